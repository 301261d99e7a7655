//! Telling the service manager (`man 3 sd_notify`): datagrams to the socket that it names.
//!
//! Nothing here waits: a service manager that doesn't read must not keep anybody from serving.

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use nix::time::{ClockId, clock_gettime};
use tracing::debug;

/// The service manager's ear, if there is one.
#[derive(Debug, Clone, Default)]
pub struct Notifier {
    ear: Option<Arc<(UnixDatagram, SocketAddr)>>,
    watchdog: Option<Duration>,
}

impl Notifier {
    /// As the environment says (`NOTIFY_SOCKET`, `WATCHDOG_USEC`, `WATCHDOG_PID`).
    pub fn from_env() -> io::Result<Self> {
        let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let Some(path) = variable("NOTIFY_SOCKET") else { return Ok(Self::default()) };
        let address = match path.strip_prefix('@') {
            Some(name) => SocketAddr::from_abstract_name(name)?,
            None => SocketAddr::from_pathname(&path)?,
        };
        let socket = UnixDatagram::unbound()?;
        socket.set_nonblocking(true)?;
        let ours = variable("WATCHDOG_PID").is_none_or(|pid| pid == std::process::id().to_string());
        let interval = variable("WATCHDOG_USEC").filter(|_| ours).and_then(|usec| usec.parse().ok());
        let watchdog = interval.filter(|usec| *usec > 0).map(Duration::from_micros);
        Ok(Self { ear: Some(Arc::new((socket, address))), watchdog })
    }

    /// Whether anybody listens.
    pub fn is_heard(&self) -> bool {
        self.ear.is_some()
    }

    /// How often it wants to hear `WATCHDOG=1`, if at all. Say it twice as often.
    pub fn watchdog(&self) -> Option<Duration> {
        self.watchdog
    }

    /// Tells it assignments such as `READY=1`.
    pub fn tell(&self, assignments: &[&str]) {
        let Some(ear) = &self.ear else { return };
        let (socket, address) = &**ear;
        // A line's end begins the next assignment.
        let lines: Vec<String> = assignments.iter().map(|line| line.replace(['\n', '\r'], " ")).collect();
        if let Err(error) = socket.send_to_addr(lines.join("\n").as_bytes(), address) {
            // It says nothing that isn't said again, or seen otherwise.
            debug!(%error, "the service manager can't be told");
        }
    }

    /// Gives it a descriptor to keep for the unit's next process, under a name.
    pub(crate) fn keep(&self, name: &str, fd: BorrowedFd<'_>) -> io::Result<()> {
        let Some(ear) = &self.ear else { return Ok(()) };
        let socket = UnixDatagram::unbound()?;
        socket.connect_addr(&ear.1)?;
        let words = format!("FDSTORE=1\nFDNAME={name}");
        let fds = [fd.as_raw_fd()];
        let rights = [ControlMessage::ScmRights(&fds)];
        let words = [io::IoSlice::new(words.as_bytes())];
        sendmsg::<()>(socket.as_raw_fd(), &words, &rights, MsgFlags::MSG_NOSIGNAL, None)?;
        Ok(())
    }

    /// Tells it what goes on, for `systemctl status`.
    pub fn status(&self, words: &str) {
        self.tell(&[&format!("STATUS={words}")]);
    }

    /// Tells it that the service reloads from now on until `READY=1`.
    pub fn reloading(&self) {
        // systemd wants to know that the message isn't older than its own order.
        let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map(Duration::from).unwrap_or_default();
        self.tell(&["RELOADING=1", &format!("MONOTONIC_USEC={}", now.as_micros())]);
    }
}
