//! Transparent proxying: the application sees the client's address, and its answers come back to the proxy.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use socket2::{Domain, Socket, Type};
use ursa_init::intent::{Inbound, InboundMode, RedirectIntent};
use ursa_init::{Backend, Plan};

use crate::lab::{APP, Namespace, PATIENCE, PROXY};
use crate::reused::{call_from_port, lose_the_ends, nft, same_port};

const MARK: u32 = 1337;

fn intent() -> RedirectIntent {
    RedirectIntent {
        proxy_uids: vec![PROXY],
        inbound: Inbound {
            mode: InboundMode::Tproxy,
            exclude_ports: vec!["22".parse().unwrap()],
            exclude_cidrs: vec!["10.77.0.3/32".parse().unwrap()],
            ..Inbound::default()
        },
        ..RedirectIntent::default()
    }
}

fn transparent(family: &IpAddr) -> Socket {
    let domain = if family.is_ipv4() { Domain::IPV4 } else { Domain::IPV6 };
    let socket = Socket::new(domain, Type::STREAM, None).unwrap();
    // Works on sockets of both families.
    socket.set_ip_transparent_v4(true).unwrap();
    socket
}

/// A transparent proxy on 15006: connects to the address that the client meant, as the client, and passes bytes on.
/// Tells where each connection came from and went to.
fn proxy(web: &Namespace) -> mpsc::Receiver<(SocketAddr, SocketAddr)> {
    let (tell, told) = mpsc::channel();
    for any in [IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::V6(Ipv6Addr::UNSPECIFIED)] {
        let listener: TcpListener = web.run(|| {
            let socket = transparent(&any);
            if any.is_ipv6() {
                socket.set_only_v6(true).unwrap();
            }
            socket.bind(&SocketAddr::new(any, 15006).into()).unwrap();
            socket.listen(16).unwrap();
            socket.into()
        });
        let tell = tell.clone();
        let path = web.path().to_owned();
        thread::spawn(move || {
            while let Ok((mut client, from)) = listener.accept() {
                let to = client.local_addr().unwrap();
                tell.send((from, to)).ok();
                let app = ursa_init::in_netns(&path, || {
                    nix::unistd::setfsuid(PROXY.into());
                    let socket = transparent(&from.ip());
                    socket.set_mark(MARK).unwrap();
                    socket.bind(&SocketAddr::new(from.ip(), 0).into()).unwrap();
                    socket.connect_timeout(&to.into(), PATIENCE).map(|()| TcpStream::from(socket))
                });
                let Ok(Ok(mut app)) = app else { continue };
                let mut seen = Vec::new();
                app.set_read_timeout(Some(PATIENCE)).unwrap();
                if app.read_to_end(&mut seen).is_ok() {
                    let _ = client.write_all(&seen);
                }
            }
        });
    }
    told
}

/// Answers with the address that it sees.
fn application(web: &Namespace, port: u16) {
    let listener = web.run(|| TcpListener::bind((Ipv6Addr::UNSPECIFIED, port))).unwrap();
    thread::spawn(move || {
        while let Ok((mut stream, from)) = listener.accept() {
            let _ = write!(stream, "{}", from.ip().to_canonical());
        }
    });
}

fn seen(from: &Namespace, source: Option<&str>, to: &str) -> Result<String, std::io::ErrorKind> {
    let to: SocketAddr = to.parse().unwrap();
    from.run(|| {
        nix::unistd::setfsuid(APP.into());
        let ask = || {
            let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
            if let Some(source) = source {
                socket.bind(&SocketAddr::new(source.parse().unwrap(), 0).into())?;
            }
            socket.connect_timeout(&to.into(), PATIENCE)?;
            socket.set_read_timeout(Some(PATIENCE))?;
            let mut text = String::new();
            TcpStream::from(socket).read_to_string(&mut text)?;
            Ok(text)
        };
        ask().map_err(|e: std::io::Error| e.kind())
    })
}

#[test]
fn the_application_sees_the_client() {
    the_application_sees_the_client_by(Backend::Auto);
}

#[test]
fn the_application_sees_the_client_with_iptables() {
    the_application_sees_the_client_by(Backend::IptablesNft);
}

#[test]
fn the_application_sees_the_client_with_old_iptables() {
    the_application_sees_the_client_by(Backend::IptablesLegacy);
}

/// What is on `lo` and in tables of routes of our own; the link's own state moves while it comes up.
fn ours(web: &Namespace) -> String {
    web.network().lines().filter(|line| !line.contains("eth0")).collect::<Vec<_>>().join("\n")
}

fn the_application_sees_the_client_by(backend: Backend) {
    let (web, stranger) = Namespace::pair();
    stranger.ip("addr add 10.77.0.3/24 dev eth0");
    application(&web, 8080);
    application(&web, 22);
    let told = proxy(&web);
    let before = ours(&web);
    let plan = Plan::compile(&intent()).unwrap();
    assert!(web.run(|| ursa_init::apply_with(&plan, backend)).unwrap().changed());

    for (to, client) in [("10.77.0.1:8080", "10.77.0.2"), ("[fd77::1]:8080", "fd77::2")] {
        assert_eq!(seen(&stranger, None, to), Ok(client.to_owned()), "{to}");
        let (from, meant) = told.recv_timeout(PATIENCE).unwrap();
        assert_eq!((from.ip().to_string().as_str(), meant.to_string().as_str()), (client, to));
    }
    // Excluded: straight to the application.
    assert_eq!(seen(&stranger, None, "10.77.0.1:22"), Ok("10.77.0.2".to_owned()));
    assert_eq!(seen(&stranger, Some("10.77.0.3"), "10.77.0.1:8080"), Ok("10.77.0.3".to_owned()));
    assert!(told.try_recv().is_err(), "excluded connections never reach the proxy");
    // The proxy's own port is closed to the outside, and what isn't there is refused by nobody else.
    assert!(seen(&stranger, None, "10.77.0.1:15006").is_err());

    // Applied again it is in place already; removed it leaves nothing.
    assert!(!web.run(|| ursa_init::apply_with(&plan, backend)).unwrap().changed());
    assert_eq!(web.run(|| ursa_init::diff_with(&plan, backend)).unwrap(), Vec::<String>::new());
    assert!(web.ip("rule show").contains("fwmark 0x539 lookup 133"));
    assert!(web.run(ursa_init::remove).unwrap());
    assert_eq!(ours(&web), before);
    assert!(!web.ip("rule show").contains("0x539") && !web.ip("-6 rule show").contains("0x539"));
    assert_eq!(seen(&stranger, None, "10.77.0.1:8080"), Ok("10.77.0.2".to_owned()), "direct");
}

#[test]
fn without_a_proxy_nothing_reaches_the_application() {
    let (web, stranger) = Namespace::pair();
    application(&web, 8080);
    web.run(|| ursa_init::apply(&Plan::compile(&intent()).unwrap())).unwrap();
    for to in ["10.77.0.1:8080", "[fd77::1]:8080"] {
        assert!(seen(&stranger, None, to).is_err(), "{to}");
    }
}

#[test]
fn a_lost_rule_is_seen_and_repaired() {
    let (web, stranger) = Namespace::pair();
    application(&web, 8080);
    let _told = proxy(&web);
    let plan = Plan::compile(&intent()).unwrap();
    web.run(|| ursa_init::apply(&plan)).unwrap();
    for lose in ["rule del fwmark 0x539 lookup 133", "route flush table 133"] {
        web.ip(lose);
        let lines = web.run(|| ursa_init::diff(&plan)).unwrap();
        assert_eq!(lines.len(), 1, "{lose}: {lines:?}");
        assert!(web.run(|| ursa_init::apply(&plan)).unwrap().changed());
        assert_eq!(seen(&stranger, None, "10.77.0.1:8080"), Ok("10.77.0.2".to_owned()), "{lose}");
    }
}

fn a_port_used_again_is_refused_by(backend: Backend) {
    const PORT: u16 = 40000;
    let (web, stranger) = Namespace::pair();
    // iptables finds a socket that listens on the very address, and nftables one that listens on all.
    for address in ["10.77.0.1", "fd77::1"] {
        let to = SocketAddr::new(address.parse().unwrap(), 8080);
        let listener = web.run(|| TcpListener::bind(to)).unwrap();
        thread::spawn(move || listener.incoming().flatten().for_each(|mut s| drop(s.write_all(b"open"))));
    }
    web.run(|| ursa_init::apply_with(&Plan::compile(&intent()).unwrap(), backend)).unwrap();
    for to in ["10.77.0.1:8080", "[fd77::1]:8080"] {
        let to_ip: SocketAddr = to.parse().unwrap();
        // A transparent proxy takes the connection, and both ends go without a word that arrives.
        let client = {
            let listener: TcpListener = web.run(|| {
                let socket = transparent(&to_ip.ip());
                let any: IpAddr =
                    if to_ip.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
                socket.bind(&SocketAddr::new(any, 15006).into()).unwrap();
                socket.listen(16).unwrap();
                socket.into()
            });
            let client = stranger.run(|| {
                let socket = same_port(to_ip, PORT);
                socket.connect_timeout(&to_ip.into(), PATIENCE).unwrap();
                socket
            });
            let taken = Socket::from(listener.accept().unwrap().0);
            for (ns, socket) in [(&web, &taken), (&stranger, &client)] {
                lose_the_ends(ns);
                socket.set_linger(Some(Duration::ZERO)).unwrap();
            }
            client
        };
        drop(client);
        for ns in [&web, &stranger] {
            nft(ns, "delete table inet loss");
        }
        // For connection tracking this is the old connection.
        assert!(call_from_port(&stranger, PORT, to).is_err(), "{backend}: {to} reached the application");
    }
}

#[test]
fn a_port_used_again_is_refused() {
    a_port_used_again_is_refused_by(Backend::Nftables);
}

#[test]
fn a_port_used_again_is_refused_with_iptables() {
    a_port_used_again_is_refused_by(Backend::IptablesNft);
}

#[test]
fn a_port_used_again_is_refused_with_old_iptables() {
    a_port_used_again_is_refused_by(Backend::IptablesLegacy);
}

fn an_older_connection_stays_by(backend: Backend) {
    let (web, stranger) = Namespace::pair();
    for address in ["10.77.0.1", "fd77::1"] {
        let at = SocketAddr::new(address.parse().unwrap(), 8080);
        let listener = web.run(|| TcpListener::bind(at)).unwrap();
        let mut client = stranger.run(|| TcpStream::connect_timeout(&at, PATIENCE)).unwrap();
        let mut server = listener.accept().unwrap().0;
        assert!(
            web.run(|| ursa_init::apply_with(&Plan::compile(&intent()).unwrap(), backend)).unwrap().changed()
        );
        client.write_all(b"still there?").unwrap();
        server.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut heard = [0; 12];
        server.read_exact(&mut heard).unwrap_or_else(|e| panic!("{backend}: {at}: {e}"));
        assert!(web.run(ursa_init::remove).unwrap());
    }
}

#[test]
fn an_older_connection_stays() {
    // Nothing has tracked connections here before.
    for backend in [Backend::Nftables, Backend::IptablesNft, Backend::IptablesLegacy] {
        an_older_connection_stays_by(backend);
    }
}
