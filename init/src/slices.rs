//! The slices by which workloads are told apart, while they come and go.
//!
//! The kernel compares a cgroup's number, so a rule for a slice that doesn't exist can't be written, and one for a slice
//! that was made again matches no longer. Neither opens anything that could be closed: no process can be in a slice that
//! doesn't exist, what arrives at the workload's ports is known by the port, and mesh addresses are refused to
//! whoever isn't told apart. What remains is the moment between a slice's making and the rule for it. [`Follow`] keeps
//! it short: the file system of cgroups tells of a new folder at once.

mod start;

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, InotifyEvent, WatchDescriptor};
use serde::Serialize;

use crate::cgroup;
use crate::intent::Cgroup;
use crate::plan::Plan;
pub use start::start;

/// A slice that a plan names and that doesn't exist.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Missing {
    /// The slice.
    pub slice: Cgroup,
    /// What the system said.
    pub why: String,
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { slice, why } = self;
        write!(
            f,
            "the slice {slice} doesn't exist ({why}): what its workload opens can't be told apart until it does; \
             everything else is in place. "
        )?;
        match unit(slice) {
            Some(unit) => {
                write!(f, "`systemctl start {unit}`, and run the workload's service with Slice={unit}")
            }
            None => f.write_str("Start what makes it"),
        }
    }
}

/// The slices of a plan that don't exist now.
pub fn missing(plan: &Plan) -> Vec<Missing> {
    let all = plan.slices();
    if all.is_empty() {
        return Vec::new();
    }
    let root = cgroup::root();
    let why = |slice: &Cgroup| match &root {
        Ok(root) => {
            let path = root.join(slice.path());
            std::fs::metadata(&path).err().map(|error| format!("{}: {error}", path.display()))
        }
        Err(error) => Some(format!("{error}; slices need the unified hierarchy, use uids without it")),
    };
    all.into_iter().filter_map(|slice| Some(Missing { slice: slice.clone(), why: why(slice)? })).collect()
}

/// The unit that systemd would make this cgroup for: `a.slice/a-b.slice` is that of `a-b.slice`. `None` for a cgroup
/// that isn't systemd's slice.
pub fn unit(slice: &Cgroup) -> Option<&str> {
    let unit = slice.path().rsplit('/').next()?;
    let name = unit.strip_suffix(".slice")?;
    let mut ends = name.match_indices('-').map(|(at, _)| at).chain([name.len()]);
    let path: Vec<_> = ends.by_ref().map(|end| format!("{}.slice", &name[..end])).collect();
    (!name.is_empty() && path.join("/") == slice.path()).then_some(unit)
}

/// Folders that come and go below those that exist.
const NEWS: AddWatchFlags = AddWatchFlags::IN_CREATE
    .union(AddWatchFlags::IN_DELETE)
    .union(AddWatchFlags::IN_MOVE)
    .union(AddWatchFlags::IN_ONLYDIR);

/// Tells when a slice is made or removed. Its descriptor becomes readable with every folder that comes or goes beside
/// one of them.
#[derive(Debug)]
pub struct Follow {
    inotify: Inotify,
    followed: Mutex<Followed>,
}

#[derive(Debug, Default)]
struct Followed {
    root: PathBuf,
    slices: BTreeSet<Cgroup>,
    /// What is waited for in each folder.
    names: BTreeMap<WatchDescriptor, BTreeSet<OsString>>,
}

impl Follow {
    /// Follows none yet. The system has few of these for each user: make one only where there are slices.
    pub fn new() -> io::Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
        Ok(Self { inotify, followed: Mutex::default() })
    }

    /// From now on the slices of this plan count. Follow first and look then: what comes in between is told.
    pub fn plan(&self, plan: &Plan) -> io::Result<()> {
        let slices = plan.slices().into_iter().cloned().collect();
        let root = if plan.slices().is_empty() { PathBuf::new() } else { cgroup::root()? };
        self.follow(root, slices)
    }

    fn follow(&self, root: PathBuf, slices: BTreeSet<Cgroup>) -> io::Result<()> {
        let mut followed = self.lock();
        if (&followed.root, &followed.slices) == (&root, &slices) {
            return Ok(());
        }
        for at in std::mem::take(&mut followed.names).into_keys() {
            let _ = self.inotify.rm_watch(at); // its folder may be gone
        }
        (followed.root, followed.slices) = (root, slices);
        let done = followed.watch(&self.inotify);
        if done.is_err() {
            followed.slices.clear(); // to be tried again
        }
        done
    }

    /// Takes what was told; whether a slice may have come or gone.
    pub fn changed(&self) -> io::Result<bool> {
        let mut followed = self.lock();
        let mut news = false;
        loop {
            match self.inotify.read_events() {
                Ok(events) => news |= events.iter().filter(|event| followed.takes(event)).count() > 0,
                Err(Errno::EAGAIN) => break,
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        if news {
            followed.watch(&self.inotify)?;
        }
        Ok(news)
    }

    /// What is followed is right after every step, also if somebody died in between.
    fn lock(&self) -> MutexGuard<'_, Followed> {
        self.followed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Followed {
    /// Watches each folder on the way to each slice, as far as they exist. A folder is watched before the next one is
    /// looked for, so that none comes unseen.
    fn watch(&mut self, inotify: &Inotify) -> io::Result<()> {
        for slice in &self.slices {
            let mut folder = self.root.clone();
            for part in Path::new(slice.path()) {
                match inotify.add_watch(&folder, NEWS) {
                    Ok(at) => self.names.entry(at).or_default().insert(part.to_owned()),
                    // It went, or isn't there yet: the folder above tells when it comes.
                    Err(Errno::ENOENT) if folder != self.root => break,
                    Err(errno) => return Err(errno.into()),
                };
                folder.push(part);
            }
        }
        Ok(())
    }

    /// Whether the event is about one of the folders that are waited for.
    fn takes(&mut self, event: &InotifyEvent) -> bool {
        let lost = event.mask.contains(AddWatchFlags::IN_Q_OVERFLOW);
        let waits = |name: &OsStr| self.names.get(&event.wd).is_some_and(|names| names.contains(name));
        let news = lost || event.name.as_deref().is_some_and(waits);
        if event.mask.contains(AddWatchFlags::IN_IGNORED) {
            self.names.remove(&event.wd); // the folder is gone
        }
        news
    }
}

impl AsFd for Follow {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inotify.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn systemd_makes_a_slice_where_its_name_says() {
        let unit = |path: &str| super::unit(&path.parse().unwrap()).map(str::to_owned);
        assert_eq!(unit("ursa.slice"), Some("ursa.slice".to_owned()));
        assert_eq!(unit("ursa.slice/ursa-web.slice/ursa-web-a.slice"), Some("ursa-web-a.slice".to_owned()));
        for none in ["ursa.slice/web.slice", "ursa-web.slice", "system.slice/web.service", "web", ".slice"] {
            assert_eq!(unit(none), None, "{none}");
        }
    }

    #[test]
    fn what_comes_and_goes_is_told_and_nothing_else() {
        let root = tempfile::tempdir().unwrap();
        let at = |path: &str| root.path().join(path);
        let follow = Follow::new().unwrap();
        let slices = |path: &str| BTreeSet::from([path.parse().unwrap()]);
        follow.follow(root.path().to_owned(), slices("before.slice")).unwrap();
        follow.follow(root.path().to_owned(), slices("a.slice/a-b.slice")).unwrap();
        assert!(!follow.changed().unwrap());
        std::fs::create_dir(at("other.slice")).unwrap();
        std::fs::create_dir(at("before.slice")).unwrap();
        assert!(!follow.changed().unwrap(), "somebody else's, and one that isn't followed any more");
        // Both at once: the inner one comes before the outer one can be watched.
        std::fs::create_dir_all(at("a.slice/a-b.slice")).unwrap();
        assert!(follow.changed().unwrap());
        for _ in 0..3 {
            std::fs::remove_dir(at("a.slice/a-b.slice")).unwrap();
            assert!(follow.changed().unwrap());
            std::fs::create_dir(at("a.slice/a-b.slice")).unwrap();
            assert!(follow.changed().unwrap());
            std::fs::create_dir(at("a.slice/a-b.slice/web.service")).unwrap();
            std::fs::remove_dir(at("a.slice/a-b.slice/web.service")).unwrap();
            assert!(!follow.changed().unwrap(), "below it nothing matters");
            std::fs::remove_dir_all(at("a.slice")).unwrap();
            assert!(follow.changed().unwrap());
            std::fs::create_dir(at("a.slice")).unwrap();
            assert!(follow.changed().unwrap());
            std::fs::create_dir(at("a.slice/a-b.slice")).unwrap();
            assert!(follow.changed().unwrap(), "in a folder that was made again");
        }
    }
}
