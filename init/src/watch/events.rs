//! What the kernel tells about rules and routes of a namespace, and about the slices that its redirect names.

use std::fmt;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use netlink_sys::Socket;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{setsockopt, sockopt::RcvBufForce};
use serde::{Deserialize, Serialize};

use crate::netlink::{attribute, be32, text};
use crate::plan::Plan;
use crate::slices::Follow;

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
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
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

/// Rules or routes changed, or a slice came or went.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// By whom, if the kernel said so.
    pub by: Option<Process>,
}

/// The subscriptions of a namespace. They keep it alive.
#[derive(Debug)]
pub struct Events {
    rules: Option<Socket>,
    routes: Socket,
    /// Made when a redirect first names slices.
    slices: OnceLock<Follow>,
    /// The thread whose changes are no news.
    own: AtomicU32,
}

impl Events {
    /// Subscribes in the calling thread's namespace.
    pub fn open() -> io::Result<Self> {
        // Without nf_tables there is nothing that it could tell.
        let rules = match subscribe(NETLINK_NETFILTER, &[RULES]) {
            Err(error) if error.raw_os_error() == Some(nix::libc::EPROTONOSUPPORT) => None,
            subscribed => Some(subscribed?),
        };
        let routes = subscribe(NETLINK_ROUTE, &ROUTES)?;
        let events = Self { rules, routes, slices: OnceLock::new(), own: AtomicU32::default() };
        events.own();
        Ok(events)
    }

    /// From now on it is news when a slice of this plan comes or goes. After an error it isn't.
    pub(super) fn follow(&self, plan: &Plan) -> io::Result<()> {
        if let Some(slices) = self.slices.get() {
            return slices.plan(plan);
        }
        if plan.slices().is_empty() {
            return Ok(());
        }
        let slices = Follow::new()?;
        slices.plan(plan)?;
        // Somebody else's that came first is as good, and is told of the plan next time.
        let _ = self.slices.set(slices);
        Ok(())
    }

    /// From now on the changes of the calling thread are no news.
    pub(super) fn own(&self) {
        let thread = u32::try_from(nix::unistd::gettid().as_raw()).unwrap_or_default();
        self.own.store(thread, Ordering::Relaxed);
    }

    /// What becomes readable when there is news. With the first redirect that names slices comes one more.
    pub fn sockets(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.rules.iter().chain([&self.routes]).map(Socket::as_fd).chain(self.slices.get().map(Follow::as_fd))
    }

    /// Takes what was told until now; `None` when that was nothing, or only our own doing. May wait for the end of a
    /// commit that is being told.
    pub fn take(&self) -> io::Result<Option<Change>> {
        let mut news = self.slices.get().is_some_and(|slices| {
            slices.changed().unwrap_or_else(|error| {
                tracing::warn!(%error, "what is told of slices can't be read; they are looked at every second");
                true
            })
        });
        drain(&self.routes, |_| news = true)?;
        Ok(match self.commit()? {
            Commit::Foreign(by) => Some(Change { by }),
            Commit::Nothing | Commit::Own => news.then_some(Change { by: None }),
        })
    }

    /// Who changed rules just now, for a change that was found before it was told.
    pub(super) fn author(&self) -> io::Result<Option<Process>> {
        Ok(match self.commit()? {
            Commit::Foreign(by) => by,
            Commit::Nothing | Commit::Own => None,
        })
    }

    /// Takes what is told about rules, up to the message that ends a commit.
    fn commit(&self) -> io::Result<Commit> {
        let own = self.own.load(Ordering::Relaxed);
        let (mut found, mut open) = (Commit::Nothing, false);
        loop {
            let Some(rules) = &self.rules else { return Ok(found) };
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
            let told =
                poll(&mut [PollFd::new(rules.as_fd(), PollFlags::POLLIN)], PollTimeout::from(END_OF_COMMIT));
            if !matches!(told, Ok(1..)) {
                return Ok(Commit::Foreign(None));
            }
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
    let _ = setsockopt(&socket, RcvBufForce, &BUFFER);
    groups.iter().try_for_each(|group| socket.add_membership(*group))?;
    socket.set_non_blocking(true)?;
    Ok(socket)
}

/// Takes every datagram that waits; `None` stands for those that were lost, because nobody took them in time.
fn drain(socket: &Socket, mut take: impl FnMut(Option<&[u8]>)) -> io::Result<()> {
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
