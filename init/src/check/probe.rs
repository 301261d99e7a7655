//! One connection or datagram, as a user.

use std::fmt;
use std::io::{self, ErrorKind, Read as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::thread;
use std::time::Duration;

use nix::unistd::{Gid, Uid, setfsgid, setfsuid};

use crate::plan::simulate::Owner;

/// As long as a token.
const LENGTH: usize = 32;

/// What came back.
#[derive(Debug)]
pub(super) enum Answer {
    /// So many bytes as a token has, or fewer.
    Text(String),
    /// An error.
    Failed(io::Error),
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Text(_) => f.write_str("was answered by a stranger"),
            Self::Failed(error) => match error.kind() {
                ErrorKind::ConnectionRefused => f.write_str("was refused"),
                ErrorKind::WouldBlock | ErrorKind::TimedOut => f.write_str("got no answer in time"),
                _ => write!(f, "failed: {error}"),
            },
        }
    }
}

/// Asks as a user, in the calling thread's namespace. The error is why that isn't possible.
pub(super) fn ask(to: SocketAddr, udp: bool, owner: Owner, patience: Duration) -> Result<Answer, String> {
    // A thread of its own: the user of the file system, which the kernel compares, is the thread's.
    let work = move || {
        become_user(owner)?;
        let asked = if udp { datagram(to, patience) } else { connection(to, patience) };
        Ok(asked.map_or_else(Answer::Failed, Answer::Text))
    };
    thread::spawn(work).join().unwrap_or_else(|_| Err("the attempt panicked".to_owned()))
}

fn become_user(owner: Owner) -> Result<(), String> {
    let (uid, gid) = (Uid::from_raw(owner.uid), Gid::from_raw(owner.gid));
    // Each returns what was before and never fails; the second call tells what the first one did.
    setfsgid(gid);
    let gid_now = setfsgid(gid);
    setfsuid(uid);
    let uid_now = setfsuid(uid);
    if uid_now == uid && gid_now == gid {
        Ok(())
    } else {
        Err(format!(
            "acting as uid {} gid {} needs CAP_SETUID and CAP_SETGID: run as root",
            owner.uid, owner.gid
        ))
    }
}

fn connection(to: SocketAddr, patience: Duration) -> io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&to, patience)?;
    stream.set_read_timeout(Some(patience))?;
    let mut bytes = [0; LENGTH];
    let mut filled = 0;
    while filled < LENGTH {
        match stream.read(&mut bytes[filled..])? {
            0 => break,
            n => filled += n,
        }
    }
    Ok(String::from_utf8_lossy(&bytes[..filled]).into_owned())
}

fn datagram(to: SocketAddr, patience: Duration) -> io::Result<String> {
    let any: IpAddr = match to.ip() {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind(SocketAddr::new(any, 0))?;
    socket.set_read_timeout(Some(patience))?;
    socket.connect(to)?;
    socket.send(b"ursa-init check")?;
    let mut bytes = [0; LENGTH];
    let length = socket.recv(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes[..length]).into_owned())
}
