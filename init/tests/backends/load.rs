//! Rules are replaced while connections are opened: none goes past the proxy, none is refused, none breaks.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use ursa_init::backend::Backend;

use crate::lab::{APP, Namespace, PATIENCE};
use crate::support::{moved, plan};

/// How often rules are replaced; more by `URSA_REAPPLIES`.
const REAPPLIES: usize = 24;

/// A proxy that sends back whatever comes.
fn echo(ns: &Namespace, port: u16) {
    let listener = ns.run(|| TcpListener::bind((std::net::Ipv6Addr::UNSPECIFIED, port))).unwrap();
    thread::spawn(move || {
        while let Ok((mut stream, _)) = listener.accept() {
            thread::spawn(move || {
                let mut buffer = [0; 64];
                while let Ok(n @ 1..) = stream.read(&mut buffer) {
                    if stream.write_all(&buffer[..n]).is_err() {
                        break;
                    }
                }
            });
        }
    });
}

fn nothing_opens_and_nothing_breaks(ways: &[Backend]) {
    let (web, stranger) = Namespace::pair();
    let loopbacks: [IpAddr; 2] = ["127.0.0.1".parse().unwrap(), "::1".parse().unwrap()];
    web.listen(&[15001, 15006, 15101, 15106, 8080]);
    web.serve_dns(&loopbacks, 15053);
    // Whoever gets past the proxy is answered with another port.
    stranger.listen(&[80]);
    stranger.serve_dns(&["10.77.0.2".parse().unwrap(), "fd77::2".parse().unwrap()], 53);
    // The answer to a lookup that is under way finds back only while the shim's port is the same.
    let mut second = moved(100);
    second.dns.port = 15053;
    let plans = [plan(&moved(0)), plan(&second)];
    web.apply(&plans[0], ways[0]).unwrap();

    // A connection that lives through it all.
    let mut other = moved(0);
    other.outbound.port = 16001;
    web.apply(&plan(&other), ways[0]).unwrap();
    echo(&web, 16001);
    let mut old = web.run(|| {
        nix::unistd::setfsuid(APP.into());
        TcpStream::connect_timeout(&SocketAddr::from(([10, 77, 0, 2], 80)), PATIENCE)
    });
    let old = old.as_mut().unwrap();
    old.set_read_timeout(Some(PATIENCE)).unwrap();
    web.apply(&plans[0], ways[0]).unwrap();

    let over = AtomicBool::new(false);
    let opened = AtomicUsize::new(0);
    let applies = std::env::var("URSA_REAPPLIES").ok().and_then(|n| n.parse().ok()).unwrap_or(REAPPLIES);
    thread::scope(|scope| {
        let until_over =
            |from: &'static str, connect: &dyn Fn() -> Result<u16, std::io::ErrorKind>, good: [u16; 2]| {
                while !over.load(Ordering::Relaxed) {
                    let landed = connect();
                    assert!(landed.is_ok_and(|port| good.contains(&port)), "{from} by {ways:?}: {landed:?}");
                    opened.fetch_add(1, Ordering::Relaxed);
                }
            };
        let (web, stranger) = (&web, &stranger);
        let running = [
            scope.spawn(move || until_over("outbound", &|| web.tcp(APP, "10.77.0.2:80"), [15001, 15101])),
            scope
                .spawn(move || until_over("outbound IPv6", &|| web.tcp(APP, "[fd77::2]:80"), [15001, 15101])),
            scope.spawn(move || until_over("lookups", &|| web.udp(APP, 0, "10.77.0.2:53"), [15053, 15053])),
            scope.spawn(move || {
                until_over("inbound", &|| stranger.tcp(APP, "10.77.0.1:8080"), [15006, 15106]);
            }),
        ];
        for i in 1..=applies {
            web.apply(&plans[i % 2], ways[i % ways.len()]).unwrap();
            old.write_all(&[7]).unwrap();
            let mut answer = [0];
            old.read_exact(&mut answer).expect("the old connection goes on");
            if running.iter().any(thread::ScopedJoinHandle::is_finished) {
                break;
            }
        }
        over.store(true, Ordering::Relaxed);
    });
    let opened = opened.into_inner();
    assert!(opened > applies, "{opened} connections");
    println!("{ways:?}: {opened} connections while the rules were replaced {applies} times");
}

#[test]
fn nftables_is_replaced_under_load() {
    nothing_opens_and_nothing_breaks(&[Backend::Nftables]);
}

#[test]
fn iptables_on_nf_tables_is_replaced_under_load() {
    nothing_opens_and_nothing_breaks(&[Backend::IptablesNft]);
}

#[test]
fn old_iptables_is_replaced_under_load() {
    nothing_opens_and_nothing_breaks(&[Backend::IptablesLegacy]);
}

#[test]
fn backends_are_exchanged_under_load() {
    nothing_opens_and_nothing_breaks(&[Backend::Nftables, Backend::IptablesNft, Backend::IptablesLegacy]);
}
