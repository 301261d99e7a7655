//! The two processes that roll back.

use std::ffi::OsString;
use std::io::{self, Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use super::{ConfirmError, Probation};
use crate::netns::Netns;

/// What a guard says when it waits.
const READY: u8 = b'+';

/// How a probation ended for a guard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Somebody confirmed, or the other guard rolled back.
    Settled,
    /// The rules from before are in place again.
    RolledBack,
}

/// How to start the guards.
#[derive(Debug)]
pub struct Guard {
    /// The program's arguments, without the twin's.
    pub arguments: Vec<OsString>,
}

impl Guard {
    /// Starts the guards of a change; they wait when this returns. They belong to nobody then.
    pub fn spawn(&self) -> Result<(), ConfirmError> {
        let fail = |why: io::Error| ConfirmError::Guards(why.to_string());
        let mut child = self.start(false).map_err(fail)?;
        wait_until_ready(&mut child).map_err(|why| {
            // Nothing was changed yet; a guard that hangs would roll back nothing.
            let _ = child.kill();
            let _ = child.wait();
            fail(why)
        })
    }

    fn start(&self, twin: bool) -> io::Result<Child> {
        let mut command = Command::new("/proc/self/exe");
        command.args(&self.arguments).current_dir("/").stdin(Stdio::piped()).stdout(Stdio::piped());
        // Whoever waits for the end of our caller's output must not wait for us.
        command.stderr(Stdio::null());
        if twin {
            command.arg("--twin");
        }
        command.spawn()
    }
}

fn wait_until_ready(child: &mut Child) -> io::Result<()> {
    let mut word = [0];
    let told = child.stdout.as_mut().map_or(Ok(0), |out| out.read(&mut word))?;
    if told == 1 && word[0] == READY { Ok(()) } else { Err(io::Error::other("it ended before it was ready")) }
}

/// Waits for the deadline of a change and rolls it back unless it is confirmed; at once when the other guard dies or
/// a signal asks to end. The twin is the other one's child; the pipes between them close when either dies.
pub fn guard(
    probation: &Probation,
    netns: &Netns,
    id: &str,
    twin: Option<&Guard>,
) -> Result<Outcome, ConfirmError> {
    let fail = |why: io::Error| ConfirmError::Guards(why.to_string());
    // A session of its own: a terminal that closes takes its own session along.
    nix::unistd::setsid().map_err(|errno| fail(errno.into()))?;
    let signals: SigSet = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP].into_iter().collect();
    signals.thread_block().map_err(|errno| fail(errno.into()))?;
    let flags = SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC;
    let signals = SignalFd::with_flags(&signals, flags).map_err(|errno| fail(errno.into()))?;
    let mut other = match twin {
        Some(guard) => {
            let mut child = guard.start(true).map_err(fail)?;
            wait_until_ready(&mut child).map_err(fail)?;
            Some(child)
        }
        None => None,
    };
    let mut out = io::stdout();
    out.write_all(&[READY]).and_then(|()| out.flush()).map_err(fail)?;
    let left = probation.remaining(id)?.unwrap_or_default();
    let deadline = Instant::now() + left;
    // The twin's standard input stays open as long as we live.
    match other.as_ref().and_then(|child| child.stdout.as_ref()) {
        Some(pipe) => wait(deadline, pipe, &signals).map_err(fail)?,
        None => wait(deadline, &io::stdin(), &signals).map_err(fail)?,
    }
    // The other one may be rolling back right now; then this finds it done.
    let rolled_back = probation.expire(netns, id)?;
    drop(other.as_mut().and_then(|child| child.stdin.take()));
    if let Some(child) = &mut other {
        let _ = child.wait();
    }
    Ok(if rolled_back { Outcome::RolledBack } else { Outcome::Settled })
}

/// Until the deadline, until the other end of the pipe is closed, or until a signal. SIGHUP is no reason: it says
/// that the terminal is gone, and that is what the guards are for.
fn wait(deadline: Instant, pipe: &impl std::os::fd::AsFd, signals: &SignalFd) -> io::Result<()> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(());
        }
        let timeout = PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
        let mut fds =
            [PollFd::new(pipe.as_fd(), PollFlags::POLLIN), PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, timeout) {
            Err(nix::errno::Errno::EINTR) => continue,
            polled => polled?,
        };
        let hung_up = fds[0].any().unwrap_or(false);
        let asked = signals.read_signal()?.is_some_and(|info| info.ssi_signo != Signal::SIGHUP as u32);
        if hung_up || asked {
            return Ok(());
        }
    }
}
