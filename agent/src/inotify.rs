//! Noticing that something in a directory has changed, without looking.

use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::path::Path;

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// What happens in one directory.
#[derive(Debug)]
pub(crate) struct Events(AsyncFd<Descriptor>);

#[derive(Debug)]
struct Descriptor(Inotify);

impl AsRawFd for Descriptor {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

impl Events {
    /// The events of a directory that exists.
    #[expect(unsafe_code, reason = "registering a descriptor with the reactor promises to keep it open")]
    pub(crate) fn of(dir: &Path, events: AddWatchFlags) -> io::Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
        inotify.add_watch(dir, events | AddWatchFlags::IN_ONLYDIR)?;
        // SAFETY: `Descriptor` owns the descriptor, always returns the same one, and keeps it open while it lives.
        let events = unsafe { AsyncFd::register_with_interest(Descriptor(inotify), Interest::READABLE) }?;
        Ok(Self(events))
    }

    /// Returns when something has happened. An error means that nothing will be told any more.
    pub(crate) async fn next(&mut self) -> io::Result<()> {
        loop {
            let mut ready = self.0.readable().await?;
            match ready.try_io(|events| Ok(events.get_ref().0.read_events()?)) {
                Ok(read) => return read.map(drop),
                Err(_would_block) => {}
            }
        }
    }
}
