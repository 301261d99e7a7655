//! What the kernel tells about rules, routes, and signals.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd};
use std::time::{Duration, Instant};

use netlink_sys::Socket;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::socket::{setsockopt, sockopt::RcvBufForce};
use serde::Serialize;

use crate::netlink::{attribute, be32, text};

const NETLINK_ROUTE: isize = 0;
const NETLINK_NETFILTER: isize = 12;
/// `NFNLGRP_NFTABLES`.
const RULES: u32 = 7;
/// `RTNLGRP_LINK`, addresses, routes and policy rules of both families.
const ROUTES: [u32; 7] = [1, 5, 7, 8, 9, 11, 19];
/// `NFT_MSG_NEWGEN` of nf_tables: the last message of a commit, and the only one that says whose it was.
const NEWGEN: u16 = 10 << 8 | 15;
/// Of the messages that wait, in bytes.
const BUFFER: usize = 8 << 20;
/// How long the end of a commit may come after its beginning, in milliseconds.
const END_OF_COMMIT: u16 = 1000;
const HEADER: usize = 16;
const NFGEN: usize = 4;

/// A program that changed rules.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Process {
    /// Its process id (more exactly, its thread's).
    pub pid: u32,
    /// Its name, as the kernel knows it.
    pub name: String,
}

impl fmt::Display for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (pid {})", self.name, self.pid)
    }
}

/// What happened.
pub(super) enum Event {
    /// Rules or routes changed; perhaps known by whom.
    Changed(Option<Process>),
    /// Nothing for the whole wait.
    Quiet,
    /// SIGHUP.
    Reload,
    /// SIGTERM or SIGINT.
    Stop,
}

/// The subscriptions of the calling thread's namespace.
pub(super) struct Events {
    rules: Option<Socket>,
    routes: Socket,
    signals: SignalFd,
    /// Our own thread, whose changes are no news.
    own: u32,
}

pub(super) fn signals() -> SigSet {
    [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP].into_iter().collect()
}

impl Events {
    pub(super) fn open() -> io::Result<Self> {
        // Without nf_tables there is nothing that it could tell.
        let rules = match subscribe(NETLINK_NETFILTER, &[RULES]) {
            Err(error) if error.raw_os_error() == Some(nix::libc::EPROTONOSUPPORT) => None,
            subscribed => Some(subscribed?),
        };
        let flags = SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC;
        Ok(Self {
            rules,
            routes: subscribe(NETLINK_ROUTE, &ROUTES)?,
            signals: SignalFd::with_flags(&signals(), flags)?,
            own: u32::try_from(nix::unistd::gettid().as_raw()).unwrap_or_default(),
        })
    }

    /// Waits for the next event that isn't our own doing.
    pub(super) fn wait(&mut self, at_most: Duration) -> io::Result<Event> {
        let deadline = Instant::now() + at_most;
        loop {
            if !self.readable(deadline.saturating_duration_since(Instant::now()))? {
                return Ok(Event::Quiet);
            }
            if let Some(signal) = self.signals.read_signal()? {
                let hangup = signal.ssi_signo == Signal::SIGHUP as u32;
                return Ok(if hangup { Event::Reload } else { Event::Stop });
            }
            let mut news = false;
            drain(&mut self.routes, |_| news = true)?;
            let by = match self.commit()? {
                Commit::Nothing | Commit::Own => None,
                Commit::Foreign(by) => {
                    news = true;
                    by
                }
            };
            if news {
                return Ok(Event::Changed(by));
            }
        }
    }

    /// Who changed rules just now, for a change that was found before it was told.
    pub(super) fn author(&mut self) -> io::Result<Option<Process>> {
        Ok(match self.commit()? {
            Commit::Foreign(by) => by,
            Commit::Nothing | Commit::Own => None,
        })
    }

    /// Takes what is told about rules, up to the message that ends a commit.
    fn commit(&mut self) -> io::Result<Commit> {
        let (own, mut found, mut open) = (self.own, Commit::Nothing, false);
        loop {
            let Some(rules) = &mut self.rules else { return Ok(found) };
            drain(rules, |datagram| match datagram.map(author) {
                Some(Some(process)) if process.pid == own => {
                    open = false;
                    if matches!(found, Commit::Nothing) {
                        found = Commit::Own;
                    }
                }
                Some(Some(process)) => (open, found) = (false, Commit::Foreign(Some(process))),
                Some(None) => open = true,
                // Lost: whoever it was.
                None => (open, found) = (false, Commit::Foreign(None)),
            })?;
            // The kernel tells of the objects and then of the commit; this is between both.
            if !open {
                return Ok(found);
            }
            let fd = borrow(rules);
            let told = poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], PollTimeout::from(END_OF_COMMIT));
            if !matches!(told, Ok(1..)) {
                return Ok(Commit::Foreign(None));
            }
        }
    }

    /// Whether anything is there to be read within this time.
    fn readable(&self, at_most: Duration) -> io::Result<bool> {
        // Rounded up: a wait of less than a millisecond must not spin.
        let timeout = PollTimeout::try_from(at_most + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
        let sockets = self.rules.iter().chain([&self.routes]).map(borrow);
        let fds = sockets.chain([self.signals.as_fd()]);
        let mut fds: Vec<_> = fds.map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
        match poll(&mut fds, timeout) {
            // To be looked at again; the caller's deadline holds.
            Err(nix::errno::Errno::EINTR) => Ok(true),
            polled => Ok(polled? > 0),
        }
    }
}

/// What was told about rules.
enum Commit {
    Nothing,
    /// Only our own changes.
    Own,
    /// Somebody else's, perhaps known whose.
    Foreign(Option<Process>),
}

fn subscribe(protocol: isize, groups: &[u32]) -> io::Result<Socket> {
    let mut socket = Socket::new(protocol)?;
    socket.bind_auto()?;
    // One message per rule, each in a page: the usual buffer overflows with one whole table. A smaller one, where
    // this isn't allowed, only loses who it was.
    let _ = setsockopt(&borrow(&socket), RcvBufForce, &BUFFER);
    groups.iter().try_for_each(|group| socket.add_membership(*group))?;
    socket.set_non_blocking(true)?;
    Ok(socket)
}

/// The socket's descriptor; netlink-sys knows only the raw one.
#[allow(unsafe_code, reason = "netlink-sys 0.9 offers no AsFd")]
fn borrow(socket: &Socket) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is the socket's own and stays open as long as the socket that is borrowed here.
    unsafe { BorrowedFd::borrow_raw(socket.as_raw_fd()) }
}

/// Takes every datagram that waits; `None` stands for those that were lost, because nobody took them in time.
fn drain(socket: &mut Socket, mut take: impl FnMut(Option<&[u8]>)) -> io::Result<()> {
    let mut buffer = vec![0; 1 << 16];
    loop {
        match socket.recv(&mut &mut buffer[..], 0) {
            Ok(length) => take(Some(&buffer[..length.min(buffer.len())])),
            Err(error) => match error.raw_os_error() {
                Some(nix::libc::EAGAIN) => return Ok(()),
                Some(nix::libc::EINTR) => {}
                Some(nix::libc::ENOBUFS) => take(None),
                _ => return Err(error),
            },
        }
    }
}

/// Who made the commit that a datagram tells of.
fn author(mut datagram: &[u8]) -> Option<Process> {
    while datagram.len() >= HEADER {
        let length = u32::from_ne_bytes(*datagram.first_chunk()?) as usize;
        let kind = u16::from_ne_bytes([datagram[4], datagram[5]]);
        let message = datagram.get(HEADER + NFGEN..length)?;
        if kind == NEWGEN {
            let pid = attribute(message, 2).and_then(be32)?;
            return Some(Process { pid, name: attribute(message, 3).map(text).unwrap_or_default() });
        }
        datagram = datagram.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strange_datagrams_name_nobody() {
        for bytes in [
            &[][..],
            &[0; 15],
            &[0; 64],
            &[255; 64],
            &[20, 0, 0, 0, 15, 10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        ] {
            assert_eq!(author(bytes), None, "{bytes:?}");
        }
    }
}
