//! Which file of a configuration directory is the network that pods get.
//!
//! As kubelet, containerd and CRI-O choose: the first valid one by name, in the directory itself.

use std::fs;
use std::io;
use std::path::Path;

use super::conflist::{Conf, ConfError, Conflist};

/// What a file's name promises.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A list of plugins: `.conflist`.
    List,
    /// A single plugin: `.conf` and `.json`.
    Single,
}

impl Kind {
    /// What the name promises; none where a runtime wouldn't look into the file.
    pub fn of(name: &str) -> Option<Self> {
        match Path::new(name).extension()?.to_str()? {
            "conflist" => Some(Self::List),
            "conf" | "json" => Some(Self::Single),
            _ => None,
        }
    }
}

/// A file of the directory.
#[derive(Debug, Clone)]
pub struct ConfFile {
    /// Its name.
    pub name: String,
    /// What its name promises.
    pub kind: Kind,
    /// Its text, or why it has none.
    pub text: Result<String, String>,
}

impl ConfFile {
    /// Reads one, whatever its name: what isn't called `.conflist` is a single plugin.
    pub fn read(path: &Path) -> Self {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let text = fs::read_to_string(path).map_err(|error| format!("it can't be read: {error}"));
        Self { kind: Kind::of(&name).unwrap_or(Kind::Single), name, text }
    }

    /// Whether a plugin is in its list (`chained`), or is all that it holds.
    pub fn holds(&self, own_type: &str, chained: bool) -> bool {
        let Ok(text) = &self.text else { return false };
        match self.kind {
            // As libcni reads it, a list is a list only under its name; to find an entry, that doesn't matter.
            _ if chained => Conflist::parse(text).is_ok_and(|list| list.has(own_type)),
            Kind::List => Conflist::parse(text).is_ok_and(|list| list.is_only(own_type)),
            Kind::Single => Conf::parse(text).is_ok_and(|conf| conf.plugin_type() == own_type),
        }
    }

    /// Why it can't be a network; nothing when it can.
    pub fn problem(&self) -> Option<String> {
        let text = match &self.text {
            Ok(text) => text,
            Err(why) => return Some(why.clone()),
        };
        let read: Result<(), ConfError> = match self.kind {
            Kind::List => Conflist::parse(text).map(drop),
            Kind::Single => Conf::parse(text).map(drop),
        };
        read.err().map(|error| error.to_string())
    }

    /// The types of its plugins; none when it isn't valid.
    pub fn types(&self) -> Vec<String> {
        let text = self.text.as_deref().unwrap_or_default();
        match self.kind {
            Kind::List => {
                Conflist::parse(text).map(|l| l.types().map(str::to_owned).collect()).unwrap_or_default()
            }
            Kind::Single => Conf::parse(text).map(|c| vec![c.plugin_type().to_owned()]).unwrap_or_default(),
        }
    }

    /// Whether pods get their network from it: valid, and more than the loopback or a plugin of ours alone.
    fn is_base(&self, own_type: &str) -> bool {
        self.types().iter().any(|kind| kind != "loopback" && kind != own_type)
    }
}

/// Whether a file is a valid single plugin.
pub fn is_conf(path: &Path) -> bool {
    fs::read_to_string(path).is_ok_and(|text| Conf::parse(&text).is_ok())
}

/// Whether a file is a valid list of plugins.
pub fn is_conflist(path: &Path) -> bool {
    fs::read_to_string(path).is_ok_and(|text| Conflist::parse(&text).is_ok())
}

/// The directory's files as a runtime sees them, sorted by name.
#[derive(Debug, Clone, Default)]
pub struct Directory {
    /// The files with a name that a runtime looks into.
    pub files: Vec<ConfFile>,
}

impl Directory {
    /// Reads the directory itself, nothing below.
    pub fn read(dir: &Path) -> io::Result<Self> {
        let mut files = Vec::new();
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            let Ok(name) = entry.file_name().into_string() else { continue };
            let Some(kind) = Kind::of(&name) else { continue };
            // Follows links, as runtimes do.
            let text = match fs::metadata(entry.path()) {
                Ok(meta) if meta.is_dir() => continue,
                Ok(_) => {
                    fs::read_to_string(entry.path()).map_err(|error| format!("it can't be read: {error}"))
                }
                Err(error) => Err(format!("it can't be read: {error}")),
            };
            files.push(ConfFile { name, kind, text });
        }
        files.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(Self { files })
    }

    /// The file that the runtime would choose.
    pub fn chosen(&self, own_type: &str) -> Option<&ConfFile> {
        self.files.iter().find(|file| file.is_base(own_type))
    }

    /// A file by its name.
    pub fn named(&self, name: &str) -> Option<&ConfFile> {
        self.files.iter().find(|file| file.name == name)
    }

    /// The files in front of the chosen one that can't be used, and why: containerd stops at the first such file.
    pub fn broken(&self) -> impl Iterator<Item = (&str, String)> {
        self.files.iter().filter_map(|file| Some((file.name.as_str(), file.problem()?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_the_first_that_gives_pods_a_network() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
        write("00-notes.txt", "{}");
        write("01-broken.conflist", "{");
        write("02-list-in-conf.conf", r#"{"name":"n","plugins":[{"type":"a"}]}"#);
        write("03-lo.conf", r#"{"type":"loopback"}"#);
        write("04-own.conflist", r#"{"name":"n","plugins":[{"type":"ursa-cni"}]}"#);
        fs::create_dir(dir.path().join("05-dir.conf")).unwrap();
        write("20-late.conf", r#"{"type":"flannel"}"#);
        write("10-base.conflist", r#"{"name":"n","plugins":[{"type":"calico"},{"type":"ursa-cni"}]}"#);
        let found = Directory::read(dir.path()).unwrap();
        assert_eq!(found.chosen("ursa-cni").unwrap().name, "10-base.conflist");
        let broken: Vec<_> = found.broken().map(|(name, _)| name).collect();
        assert_eq!(broken, ["01-broken.conflist", "02-list-in-conf.conf"]);
    }
}
