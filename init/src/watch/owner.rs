//! Who has the say over a namespace's redirect: `ursa-init watch`, as long as it runs. The agent asks before it writes
//! rules and leaves that namespace alone.
//!
//! The claim is a record lock on a file in the run directory, which only root may open: the kernel gives it back when
//! its holder dies, however that happens, and names the holder. (A lock on the namespace itself would need no file, but
//! any process of a pod could take it.)

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

use super::Process;
use crate::error::Error;
use crate::netns::Netns;

/// Why there is no claim.
#[derive(Debug, thiserror::Error)]
pub enum OwnerError {
    /// The namespace can't be told from others.
    #[error(transparent)]
    Namespace(#[from] Error),
    /// The file can't be used.
    #[error("can't {what} {}; is the run directory writable, and are you root?", path.display())]
    File {
        /// What was tried.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Somebody else has it.
    #[error("{0} keeps the redirect of this namespace already: stop that one first")]
    Taken(Process),
}

/// The say over a namespace's redirect, until it is dropped.
#[derive(Debug)]
pub struct Claim {
    _file: File,
}

/// Takes the say over a namespace's redirect.
pub fn claim(run_dir: &Path, netns: &Netns) -> Result<Claim, OwnerError> {
    let path = path(run_dir, netns)?;
    let fail = |what, source| OwnerError::File { what, path: path.clone(), source };
    std::fs::create_dir_all(run_dir).map_err(|source| fail("create", source))?;
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .map_err(|source| fail("open", source))?;
    match fcntl(&file, FcntlArg::F_SETLK(&whole_file())) {
        Ok(_) => Ok(Claim { _file: file }),
        Err(Errno::EAGAIN | Errno::EACCES) => {
            Err(OwnerError::Taken(owner(run_dir, netns)?.unwrap_or_else(|| process(0))))
        }
        Err(errno) => Err(fail("lock", errno.into())),
    }
}

/// Who has it; nobody is the usual case.
pub fn owner(run_dir: &Path, netns: &Netns) -> Result<Option<Process>, OwnerError> {
    let path = path(run_dir, netns)?;
    let fail = |what, source| OwnerError::File { what, path: path.clone(), source };
    let file = match File::open(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file.map_err(|source| fail("open", source))?,
    };
    let mut lock = whole_file();
    fcntl(&file, FcntlArg::F_GETLK(&mut lock)).map_err(|errno| fail("look at the lock of", errno.into()))?;
    let is_free = i32::from(lock.l_type) == libc::F_UNLCK;
    Ok((!is_free).then(|| process(u32::try_from(lock.l_pid).unwrap_or_default())))
}

fn path(run_dir: &Path, netns: &Netns) -> Result<PathBuf, Error> {
    let (device, number) = netns.id()?;
    Ok(run_dir.join(format!("redirect-{device}-{number}.lock")))
}

fn process(pid: u32) -> Process {
    let name = std::fs::read_to_string(format!("/proc/{pid}/comm"));
    Process { pid, name: name.map_or_else(|_| "ursa-init".to_owned(), |name| name.trim().to_owned()) }
}

#[expect(clippy::cast_possible_truncation, reason = "libc's constants are wider than the field they are for")]
const fn whole_file() -> libc::flock {
    libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    }
}
