//! systemd: what it hands to this process, and what it is asked over the system bus. What it is told: [`notify`](crate::notify).
//!
//! The agent asks it to start and stop sidecars, which a polkit rule allows it, and which unit a process belongs to:
//! systemd's own answer, not the name of a control group that whoever delegates one can choose.

mod manager;

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::net::UnixListener;

use nix::fcntl::{FcntlArg, FdFlag, fcntl};

pub use manager::{ActiveState, Manager, ManagerError, Unit};

/// Whether systemd is this machine's first process (`sd_booted(3)`).
pub fn is_booted() -> bool {
    std::fs::symlink_metadata("/run/systemd/system").is_ok_and(|data| data.is_dir())
}

/// The sockets that systemd has opened for this process (`sd_listen_fds(3)`). Call it once.
#[expect(unsafe_code, reason = "descriptors come by number from the parent")]
pub fn listeners() -> io::Result<Vec<UnixListener>> {
    let mut listeners = Vec::new();
    for fd in sd_notify::listen_fds()? {
        // SAFETY: systemd has opened it for this process and says so to nobody else here; `listen_fds` names it once.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        // Shims that are started from here must not hold it.
        fcntl(&fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
        let listener = UnixListener::from(fd);
        listener.set_nonblocking(true)?;
        listeners.push(listener);
    }
    Ok(listeners)
}

/// The descriptor that this unit's earlier process has given systemd to keep under this name (`FDSTORE=1`). Call it once.
#[expect(unsafe_code, reason = "descriptors come by number from the parent")]
pub(crate) fn kept(name: &str) -> io::Result<Option<OwnedFd>> {
    let Some((fd, _)) = sd_notify::listen_fds_with_names()?.find(|(_, found)| found == name) else {
        return Ok(None);
    };
    // SAFETY: systemd has opened it for this process and says so to nobody else here; each name is asked for once.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    fcntl(&fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    Ok(Some(fd))
}
