//! A file per attachment of a meshed container, `cni/CONTAINER/POSITION:NETWORK:IFNAME` below the run directory: written
//! before anything is done for it, removed when it is gone.
//!
//! An attachment is a container's place in a network, by the specification told apart by network, container and
//! interface. Rules and sidecar are the container's: they are as the first attachment described them, and stay until the
//! last one is gone. DEL and CHECK go by these files and not by what a pod's annotations say by then; an agent that was
//! away sees by them who has gone. A runtime never makes two calls for the same container at once, so that nothing here
//! is locked.

use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use crate::call::Call;

/// A container's place in a network.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Attachment {
    /// `CNI_CONTAINERID`.
    pub container_id: String,
    /// The network's name. It and the interface are empty where the agent found the pod by itself.
    pub network: String,
    /// `CNI_IFNAME`.
    pub ifname: String,
}

impl Attachment {
    /// Whether the agent found the pod by itself, and nobody knows by which network it came.
    pub fn is_found(&self) -> bool {
        self.network.is_empty() && self.ifname.is_empty()
    }
}

/// An attachment on record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Which.
    pub attachment: Attachment,
    /// Attachments come one after the other; the first has 0 as long as none before it has gone.
    position: u32,
}

impl Record {
    /// Reads a file's name.
    fn parse(container: &str, name: &str) -> Option<Self> {
        let (position, rest) = name.split_once(':')?;
        // An interface's name has no colon.
        let (network, ifname) = rest.rsplit_once(':')?;
        let attachment = Attachment {
            container_id: container.to_owned(),
            network: network.to_owned(),
            ifname: ifname.to_owned(),
        };
        Some(Self { attachment, position: position.parse().ok()? })
    }

    fn file_name(&self) -> String {
        format!("{}:{}:{}", self.position, self.attachment.network, self.attachment.ifname)
    }
}

/// The records of a machine.
#[derive(Debug, Clone)]
pub struct Records {
    dir: PathBuf,
}

impl Records {
    /// Those below this run directory.
    pub fn below(run_dir: &Path) -> Self {
        Self { dir: run_dir.join("cni") }
    }

    /// Where they are.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Every container that has one, in order.
    pub fn containers(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.dir).into_iter().flatten().flatten();
        let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
        let mut names: Vec<_> = names.filter(|name| !self.of(name).is_empty()).collect();
        names.sort();
        names
    }

    /// The attachments of a container, the first one first.
    pub fn of(&self, container: &str) -> Vec<Record> {
        self.list(container).unwrap_or_default()
    }

    fn list(&self, container: &str) -> io::Result<Vec<Record>> {
        let dir = self.dir_of(container)?;
        let mut records = Vec::new();
        for entry in fs::read_dir(dir)? {
            let name = entry?.file_name();
            // Unfinished ones begin with a dot, which is no position.
            records.extend(name.to_str().and_then(|name| Record::parse(container, name)));
        }
        records.sort_by_key(|record| record.position);
        Ok(records)
    }

    /// Whether a container has one.
    pub fn has(&self, container: &str) -> bool {
        !self.of(container).is_empty()
    }

    /// Whether a container surely has none (any more). What can't be looked at is taken to be there.
    pub fn has_none(&self, container: &str) -> bool {
        match self.list(container) {
            Ok(records) => records.is_empty(),
            Err(error) => error.kind() == io::ErrorKind::NotFound,
        }
    }

    /// What is known of an attachment; `None` when its file can't be read.
    pub fn read(&self, record: &Record) -> Option<Call> {
        let path = self.dir_of(&record.attachment.container_id).ok()?.join(record.file_name());
        serde_json::from_slice(&fs::read(path).ok()?).ok()
    }

    /// Notes that something is done for an attachment, or done anew.
    pub fn write(&self, call: &Call) -> io::Result<()> {
        let attachment = call.attachment();
        if attachment.network.contains('/') || attachment.ifname.contains(['/', ':']) {
            let why = format!("network {:?} or interface {:?}", attachment.network, attachment.ifname);
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{why} has `/` or `:` in its name"),
            ));
        }
        let dir = self.dir_of(&call.container_id)?;
        let mut builder = fs::DirBuilder::new();
        builder.recursive(true).mode(0o700).create(&dir)?;
        let there = self.list(&call.container_id)?;
        let known = there.iter().find(|record| record.attachment == attachment).map(|record| record.position);
        let next = there.last().map_or(0, |last| last.position.saturating_add(1));
        let record = Record { attachment, position: known.unwrap_or(next) };
        let temporary = dir.join(format!(".{}", std::process::id()));
        let mut file =
            fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
        file.write_all(&serde_json::to_vec(call)?)?;
        fs::rename(&temporary, dir.join(record.file_name()))
    }

    /// An attachment is gone.
    pub fn remove(&self, record: &Record) -> io::Result<()> {
        let container = &record.attachment.container_id;
        let path = self.dir_of(container)?.join(record.file_name());
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        if self.has_none(container) { self.remove_all(container) } else { Ok(()) }
    }

    /// Nothing is left of a container.
    pub fn remove_all(&self, container: &str) -> io::Result<()> {
        match fs::remove_dir_all(self.dir_of(container)?) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    fn dir_of(&self, container: &str) -> io::Result<PathBuf> {
        if container.is_empty() || container.starts_with('.') || container.contains('/') {
            let why = format!("the container's id {container:?} is no name of a directory");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        }
        Ok(self.dir.join(container))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test that can't go on has failed")]
mod tests {
    use super::*;
    use crate::network::{Network, PluginConfig};

    fn call(container: &str, network: &str, ifname: &str) -> Call {
        let network = Network { name: network.to_owned(), ..Network::default() };
        Call {
            container_id: container.to_owned(),
            ifname: ifname.to_owned(),
            ips: vec!["10.0.0.9".to_owned()],
            config: PluginConfig { network, ..PluginConfig::default() },
            ..Call::default()
        }
    }

    fn names(records: &Records, container: &str) -> Vec<(String, String)> {
        let attachments = records.of(container).into_iter().map(|record| record.attachment);
        attachments.map(|attachment| (attachment.network, attachment.ifname)).collect()
    }

    #[test]
    fn a_container_is_there_until_its_last_attachment_goes() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::below(dir.path());
        assert!(records.has_none("c1") && !records.has("c1"));
        for (network, ifname) in [("pods", "eth0"), ("a:b", "net1"), ("pods", "eth1"), ("", "")] {
            records.write(&call("c1", network, ifname)).unwrap();
        }
        // Again: it keeps its place.
        records.write(&call("c1", "pods", "eth0")).unwrap();
        let pair = |network: &str, ifname: &str| (network.to_owned(), ifname.to_owned());
        let expected = [pair("pods", "eth0"), pair("a:b", "net1"), pair("pods", "eth1"), pair("", "")];
        assert_eq!(names(&records, "c1"), expected);
        assert_eq!(records.containers(), ["c1"]);
        let all = records.of("c1");
        assert_eq!(records.read(&all[1]), Some(call("c1", "a:b", "net1")));
        for (gone, record) in all.iter().enumerate() {
            assert!(records.has("c1"), "{gone} of {} are gone", all.len());
            records.remove(record).unwrap();
            records.remove(record).unwrap();
        }
        assert!(records.has_none("c1"));
        assert_eq!(fs::read_dir(records.dir()).unwrap().count(), 0);
    }

    #[test]
    fn what_a_killed_plugin_left_is_no_attachment() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::below(dir.path());
        records.write(&call("c1", "pods", "eth0")).unwrap();
        fs::write(records.dir().join("c1/.4711"), "{").unwrap();
        let [record] = &records.of("c1")[..] else { panic!("{:?}", records.of("c1")) };
        records.remove(record).unwrap();
        assert_eq!(fs::read_dir(records.dir()).unwrap().count(), 0, "and it goes with the rest");
        // Killed before it had written anything.
        fs::create_dir(records.dir().join("c2")).unwrap();
        assert!(records.has_none("c2") && records.containers().is_empty());
    }

    #[test]
    fn what_cannot_be_looked_at_is_taken_to_be_there() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::below(dir.path());
        fs::create_dir(records.dir()).unwrap();
        fs::write(records.dir().join("c1"), "").unwrap();
        assert!(!records.has_none("c1"));
        for (container, network, ifname) in
            [("../x", "pods", "eth0"), ("c", "a/b", "eth0"), ("c", "n", "a:b")]
        {
            assert!(
                records.write(&call(container, network, ifname)).is_err(),
                "{container} {network} {ifname}"
            );
        }
    }
}
