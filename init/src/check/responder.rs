//! Listeners in the proxy's place, each with a token that nobody else knows.

use std::fmt;
use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::thread;

use crate::plan::Family;
use crate::random;

/// What a port of the proxy's is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Outbound,
    Inbound,
    Dns,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Outbound => "outbound",
            Self::Inbound => "inbound",
            Self::Dns => "DNS",
        })
    }
}

/// The listeners; they end with the process, which is about to.
pub(super) struct Responders {
    tokens: Vec<(String, Kind, u16)>,
    /// Ports that somebody else holds, and whether for datagrams.
    taken: Vec<(Kind, bool)>,
}

const fn loopback(family: Family) -> IpAddr {
    match family {
        Family::V4 => IpAddr::V4(Ipv4Addr::LOCALHOST),
        Family::V6 => IpAddr::V6(Ipv6Addr::LOCALHOST),
    }
}

/// Whether the namespace speaks the family at all.
pub(super) fn has_loopback(family: Family) -> bool {
    UdpSocket::bind(SocketAddr::new(loopback(family), 0)).is_ok()
}

impl Responders {
    /// Holds the ports on loopback, where redirected connections of local processes end.
    pub(super) fn open(ports: &[(Kind, u16)], family: Family) -> Self {
        let mut this = Self { tokens: Vec::new(), taken: Vec::new() };
        for (kind, port) in ports {
            let at = SocketAddr::new(loopback(family), *port);
            // Without a token nothing could be told from a stranger's answer.
            let Ok(token) = random::token() else { continue };
            match TcpListener::bind(at) {
                Ok(listener) => answer_connections(listener, token.clone()),
                Err(_) => this.taken.push((*kind, false)),
            }
            if *kind == Kind::Dns {
                match UdpSocket::bind(at) {
                    Ok(socket) => answer_datagrams(socket, token.clone()),
                    Err(_) => this.taken.push((*kind, true)),
                }
            }
            this.tokens.push((token, *kind, *port));
        }
        this
    }

    /// Whether somebody else holds the port, most likely the proxy.
    pub(super) fn is_taken(&self, kind: Kind, udp: bool) -> bool {
        self.taken.contains(&(kind, udp))
    }

    /// Which listener said this.
    pub(super) fn whose(&self, text: &str) -> Option<(Kind, u16)> {
        self.tokens.iter().find(|(token, ..)| token == text).map(|(_, kind, port)| (*kind, *port))
    }
}

fn answer_connections(listener: TcpListener, token: String) {
    thread::spawn(move || {
        while let Ok((mut stream, _)) = listener.accept() {
            // Who hangs up early doesn't want to know.
            let _ = stream.write_all(token.as_bytes());
        }
    });
}

fn answer_datagrams(socket: UdpSocket, token: String) {
    thread::spawn(move || {
        let mut buffer = [0; 512];
        while let Ok((_, from)) = socket.recv_from(&mut buffer) {
            let _ = socket.send_to(token.as_bytes(), from);
        }
    });
}
