//! Real packets, and what the kernel's connection tracking says became of each.
//!
//! Nobody listens. Connection tracking announces every connection that has passed all rules, with the addresses
//! before and after translation; what it doesn't announce was discarded or refused, and the sender's socket tells
//! which. Everything runs on one processor, where packets don't overtake each other: once a last packet that
//! certainly passes is announced, all before it have been decided.

use std::collections::HashMap;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use netlink_sys::{Socket as Netlink, SocketAddr as NetlinkAddr, protocols::NETLINK_NETFILTER};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::{Pid, setfsgid, setfsuid};
use socket2::{Domain, Socket, Type};
use ursa_init::plan::Protocol;

use crate::lab::{Namespace, PATIENCE};

/// A packet to send.
#[derive(Debug, Clone)]
pub(super) struct Shot {
    pub(super) protocol: Protocol,
    pub(super) source: Option<IpAddr>,
    pub(super) to: SocketAddr,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) mark: u32,
}

/// What became of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    /// It went where it was sent.
    Passed,
    /// It went to this port.
    Landed(u16),
    Refused,
    Dropped,
}

/// A packet that was sent: where from, what became of it, in which zone.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sent {
    pub(super) source: SocketAddr,
    pub(super) fate: Fate,
    pub(super) zone: u16,
}

/// Keeps the calling thread, and those that it starts, on one processor.
pub(super) fn one_processor() {
    let mut cpus = CpuSet::new();
    cpus.set(0).unwrap();
    sched_setaffinity(Pid::from_raw(0), &cpus).unwrap();
}

/// Listens to the connection tracking of a namespace.
pub(super) struct Tracking(Netlink);

/// Where a connection's answers come from, and its zone.
type Tracked = HashMap<u16, (SocketAddr, SocketAddr, u16)>;

impl Tracking {
    pub(super) fn of(ns: &Namespace) -> Self {
        const NEW: u32 = 1;
        let socket = ns.run(|| {
            let mut socket = Netlink::new(NETLINK_NETFILTER)?;
            socket.bind(&NetlinkAddr::new(0, NEW))?;
            socket.set_rx_buf_sz(4 << 20)?;
            socket.set_non_blocking(true)?;
            Ok::<_, io::Error>(socket)
        });
        Self(socket.unwrap())
    }

    /// Everything announced until the connection from `last` is.
    fn until(&self, last: u16) -> Tracked {
        let mut all = Tracked::new();
        let start = std::time::Instant::now();
        let mut buffer = vec![0; 1 << 16];
        while !all.contains_key(&last) {
            match self.0.recv(&mut &mut buffer[..], 0) {
                Ok(len) => all.extend(tracked(&buffer[..len])),
                Err(e) if e.kind() == ErrorKind::WouldBlock => {
                    assert!(start.elapsed() < PATIENCE, "the last packet never passed");
                    // The socket is the library's, which has no wait with a deadline.
                    std::thread::sleep(Duration::from_micros(50));
                }
                Err(e) => panic!("connection tracking: {e}"),
            }
        }
        all
    }
}

/// Sends the packets from `from`, each from a port of its own, and asks the tracking of another namespace what became
/// of them. `last` goes to a port that nothing concerns.
pub(super) fn fire(
    from: &Namespace,
    tracking: &Tracking,
    ports: &mut std::ops::Range<u16>,
    shots: &[Shot],
    last: SocketAddr,
) -> Vec<Option<Sent>> {
    let sockets: Vec<_> = from.run(|| {
        let mut send = |shot: &Shot| {
            let port = ports.next().expect("enough ports for one lab");
            (port, shoot(shot, port).ok())
        };
        let end = Shot { protocol: Protocol::Udp, source: None, to: last, uid: 0, gid: 0, mark: 0 };
        shots.iter().chain([&end]).map(&mut send).collect()
    });
    let last = sockets.last().map(|(port, _)| *port).unwrap();
    let tracked = tracking.until(last);
    let outcome = |((port, socket), shot): (&(u16, Option<Socket>), &Shot)| {
        let socket = socket.as_ref()?;
        let source = socket.local_addr().ok()?.as_socket()?;
        let (fate, zone) = match tracked.get(port) {
            Some((_, answers, zone)) if *answers == shot.to => (Fate::Passed, *zone),
            Some((to, answers, zone)) => {
                assert_eq!(*to, shot.to);
                (Fate::Landed(answers.port()), *zone)
            }
            None if refused(socket, shots.len() == 1) => (Fate::Refused, 0),
            None => (Fate::Dropped, 0),
        };
        Some(Sent { source, fate, zone })
    };
    sockets.iter().zip(shots).map(outcome).collect()
}

/// Whether the sender was told that it is refused. Asked once more, it is given time to hear.
fn refused(socket: &Socket, patient: bool) -> bool {
    let start = std::time::Instant::now();
    loop {
        match socket.take_error() {
            Ok(Some(e)) => return e.kind() == ErrorKind::ConnectionRefused,
            Ok(None) if patient && start.elapsed() < Duration::from_millis(300) => std::thread::yield_now(),
            _ => return false,
        }
    }
}

/// An error means that there is no way to the destination.
fn shoot(shot: &Shot, port: u16) -> io::Result<Socket> {
    setfsgid(shot.gid.into());
    setfsuid(shot.uid.into());
    let kind = if shot.protocol == Protocol::Tcp { Type::STREAM } else { Type::DGRAM };
    let socket = Socket::new(Domain::for_address(shot.to), kind, None);
    setfsuid(0.into());
    setfsgid(0.into());
    let socket = socket?;
    socket.set_nonblocking(true)?;
    if shot.mark != 0 {
        socket.set_mark(shot.mark)?;
    }
    let any = if shot.to.is_ipv4() { "0.0.0.0" } else { "::" };
    let source = shot.source.unwrap_or_else(|| any.parse().unwrap());
    socket.bind(&SocketAddr::new(source, port).into())?;
    match socket.connect(&shot.to.into()) {
        Err(e) if e.raw_os_error() == Some(nix::libc::EINPROGRESS) => {}
        done => done?,
    }
    if shot.protocol == Protocol::Udp {
        socket.send(b"?")?;
    }
    Ok(socket)
}

/// The connections of one datagram of events: by port of origin, the destination, where answers come from, the zone.
fn tracked(mut rest: &[u8]) -> Vec<(u16, (SocketAddr, SocketAddr, u16))> {
    let mut all = Vec::new();
    while rest.len() >= 20 {
        let len = u32::from_ne_bytes(rest[..4].try_into().unwrap()) as usize;
        let attributes: HashMap<_, _> = attributes(&rest[20..len]).collect();
        let zone = attributes.get(&18).map_or(0, |z| u16::from_be_bytes((*z).try_into().unwrap()));
        if let (Some((from, to)), Some((answers, _))) =
            (attributes.get(&1).and_then(|t| tuple(t)), attributes.get(&2).and_then(|t| tuple(t)))
        {
            all.push((from.port(), (to, answers, zone)));
        }
        rest = rest.get((len + 3) & !3..).unwrap_or_default();
    }
    all
}

fn tuple(bytes: &[u8]) -> Option<(SocketAddr, SocketAddr)> {
    let parts: HashMap<_, _> = attributes(bytes).collect();
    let ip: HashMap<_, _> = attributes(parts.get(&1)?).collect();
    let proto: HashMap<_, _> = attributes(parts.get(&2)?).collect();
    let address = |v4: u16, v6: u16| -> Option<IpAddr> {
        match ip.get(&v4) {
            Some(bytes) => Some(<[u8; 4]>::try_from(*bytes).ok()?.into()),
            None => Some(<[u8; 16]>::try_from(*ip.get(&v6)?).ok()?.into()),
        }
    };
    let port = |kind: u16| Some(u16::from_be_bytes((*proto.get(&kind)?).try_into().ok()?));
    Some((SocketAddr::new(address(1, 3)?, port(2)?), SocketAddr::new(address(2, 4)?, port(3)?)))
}

fn attributes(bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        let len = usize::from(u16::from_ne_bytes(rest.get(..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(rest.get(2..4)?.try_into().ok()?) & 0x3fff;
        let value = rest.get(4..len)?;
        rest = rest.get((len + 3) & !3..).unwrap_or_default();
        Some((kind, value))
    })
}
