//! Telling processes apart: a pid alone may have been reused.

use std::io;
use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags};

/// When the process started, in clock ticks after boot.
pub fn start_time(pid: i32) -> io::Result<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    parse(&stat, 19).ok_or_else(|| io::Error::other(format!("/proc/{pid}/stat is not understood: {stat:?}")))
}

/// A descriptor that means this process and no later one of the same pid, and is readable once it has ended. An error
/// of kind `NotFound` means it is gone.
pub(crate) fn pidfd_open(pid: i32) -> io::Result<OwnedFd> {
    let pid = Pid::from_raw(pid).ok_or_else(|| io::Error::other(format!("{pid} is no pid")))?;
    rustix::process::pidfd_open(pid, PidfdFlags::empty()).map_err(|error| match error {
        Errno::SRCH => io::Error::new(io::ErrorKind::NotFound, error),
        error => error.into(),
    })
}

/// The parent of a process.
pub(crate) fn parent(pid: i32) -> io::Result<i32> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    parse(&stat, 1).ok_or_else(|| io::Error::other(format!("/proc/{pid}/stat is not understood: {stat:?}")))
}

/// A field after the second, which is the program's name in parentheses, which may hold anything.
fn parse<T: std::str::FromStr>(stat: &str, field: usize) -> Option<T> {
    stat.rsplit_once(')')?.1.split_whitespace().nth(field)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_may_be_called_anything() {
        let tail = "S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4242 20 21";
        assert_eq!(parse(&format!("7 (a) b (c) {tail}"), 19), Some(4242_u64));
        assert_eq!(parse::<u64>("7 (a", 19), None);
        assert!(start_time(i32::try_from(std::process::id()).unwrap()).unwrap() > 0);
    }
}
