//! A process that stays the same one, however often its pid is reused.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::timeout;

use crate::shim::peer::effective_uid;
use crate::shim::process::{pidfd_open, start_time};

/// A running process, not necessarily a child.
#[derive(Debug)]
pub(super) struct Process {
    pid: i32,
    start_time: u64,
    pidfd: AsyncFd<OwnedFd>,
}

impl Process {
    /// Opens a process; with `expected` it must have started then. An error of kind `NotFound` means it is gone.
    #[expect(unsafe_code, reason = "registering a descriptor with the reactor promises to keep it open")]
    pub(super) fn open(pid: i32, expected: Option<u64>) -> io::Result<Self> {
        let pidfd = pidfd_open(pid)?;
        // Read after opening: the descriptor keeps the pid from meaning another process unnoticed.
        let started = start_time(pid)?;
        if expected.is_some_and(|expected| expected != started) {
            return Err(io::Error::new(io::ErrorKind::NotFound, format!("pid {pid} was reused")));
        }
        // SAFETY: the `AsyncFd` owns the descriptor and never lets go of it.
        let pidfd = unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE) }?;
        Ok(Self { pid, start_time: started, pidfd })
    }

    pub(super) fn pid(&self) -> i32 {
        self.pid
    }

    pub(super) fn start_time(&self) -> u64 {
        self.start_time
    }

    /// Its descriptor, which keeps meaning this process.
    pub(super) fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.get_ref().as_fd()
    }

    /// Whether it has ended: what was read about its pid before holds only if it hasn't.
    pub(super) fn has_ended(&self) -> bool {
        let mut ended = [PollFd::new(self.pidfd(), PollFlags::POLLIN)];
        poll(&mut ended, PollTimeout::ZERO).is_ok_and(|events| events != 0)
    }

    /// Whether it is the shim of this directory. Whoever may write there decides whom we find there, so its own word
    /// is worth nothing: the kernel says what user it runs as, and only root says whose the directory is.
    pub(super) fn check_shim_of(&self, dir: &Path) -> io::Result<()> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid))?;
        let uid = effective_uid(&status)
            .ok_or_else(|| io::Error::other(format!("/proc/{}/status is not understood", self.pid)))?;
        let owner = fs::symlink_metadata(dir)?.uid();
        // Root's it is only while it starts. Its arguments are believed then, because root started it with them.
        let ours = if uid == 0 {
            names(&fs::read(format!("/proc/{}/cmdline", self.pid))?, dir)
        } else {
            uid == owner
        };
        // Only of a process that still runs are these the user and the arguments.
        if self.has_ended() {
            return Err(io::Error::new(io::ErrorKind::NotFound, "it has ended"));
        }
        if ours {
            return Ok(());
        }
        Err(io::Error::other(format!(
            "it runs as uid {uid} and isn't the shim of {}, which is uid {owner}'s: somebody replaced the socket",
            dir.display()
        )))
    }

    /// Whether it is in this network namespace.
    pub(super) fn is_in(&self, netns: &Path) -> io::Result<bool> {
        let inode = |path: &Path| fs::metadata(path).map(|data| (data.dev(), data.ino()));
        Ok(inode(&PathBuf::from(format!("/proc/{}/ns/net", self.pid)))? == inode(netns)?)
    }

    /// Waits until it has ended, and reaps it if it is our child.
    pub(super) async fn ended(&self) -> io::Result<()> {
        self.pidfd.readable().await?.retain_ready();
        // ECHILD: somebody else's.
        let _ = waitpid(Pid::from_raw(self.pid), Some(WaitPidFlag::WNOHANG));
        Ok(())
    }

    /// Whether it ended within `patience`.
    pub(super) async fn ends_within(&self, patience: Duration) -> bool {
        matches!(timeout(patience, self.ended()).await, Ok(Ok(())))
    }

    /// Sends a signal. It is no error when the process has ended.
    #[expect(unsafe_code, reason = "neither std nor nix wraps pidfd_send_signal")]
    pub(super) fn signal(&self, signal: Signal) -> io::Result<()> {
        let none: *const libc::siginfo_t = std::ptr::null();
        // SAFETY: the descriptor is open as long as `self`; no siginfo and no flags are passed.
        let done = unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                self.pidfd.get_ref().as_raw_fd(),
                signal as i32,
                none,
                0,
            )
        };
        match Errno::result(done) {
            Ok(_) | Err(Errno::ESRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

/// Whether a command line says `--dir DIR`.
fn names(cmdline: &[u8], dir: &Path) -> bool {
    let arguments: Vec<&[u8]> = cmdline.split(|byte| *byte == 0).collect();
    arguments.windows(2).any(|pair| pair == [b"--dir".as_slice(), dir.as_os_str().as_encoded_bytes()])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn follows_a_child_to_its_end() {
        let mut child = std::process::Command::new("sleep").arg("100").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        assert!(Process::open(pid, Some(1)).is_err(), "started after boot");
        let process = Process::open(pid, None).unwrap();
        assert!(!process.ends_within(Duration::from_millis(1)).await);
        process.signal(Signal::SIGKILL).unwrap();
        assert!(process.ends_within(Duration::from_secs(5)).await);
        process.signal(Signal::SIGKILL).unwrap();
        assert_eq!(Process::open(pid, None).unwrap_err().kind(), io::ErrorKind::NotFound, "it was reaped");
        assert!(child.wait().is_err(), "it was reaped");
    }

    #[tokio::test]
    async fn a_process_is_no_shim_because_a_directory_leads_to_it() {
        let dir = tempfile::tempdir().unwrap();
        let mut child = std::process::Command::new("sleep").arg("100").spawn().unwrap();
        let process = Process::open(i32::try_from(child.id()).unwrap(), None).unwrap();
        if nix::unistd::geteuid().is_root() {
            let error = process.check_shim_of(dir.path()).unwrap_err();
            assert!(error.to_string().contains("isn't the shim"), "{error}");
        } else {
            process.check_shim_of(dir.path()).unwrap();
            assert!(process.check_shim_of(Path::new("/")).is_err(), "it is root's");
        }
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(process.check_shim_of(dir.path()).unwrap_err().kind(), io::ErrorKind::NotFound);
        let dir = Path::new("/run/ursa/w/a");
        assert!(names(b"ursa-shim\0--dir\0/run/ursa/w/a\0--uid\x007\0", dir));
        assert!(!names(b"ursa-shim\0--dir\0/run/ursa/w/ab\0", dir));
        assert!(!names(b"containerd\0", dir));
    }
}
