//! The shim's directory: locked to one shim, closed to everybody but its user and root.

use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, chown, lchown};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use nix::unistd::Uid;

use super::handover::Passed;
use super::protocol::{ADMIN_SOCKET, BOOTSTRAP_FILE, CONTROL_SOCKET, DNS_FILE, PRIVATE_DIR, XDS_SOCKET};

/// What fits into a `sockaddr_un`, with its terminating zero.
const MAX_SOCKET_PATH: usize = 107;

/// Why a directory can't be used.
#[derive(Debug, thiserror::Error)]
#[error("{}: cannot {step}", path.display())]
pub struct DirectoryError {
    path: PathBuf,
    step: String,
    #[source]
    source: io::Error,
}

/// Who may pass through a shim's directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// Its user and root. The agent is root.
    Closed,
    /// Everybody may knock at `control.sock`; the rest is in a directory of its own. The agent is not root.
    Unit,
}

impl Layout {
    /// Where everything but `control.sock` is.
    pub fn private(self, dir: &Path) -> PathBuf {
        match self {
            Self::Closed => dir.to_owned(),
            Self::Unit => dir.join(PRIVATE_DIR),
        }
    }
}

/// What was bound in the directory.
#[derive(Debug)]
pub struct Directory {
    /// The agent's socket.
    pub control: UnixListener,
    /// Envoy's socket.
    pub xds: UnixListener,
    /// Held as long as the process lives.
    pub(super) lock: Flock<File>,
}

impl Directory {
    /// What an earlier program of this process had bound.
    pub(super) fn take_over(control: Passed, xds: Passed, lock: Passed) -> io::Result<Self> {
        // The lock came along with the descriptor, so this waits for nobody.
        let lock = Flock::lock(File::from(lock.claim()?), FlockArg::LockExclusiveNonblock)
            .map_err(|(_, error)| io::Error::from(error))?;
        Ok(Self { control: control.claim()?.into(), xds: xds.claim()?.into(), lock })
    }

    /// Takes the directory over, as root (then it is handed to `uid`:`gid`) or as that user itself.
    pub fn prepare(dir: &Path, layout: Layout, uid: u32, gid: u32) -> Result<Self, DirectoryError> {
        let root = Uid::effective().is_root();
        let failed = |step: &str| {
            let step = step.to_owned();
            |source| DirectoryError { path: dir.to_owned(), step, source }
        };
        let private = layout.private(dir);
        let longest = private.as_os_str().len() + 1 + ADMIN_SOCKET.len().max(CONTROL_SOCKET.len());
        if longest > MAX_SOCKET_PATH {
            let source = io::Error::other(format!(
                "{longest} bytes, at most {MAX_SOCKET_PATH}; use a shorter run directory"
            ));
            return Err(failed("put sockets there, the path is too long")(source));
        }
        let kind = fs::symlink_metadata(dir).map_err(failed("use it as the shim's directory"))?;
        if !kind.is_dir() {
            return Err(failed("use it as the shim's directory")(io::Error::from(
                io::ErrorKind::NotADirectory,
            )));
        }
        // Before anything is touched: a running shim must not notice another that comes too late. The directory
        // itself is the lock, because its user can't put another in its place.
        let lock = File::open(dir).map_err(failed("open it"))?;
        let lock = Flock::lock(lock, FlockArg::LockExclusiveNonblock)
            .map_err(|(_, error)| failed("lock it, another shim runs there")(error.into()))?;
        if root {
            // Ours alone while root works in it: the sidecar's user must not be able to swap a name under our hands.
            chown(dir, Some(0), Some(0)).map_err(failed("own it"))?;
        }
        let (mode, knock) = match layout {
            Layout::Closed => (0o700, 0o600),
            Layout::Unit => (0o711, 0o666),
        };
        fs::set_permissions(dir, Permissions::from_mode(mode)).map_err(failed("set who may enter"))?;
        if private != dir {
            match fs::DirBuilder::new().mode(0o700).create(&private) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                made => made.map_err(failed("make its private directory"))?,
            }
            fs::set_permissions(&private, Permissions::from_mode(0o700))
                .map_err(failed("close its private directory"))?;
        }

        let old = [dir.join(CONTROL_SOCKET), private.join(XDS_SOCKET), private.join(ADMIN_SOCKET)];
        for path in old {
            remove(&path).map_err(failed(&format!("remove the old {}", path.display())))?;
        }
        let bind = |path: PathBuf, mode| {
            let listener = UnixListener::bind(&path)?;
            fs::set_permissions(&path, Permissions::from_mode(mode))?;
            listener.set_nonblocking(true)?;
            Ok(listener)
        };
        let control = bind(dir.join(CONTROL_SOCKET), knock).map_err(failed("bind control.sock"))?;
        let xds = bind(private.join(XDS_SOCKET), 0o600).map_err(failed("bind xds.sock"))?;
        if root {
            for name in [XDS_SOCKET, BOOTSTRAP_FILE, DNS_FILE] {
                hand_over(&dir.join(name), uid, gid).map_err(failed(&format!("hand {name} to uid {uid}")))?;
            }
            // control.sock stays root's: the sidecar's user has no business there.
            chown(dir, Some(uid), Some(gid)).map_err(failed("hand it to the sidecar's user"))?;
        }
        Ok(Self { control, xds, lock })
    }
}

/// Gives a file to the sidecar's user, if it is there.
fn hand_over(path: &Path, uid: u32, gid: u32) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        // The directory was that user's before: a second name of somebody else's file must not become theirs.
        Ok(data) if data.nlink() > 1 => Err(io::Error::other("it has other names (hard links)")),
        Ok(_) => lchown(path, Some(uid), Some(gid)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

/// Removes a file, if it is there.
pub(super) fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        done => done,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_has_one_shim() {
        let dir = tempfile::tempdir().unwrap();
        let (uid, gid) = (nix::unistd::getuid().as_raw(), nix::unistd::getgid().as_raw());
        let first = Directory::prepare(dir.path(), Layout::Closed, uid, gid).unwrap();
        let second = Directory::prepare(dir.path(), Layout::Closed, uid, gid).unwrap_err();
        assert!(second.to_string().contains("another shim runs there"), "{second}");
        drop(first);
        Directory::prepare(dir.path(), Layout::Closed, uid, gid).unwrap();
        assert_eq!(fs::metadata(dir.path()).unwrap().permissions().mode() & 0o777, 0o700);
    }

    #[test]
    fn in_a_unit_everybody_may_knock_and_nobody_may_enter() {
        let dir = tempfile::tempdir().unwrap();
        let (uid, gid) = (nix::unistd::getuid().as_raw(), nix::unistd::getgid().as_raw());
        for _ in 0..2 {
            Directory::prepare(dir.path(), Layout::Unit, uid, gid).unwrap();
            let mode = |path: &str| fs::metadata(dir.path().join(path)).unwrap().permissions().mode() & 0o777;
            assert_eq!((mode(""), mode("control.sock")), (0o711, 0o666));
            assert_eq!((mode("private"), mode("private/xds.sock")), (0o700, 0o600));
        }
    }

    #[test]
    fn says_what_is_wrong_with_a_directory() {
        let dir = tempfile::tempdir().unwrap();
        let missing = Directory::prepare(&dir.path().join("no"), Layout::Closed, 1, 1).unwrap_err();
        assert!(missing.to_string().contains("cannot use it as the shim's directory"), "{missing}");
        let long = dir.path().join("x".repeat(100));
        let error = Directory::prepare(&long, Layout::Closed, 1, 1).unwrap_err();
        assert!(error.to_string().contains("too long"), "{error}");
    }
}
