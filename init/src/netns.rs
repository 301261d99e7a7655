//! Working in another network namespace, and never by accident in the machine's own.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::thread;

use nix::sched::{CloneFlags, setns};

use crate::error::{Error, Hint};

/// An open network namespace. Opening needs rights that entering doesn't, so a program opens first and drops
/// its capabilities then.
#[derive(Debug)]
pub struct Netns {
    file: File,
    path: std::path::PathBuf,
}

impl Netns {
    /// Opens the namespace behind a path such as `/run/netns/web` or `/proc/4711/ns/net`.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let fail = |what, source: io::Error| {
            let hint = Hint(match source.kind() {
                io::ErrorKind::NotFound => {
                    "it doesn't exist (any more); `ip netns list` shows the named ones"
                }
                io::ErrorKind::PermissionDenied => {
                    "needs root, and CAP_SYS_PTRACE for /proc/PID/ns/net of another user"
                }
                _ => "",
            });
            Error::Namespace { what, path: path.to_owned(), hint, source }
        };
        let file = File::open(path).map_err(|e| fail("open", e))?;
        let kind = nix::sys::statfs::fstatfs(&file).map_err(|e| fail("inspect", e.into()))?.filesystem_type();
        // The kernel's own check in setns would call every wrong file just "invalid argument".
        if kind != nix::sys::statfs::NSFS_MAGIC {
            let not_ns = io::Error::new(io::ErrorKind::InvalidInput, "the file is no namespace");
            return Err(fail("use", not_ns));
        }
        Ok(Self { file, path: path.to_owned() })
    }

    /// Opens the calling thread's namespace.
    pub fn current() -> Result<Self, Error> {
        Self::open(Path::new("/proc/thread-self/ns/net"))
    }

    /// Whether this is the namespace of PID 1: the machine's own.
    pub fn is_host(&self) -> Result<bool, Error> {
        let is_init = self.is_that_of("/proc/1/ns/net");
        if is_init.is_ok() {
            return is_init;
        }
        // Looking at PID 1's namespace needs CAP_SYS_PTRACE or as many capabilities as PID 1; looking at its
        // view of the network doesn't, and that view is one file per namespace.
        let id = |path: &str| std::fs::metadata(path).map(|m| (m.dev(), m.ino()));
        match (id("/proc/1/net/dev"), self.run(|| id("/proc/thread-self/net/dev"))?) {
            (Ok(init), Ok(this)) => Ok(init == this),
            _ => is_init,
        }
    }

    /// What tells this namespace from others as long as it lives: its device and number.
    pub fn id(&self) -> Result<(u64, u64), Error> {
        let metadata = self.file.metadata().map_err(|source| Error::Namespace {
            what: "inspect",
            path: self.path.clone(),
            hint: Hint(""),
            source,
        })?;
        Ok((metadata.dev(), metadata.ino()))
    }

    /// Whether this is the namespace that the calling process runs in.
    pub fn is_own(&self) -> Result<bool, Error> {
        self.is_that_of("/proc/self/ns/net")
    }

    fn is_that_of(&self, other: &str) -> Result<bool, Error> {
        let inspect = |path: &Path, source| Error::Namespace {
            what: "inspect",
            path: path.to_owned(),
            hint: Hint("needs root and /proc; without them it can't be told apart from the machine's own"),
            source,
        };
        let mine = self.file.metadata().map_err(|e| inspect(&self.path, e))?;
        let other = Path::new(other);
        let other = std::fs::metadata(other).map_err(|e| inspect(other, e))?;
        Ok((other.dev(), other.ino()) == (mine.dev(), mine.ino()))
    }

    /// Fails when the namespace belongs to another user namespace than the caller's, as that of a pod with
    /// `hostUsers: false` does. The kernel would read the rules' user ids as that namespace's, and a proxy that has no
    /// id there would look like 'nobody': its own connections would be sent back to it.
    pub fn refuse_other_users(&self) -> Result<(), Error> {
        let fail = |source: io::Error| Error::Namespace {
            what: "inspect the owner of",
            path: self.path.clone(),
            hint: Hint("needs /proc"),
            source,
        };
        let owner = match owner(&self.file) {
            Ok(owner) => owner,
            // The owner is an ancestor of the caller's user namespace, or the kernel is older than 4.9.
            Err(nix::errno::Errno::EPERM | nix::errno::Errno::ENOTTY) => return Ok(()),
            Err(errno) => return Err(fail(errno.into())),
        };
        let id = |meta: std::fs::Metadata| (meta.dev(), meta.ino());
        let theirs = owner.metadata().map(id).map_err(fail)?;
        let ours = std::fs::metadata("/proc/self/ns/user").map(id).map_err(fail)?;
        if theirs == ours { Ok(()) } else { Err(Error::OtherUsers(self.path.clone())) }
    }

    /// Fails when this is the machine's own namespace.
    pub fn refuse_host(&self) -> Result<(), Error> {
        if self.is_host()? { Err(Error::HostNamespace(self.path.clone())) } else { Ok(()) }
    }

    /// Fails when this is the machine's own namespace or the caller's.
    pub fn refuse_own_or_host(&self) -> Result<(), Error> {
        if self.is_own()? { Err(Error::HostNamespace(self.path.clone())) } else { self.refuse_host() }
    }

    /// The addresses of its interfaces.
    pub fn addresses(&self) -> Result<BTreeSet<IpAddr>, Error> {
        let list = || -> nix::Result<BTreeSet<IpAddr>> {
            let of = |interface: nix::ifaddrs::InterfaceAddress| {
                let address = interface.address?;
                let v4 = address.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip()));
                v4.or_else(|| address.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip())))
            };
            Ok(nix::ifaddrs::getifaddrs()?.filter_map(of).collect())
        };
        self.run(list)?.map_err(|errno| Error::Namespace {
            what: "list the addresses of",
            path: self.path.clone(),
            hint: Hint(""),
            source: errno.into(),
        })
    }

    /// Fails when none of a pod's addresses is in the namespace: it isn't that pod's, and rules in another's would be
    /// worse than none.
    pub fn refuse_strangers(&self, expected: &[IpAddr]) -> Result<(), Error> {
        let found = self.addresses()?;
        if expected.iter().any(|address| found.contains(address)) {
            return Ok(());
        }
        let list = |addresses: Vec<String>| {
            if addresses.is_empty() { "none".to_owned() } else { addresses.join(", ") }
        };
        Err(Error::Stranger {
            path: self.path.clone(),
            expected: list(expected.iter().map(ToString::to_string).collect()),
            found: list(found.iter().map(ToString::to_string).collect()),
        })
    }

    /// Runs `f` inside, on a thread of its own: a pool's thread must never keep a foreign namespace. Where the caller is
    /// inside already that takes no right.
    pub fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> Result<T, Error> {
        thread::scope(|scope| {
            let work = || {
                if self.is_that_of("/proc/thread-self/ns/net")? {
                    return Ok(f());
                }
                setns(self.file.as_fd(), CloneFlags::CLONE_NEWNET).map_err(|errno| Error::Namespace {
                    what: "enter",
                    path: self.path.clone(),
                    hint: Hint("needs CAP_SYS_ADMIN here and in the namespace's user namespace: run as root"),
                    source: errno.into(),
                })?;
                Ok(f())
            };
            let spawned = thread::Builder::new().name("netns".to_owned()).spawn_scoped(scope, work);
            let handle = spawned.map_err(|source| Error::Namespace {
                what: "start a thread for",
                path: self.path.clone(),
                hint: Hint("the limit of tasks is reached"),
                source,
            })?;
            handle.join().unwrap_or_else(|panic| {
                let text = panic
                    .downcast_ref::<&str>()
                    .map(ToString::to_string)
                    .or_else(|| panic.downcast_ref::<String>().cloned());
                Err(Error::Panicked(text.unwrap_or_else(|| "no message".to_owned())))
            })
        })
    }
}

/// The user namespace that a namespace belongs to (`man 2 NS_GET_USERNS`).
#[expect(unsafe_code, reason = "neither std nor nix wraps NS_GET_USERNS")]
fn owner(namespace: &File) -> nix::Result<File> {
    use std::os::fd::{AsRawFd as _, FromRawFd as _};
    // SAFETY: the descriptor is open during the call, and the request takes no argument.
    let fd = unsafe { nix::libc::ioctl(namespace.as_raw_fd(), nix::libc::NS_GET_USERNS) };
    let fd = nix::errno::Errno::result(fd)?;
    // SAFETY: the kernel has just made this descriptor, and nobody else knows it.
    Ok(unsafe { File::from_raw_fd(fd) })
}

/// Runs `f` in the network namespace at `path`.
pub fn in_netns<T: Send>(path: &Path, f: impl FnOnce() -> T + Send) -> Result<T, Error> {
    Netns::open(path)?.run(f)
}
