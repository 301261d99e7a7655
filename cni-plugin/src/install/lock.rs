//! One installer at a time, and one watch.
//!
//! Whoever may open a file may lock it, and a directory of configuration is everybody's to open. So the locks are files of
//! their own in the run directory, which only their owner can open.

use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use nix::fcntl::OFlag;

use super::error::{InstallError, io};

/// More than what is done under a lock takes: a drain is none of it.
const PATIENCE: Duration = Duration::from_secs(30);

/// What is locked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum What {
    /// The configuration, while it is changed.
    Install,
    /// Its watch, as long as that runs.
    Watch,
}

impl What {
    /// The file.
    pub(super) fn path(self, run_dir: &Path) -> PathBuf {
        run_dir.join(match self {
            Self::Install => "cni-install.lock",
            Self::Watch => "cni-watch.lock",
        })
    }
}

/// A lock that is held. Dropping it unlocks.
#[derive(Debug)]
pub(super) struct Lock {
    path: PathBuf,
    #[cfg_attr(not(test), expect(dead_code, reason = "closing it unlocks"))]
    file: File,
}

impl Lock {
    /// Waits for it, but not for ever.
    pub(super) fn hold(run_dir: &Path, what: What) -> Result<Self, InstallError> {
        Self::hold_within(run_dir, what, PATIENCE)
    }

    fn hold_within(run_dir: &Path, what: What, patience: Duration) -> Result<Self, InstallError> {
        let path = what.path(run_dir);
        loop {
            let file = create(run_dir, &path)?;
            let locked = if try_lock(&file, &path)? {
                Some(file)
            } else {
                wait(file, patience).transpose().map_err(io("lock", &path))?
            };
            let Some(file) = locked else {
                return Err(InstallError::Busy { by: holder(&path), path, seconds: patience.as_secs() });
            };
            // The former holder may have removed it.
            if is_at(&file, &path) {
                return Ok(Self { path, file });
            }
        }
    }

    /// None when somebody else holds it.
    pub(super) fn try_hold(run_dir: &Path, what: What) -> Result<Option<Self>, InstallError> {
        let path = what.path(run_dir);
        loop {
            let file = create(run_dir, &path)?;
            if !try_lock(&file, &path)? {
                return Ok(None);
            }
            if is_at(&file, &path) {
                return Ok(Some(Self { path, file }));
            }
        }
    }

    /// Whether somebody else holds it. Changes nothing.
    pub(super) fn is_held(run_dir: &Path, what: What) -> Result<bool, InstallError> {
        let path = what.path(run_dir);
        match open(&path, false) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(io("open", &path)(error)),
            Ok(file) => Ok(!try_lock(&file, &path)?),
        }
    }

    /// Removes its file, and unlocks.
    pub(super) fn remove(self) -> Result<(), InstallError> {
        fs::remove_file(&self.path).map_err(io("remove", &self.path))
    }
}

fn open(path: &Path, create: bool) -> io::Result<File> {
    let flags = OFlag::O_NOFOLLOW.bits();
    OpenOptions::new().read(true).write(true).create(create).mode(0o600).custom_flags(flags).open(path)
}

fn create(run_dir: &Path, path: &Path) -> Result<File, InstallError> {
    DirBuilder::new().recursive(true).mode(0o755).create(run_dir).map_err(io("create", run_dir))?;
    let file = open(path, true).map_err(io("open", path))?;
    let meta = file.metadata().map_err(io("inspect", path))?;
    if meta.uid() != nix::unistd::geteuid().as_raw() || meta.mode() & 0o077 != 0 {
        return Err(InstallError::Unusable {
            path: path.to_owned(),
            why: format!(
                "user {} can lock it (mode {:o}), and so keep installers waiting",
                meta.uid(),
                meta.mode() & 0o777
            ),
            next: "Remove it, and see that only root can write to its directory.",
        });
    }
    Ok(file)
}

fn try_lock(file: &File, path: &Path) -> Result<bool, InstallError> {
    match file.try_lock() {
        Ok(()) => Ok(true),
        Err(TryLockError::WouldBlock) => Ok(false),
        Err(TryLockError::Error(error)) => Err(io("lock", path)(error)),
    }
}

/// Waits on a thread of its own: the system knows no deadline for that. A thread that comes too late closes the file.
fn wait(file: File, patience: Duration) -> Option<io::Result<File>> {
    let (tell, told) = mpsc::channel();
    thread::spawn(move || {
        let locked = file.lock().map(|()| file);
        let _ = tell.send(locked);
    });
    told.recv_timeout(patience).ok()
}

fn is_at(file: &File, path: &Path) -> bool {
    let id = |meta: fs::Metadata| (meta.dev(), meta.ino());
    let there = fs::symlink_metadata(path).map(id);
    matches!((file.metadata().map(id), there), (Ok(own), Ok(there)) if own == there)
}

/// The process that holds the lock, where the kernel's table says it: `1: FLOCK ADVISORY WRITE 4711 00:1a:23 0 EOF`.
fn holder(path: &Path) -> Option<String> {
    let inode = fs::metadata(path).ok()?.ino().to_string();
    let table = fs::read_to_string("/proc/locks").ok()?;
    let of = |line: &str| {
        let mut words = line.split_ascii_whitespace().skip(1);
        let held = words.next()? == "FLOCK";
        let pid = words.nth(2)?.to_owned();
        (held && words.next()?.rsplit(':').next()? == inode).then_some(pid)
    };
    table.lines().find_map(of)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Barrier;

    #[test]
    fn it_is_waited_for_and_not_for_ever() {
        let dir = tempfile::tempdir().unwrap();
        let run_dir = dir.path().join("run/ursa");
        let held = Lock::hold(&run_dir, What::Install).unwrap();
        assert!(Lock::try_hold(&run_dir, What::Install).unwrap().is_none());
        assert!(
            Lock::is_held(&run_dir, What::Install).unwrap() && !Lock::is_held(&run_dir, What::Watch).unwrap()
        );
        let error =
            Lock::hold_within(&run_dir, What::Install, Duration::from_millis(1)).unwrap_err().to_string();
        for part in ["cni-install.lock", &format!("process {}", std::process::id()), "end it"] {
            assert!(error.contains(part), "{part}: {error}");
        }
        let begin = Barrier::new(2);
        thread::scope(|scope| {
            let next = scope.spawn(|| {
                begin.wait();
                Lock::hold(&run_dir, What::Install).unwrap()
            });
            begin.wait();
            // Whoever waits gets a lock of the file that is there, not of the one that was.
            held.remove().unwrap();
            let next = next.join().unwrap();
            assert!(is_at(&next.file, &next.path));
        });
        assert_eq!(fs::read_dir(&run_dir).unwrap().count(), 1);
    }

    #[test]
    fn one_that_others_can_open_is_refused() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();
        let path = What::Install.path(dir.path());
        drop(Lock::hold(dir.path(), What::Install).unwrap());
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        let error = Lock::hold(dir.path(), What::Install).unwrap_err().to_string();
        assert!(error.contains("644") && error.contains("Remove it"), "{error}");
    }
}
