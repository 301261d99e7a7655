//! Clients that call again from the port of a connection that connection tracking still knows from before the rules.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use socket2::{Domain, Socket, Type};
use ursa_init::intent::{Bridge, Inbound, Interfaces, RedirectIntent, Workload};
use ursa_init::{Backend, Plan};

use crate::lab::{Namespace, PATIENCE, PROXY};

const BACKENDS: [Backend; 3] = [Backend::Nftables, Backend::IptablesNft, Backend::IptablesLegacy];
/// Where the clients' ports begin.
const PORT: u16 = 40000;

/// A call without a further word: the address that the application saw, or why there was none. Its port is the
/// client's own choice.
pub(crate) fn call_from_port(from: &Namespace, port: u16, to: &str) -> Result<String, std::io::ErrorKind> {
    let to: SocketAddr = to.parse().unwrap();
    from.run(|| {
        let socket = same_port(to, port);
        // iptables discards, and then this is how long it takes.
        socket.connect_timeout(&to.into(), Duration::from_secs(1)).map_err(|e| e.kind())?;
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut text = String::new();
        TcpStream::from(socket).read_to_string(&mut text).map_err(|e| e.kind())?;
        Ok(text)
    })
}

/// A socket on a port that an earlier one has left. A program that another test of this process starts holds a copy
/// of the earlier one between its fork and its exec, and with it the port.
pub(crate) fn same_port(to: SocketAddr, port: u16) -> Socket {
    let any: IpAddr = if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let at = SocketAddr::new(any, port).into();
    let deadline = Instant::now() + PATIENCE;
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, None).unwrap();
    while let Err(e) = socket.bind(&at) {
        assert!(e.kind() == ErrorKind::AddrInUse && Instant::now() < deadline, "port {port}: {e}");
        thread::yield_now();
    }
    socket
}

pub(crate) fn nft(of: &Namespace, command: &str) {
    assert!(of.run(|| Command::new("nft").arg(command).status()).unwrap().success(), "{command}");
}

/// The ends of connections get lost on the way: as when a machine loses its power, or a client means harm.
pub(crate) fn lose_the_ends(of: &Namespace) {
    let chain = "type filter hook output priority -400; tcp flags & (fin|rst) != 0 drop;";
    nft(of, &format!("table inet loss {{ chain out {{ {chain} }}; }}"));
}

/// A workload whose connections are tracked, and a stranger.
fn tracked() -> (Namespace, Namespace) {
    let (web, stranger) = Namespace::pair();
    track(&web);
    (web, stranger)
}

fn track(ns: &Namespace) {
    nft(ns, "table inet lab { chain in { type filter hook input priority 300; ct state new counter; }; }");
}

/// Says `what` to everybody; each connection ends when the client says so.
fn serve(web: &Namespace, port: u16, what: &'static [u8]) {
    // A neighbouring test that forks right now holds a closed socket of ours until it executes its program.
    let deadline = Instant::now() + PATIENCE;
    let listener = web.run(|| {
        loop {
            match TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)) {
                Err(e) if e.kind() == ErrorKind::AddrInUse && Instant::now() < deadline => {
                    thread::yield_now();
                }
                bound => return bound.unwrap(),
            }
        }
    });
    thread::spawn(move || listener.incoming().flatten().for_each(|mut s| drop(s.write_all(what))));
}

/// A connection that was opened before the rules and of which both ends are gone, without a word that arrives.
fn forgotten(web: &Namespace, stranger: &Namespace, port: u16, to: &str) {
    let to: SocketAddr = to.parse().unwrap();
    let listener = web.run(|| {
        let socket = Socket::new(Domain::for_address(to), Type::STREAM, None).unwrap();
        socket.set_reuse_address(true).unwrap();
        socket.bind(&to.into()).unwrap();
        socket.listen(16).unwrap();
        TcpListener::from(socket)
    });
    let client = stranger.run(|| {
        let socket = same_port(to, port);
        socket.connect_timeout(&to.into(), PATIENCE).unwrap();
        socket
    });
    let server = Socket::from(listener.accept().unwrap().0);
    abandon([(web, server), (stranger, client)]);
}

/// Both ends go without a word that arrives.
fn abandon(ends: [(&Namespace, Socket); 2]) {
    for (ns, socket) in ends {
        lose_the_ends(ns);
        socket.set_linger(Some(Duration::ZERO)).unwrap();
        drop(socket);
        nft(ns, "delete table inet loss");
    }
}

fn apply(web: &Namespace, intent: &RedirectIntent, backend: Backend) {
    assert!(web.run(|| ursa_init::apply_with(&Plan::compile(intent).unwrap(), backend)).unwrap().changed());
}

fn proxied() -> RedirectIntent {
    RedirectIntent { proxy_uids: vec![PROXY], ..RedirectIntent::default() }
}

fn refused(called: &Result<String, ErrorKind>, backend: Backend) -> bool {
    // iptables can't refuse before the table `filter`.
    let silent = backend != Backend::Nftables && matches!(called, Err(ErrorKind::TimedOut));
    silent || matches!(called, Err(ErrorKind::ConnectionRefused))
}

fn a_port_used_again_never_reaches_the_application_by(backend: Backend) {
    for to in ["10.77.0.1:8080", "[fd77::1]:8080"] {
        let (web, stranger) = tracked();
        forgotten(&web, &stranger, PORT, to);
        serve(&web, 8080, b"open");
        serve(&web, 15006, b"proxy");
        apply(&web, &proxied(), backend);
        let again = call_from_port(&stranger, PORT, to);
        assert!(refused(&again, backend), "{backend}: {to}: {again:?}");
        assert_eq!(call_from_port(&stranger, PORT + 1, to), Ok("proxy".to_owned()), "{backend}: {to}");
    }
}

#[test]
fn a_port_used_again_never_reaches_the_application() {
    a_port_used_again_never_reaches_the_application_by(Backend::Nftables);
}

#[test]
fn a_port_used_again_never_reaches_the_application_with_iptables() {
    a_port_used_again_never_reaches_the_application_by(Backend::IptablesNft);
}

#[test]
fn a_port_used_again_never_reaches_the_application_with_old_iptables() {
    a_port_used_again_never_reaches_the_application_by(Backend::IptablesLegacy);
}

/// Tracking that begins with what the server says takes the server for who called, and the client's next call is
/// no packet of any connection.
#[test]
fn a_port_used_again_the_other_way_round_never_reaches_the_application() {
    const TO: &str = "10.77.0.1:8080";
    for backend in BACKENDS {
        let (web, stranger) = Namespace::pair();
        let to: SocketAddr = TO.parse().unwrap();
        let listener = web.run(|| TcpListener::bind(to)).unwrap();
        let client = stranger.run(|| {
            let socket = same_port(to, PORT);
            socket.connect_timeout(&to.into(), PATIENCE).unwrap();
            socket
        });
        let mut server = listener.accept().unwrap().0;
        drop(listener);
        nft(
            &web,
            "table inet lab { chain out { type filter hook output priority 300; ct state new counter; }; }",
        );
        server.write_all(b"hello").unwrap();
        let mut heard = [0; 5];
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        (&client).read_exact(&mut heard).unwrap();
        abandon([(&web, server.into()), (&stranger, client)]);
        serve(&web, 8080, b"open");
        serve(&web, 15006, b"proxy");
        apply(&web, &proxied(), backend);
        let again = call_from_port(&stranger, PORT, TO);
        assert!(refused(&again, backend), "{backend}: {again:?}");
    }
}

/// What isn't redirected may use a port again.
#[test]
fn exempt_calls_may_use_a_port_again() {
    const TO: &str = "10.77.0.1:8080";
    let port = |port: u16| vec![port.to_string().parse().unwrap()];
    let source = || vec!["10.77.0.2/32".parse().unwrap()];
    let inbound = |inbound: Inbound| RedirectIntent { inbound, ..proxied() };
    let bridge = |local| Bridge { interface: "eth0".parse().unwrap(), local_cidrs: local };
    let workload = Workload {
        name: "db".to_owned(),
        uids: vec!["1500".parse().unwrap()],
        inbound: Inbound { include_ports: port(5432), ..Inbound::default() },
        ..Workload::default()
    };
    let own = Workload {
        inbound: Inbound { include_ports: port(8080), ..workload.inbound.clone() },
        ..workload.clone()
    };
    let interfaces = |include: &[&str], exclude: &[&str]| {
        let parse = |names: &[&str]| names.iter().map(|name| name.parse().unwrap()).collect();
        RedirectIntent {
            interfaces: Interfaces { include: parse(include), exclude: parse(exclude) },
            ..proxied()
        }
    };
    let probes = |ports: Vec<_>| {
        let mut intent = proxied();
        intent.inbound.probes.sources = vec!["10.77.0.2".parse().unwrap()];
        intent.inbound.probes.ports = ports;
        intent
    };
    let cases: Vec<(&str, bool, RedirectIntent)> = vec![
        ("excluded port", true, inbound(Inbound { exclude_ports: port(8080), ..Inbound::default() })),
        (
            "another excluded port",
            false,
            inbound(Inbound { exclude_ports: port(8081), ..Inbound::default() }),
        ),
        ("included port", false, inbound(Inbound { include_ports: port(8080), ..Inbound::default() })),
        ("another included port", true, inbound(Inbound { include_ports: port(8081), ..Inbound::default() })),
        ("excluded source", true, inbound(Inbound { exclude_cidrs: source(), ..Inbound::default() })),
        ("included source", false, inbound(Inbound { include_cidrs: source(), ..Inbound::default() })),
        ("probes", true, probes(port(8080))),
        ("probes of another port", false, probes(port(8081))),
        ("excluded interface", true, interfaces(&[], &["eth0"])),
        ("included interface", false, interfaces(&["eth0"], &[])),
        ("another included interface", true, interfaces(&["eth7"], &[])),
        ("family switched off", true, RedirectIntent { ipv4: false, ..proxied() }),
        ("no inbound", true, inbound(Inbound { enabled: false, ..Inbound::default() })),
        ("another workload's port", true, RedirectIntent { workloads: vec![workload], ..proxied() }),
        ("the workload's port", false, RedirectIntent { workloads: vec![own], ..proxied() }),
        ("a guest's connection", false, RedirectIntent { bridges: vec![bridge(vec![])], ..proxied() }),
        ("between guests", false, RedirectIntent { bridges: vec![bridge(source())], ..proxied() }),
    ];
    for (case, passes, intent) in cases {
        for backend in [Backend::Nftables, Backend::IptablesNft] {
            let (web, stranger) = tracked();
            forgotten(&web, &stranger, PORT, TO);
            serve(&web, 8080, b"open");
            apply(&web, &intent, backend);
            let again = call_from_port(&stranger, PORT, TO);
            if passes {
                assert_eq!(again, Ok("open".to_owned()), "{backend}: {case}");
            } else {
                assert!(refused(&again, backend), "{backend}: {case}: {again:?}");
            }
        }
    }
}

/// What is open when the rules come goes on, both ways.
#[test]
fn an_older_connection_goes_on() {
    for backend in BACKENDS {
        for to in ["10.77.0.1:8080", "[fd77::1]:8080"] {
            let (web, stranger) = tracked();
            let to: SocketAddr = to.parse().unwrap();
            let listener = web.run(|| TcpListener::bind(to)).unwrap();
            let client = stranger.run(|| TcpStream::connect_timeout(&to, PATIENCE)).unwrap();
            let server = listener.accept().unwrap().0;
            apply(&web, &proxied(), backend);
            let turns = [(&client, &server), (&server, &client), (&client, &server), (&server, &client)];
            for (mut says, mut hears) in turns {
                says.write_all(b"still there?").unwrap();
                hears.set_read_timeout(Some(PATIENCE)).unwrap();
                let mut heard = [0; 12];
                hears.read_exact(&mut heard).unwrap_or_else(|e| panic!("{backend}: {to}: {e}"));
            }
        }
    }
}

/// Where nobody tracked connections before, the next packet of an older one counts as its first. The client is told.
#[test]
fn an_older_connection_that_nobody_tracked_ends() {
    for backend in BACKENDS {
        for to in ["10.77.0.1:8080", "[fd77::1]:8080"] {
            let (web, stranger) = Namespace::pair();
            let to: SocketAddr = to.parse().unwrap();
            let listener = web.run(|| TcpListener::bind(to)).unwrap();
            let mut client = stranger.run(|| TcpStream::connect_timeout(&to, PATIENCE)).unwrap();
            let _server = listener.accept().unwrap().0;
            apply(&web, &proxied(), backend);
            client.write_all(b"still there?").unwrap();
            client.set_read_timeout(Some(PATIENCE)).unwrap();
            let end = client.read(&mut [0]).map_err(|e| e.kind());
            assert_eq!(end, Err(ErrorKind::ConnectionReset), "{backend}: {to}");
        }
    }
}

/// Calls that are sent twice, since the answer gets lost, are the redirected connection's own.
#[test]
fn a_call_that_is_repeated_is_redirected() {
    for backend in BACKENDS {
        let (web, stranger) = tracked();
        serve(&web, 8080, b"open");
        serve(&web, 15006, b"proxy");
        apply(&web, &proxied(), backend);
        // The first two answers; the caller asks again meanwhile.
        let lost = "tcp flags & (syn|ack) == (syn|ack) limit rate 1/hour burst 2 packets drop;";
        let chain = format!("type filter hook input priority -400; {lost}");
        nft(&stranger, &format!("table inet loss {{ chain in {{ {chain} }}; }}"));
        assert_eq!(
            stranger.run(|| {
                let to: SocketAddr = "10.77.0.1:8080".parse().unwrap();
                let mut text = String::new();
                let mut stream = TcpStream::connect_timeout(&to, PATIENCE).map_err(|e| e.kind())?;
                stream.set_read_timeout(Some(PATIENCE)).unwrap();
                stream.read_to_string(&mut text).map_err(|e| e.kind())?;
                Ok::<_, ErrorKind>(text)
            }),
            Ok("proxy".to_owned()),
            "{backend}"
        );
    }
}
