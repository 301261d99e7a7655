//! The kernel's numbers of cgroups.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use crate::intent::Cgroup;
use crate::plan::Plan;

/// What the kernel compares a socket's cgroup with: the number of its directory. `None` for one that isn't there.
#[derive(Debug, Default)]
pub(crate) struct Cgroups(BTreeMap<Cgroup, Option<u64>>);

impl Cgroups {
    /// Looks up every cgroup of a plan. One that isn't there is no error: nothing can run in it, and the rules of its
    /// neighbours must not wait for it.
    pub(crate) fn resolve(plan: &Plan) -> Self {
        let all = plan.slices();
        // Without the hierarchy none of them is there.
        let root = if all.is_empty() { None } else { root().ok() };
        let number = |slice: &Cgroup| Some(std::fs::metadata(root.as_ref()?.join(slice.path())).ok()?.ino());
        Self(all.into_iter().map(|slice| (slice.clone(), number(slice))).collect())
    }

    /// The number; 0, which no cgroup has, for one that isn't there or wasn't looked up.
    pub(crate) fn id(&self, cgroup: &Cgroup) -> u64 {
        self.0.get(cgroup).copied().flatten().unwrap_or_default()
    }

    /// What is different from before, for the operator.
    pub(crate) fn news(&self, before: &Self) -> String {
        let changed = self.0.iter().filter(|(slice, number)| before.0.get(*slice) != Some(number));
        let one = |(slice, number): (&Cgroup, &Option<u64>)| match number {
            Some(_) => format!("the slice {slice} exists now: what runs in it is redirected"),
            None => format!("the slice {slice} doesn't exist any more: its rules wait for a new one"),
        };
        changed.map(one).collect::<Vec<_>>().join("; ")
    }

    /// The first of a rule's cgroups that was looked for and isn't there: the rule matches nothing.
    pub(crate) fn missing<'a>(&self, mut of: impl Iterator<Item = &'a Cgroup>) -> Option<&'a Cgroup> {
        of.find(|cgroup| self.0.get(*cgroup) == Some(&None))
    }
}

/// What stands beside a rule that waits for its cgroup.
pub(crate) fn waiting(reason: &str, cgroup: &Cgroup) -> String {
    format!("{reason}: waits for slice {cgroup}, which doesn't exist")
}

/// How a cgroup is called of which only the number is left.
const GONE: &str = "gone-";

/// The cgroup of a number, so many levels below the root. One that is gone is told by its number.
pub(crate) fn by_number(number: u64, level: u32) -> Option<Cgroup> {
    fn find(folder: &Path, number: u64, levels: u32) -> Option<PathBuf> {
        if levels == 0 {
            let found = std::fs::metadata(folder).is_ok_and(|metadata| metadata.ino() == number);
            return found.then(|| folder.to_owned());
        }
        let below =
            std::fs::read_dir(folder).ok()?.flatten().filter(|e| e.file_type().is_ok_and(|t| t.is_dir()));
        below.map(|entry| entry.path()).find_map(|path| find(&path, number, levels - 1))
    }
    let found = root().ok().and_then(|root| {
        let path = find(&root, number, level)?;
        path.strip_prefix(&root).ok()?.to_str()?.parse().ok()
    });
    found.or_else(|| gone(number))
}

/// What stands for a cgroup of which only the number is left; 0 where not even that is.
pub(crate) fn gone(number: u64) -> Option<Cgroup> {
    format!("{GONE}{number}").parse().ok()
}

/// Whether [`by_number`] found none.
pub(crate) fn is_gone(cgroup: &Cgroup) -> bool {
    cgroup.path().starts_with(GONE)
}

/// Where the unified hierarchy is mounted.
pub(crate) fn root() -> io::Result<PathBuf> {
    let none = || io::Error::new(io::ErrorKind::NotFound, "no cgroup2 is mounted");
    mount_point(&std::fs::read_to_string("/proc/self/mountinfo")?).ok_or_else(none)
}

/// The mount point of the first cgroup2 (`man 5 proc`: the type follows the hyphen, the mount point is the fifth).
fn mount_point(mounts: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let (mount, filesystem) = line.split_once(" - ")?;
        filesystem.starts_with("cgroup2 ").then(|| mount.split(' ').nth(4).map(PathBuf::from))?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_unified_hierarchy_is_found_beside_the_old_one() {
        let mounts = "31 23 0:27 / /sys/fs/cgroup rw,nosuid shared:8 - tmpfs tmpfs rw\n\
                      32 31 0:28 / /sys/fs/cgroup/unified rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n";
        assert_eq!(mount_point(mounts), Some(PathBuf::from("/sys/fs/cgroup/unified")));
        assert_eq!(mount_point("31 23 0:27 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n"), None);
    }
}
