//! A node's file system, as far as the installer sees it.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use base64::Engine as _;
use serde_json::{Value, json};
use tempfile::TempDir;

/// In a style of its own: tabs, CRLF, escapes, no newline at the end.
pub(crate) const BASE: &str = "{\r\n\t\"cniVersion\": \"1.0.0\",\r\n\t\"name\" : \"k8s-p\\u006fd-network\",\r\n\t\"plugins\":[\r\n\t\t{\"type\": \"bridge\", \"mtu\": 1.5e3, \"note\": \"\u{fc}\\\"]}\" },\r\n\t\t{\"type\":\"portmap\"}\r\n\t]\r\n}";
pub(crate) const CONFLIST: &str = "10-base.conflist";

/// Programs that a base CNI would have brought; never written, so never busy.
pub(crate) fn fake(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/installer/fake").join(name)
}

/// What a program did.
#[derive(Debug)]
pub(crate) struct Done {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl From<Output> for Done {
    fn from(output: Output) -> Self {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Self { code: output.status.code(), stdout: text(&output.stdout), stderr: text(&output.stderr) }
    }
}

impl Done {
    #[track_caller]
    pub(crate) fn ok(self) -> Self {
        assert_eq!(self.code, Some(0), "{self:?}");
        self
    }

    /// Refused, and said so.
    #[track_caller]
    pub(crate) fn refused(self, words: &[&str]) {
        assert_eq!(self.code, Some(1), "{self:?}");
        for word in words {
            assert!(self.stderr.contains(word), "{word} is not in {}", self.stderr);
        }
    }
}

/// A scratch root.
pub(crate) struct Node {
    dir: TempDir,
}

impl Node {
    /// With a base CNI whose list is `text`.
    pub(crate) fn with(name: &str, text: &str) -> Self {
        let node = Self::bare();
        fs::write(node.net().join(name), text).unwrap();
        node
    }

    /// Without a network yet.
    pub(crate) fn bare() -> Self {
        // In memory where there is such a place: thousands of fsyncs are of no use to a test.
        let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
        let node = Self { dir };
        for dir in [node.net(), node.bin(), node.root().join("run/ursa"), node.results()] {
            fs::create_dir_all(dir).unwrap();
        }
        for plugin in ["bridge", "portmap", "flannel"] {
            symlink(fake(plugin), node.bin().join(plugin)).unwrap();
        }
        node
    }

    pub(crate) fn root(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn net(&self) -> PathBuf {
        self.root().join("etc/cni/net.d")
    }

    pub(crate) fn bin(&self) -> PathBuf {
        self.root().join("opt/cni/bin")
    }

    pub(crate) fn program(&self) -> PathBuf {
        self.bin().join("ursa-cni")
    }

    pub(crate) fn results(&self) -> PathBuf {
        self.root().join("var/lib/cni/results")
    }

    pub(crate) fn list(&self) -> String {
        fs::read_to_string(self.net().join(CONFLIST)).unwrap()
    }

    /// The installer, with these arguments.
    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ursa-cni"));
        command.args(arguments).arg("--root").arg(self.root());
        command
    }

    pub(crate) fn run(&self, arguments: &[&str]) -> Done {
        self.command(arguments).output().unwrap().into()
    }

    /// Ours, small, into the chosen network.
    pub(crate) fn install(&self, more: &[&str]) -> Done {
        let program = fake("ursa-cni");
        let mut arguments = vec!["install", "--binary", program.to_str().unwrap()];
        arguments.extend(more);
        self.run(&arguments)
    }

    pub(crate) fn uninstall(&self) -> Done {
        self.run(&["uninstall", "--drain-timeout", "0"])
    }

    /// What the runtime remembers of a container that started with the network as it is now.
    pub(crate) fn attach(&self, container: &str) -> PathBuf {
        let list = base64::engine::general_purpose::STANDARD.encode(self.list());
        let cache = json!({"kind": "cniCacheV1", "containerId": container, "config": list});
        let path = self.results().join(format!("k8s-pod-network-{container}-eth0"));
        fs::write(&path, cache.to_string()).unwrap();
        path
    }

    /// Every file of ours to see, with mode and owner, content and target of links.
    pub(crate) fn files(&self) -> BTreeMap<PathBuf, (u32, u32, Vec<u8>)> {
        let mut files = BTreeMap::new();
        let mut dirs = vec![self.net(), self.bin()];
        while let Some(dir) = dirs.pop() {
            for entry in fs::read_dir(&dir).unwrap() {
                let path = entry.unwrap().path();
                let meta = fs::symlink_metadata(&path).unwrap();
                let content = if meta.is_symlink() {
                    fs::read_link(&path).unwrap().into_os_string().into_encoded_bytes()
                } else if meta.is_dir() {
                    dirs.push(path.clone());
                    Vec::new()
                } else {
                    fs::read(&path).unwrap()
                };
                files.insert(path, (meta.mode(), meta.uid(), content));
            }
        }
        files
    }

    /// What a runtime would run for a pod that starts now: the first file by name, which must be valid, as
    /// containerd demands. An independent reading of libcni.
    #[track_caller]
    pub(crate) fn chain(&self) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(self.net())
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.extension().is_some_and(|e| e == "conf" || e == "conflist" || e == "json"))
            .collect();
        names.sort();
        let path = names.first().unwrap_or_else(|| panic!("no network in {:?}", self.files().keys()));
        let document: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
        let types =
            |plugins: &[Value]| plugins.iter().map(|p| p["type"].as_str().unwrap().to_owned()).collect();
        if path.extension().is_some_and(|e| e == "conflist") {
            types(document["plugins"].as_array().unwrap())
        } else {
            types(&[document])
        }
    }

    /// Any pod can start now and stop, and those that started can stop: every program that is asked for is there.
    #[track_caller]
    pub(crate) fn serves(&self) {
        let mut needed = self.chain();
        for entry in fs::read_dir(self.results()).unwrap() {
            assert!(entry.unwrap().path().is_file());
            needed.push("ursa-cni".to_owned());
        }
        for kind in needed {
            let mode =
                fs::metadata(self.bin().join(&kind)).unwrap_or_else(|e| panic!("{kind}: {e}")).permissions();
            assert_eq!(mode.mode() & 0o111, 0o111, "{kind}");
        }
    }
}
