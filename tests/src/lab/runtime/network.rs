//! The conflists of a machine, and the plugins that they name.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use serde_json::{Value, json};

use crate::lab::mesh::PORT;
use crate::lab::{Lab, create_open};

/// Where Debian puts its plugins.
const DEBIAN: &str = "/usr/lib/cni";
/// The namespace of pods that are meshed, where namespaces decide.
pub const MESHED: &str = "shop";
/// The namespace of pods that aren't.
pub const PLAIN: &str = "plain";
/// The version that Debian's plugins (1.1.1) support besides older ones.
pub const VERSION: &str = "1.0.0";
/// A plugin for versions that Debian's don't support: its ADD gives the `result` of its configuration, and it does
/// nothing else. It is the lab's program by another name.
pub const PREPARED: &str = "prepared";
/// Nobody answers names there: they must come from the mesh.
pub const RESOLVER: &str = "10.244.0.1";

/// The networks of one machine.
#[derive(Debug, Clone)]
pub struct Networks {
    /// Where the conflists are.
    pub conf_dir: PathBuf,
    /// Where the plugins are.
    pub bin_dir: PathBuf,
    /// The machine's root, as far as the mesh's installer is concerned; both folders are in it.
    pub root: PathBuf,
    run_dir: PathBuf,
}

impl Networks {
    /// Gathers Debian's plugins in one folder, and ours unless it is yet to be installed.
    pub fn new(lab: &Lab, run_dir: &Path, installed: bool) -> anyhow::Result<Self> {
        let root = lab.dir().join("root");
        let (conf_dir, bin_dir) = (root.join("etc/cni/net.d"), root.join("opt/cni/bin"));
        for dir in [&root, &conf_dir, &bin_dir] {
            create_open(dir)?;
        }
        for plugin in ["bridge", "host-local", "portmap", "loopback"] {
            let path = Path::new(DEBIAN).join(plugin);
            anyhow::ensure!(path.exists(), "{} is missing: run scripts/need-tools.sh", path.display());
            link(&path, &bin_dir.join(plugin))?;
        }
        if installed {
            link(&lab.programs.path("ursa-cni"), &bin_dir.join("ursa-cni"))?;
        }
        link(&lab.programs.path("lab-app"), &bin_dir.join(PREPARED))?;
        Ok(Self { conf_dir, bin_dir, root, run_dir: run_dir.to_owned() })
    }

    /// Our plugin's part: pods are meshed, except those in [`PLAIN`].
    pub fn ursa(&self) -> Value {
        json!({
            "type": "ursa-cni",
            "runDir": self.run_dir,
            "annotations": {"kuma.io/sidecar-injection": "enabled"},
            "excludeNamespaces": [PLAIN],
            "workload": {"ports": format!("{PORT}/http")},
        })
    }

    /// A dual-stack network of its own; `number` tells it from others.
    pub fn conflist(&self, name: &str, number: u8, ursa: Option<Value>) -> Value {
        let range = |subnet: String| json!([{"subnet": subnet}]);
        let mut plugins = vec![
            json!({
                "type": "bridge", "bridge": format!("cni{number}"), "isGateway": true, "ipMasq": true,
                "hairpinMode": true,
                "ipam": {
                    "type": "host-local",
                    "ranges": [range(format!("10.244.{number}.0/24")), range(format!("fd10:244:{number}::/64"))],
                    "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
                },
            }),
            json!({"type": "portmap", "capabilities": {"portMappings": true}}),
        ];
        plugins.extend(ursa);
        json!({"cniVersion": VERSION, "name": name, "plugins": plugins})
    }

    /// Puts a conflist in place, as installers do: by a rename within its folder.
    pub fn write(&self, file: &str, conflist: &Value) -> anyhow::Result<()> {
        let (path, aside) = (self.conf_dir.join(file), self.conf_dir.join(format!(".{file}.new")));
        std::fs::write(&aside, serde_json::to_string_pretty(conflist)?)?;
        std::fs::rename(&aside, &path).with_context(|| format!("cannot write {}", path.display()))
    }
}

fn link(to: &Path, at: &Path) -> anyhow::Result<()> {
    std::os::unix::fs::symlink(to, at).with_context(|| format!("cannot create {}", at.display()))
}
