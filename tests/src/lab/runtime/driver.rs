//! What libcni does with a conflist, for the verbs that runtimes of this generation never call.
//!
//! The order of plugins, what each is given, and what is kept for later calls are those of the specification's
//! section 4 and of libcni 1.3: ADD, CHECK and STATUS go forward, DEL and GC backward; each plugin's result is the next
//! one's `prevResult`, and the last one is cached for CHECK and DEL.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};

use anyhow::Context as _;
use serde_json::{Value, json};

use super::ground::{PLAIN_NETWORK, PODS_NETWORK};
use super::network::{MESHED, Networks, PLAIN, RESOLVER};
use super::{Pod, PodSpec, Runtime};
use crate::lab::daemon::Daemon;
use crate::lab::machine::Machine;
use crate::lab::{Lab, create_open, mesh};

/// The interface of every attachment.
const IFNAME: &str = "eth0";

/// A container's place in a network.
#[derive(Debug, Clone, Default)]
pub struct Attachment {
    /// `CNI_CONTAINERID`.
    pub id: String,
    /// `CNI_NETNS`; nowhere for a DEL after the namespace's end.
    pub netns: Option<PathBuf>,
    /// `CNI_ARGS`.
    pub args: String,
    /// By capability; a plugin is given those that it asks for.
    pub capabilities: BTreeMap<String, Value>,
}

/// An error as a plugin writes it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("plugin {plugin} failed ({verb}), code {code}: {message}")]
pub struct PluginError {
    /// Which one.
    pub plugin: String,
    /// At what.
    pub verb: String,
    /// The specification's code, 0 if what it wrote is no error of CNI's.
    pub code: u64,
    /// What it says.
    pub message: String,
}

/// A runtime that is nothing but libcni.
#[derive(Debug)]
pub struct Driver {
    /// The conflists, which a test may change.
    pub lists: Mutex<BTreeMap<String, Value>>,
    cache: PathBuf,
    networks: Networks,
    programs: PathBuf,
    prefix: String,
    logs: PathBuf,
    apps: Mutex<BTreeMap<String, Daemon>>,
}

impl Driver {
    /// Reads the machine's conflists.
    pub fn start(lab: &Lab, _machine: &Machine, networks: &Networks) -> anyhow::Result<Self> {
        let cache = lab.dir().join("results");
        create_open(&cache)?;
        Ok(Self {
            lists: Mutex::new(read(networks)?),
            cache,
            networks: networks.clone(),
            programs: lab.programs.bin_dir.clone(),
            prefix: lab.prefix.clone(),
            logs: lab.dir().join("log"),
            apps: Mutex::default(),
        })
    }

    /// Reads the machine's conflists again.
    pub fn read_again(&self) -> anyhow::Result<()> {
        *self.lists.lock().unwrap_or_else(PoisonError::into_inner) = read(&self.networks)?;
        Ok(())
    }

    /// Attaches; each plugin's result, of which the last one counts.
    pub fn add(&self, machine: &Machine, network: &str, to: &Attachment) -> Result<Vec<Value>, PluginError> {
        let mut results = Vec::new();
        for plugin in self.plugins(network) {
            let result = self.call(machine, "ADD", network, &plugin, to, results.last(), None)?;
            results.push(result);
        }
        let last = results.last().unwrap_or(&Value::Null);
        let _ = std::fs::write(self.cached(network, &to.id), last.to_string());
        Ok(results)
    }

    /// Makes a network known.
    pub fn know(&self, name: &str, list: Value) {
        self.lists.lock().unwrap_or_else(PoisonError::into_inner).insert(name.to_owned(), list);
    }

    /// Makes it forget an attachment, as a runtime does that was reinstalled.
    pub fn forget(&self, network: &str, id: &str) -> std::io::Result<()> {
        std::fs::remove_file(self.cached(network, id))
    }

    /// A network namespace on the machine, with a resolver that answers nothing; its name and its path there.
    pub fn namespace(&self, machine: &Machine, pod: &str) -> anyhow::Result<(String, PathBuf)> {
        let name = self.namespace_name(pod);
        let etc = PathBuf::from("/etc/netns").join(&name);
        std::fs::create_dir_all(&etc)?;
        let resolver = format!("nameserver {RESOLVER}\noptions timeout:1 attempts:1\n");
        std::fs::write(etc.join("resolv.conf"), resolver)?;
        mesh::run(machine.command(Path::new("ip")).args(["netns", "add", &name]), "")?;
        let path = PathBuf::from("/run/netns").join(&name);
        Ok((name, path))
    }

    fn namespace_name(&self, pod: &str) -> String {
        format!("{}-pod-{pod}", self.prefix)
    }

    fn id(spec: &PodSpec) -> String {
        format!("{}-{}", spec.name, spec.attempt)
    }

    /// Detaches; the first error ends it, as libcni's does.
    pub fn del(&self, machine: &Machine, network: &str, from: &Attachment) -> Result<(), PluginError> {
        // Before 0.4.0 DEL was given no result.
        let old = self.version(network).starts_with("0.3");
        let previous = self.recall(network, &from.id).filter(|_| !old);
        for plugin in self.plugins(network).iter().rev() {
            self.call(machine, "DEL", network, plugin, from, previous.as_ref(), None)?;
        }
        let _ = std::fs::remove_file(self.cached(network, &from.id));
        Ok(())
    }

    /// Asks whether all is as ADD left it.
    pub fn check(&self, machine: &Machine, network: &str, of: &Attachment) -> Result<(), PluginError> {
        let previous = self.recall(network, &of.id);
        for plugin in self.plugins(network) {
            self.call(machine, "CHECK", network, &plugin, of, previous.as_ref(), None)?;
        }
        Ok(())
    }

    /// Asks whether an ADD could succeed. Wants a list of version 1.1.0.
    pub fn status(&self, machine: &Machine, network: &str) -> Result<(), PluginError> {
        for plugin in self.plugins(network) {
            self.call(machine, "STATUS", network, &plugin, &Attachment::default(), None, None)?;
        }
        Ok(())
    }

    /// Says which containers there are; what remains of others goes. Wants a list of version 1.1.0.
    pub fn gc(&self, machine: &Machine, network: &str, valid: &[&str]) -> Result<(), PluginError> {
        let prefix = format!("{network}:");
        let entries = std::fs::read_dir(&self.cache).into_iter().flatten().flatten();
        let known = entries.filter_map(|entry| entry.file_name().into_string().ok());
        for id in known.filter_map(|name| name.strip_prefix(&prefix).map(str::to_owned)) {
            if !valid.contains(&id.as_str()) {
                // As libcni: what fails here is left to GC.
                let _ = self.del(machine, network, &Attachment { id, ..Attachment::default() });
            }
        }
        let valid: Vec<Value> = valid.iter().map(|id| json!({"containerID": id, "ifname": IFNAME})).collect();
        for plugin in self.plugins(network) {
            let all = Some(json!(valid));
            self.call(machine, "GC", network, &plugin, &Attachment::default(), None, all.as_ref())?;
        }
        Ok(())
    }

    /// What is cached of an attachment.
    pub fn recall(&self, network: &str, id: &str) -> Option<Value> {
        serde_json::from_slice(&std::fs::read(self.cached(network, id)).ok()?).ok()
    }

    fn cached(&self, network: &str, id: &str) -> PathBuf {
        self.cache.join(format!("{network}:{id}"))
    }

    fn list(&self, network: &str) -> Value {
        let lists = self.lists.lock().unwrap_or_else(PoisonError::into_inner);
        lists.get(network).cloned().unwrap_or_default()
    }

    fn plugins(&self, network: &str) -> Vec<Value> {
        self.list(network)["plugins"].as_array().cloned().unwrap_or_default()
    }

    fn version(&self, network: &str) -> String {
        self.list(network)["cniVersion"].as_str().unwrap_or_default().to_owned()
    }

    #[expect(clippy::too_many_arguments, reason = "what the protocol gives to a plugin")]
    fn call(
        &self,
        machine: &Machine,
        verb: &str,
        network: &str,
        plugin: &Value,
        attachment: &Attachment,
        previous: Option<&Value>,
        valid: Option<&Value>,
    ) -> Result<Value, PluginError> {
        let kind = plugin["type"].as_str().unwrap_or_default();
        let failed = |code, message: String| PluginError {
            plugin: kind.to_owned(),
            verb: verb.to_owned(),
            code,
            message,
        };
        let mut config = plugin.clone();
        config["name"] = network.into();
        config["cniVersion"] = self.version(network).into();
        let asked = plugin["capabilities"].as_object().cloned().unwrap_or_default();
        let wanted = |name: &str| asked.get(name).and_then(Value::as_bool) == Some(true);
        let given: serde_json::Map<String, Value> = attachment
            .capabilities
            .iter()
            .filter(|(name, _)| wanted(name))
            .map(|(name, value)| (name.clone(), value.clone()))
            .collect();
        if let Some(config) = config.as_object_mut() {
            config.remove("capabilities");
        }
        if !given.is_empty() {
            config["runtimeConfig"] = Value::Object(given);
        }
        if let Some(previous) = previous {
            config["prevResult"] = previous.clone();
        }
        if let Some(valid) = valid {
            config["cni.dev/valid-attachments"] = valid.clone();
        }
        let mut command = machine.command(&self.networks.bin_dir.join(kind));
        command.env("CNI_COMMAND", verb).env("CNI_PATH", &self.networks.bin_dir);
        if !attachment.id.is_empty() {
            let netns = attachment.netns.as_deref().unwrap_or(Path::new(""));
            command.env("CNI_CONTAINERID", &attachment.id).env("CNI_NETNS", netns);
            command.env("CNI_IFNAME", IFNAME).env("CNI_ARGS", &attachment.args);
        }
        let outcome = mesh::outcome(&mut command, &config.to_string())
            .map_err(|error| failed(0, format!("{error:#}")))?;
        let answer: Value = serde_json::from_str(&outcome.out).unwrap_or(Value::Null);
        if outcome.code == Some(0) {
            return Ok(answer);
        }
        let (code, message) = (answer["code"].as_u64(), answer["msg"].as_str());
        let said = || format!("{} {} {:?}", outcome.out.trim(), outcome.err.trim(), outcome.code);
        let details = answer["details"].as_str().unwrap_or_default();
        Err(match (code, message) {
            (Some(code), Some(message)) => failed(code, format!("{message}: {details}")),
            _ => failed(0, said()),
        })
    }

    /// The attachment of a pod.
    pub fn attachment(spec: &PodSpec, id: &str, netns: Option<PathBuf>) -> Attachment {
        let namespace = if spec.meshed { MESHED } else { PLAIN };
        let args = format!("IgnoreUnknown=1;K8S_POD_NAMESPACE={namespace};K8S_POD_NAME={}", spec.name);
        let mut capabilities = BTreeMap::new();
        if let Some(port) = spec.host_port {
            let mapping = json!([{"hostPort": port, "containerPort": mesh::PORT, "protocol": "tcp"}]);
            capabilities.insert("portMappings".to_owned(), mapping);
        }
        Attachment { id: id.to_owned(), netns, args, capabilities }
    }

    /// The network of a pod.
    pub fn network(spec: &PodSpec) -> &'static str {
        if spec.meshed { PODS_NETWORK } else { PLAIN_NETWORK }
    }
}

/// As libcni 1.3 does: to a list's own plugins come those of the `.conf` files in the directory of its name.
fn read(networks: &Networks) -> anyhow::Result<BTreeMap<String, Value>> {
    let files = |dir: &Path, extension: &str| -> Vec<PathBuf> {
        let entries = std::fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
        let mut files: Vec<_> =
            entries.filter(|path| path.extension().is_some_and(|e| e == extension)).collect();
        files.sort();
        files
    };
    let json = |path: &Path| -> anyhow::Result<Value> { Ok(serde_json::from_slice(&std::fs::read(path)?)?) };
    let mut lists = BTreeMap::new();
    for file in files(&networks.conf_dir, "conflist") {
        let mut list = json(&file)?;
        let name = list["name"].as_str().context("a conflist without a name")?.to_owned();
        if list["loadOnlyInlinedPlugins"] != json!(true) {
            let plugins = list["plugins"].as_array_mut().context("a conflist without plugins")?;
            for file in files(&networks.conf_dir.join(&name), "conf") {
                plugins.push(json(&file)?);
            }
        }
        lists.insert(name, list);
    }
    Ok(lists)
}

impl Runtime for Driver {
    fn start(&self, machine: &Machine, spec: &PodSpec) -> anyhow::Result<Pod> {
        let (name, netns) = self.namespace(machine, &spec.name)?;
        let id = Self::id(spec);
        let attachment = Self::attachment(spec, &id, Some(netns.clone()));
        let results = self.add(machine, Self::network(spec), &attachment)?;
        let addresses = results.last().unwrap_or(&Value::Null)["ips"].as_array().cloned().unwrap_or_default();
        let address = |v6: bool| {
            let texts = addresses.iter().filter_map(|one| one["address"].as_str()?.split('/').next());
            texts.into_iter().find(|text| text.contains(':') == v6).map(str::to_owned)
        };
        if spec.app {
            let program = self.programs.join("lab-app").display().to_string();
            let port = mesh::PORT.to_string();
            let words = ["netns", "exec", &name, &program, "serve", "--name", &spec.name, "--port", &port];
            let args = words.map(str::to_owned).to_vec();
            let log = self.logs.join(format!("{}.log", spec.name));
            let app = Daemon::start(&spec.name, machine, "ip".into(), args, Vec::new(), log)?;
            self.apps.lock().unwrap_or_else(PoisonError::into_inner).insert(id.clone(), app);
        }
        Ok(Pod {
            spec: spec.clone(),
            container: name,
            id,
            netns,
            v4: address(false).context("no IPv4 address")?,
            v6: address(true).context("no IPv6 address")?,
        })
    }

    fn exec(&self, machine: &Machine, pod: &Pod, args: &[&str]) -> Command {
        let mut command = machine.command(Path::new("ip"));
        command.args(["netns", "exec", &pod.container]).arg(self.programs.join("lab-app")).args(args);
        command
    }

    fn stop(&self, machine: &Machine, pod: &Pod) -> anyhow::Result<()> {
        self.apps.lock().unwrap_or_else(PoisonError::into_inner).remove(&pod.id);
        let attachment = Self::attachment(&pod.spec, &pod.id, Some(pod.netns.clone()));
        self.del(machine, Self::network(&pod.spec), &attachment)?;
        mesh::run(machine.command(Path::new("ip")).args(["netns", "del", &pod.container]), "").map(drop)
    }

    fn remove(&self, machine: &Machine, pod: &Pod) -> anyhow::Result<()> {
        if machine.file(&pod.netns).exists() {
            self.stop(machine, pod)?;
        }
        let attachment = Self::attachment(&pod.spec, &pod.id, None);
        Ok(self.del(machine, Self::network(&pod.spec), &attachment)?)
    }

    fn discard(&self, machine: &Machine, spec: &PodSpec) -> anyhow::Result<()> {
        // A failed ADD is followed by DEL.
        let name = self.namespace_name(&spec.name);
        let netns = PathBuf::from("/run/netns").join(&name);
        let attachment = Self::attachment(spec, &Self::id(spec), Some(netns.clone()));
        self.del(machine, Self::network(spec), &attachment)?;
        if machine.file(&netns).exists() {
            mesh::run(machine.command(Path::new("ip")).args(["netns", "del", &name]), "")?;
        }
        Ok(())
    }

    fn known(&self, _machine: &Machine) -> anyhow::Result<Vec<String>> {
        let entries = std::fs::read_dir(&self.cache)?.flatten();
        Ok(entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect())
    }

    fn service(&self, pod: &str) -> String {
        format!("{pod}-{MESHED}")
    }
}
