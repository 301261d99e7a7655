//! The kernel's numbers of cgroups.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use crate::error::{Error, Hint};
use crate::intent::Cgroup;
use crate::plan::{Match, Plan};

/// What the kernel compares a socket's cgroup with: the number of its directory.
#[derive(Debug, Default)]
pub(crate) struct Cgroups(BTreeMap<Cgroup, u64>);

impl Cgroups {
    /// Looks up every cgroup of a plan.
    pub(crate) fn resolve(plan: &Plan) -> Result<Self, Error> {
        let rules = plan.chains.iter().flat_map(|chain| &chain.rules);
        let wanted = rules.flat_map(|rule| &rule.matches).filter_map(|m| match m {
            Match::Cgroup(cgroup) => Some(cgroup),
            _ => None,
        });
        let mut found = BTreeMap::new();
        let mut root = None;
        for cgroup in wanted {
            if found.contains_key(cgroup) {
                continue;
            }
            let root = match &root {
                Some(root) => root,
                None => root.insert(cgroup2_root()?),
            };
            let path = root.join(cgroup.path());
            let number = std::fs::metadata(&path).map(|m| m.ino()).map_err(|source| Error::Cgroup {
                path,
                hint: Hint(
                    "a workload's slice must exist before its rules: `systemctl start NAME.slice`, and run the \
                     service with Slice=NAME.slice",
                ),
                source,
            })?;
            found.insert(cgroup.clone(), number);
        }
        Ok(Self(found))
    }

    /// The number; 0, which no cgroup has, for what wasn't looked up.
    pub(crate) fn id(&self, cgroup: &Cgroup) -> u64 {
        self.0.get(cgroup).copied().unwrap_or_default()
    }
}

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
    let found = cgroup2_root().ok().and_then(|root| {
        let path = find(&root, number, level)?;
        path.strip_prefix(&root).ok()?.to_str()?.parse().ok()
    });
    found.or_else(|| format!("gone-{number}").parse().ok())
}

/// Where the unified hierarchy is mounted.
fn cgroup2_root() -> Result<PathBuf, Error> {
    let path = Path::new("/proc/self/mountinfo");
    let fail = |source| Error::Cgroup {
        path: path.to_owned(),
        hint: Hint("slices need the unified cgroup hierarchy (cgroup2); tell workloads apart by uid instead"),
        source,
    };
    let mounts = std::fs::read_to_string(path).map_err(fail)?;
    mount_point(&mounts).ok_or_else(|| fail(io::Error::new(io::ErrorKind::NotFound, "no cgroup2 is mounted")))
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
