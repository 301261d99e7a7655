//! The agent's configuration: `/etc/ursa/agent.yaml`, then `URSA_…` variables, then flags.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::cni::CniConfig;
use crate::systemd;

/// Where the configuration is looked for unless told otherwise.
pub const DEFAULT_PATH: &str = "/etc/ursa/agent.yaml";

/// Where package ursa-envoy puts it.
const PACKAGED_ENVOY: &str = "/usr/lib/ursa/envoy";

/// The configuration can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file can't be read.
    #[error("can't read the agent's configuration {}; pass another file with --config", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The file's content is wrong.
    #[error("the agent's configuration {} is wrong: {reason}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and why.
        reason: String,
    },
    /// A variable's value is wrong.
    #[error("the variable {name} is wrong: {reason}")]
    Variable {
        /// The variable.
        name: String,
        /// Why.
        reason: String,
    },
}

/// How shims are started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LauncherKind {
    /// As systemd units where systemd runs and the agent isn't root, else by the agent itself.
    #[default]
    Auto,
    /// By the agent itself, as detached processes. It has to be root, and puts redirects in place itself, too.
    Fork,
    /// As systemd units `ursa-sidecar@….service`. The agent needs no right but to start and stop them; redirects are
    /// put in place by units as well.
    Unit,
}

/// The agent's configuration.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct AgentConfig {
    /// `host:port` of the control plane; after a join the ticket's address is remembered.
    pub control_plane: Option<String>,
    /// Sockets and what doesn't outlive a reboot.
    pub run_dir: PathBuf,
    /// Keys, certificates and last-good configuration.
    pub state_dir: PathBuf,
    /// One Dataplane per file.
    pub workloads_dir: PathBuf,
    /// The Envoy binary; by default that of package ursa-envoy, or else the one on PATH.
    pub envoy: Option<PathBuf>,
    /// The `ursa-shim` binary; by default the one beside this program.
    pub shim: Option<PathBuf>,
    /// How shims are started.
    pub launcher: LauncherKind,
    /// This machine's name, as shown by control.
    pub node: Option<String>,
    /// User of shims and Envoys whose workload doesn't name one.
    pub proxy_uid: u32,
    /// Group of shims and Envoys whose workload doesn't name one.
    pub proxy_gid: u32,
    /// Worker threads of each Envoy.
    pub concurrency: u32,
    /// Log level of agent, shims and Envoys.
    pub log_level: String,
    /// The resolver that workloads would use without a mesh.
    pub resolv_conf: PathBuf,
    /// Names below these are the mesh's; nobody else is ever asked for them.
    pub dns_domains: Vec<String>,
    /// How long connections may take to end when a workload leaves.
    pub drain_seconds: u32,
    /// File with the dataplane token of workloads that don't name one of their own.
    pub dataplane_token_file: Option<PathBuf>,
    /// What is known of pods that say nothing, and how pods are repaired.
    pub cni: CniConfig,
    /// The container runtime's CRI socket, to find pods that the CNI plugin has missed.
    pub cri: Option<PathBuf>,
}

impl Default for AgentConfig {
    fn default() -> Self {
        Self {
            control_plane: None,
            run_dir: PathBuf::from("/run/ursa"),
            state_dir: PathBuf::from("/var/lib/ursa/agent"),
            workloads_dir: PathBuf::from("/etc/ursa/workloads.d"),
            envoy: None,
            shim: None,
            launcher: LauncherKind::Auto,
            node: None,
            proxy_uid: 5678,
            proxy_gid: 5678,
            concurrency: 2,
            log_level: "info".to_owned(),
            resolv_conf: PathBuf::from("/etc/resolv.conf"),
            dns_domains: vec!["mesh.local".to_owned()],
            drain_seconds: 5,
            dataplane_token_file: None,
            cni: CniConfig::default(),
            cri: None,
        }
    }
}

/// The fields that a variable can set, with the variable's name.
const VARIABLES: [(&str, &str); 16] = [
    ("URSA_CONTROL_PLANE", "controlPlane"),
    ("URSA_RUN_DIR", "runDir"),
    ("URSA_STATE_DIR", "stateDir"),
    ("URSA_WORKLOADS_DIR", "workloadsDir"),
    ("URSA_ENVOY", "envoy"),
    ("URSA_SHIM", "shim"),
    ("URSA_LAUNCHER", "launcher"),
    ("URSA_NODE", "node"),
    ("URSA_PROXY_UID", "proxyUid"),
    ("URSA_PROXY_GID", "proxyGid"),
    ("URSA_CONCURRENCY", "concurrency"),
    ("URSA_LOG_LEVEL", "logLevel"),
    ("URSA_RESOLV_CONF", "resolvConf"),
    ("URSA_DRAIN_SECONDS", "drainSeconds"),
    ("URSA_DATAPLANE_TOKEN_FILE", "dataplaneTokenFile"),
    ("URSA_CRI", "cri"),
];

impl AgentConfig {
    /// Reads `path` (the default path may be absent) and lays the environment over it.
    pub fn load(path: Option<&Path>) -> Result<Self, ConfigError> {
        let file = path.unwrap_or_else(|| Path::new(DEFAULT_PATH));
        let text = match fs::read_to_string(file) {
            Ok(text) => text,
            Err(error) if path.is_none() && error.kind() == io::ErrorKind::NotFound => String::new(),
            Err(source) => return Err(ConfigError::Read { path: file.to_owned(), source }),
        };
        Self::from_parts(&text, file, |name| std::env::var(name).ok())
    }

    fn from_parts(
        text: &str,
        path: &Path,
        variable: impl Fn(&str) -> Option<String>,
    ) -> Result<Self, ConfigError> {
        let wrong = |reason: String| ConfigError::Parse { path: path.to_owned(), reason };
        let mut value = if text.trim().is_empty() {
            serde_json::Value::Null
        } else {
            ursa_model::yaml::from_str(text).map_err(|error| wrong(error.to_string()))?
        };
        if value.is_null() {
            value = serde_json::json!({});
        }
        // The file is judged on its own first, so that an error names the file and not a variable.
        serde_json::from_value::<Self>(value.clone()).map_err(|error| wrong(error.to_string()))?;
        let Some(fields) = value.as_object_mut() else {
            return Err(wrong("expected fields such as `controlPlane: host:5678`".to_owned()));
        };
        for (name, field) in VARIABLES {
            let Some(text) = variable(name) else { continue };
            let scalar = text.parse::<u64>().map_or_else(|_| text.into(), serde_json::Value::from);
            fields.insert(field.to_owned(), scalar);
            serde_json::from_value::<Self>(serde_json::Value::Object(fields.clone())).map_err(|error| {
                ConfigError::Variable { name: name.to_owned(), reason: error.to_string() }
            })?;
        }
        serde_json::from_value(value).map_err(|error| wrong(error.to_string()))
    }

    /// What differs from `other` and takes effect only when the agent is started again.
    pub fn fixed_differences(&self, other: &Self) -> Vec<&'static str> {
        [
            ("runDir", self.run_dir == other.run_dir),
            ("stateDir", self.state_dir == other.state_dir),
            ("workloadsDir", self.workloads_dir == other.workloads_dir),
            ("shim", self.shim == other.shim),
            ("launcher", self.launcher == other.launcher),
            ("cni", self.cni == other.cni),
            ("cri", self.cri == other.cri),
        ]
        .into_iter()
        .filter_map(|(name, same)| (!same).then_some(name))
        .collect()
    }

    /// The socket that the CLI and the CNI plugin talk to.
    pub fn socket(&self) -> PathBuf {
        self.run_dir.join("agent.sock")
    }

    /// Where the node's own key and certificate are.
    pub fn node_dir(&self) -> PathBuf {
        self.state_dir.join("node")
    }

    /// How shims are started here.
    pub fn launcher(&self) -> LauncherKind {
        match self.launcher {
            LauncherKind::Auto if systemd::is_booted() && !nix::unistd::Uid::effective().is_root() => {
                LauncherKind::Unit
            }
            LauncherKind::Auto => LauncherKind::Fork,
            chosen => chosen,
        }
    }

    /// This machine's name.
    pub fn node_name(&self) -> String {
        self.node.clone().unwrap_or_else(|| {
            nix::unistd::gethostname()
                .ok()
                .and_then(|name| name.into_string().ok())
                .unwrap_or_else(|| "node".to_owned())
        })
    }

    /// The Envoy binary: the configured one, that of the package, or the first on PATH.
    pub fn envoy_binary(&self) -> Result<PathBuf, String> {
        if let Some(envoy) = &self.envoy {
            return Ok(envoy.clone());
        }
        let path = std::env::var_os("PATH").unwrap_or_default();
        let on_path = std::env::split_paths(&path).map(|dir| dir.join("envoy"));
        std::iter::once(PathBuf::from(PACKAGED_ENVOY)).chain(on_path).find(|file| file.is_file()).ok_or_else(|| {
            format!(
                "there is no Envoy: neither {PACKAGED_ENVOY} nor `envoy` in {} exists; install the package ursa-envoy, or \
                 name a binary by `envoy:` in {DEFAULT_PATH}",
                path.display()
            )
        })
    }

    /// The `ursa-shim` binary.
    pub fn shim_binary(&self) -> PathBuf {
        self.shim.clone().unwrap_or_else(|| {
            std::env::current_exe()
                .ok()
                .and_then(|path| Some(path.parent()?.join("ursa-shim")))
                .unwrap_or_else(|| PathBuf::from("ursa-shim"))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(text: &str, variables: &[(&str, &str)]) -> Result<AgentConfig, ConfigError> {
        AgentConfig::from_parts(text, Path::new("agent.yaml"), |name| {
            variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn nothing_at_all_is_a_configuration() {
        assert_eq!(load("", &[]).unwrap(), AgentConfig::default());
    }

    #[test]
    fn variables_go_over_the_file() {
        let config =
            load("runDir: /a\nstateDir: /b\n", &[("URSA_RUN_DIR", "/c"), ("URSA_PROXY_UID", "7")]).unwrap();
        assert_eq!(
            (config.run_dir, config.state_dir, config.proxy_uid),
            (PathBuf::from("/c"), PathBuf::from("/b"), 7)
        );
    }

    /// The keys that a section of the configuration has, by the words of the error about one that it hasn't.
    fn keys(section: &str) -> Vec<String> {
        let path =
            if section.is_empty() { "nothing: 1".to_owned() } else { format!("{section}: {{nothing: 1}}") };
        let error = load(&path, &[]).unwrap_err().to_string();
        let expected = error.split_once("expected one of").unwrap().1;
        expected.split('`').skip(1).step_by(2).map(str::to_owned).collect()
    }

    #[test]
    fn the_packaged_file_names_every_key_with_its_default() {
        let text = include_str!("../../../packaging/etc/agent.yaml");
        assert_eq!(load(text, &[]).unwrap(), AgentConfig::default(), "it sets nothing");
        // A remark has one space behind its #, a key none, or as many as its section's depth asks for.
        let is_key = |line: &&str| {
            line.strip_prefix('#').is_some_and(|rest| !rest.starts_with(' ') || rest.starts_with("  "))
        };
        let set: Vec<_> = text.lines().filter(is_key).map(|line| &line[1..]).collect();
        let value: serde_json::Value = ursa_model::yaml::from_str(&set.join("\n")).unwrap();
        for (section, found) in [("", &value), ("cni", &value["cni"])] {
            for key in keys(section) {
                assert!(found.get(&key).is_some(), "packaging/etc/agent.yaml lacks {key} {section}");
            }
        }
        assert_eq!(load(&set.join("\n"), &[]).unwrap(), AgentConfig::default());
    }

    #[test]
    fn errors_name_the_field_or_the_variable() {
        let error = load("runDirectory: /a\n", &[]).unwrap_err().to_string();
        assert!(error.contains("runDirectory") && error.contains("runDir"), "{error}");
        let error = load("", &[("URSA_PROXY_UID", "many")]).unwrap_err().to_string();
        assert!(error.contains("URSA_PROXY_UID"), "{error}");
    }
}
