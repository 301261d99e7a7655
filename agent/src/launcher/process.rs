//! A process that stays the same one, however often its pid is reused.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::libc;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::timeout;

use crate::shim::process::start_time;

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

#[expect(unsafe_code, reason = "neither std nor nix wraps pidfd_open")]
fn pidfd_open(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: the call takes two numbers; the descriptor it returns is new (and close-on-exec), so we own it.
    let opened =
        Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) }).map_err(
            |error| match error {
                Errno::ESRCH => io::Error::new(io::ErrorKind::NotFound, error),
                error => error.into(),
            },
        )?;
    let fd = i32::try_from(opened).map_err(io::Error::other)?;
    // SAFETY: as above.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
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
}
