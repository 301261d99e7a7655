//! Who is at the other end of a Unix socket.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use nix::errno::Errno;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{getsockopt, sockopt};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use tokio::net::UnixStream;

use super::process;

/// Connects to a socket in a directory that somebody else may write to: to what is there, never to what a symbolic
/// link there points to, or the owner would choose whom root talks to.
pub(crate) async fn connect(path: &Path) -> io::Result<UnixStream> {
    let found = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH | libc::O_NOFOLLOW | libc::O_CLOEXEC)
        .open(path)?;
    if !found.metadata()?.file_type().is_socket() {
        return Err(io::Error::other("it is no socket: somebody put something else in its place"));
    }
    UnixStream::connect(format!("/proc/self/fd/{}", found.as_raw_fd())).await
}

/// The process at the other end of a socket. While this is held, nothing that is read about its pid is about another
/// process without [`has_ended`](PeerProcess::has_ended) saying so.
#[derive(Debug)]
pub struct PeerProcess {
    pid: i32,
    uid: u32,
    pidfd: OwnedFd,
}

impl PeerProcess {
    /// Who connected. Its user is the one it had then and still has: a process that connected as root and then dropped
    /// its rights must not keep root's word.
    pub fn of(stream: &UnixStream) -> io::Result<Self> {
        match getsockopt(stream, sockopt::PeerPidfd) {
            Ok(pidfd) => Self::with(stream, |_| Ok(pidfd)),
            // Before 6.5 the kernel tells a number only.
            Err(Errno::ENOPROTOOPT) => Self::by_number(stream),
            Err(error) => Err(error.into()),
        }
    }

    /// The process that has the peer's number now: another one, if the peer has ended and its number was given away
    /// since. It is refused unless it runs as the same user; what it may do besides, its unit or its parent decides.
    fn by_number(stream: &UnixStream) -> io::Result<Self> {
        Self::with(stream, |pid| {
            let pid =
                Pid::from_raw(pid).ok_or_else(|| io::Error::other("the peer is in another PID namespace"))?;
            Ok(pidfd_open(pid, PidfdFlags::empty())?)
        })
    }

    fn with(stream: &UnixStream, pidfd: impl FnOnce(i32) -> io::Result<OwnedFd>) -> io::Result<Self> {
        let credentials = getsockopt(stream, sockopt::PeerCredentials)?;
        let peer = Self { pid: credentials.pid(), uid: credentials.uid(), pidfd: pidfd(credentials.pid())? };
        let now = match fs::read_to_string(format!("/proc/{}/status", peer.pid)) {
            Ok(status) => effective_uid(&status)
                .ok_or_else(|| io::Error::other("/proc/<pid>/status is not understood"))?,
            // Where /proc hides other users' processes (hidepid) there is only the credential at connect.
            Err(error) if error.kind() == io::ErrorKind::NotFound => peer.uid,
            Err(error) => return Err(error),
        };
        // Still running after its pid was looked up, so it was no other process's status.
        if peer.has_ended() {
            return Err(io::Error::other("the peer has ended"));
        }
        if now != peer.uid {
            return Err(io::Error::other(format!(
                "the peer connected as uid {} and is uid {now} now",
                peer.uid
            )));
        }
        Ok(peer)
    }

    /// Its pid.
    pub const fn pid(&self) -> i32 {
        self.pid
    }

    /// Its user.
    pub const fn uid(&self) -> u32 {
        self.uid
    }

    /// Its descriptor.
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// Whether it has ended. Ask after whatever was read by its pid.
    pub fn has_ended(&self) -> bool {
        let mut ended = [PollFd::new(self.pidfd.as_fd(), PollFlags::POLLIN)];
        poll(&mut ended, PollTimeout::ZERO) != Ok(0)
    }

    /// The process that started it, or that it was left to.
    pub fn parent(&self) -> io::Result<i32> {
        let parent = process::parent(self.pid)?;
        if self.has_ended() { Err(io::Error::other("the peer has ended")) } else { Ok(parent) }
    }
}

/// The peer's user; see [`PeerProcess::of`].
pub(crate) fn uid(stream: &UnixStream) -> io::Result<u32> {
    PeerProcess::of(stream).map(|peer| peer.uid)
}

pub(crate) fn effective_uid(status: &str) -> Option<u32> {
    status.lines().find_map(|line| line.strip_prefix("Uid:"))?.split_whitespace().nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn we_are_ourselves() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        assert_eq!(uid(&ours).unwrap(), nix::unistd::geteuid().as_raw());
        assert_eq!(effective_uid("Name:\tx\nUid:\t1\t2\t3\t4\n"), Some(2));
    }

    /// As on a kernel before 6.5, too.
    #[tokio::test]
    async fn a_peer_that_has_ended_is_nobody() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = tokio::net::UnixListener::bind(&path).unwrap();
        for ask in [PeerProcess::of, PeerProcess::by_number] {
            let program = "import socket,sys; s=socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); sys.stdin.read()";
            let mut child = std::process::Command::new("python3")
                .args(["-c", program])
                .arg(&path)
                .stdin(std::process::Stdio::piped())
                .spawn()
                .unwrap();
            let (stream, _) = listener.accept().await.unwrap();
            let peer = ask(&stream).unwrap();
            assert_eq!(peer.pid(), i32::try_from(child.id()).unwrap());
            assert_eq!(peer.parent().unwrap(), i32::try_from(std::process::id()).unwrap());
            child.kill().unwrap();
            child.wait().unwrap();
            assert!(peer.has_ended() && peer.parent().is_err());
            assert!(ask(&stream).is_err(), "its number may be another's by now");
        }
    }

    #[tokio::test]
    async fn a_link_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let (socket, link, file) = (dir.path().join("s"), dir.path().join("l"), dir.path().join("f"));
        let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        std::os::unix::fs::symlink(&socket, &link).unwrap();
        fs::write(&file, "").unwrap();
        connect(&socket).await.unwrap();
        assert!(UnixStream::connect(&link).await.is_ok(), "the link works");
        for other in [&link, &file] {
            let error = connect(other).await.unwrap_err();
            assert!(error.to_string().contains("no socket"), "{error}");
        }
        assert_eq!(connect(&dir.path().join("no")).await.unwrap_err().kind(), io::ErrorKind::NotFound);
        drop(listener);
        assert_eq!(connect(&socket).await.unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
    }
}
