//! Envoy's process. Its parent is this process and stays it when this process executes itself anew, so it is held by pid
//! and pidfd, which both versions can open, rather than by a library's handle, which only the first one has.

use std::io;
use std::os::fd::OwnedFd;
use std::process::{ChildStderr, ChildStdout, Command};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::timeout;

use crate::shim::process::{pidfd_open, start_time};

/// A child that isn't reaped yet, so its pid is its own.
#[derive(Debug)]
pub(super) struct Process {
    pid: Pid,
    start_time: u64,
    pidfd: AsyncFd<OwnedFd>,
    /// How it ended, once it was reaped.
    end: Option<String>,
}

impl Process {
    /// Starts a program, and returns its output streams if those are pipes.
    pub(super) fn spawn(
        command: &mut Command,
    ) -> io::Result<(Self, Option<ChildStdout>, Option<ChildStderr>)> {
        let mut child = command.spawn()?;
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let pid = i32::try_from(child.id()).map_err(io::Error::other)?;
        let process = Self::of_child(pid).inspect_err(|_| {
            // Nobody would look after it. It can't be anybody else: it isn't reaped.
            let _ = child.kill();
            let _ = child.wait();
        })?;
        Ok((process, stdout, stderr))
    }

    /// Takes over a child that an earlier version of this program started. It may have ended meanwhile, but nobody has
    /// reaped it.
    pub(super) fn adopt(pid: i32, started: u64) -> io::Result<Self> {
        let process = Self::of_child(pid)?;
        if process.start_time == started {
            return Ok(process);
        }
        Err(io::Error::other(format!("pid {pid} isn't the Envoy that was started")))
    }

    #[expect(unsafe_code, reason = "registering a descriptor with the reactor promises to keep it open")]
    fn of_child(pid: i32) -> io::Result<Self> {
        let pidfd = pidfd_open(pid)?;
        let start_time = start_time(pid)?;
        // SAFETY: the `AsyncFd` owns the descriptor and never lets go of it.
        let pidfd = unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE) }?;
        Ok(Self { pid: Pid::from_raw(pid), start_time, pidfd, end: None })
    }

    pub(super) fn pid(&self) -> i32 {
        self.pid.as_raw()
    }

    pub(super) fn start_time(&self) -> u64 {
        self.start_time
    }

    /// Waits until it has ended, reaps it, and tells how. Dropping the future loses nothing.
    pub(super) async fn ended(&mut self) -> String {
        if let Some(end) = &self.end {
            return end.clone();
        }
        if let Err(error) = self.pidfd.readable().await {
            return self.end.insert(format!("it cannot be watched: {error}")).clone();
        }
        let end = match waitpid(self.pid, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(_, code)) => format!("exit status: {code}"),
            Ok(WaitStatus::Signaled(_, signal, core)) => {
                let core = if core { " (core dumped)" } else { "" };
                format!("signal: {} ({signal}){core}", signal as i32)
            }
            Ok(other) => format!("ended strangely: {other:?}"),
            Err(Errno::ECHILD) => "ended, and somebody else was told how".to_owned(),
            Err(error) => format!("ended, but how is not known: {error}"),
        };
        self.end.insert(end).clone()
    }

    /// Whether it ended within `patience`.
    pub(super) async fn ends_within(&mut self, patience: Duration) -> bool {
        timeout(patience, self.ended()).await.is_ok()
    }

    /// Sends a signal, unless it was reaped.
    pub(super) fn signal(&self, signal: Signal) {
        if self.end.is_none() {
            // Of those errors that there are, none is possible for a child.
            let _ = kill(self.pid, signal);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(10);

    #[tokio::test]
    async fn tells_how_a_child_ended_however_often_it_is_asked() {
        let (mut process, ..) = Process::spawn(Command::new("sh").args(["-c", "exit 3"])).unwrap();
        for _ in 0..2 {
            assert_eq!(timeout(PATIENCE, process.ended()).await.unwrap(), "exit status: 3");
        }
        process.signal(Signal::SIGKILL);
        assert!(std::fs::metadata(format!("/proc/{}", process.pid())).is_err(), "it was reaped");
    }

    #[tokio::test]
    async fn a_child_can_be_taken_over_even_if_it_has_ended() {
        let (first, ..) = Process::spawn(Command::new("sleep").arg("100")).unwrap();
        let (pid, started) = (first.pid(), first.start_time());
        drop(first);
        assert!(Process::adopt(pid, started + 1).is_err());
        let second = Process::adopt(pid, started).unwrap();
        second.signal(Signal::SIGKILL);
        drop(second);
        let mut third = Process::adopt(pid, started).unwrap();
        assert_eq!(timeout(PATIENCE, third.ended()).await.unwrap(), "signal: 9 (SIGKILL)");
        assert!(Process::adopt(pid, started).is_err(), "it was reaped");
    }
}
