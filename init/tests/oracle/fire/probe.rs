//! One packet, and where it landed.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, SockaddrStorage, bind, connect, getsockopt, recv, send,
    setsockopt, socket, sockopt,
};

/// Long enough for any packet that is answered, on a machine with much else to do.
const PATIENCE: Duration = Duration::from_secs(2);
/// For packets that at least one of the two rule sets swallows.
const IMPATIENCE: Duration = Duration::from_millis(150);

/// A namespace of the lab.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Place {
    /// The workload's.
    Web,
    /// The world, behind `eth0`.
    Far,
    /// Guests, behind bridges.
    Guest,
}

/// Where a packet comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Origin {
    /// A process of the workload's namespace with this user and group.
    Web { uid: u32, gid: u32 },
    /// The world.
    Far,
    /// A guest behind this interface.
    Guest(&'static str),
}

/// TCP or UDP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Layer4 {
    Tcp,
    Udp,
}

/// The first packet of a connection, or a datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Probe {
    pub(crate) origin: Origin,
    pub(crate) layer4: Layer4,
    /// Its source address, when the kernel isn't to choose one.
    pub(crate) source: Option<IpAddr>,
    pub(crate) to: SocketAddr,
    /// Whether no answer is an answer.
    pub(crate) may_be_lost: bool,
}

/// What became of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Landed {
    /// The listener on this port answered.
    At(Place, u16),
    /// A reset, or an ICMP error.
    Refused,
    /// The kernel didn't send it.
    NotSent(&'static str),
    /// Nothing came back.
    Lost,
}

/// What a listener answers.
pub(super) fn encode(place: Place, port: u16) -> [u8; 3] {
    let [high, low] = port.to_be_bytes();
    [place as u8, high, low]
}

fn decode([place, high, low]: [u8; 3]) -> Landed {
    let place = match place {
        0 => Place::Web,
        1 => Place::Far,
        _ => Place::Guest,
    };
    Landed::At(place, u16::from_be_bytes([high, low]))
}

impl Probe {
    /// Sends it from the calling thread, which is in the right namespace and has the right user already. Datagrams
    /// leave from `port`: a port that was used before would be answered by what conntrack remembers.
    ///
    /// That also loses a refusal by the port that an earlier connection was redirected to, when both happen to have
    /// the same source port. So what is lost and shouldn't be is sent again, from another port.
    pub(super) fn fire(&self, mut port: impl FnMut() -> u16) -> Landed {
        let tries = if self.may_be_lost { 2 } else { 3 };
        let mut landed = (0..tries).map(|_| self.fire_once(&mut port));
        landed.find(|landed| *landed != Landed::Lost).unwrap_or(Landed::Lost)
    }

    fn fire_once(&self, port: impl FnMut() -> u16) -> Landed {
        match self.send(port) {
            Ok(landed) => landed,
            // A local datagram that a rule rejects isn't sent at all.
            Err(Errno::ECONNREFUSED | Errno::ECONNRESET | Errno::EPERM) => Landed::Refused,
            Err(Errno::ETIMEDOUT) => Landed::Lost,
            Err(errno) => Landed::NotSent(errno.desc()),
        }
    }

    fn send(&self, mut port: impl FnMut() -> u16) -> nix::Result<Landed> {
        let (family, any) = match self.to {
            SocketAddr::V4(_) => (AddressFamily::Inet, IpAddr::V4(Ipv4Addr::UNSPECIFIED)),
            SocketAddr::V6(_) => (AddressFamily::Inet6, IpAddr::V6(Ipv6Addr::UNSPECIFIED)),
        };
        let kind = if self.layer4 == Layer4::Tcp { SockType::Stream } else { SockType::Datagram };
        let fd = socket(family, kind, SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK, None)?;
        if let Origin::Guest(interface) = self.origin {
            setsockopt(&fd, sockopt::BindToDevice, &interface.into())?;
        }
        let source = self.source.unwrap_or(any);
        if self.layer4 == Layer4::Udp {
            while bind(fd.as_raw_fd(), &storage(SocketAddr::new(source, port()))) == Err(Errno::EADDRINUSE) {}
        } else if self.source.is_some() {
            bind(fd.as_raw_fd(), &storage(SocketAddr::new(source, 0)))?;
        }
        let patience = if self.may_be_lost { IMPATIENCE } else { PATIENCE };
        match connect(fd.as_raw_fd(), &storage(self.to)) {
            Err(Errno::EINPROGRESS) => {
                wait(&fd, PollFlags::POLLOUT, patience)?;
                match getsockopt(&fd, sockopt::SocketError)? {
                    0 => {}
                    errno => return Err(Errno::from_raw(errno)),
                }
            }
            done => done?,
        }
        if self.layer4 == Layer4::Udp {
            send(fd.as_raw_fd(), b"?", MsgFlags::empty())?;
        }
        let mut answer = [0; 3];
        wait(&fd, PollFlags::POLLIN, patience)?;
        match recv(fd.as_raw_fd(), &mut answer, MsgFlags::empty())? {
            3 => Ok(decode(answer)),
            _ => Ok(Landed::NotSent("closed without an answer")),
        }
    }
}

fn storage(address: SocketAddr) -> SockaddrStorage {
    match address {
        SocketAddr::V4(v4) => SocketAddrV4::into(v4),
        SocketAddr::V6(v6) if v6.ip().is_unicast_link_local() => {
            // Only eth0 has link-local addresses in the lab.
            let scope = nix::net::if_::if_nametoindex("eth0").unwrap_or_default();
            SocketAddrV6::new(*v6.ip(), v6.port(), 0, scope).into()
        }
        SocketAddr::V6(v6) => v6.into(),
    }
}

fn wait(fd: &OwnedFd, what: PollFlags, patience: Duration) -> nix::Result<()> {
    let timeout = PollTimeout::try_from(patience).unwrap_or(PollTimeout::MAX);
    match poll(&mut [PollFd::new(fd.as_fd(), what)], timeout)? {
        0 => Err(Errno::ETIMEDOUT),
        _ => Ok(()),
    }
}

impl fmt::Display for Probe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.origin {
            Origin::Web { uid, gid } => write!(f, "uid {uid} gid {gid}")?,
            Origin::Far => f.write_str("from eth0")?,
            Origin::Guest(interface) => write!(f, "from {interface}")?,
        }
        if let Some(source) = self.source {
            write!(f, " source {source}")?;
        }
        let layer4 = if self.layer4 == Layer4::Tcp { "tcp" } else { "udp" };
        write!(f, " {layer4} to {}", self.to)
    }
}

impl fmt::Display for Landed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::At(Place::Web, port) => write!(f, "own port {port}"),
            Self::At(Place::Far, port) => write!(f, "far port {port}"),
            Self::At(Place::Guest, port) => write!(f, "guest's port {port}"),
            Self::Refused => f.write_str("refused"),
            Self::NotSent(why) => write!(f, "not sent ({why})"),
            Self::Lost => f.write_str("lost"),
        }
    }
}
