//! The path of a cgroup below the root of the unified hierarchy.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A cgroup by its path below the cgroup2 root (`ursa.slice/ursa-web.slice`). What runs in it or below it is meant.
///
/// The kernel compares the cgroup's number, not its name: a cgroup that is removed and made again is another one.
/// So name a slice that outlives the service, never the service's own cgroup.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Cgroup(String);

impl Cgroup {
    /// The path, without a slash at the beginning or end.
    pub fn path(&self) -> &str {
        &self.0
    }

    /// How many levels below the root it is.
    pub fn level(&self) -> u32 {
        u32::try_from(self.0.split('/').count()).unwrap_or(u32::MAX)
    }
}

/// The text can't be the path of a cgroup.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is no path of a cgroup below the root of the unified hierarchy, such as `ursa.slice/ursa-web.slice`"
)]
pub struct ParseCgroupError(String);

impl FromStr for Cgroup {
    type Err = ParseCgroupError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let path = text.trim_matches('/');
        let part = |part: &str| !part.is_empty() && part != "." && part != "..";
        let clean = path.chars().all(|c| c.is_ascii_graphic() && !matches!(c, '"' | '\''));
        if path.is_empty() || path.len() > 512 || !clean || !path.split('/').all(part) {
            return Err(ParseCgroupError(text.to_owned()));
        }
        Ok(Self(path.to_owned()))
    }
}

impl TryFrom<String> for Cgroup {
    type Error = ParseCgroupError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<Cgroup> for String {
    fn from(cgroup: Cgroup) -> Self {
        cgroup.0
    }
}

impl fmt::Display for Cgroup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_below_the_root() {
        let slice: Cgroup = "/ursa.slice/ursa-web.slice/".parse().unwrap();
        assert_eq!((slice.path(), slice.level()), ("ursa.slice/ursa-web.slice", 2));
        for wrong in ["", "/", "a//b", "../x", "a/./b", "a b", "a\"b"] {
            assert!(wrong.parse::<Cgroup>().is_err(), "{wrong}");
        }
    }
}
