//! Who is at the other end of a Unix socket.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use nix::errno::Errno;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{getsockopt, sockopt};
use tokio::net::UnixStream;

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

/// The peer's user: as it was when it connected and, where the kernel can tell (6.5), as it still is. A process that
/// connected as root and then dropped its rights must not keep root's word.
pub(crate) fn uid(stream: &UnixStream) -> io::Result<u32> {
    let credentials = getsockopt(stream, sockopt::PeerCredentials)?;
    let pidfd = match getsockopt(stream, sockopt::PeerPidfd) {
        Ok(pidfd) => pidfd,
        Err(Errno::ENOPROTOOPT) => return Ok(credentials.uid()),
        Err(error) => return Err(error.into()),
    };
    let now = match fs::read_to_string(format!("/proc/{}/status", credentials.pid())) {
        Ok(status) => {
            effective_uid(&status).ok_or_else(|| io::Error::other("/proc/<pid>/status is not understood"))?
        }
        // Where /proc hides other users' processes (hidepid) there is only the credential at connect.
        Err(error) if error.kind() == io::ErrorKind::NotFound => credentials.uid(),
        Err(error) => return Err(error),
    };
    // Still running after its pid was looked up, so it was no other process's status.
    let mut ended = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
    if poll(&mut ended, PollTimeout::ZERO)? != 0 {
        return Err(io::Error::other("the peer has ended"));
    }
    if now != credentials.uid() {
        return Err(io::Error::other(format!(
            "the peer connected as uid {} and is uid {now} now",
            credentials.uid()
        )));
    }
    Ok(now)
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
