//! How long a shim in a unit waits before it serves, after others in a row that ended untold.
//!
//! systemd starts it again after `RestartSec=`, always. To wait longer each time it has to be version 254, and an older one
//! complains about a setting that it doesn't know, so the shim itself waits. What it knows of those before it is in a memfd
//! that systemd keeps as long as nobody stops the unit (`FileDescriptorStoreMax=`).

use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::thread::sleep;
use std::time::Duration;

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::time::{ClockId, clock_gettime};
use tracing::{debug, warn};

use crate::notify::Notifier;
use crate::systemd;

/// The name of the memfd in systemd's keeping.
const NAME: &str = "ends";
/// What served this long has nothing to do with the ends before it. Longer than the longest wait.
const HEALED: Duration = Duration::from_secs(60);
const MAX: Duration = Duration::from_secs(30);

/// What this shim leaves to the one after it.
#[derive(Debug)]
pub(super) struct Pace(Option<File>);

/// What the one before has left.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Memory {
    /// How many ended untold, one after the other.
    ends: u32,
    /// When the last one began to serve, in seconds since the machine booted.
    began: u64,
}

impl Pace {
    /// Waits as long as the ends before this start ask for. To be called once, before anything else happens.
    pub(super) fn hold_back() -> Self {
        // Without a memory it starts at once, as it would without all this.
        let attempt = || -> io::Result<Self> {
            let Some((file, before)) = remembered()? else { return Ok(Self(None)) };
            let (ends, wait) = after(before, now());
            if !wait.is_zero() {
                let seconds = wait.as_secs();
                warn!(ends, seconds, "sidecars before this one ended untold; it waits before it serves");
                let words =
                    format!("ended {ends} times in a row; waits {seconds} s, the journal says why it ended");
                Notifier::from_env()?.status(&words);
                // As one thread without duties: SIGTERM ends it at once.
                sleep(wait);
            }
            Memory { ends: ends + 1, began: now() }.write(&file)?;
            Ok(Self(Some(file)))
        };
        attempt().unwrap_or_else(|error| {
            debug!(%error, "ends in a row are not counted");
            Self(None)
        })
    }

    /// Somebody wanted this end: the next one starts at once.
    pub(super) fn ended_as_told(&self) {
        if let Some(Err(error)) = self.0.as_ref().map(|file| Memory::default().write(file)) {
            debug!(%error, "ends in a row are not counted");
        }
    }
}

impl Memory {
    fn write(self, file: &File) -> io::Result<()> {
        file.write_all_at(&[self.ends.to_le_bytes().as_slice(), &self.began.to_le_bytes()].concat(), 0)
    }

    /// By positions: the descriptor's own is where the process before left it.
    fn read(file: &File) -> Self {
        let (mut ends, mut began) = ([0; 4], [0; 8]);
        match file.read_exact_at(&mut ends, 0).and_then(|()| file.read_exact_at(&mut began, 4)) {
            Ok(()) => Self { ends: u32::from_le_bytes(ends), began: u64::from_le_bytes(began) },
            Err(_) => Self::default(),
        }
    }
}

/// How many ends count, and how long to wait for them, beyond what systemd itself waits.
fn after(before: Memory, now: u64) -> (u32, Duration) {
    let served = Duration::from_secs(now.saturating_sub(before.began));
    match before.ends {
        0 => (0, Duration::ZERO),
        _ if served >= HEALED => (0, Duration::ZERO),
        ends @ 1..=2 => (ends, Duration::ZERO),
        ends => (ends, Duration::from_secs(1 << (ends - 2).min(5)).min(MAX)),
    }
}

/// The memory in systemd's keeping, or a new one that it keeps from now on; none outside of a unit.
fn remembered() -> io::Result<Option<(File, Memory)>> {
    if std::env::var_os("NOTIFY_SOCKET").is_none() {
        return Ok(None);
    }
    if let Some(kept) = systemd::kept(NAME)? {
        let file = File::from(kept);
        let memory = Memory::read(&file);
        return Ok(Some((file, memory)));
    }
    let made: OwnedFd = memfd_create(c"ursa-ends", MFdFlags::MFD_CLOEXEC)?;
    Notifier::from_env()?.keep(NAME, made.as_fd())?;
    Ok(Some((made.into(), Memory::default())))
}

fn now() -> u64 {
    clock_gettime(ClockId::CLOCK_BOOTTIME).map(Duration::from).unwrap_or_default().as_secs()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_end_in_a_row_costs_more_and_a_long_life_forgets_them() {
        let waits: Vec<_> =
            (0..9).map(|ends| after(Memory { ends, began: 1_000 }, 1_001).1.as_secs()).collect();
        assert_eq!(waits, [0, 0, 0, 2, 4, 8, 16, 30, 30]);
        assert_eq!(after(Memory { ends: 7, began: 1_000 }, 1_060), (0, Duration::ZERO));
        assert!(MAX < HEALED, "a wait is no life");
        assert_eq!(after(Memory { ends: u32::MAX, began: 1 }, 2).1, MAX);
    }

    #[test]
    fn what_is_left_is_read() {
        let left = Memory { ends: 3, began: 77 };
        let file = tempfile::tempfile().unwrap();
        assert_eq!(Memory::read(&file), Memory::default());
        left.write(&file).unwrap();
        // Twice: each process reads the same description.
        assert_eq!([Memory::read(&file), Memory::read(&file)], [left, left]);
        let pace = Pace(Some(file));
        pace.ended_as_told();
        assert_eq!(Memory::read(pace.0.as_ref().unwrap()), Memory::default());
    }
}
