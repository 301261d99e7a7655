//! `agent.sock`: one JSON object per line from the CLI and the CNI plugin, one back. Root only.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use ursa_init::RedirectIntent;

use super::config::AgentConfig;
use super::control::{Control, chain};
use super::session::{ConnectionState, Session};
use super::status::AgentStatus;
use super::supervisor::Supervisor;
use super::workload::{Origin, POD_UIDS, WorkloadSpec};
use crate::shim::peer;

/// No request is longer; a Dataplane with all its labels fits well.
const LINE: u64 = 1 << 20;
/// Callers at the same time; a node starts dozens of pods at once after a reboot.
const CALLERS: usize = 128;

/// A request.
#[derive(Debug, Deserialize, Serialize)]
#[serde(tag = "cmd", rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Request {
    /// The whole status.
    Status,
    /// Join, and start using the new identity.
    Join {
        /// As printed by `ursa ticket create`.
        ticket: String,
        /// This machine's name.
        #[serde(default)]
        name: Option<String>,
    },
    /// A container appeared.
    CniAdd(Box<CniAdd>),
    /// A container disappeared. No error if it was never there.
    CniDel {
        /// `CNI_CONTAINERID`.
        container_id: String,
    },
    /// The containers that exist; those of former ADDs that aren't among them have gone.
    CniGc {
        /// As in `cni.dev/valid-attachments`.
        #[serde(default)]
        valid_attachments: Vec<Attachment>,
    },
}

/// One of `cni.dev/valid-attachments`.
#[derive(Debug, Deserialize, Serialize)]
pub struct Attachment {
    /// `CNI_CONTAINERID`.
    #[serde(rename = "containerID")]
    pub container_id: String,
}

/// A container as the CNI plugin describes it. The plugin has put the redirect in place.
#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct CniAdd {
    /// `CNI_CONTAINERID`.
    pub container_id: String,
    /// `CNI_NETNS`.
    pub netns: PathBuf,
    /// `CNI_ARGS`.
    pub args: BTreeMap<String, String>,
    /// The pod's annotations.
    pub annotations: BTreeMap<String, String>,
    /// Addresses of `prevResult`, with or without a prefix length.
    pub ips: Vec<String>,
    /// The plugin's configuration.
    pub config: PluginConfig,
}

/// What concerns the agent in the plugin's configuration.
#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct PluginConfig {
    /// The redirect as the plugin applied it.
    pub redirect: Option<RedirectIntent>,
    /// What the pod itself doesn't say.
    pub workload: Workload,
}

/// What the operator says of the workloads of one CNI network.
#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Workload {
    /// Name of the Dataplane; by default made of `K8S_POD_NAME` and `K8S_POD_NAMESPACE`.
    pub name: Option<String>,
    /// Its mesh; where it isn't set, annotation `kuma.io/mesh` says it.
    pub mesh: Option<String>,
    /// Its labels. Where `kuma.io/workload` isn't among them, the annotation of that name says it.
    pub labels: BTreeMap<String, String>,
    /// Its ports, unless annotation `ursa.io/ports` says otherwise: `8080/http,9090`.
    pub ports: Option<String>,
}

impl CniAdd {
    /// The Dataplane of this container.
    fn spec(self, config: &AgentConfig) -> Result<WorkloadSpec, String> {
        if self.container_id.is_empty() {
            return Err("field `container_id` is missing".to_owned());
        }
        let mut dataplane = self.dataplane()?;
        // The redirect exempts this user or group, so shim and Envoy must run as it.
        let redirect = self.config.redirect.unwrap_or_default();
        let uid = redirect.proxy_uids.first().copied().unwrap_or(*POD_UIDS.start());
        let gid = redirect.proxy_gids.first().copied();
        dataplane["ursa"] = json!({ "netns": self.netns, "proxyUid": uid, "proxyGid": gid });
        let mut spec = WorkloadSpec::from_value(dataplane, Origin::Cni(self.container_id), config)
            .map_err(|error| error.to_string())?;
        spec.redirect = None;
        Ok(spec)
    }

    fn dataplane(&self) -> Result<Value, String> {
        let given = &self.config.workload;
        let argument = |key: &str| self.args.get(key).filter(|value| !value.is_empty());
        let name = match (&given.name, argument("K8S_POD_NAME"), argument("K8S_POD_NAMESPACE")) {
            (Some(name), _, _) => name.clone(),
            (None, Some(pod), Some(namespace)) => format!("{pod}.{namespace}"),
            (None, Some(pod), None) => pod.clone(),
            (None, None, _) => {
                return Err(
                    "neither K8S_POD_NAME in CNI_ARGS nor `workload.name` in the plugin's configuration says what the workload is called"
                        .to_owned(),
                );
            }
        };
        let annotation = |key: &str| self.annotations.get(key).map(String::as_str);
        // What the operator says is what the pod is: whoever may write a pod must not choose its identity.
        let mesh = given.mesh.as_deref().or(annotation("kuma.io/mesh")).unwrap_or("default");
        let address = self
            .ips
            .first()
            .and_then(|address| address.split('/').next())
            .ok_or("`ips` is empty; the plugin must be chained after one that assigns an address")?;
        let ports = annotation("ursa.io/ports").or(given.ports.as_deref()).unwrap_or_default();
        let mut labels = given.labels.clone();
        labels
            .entry("kuma.io/workload".to_owned())
            // A label of DNS-1035, which has no dots, while a pod's full name has at least one.
            .or_insert_with(|| {
                annotation("kuma.io/workload").map_or_else(|| name.replace('.', "-"), str::to_owned)
            });
        Ok(json!({
            "type": "Dataplane",
            "mesh": mesh,
            "name": name,
            "labels": labels,
            "networking": { "address": address, "inbound": inbounds(ports)? }
        }))
    }
}

fn inbounds(ports: &str) -> Result<Vec<Value>, String> {
    ports
        .split(',')
        .map(str::trim)
        .filter(|port| !port.is_empty())
        .map(|port| {
            let (number, protocol) = port.split_once('/').unwrap_or((port, "tcp"));
            let number: u16 = number
                .parse()
                .map_err(|_| format!("`{port}` is no port; write ports as in `8080/http,9090`"))?;
            Ok(json!({ "name": number.to_string(), "port": number, "protocol": protocol }))
        })
        .collect()
}

/// The agent's socket.
#[derive(Debug)]
pub struct AgentSocket {
    listener: UnixListener,
    path: PathBuf,
    parts: Arc<Parts>,
}

/// What answers need.
#[derive(Debug)]
pub struct Parts {
    /// Configuration.
    pub config: AgentConfig,
    /// The node's identity.
    pub control: Arc<Control>,
    /// The session with control.
    pub session: Session,
    /// The workloads.
    pub supervisor: Supervisor,
}

impl AgentSocket {
    /// Binds the socket, in place of one that a dead agent left.
    pub async fn bind(path: &Path, parts: Parts) -> io::Result<Self> {
        if UnixStream::connect(path).await.is_ok() {
            return Err(io::Error::new(
                io::ErrorKind::AddrInUse,
                "another agent answers on it; stop that one first",
            ));
        }
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(path)?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
        Ok(Self { listener, path: path.to_owned(), parts: Arc::new(parts) })
    }

    /// Answers until `stop`.
    pub async fn serve(self, stop: CancellationToken) {
        let callers = Arc::new(Semaphore::new(CALLERS));
        let mut tasks = tokio::task::JoinSet::new();
        loop {
            let accepted = tokio::select! {
                () = stop.cancelled() => break,
                Some(_) = tasks.join_next() => continue,
                accepted = self.listener.accept() => accepted,
            };
            let stream = match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(%error, "can't accept on the agent's socket");
                    tokio::time::sleep(Duration::from_millis(100)).await; // out of descriptors: spinning won't help
                    continue;
                }
            };
            if !is_root(&stream) {
                continue;
            }
            let Ok(permit) = Arc::clone(&callers).try_acquire_owned() else { continue };
            let parts = Arc::clone(&self.parts);
            tasks.spawn(async move {
                let _permit = permit;
                if let Err(error) = answer_all(stream, &parts).await {
                    tracing::debug!(%error, "a caller on the agent's socket went away");
                }
            });
        }
        let _ = fs::remove_file(&self.path);
    }
}

/// The socket's mode says so already; but whoever may add a workload here obtains its identity, so it is asked twice.
fn is_root(stream: &UnixStream) -> bool {
    match peer::uid(stream) {
        Ok(0) => true,
        Ok(uid) => {
            tracing::warn!(uid, "refused a client of agent.sock that isn't root");
            false
        }
        Err(error) => {
            tracing::warn!(%error, "refused a client of agent.sock whose process cannot be told");
            false
        }
    }
}

async fn answer_all(stream: UnixStream, parts: &Parts) -> io::Result<()> {
    let (read, mut write) = stream.into_split();
    let mut reader = BufReader::new(read);
    loop {
        let mut line = String::new();
        if (&mut reader).take(LINE).read_line(&mut line).await? == 0 {
            return Ok(());
        }
        let reply = match serde_json::from_str::<Request>(&line) {
            Ok(request) => parts.answer(request).await,
            Err(error) => Err(format!("not a request that this agent knows: {error}")),
        };
        let mut reply = match reply {
            Ok(value) => value,
            Err(error) => json!({ "ok": false, "error": error }),
        }
        .to_string();
        reply.push('\n');
        write.write_all(reply.as_bytes()).await?;
    }
}

impl Parts {
    async fn answer(&self, request: Request) -> Result<Value, String> {
        match request {
            Request::Status => Ok(json!({ "ok": true, "status": self.status().await })),
            Request::Join { ticket, name } => {
                let name = name.unwrap_or_else(|| self.config.node_name());
                let node = self.control.join(&ticket, &name).await.map_err(|error| chain(&error))?;
                Ok(json!({ "ok": true, "nodeId": node.node_id, "zone": node.zone }))
            }
            Request::CniAdd(add) => {
                let spec = add.spec(&self.config)?;
                self.supervisor.add(spec).await?;
                Ok(json!({ "ok": true }))
            }
            Request::CniDel { container_id } => {
                let removed = self.supervisor.remove(&container_id).await?;
                Ok(json!({ "ok": true, "removed": removed }))
            }
            Request::CniGc { valid_attachments } => {
                let valid = valid_attachments.into_iter().map(|one| one.container_id).collect();
                let removed = self.supervisor.retain(valid).await?;
                Ok(json!({ "ok": true, "removed": removed }))
            }
        }
    }

    async fn status(&self) -> AgentStatus {
        let (workloads, broken_files) = self.supervisor.status().await;
        let link = self.control.watch().borrow().clone();
        let connection = self.session.state().borrow().clone();
        AgentStatus {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            node_id: link.as_ref().map(|link| link.node.node_id.clone()),
            zone: link.as_ref().map(|link| link.node.zone.clone()),
            node_certificate_until: link.as_ref().map(|link| link.node.not_after),
            control_plane: self.control.address(),
            connected: connection == ConnectionState::Connected,
            connection_error: match connection {
                ConnectionState::Disconnected(why) => Some(why),
                _ => None,
            },
            broken_files,
            workloads,
        }
    }
}

/// Asks the agent on `path`.
pub async fn ask(path: &Path, request: &Request) -> Result<Value, String> {
    let stream = UnixStream::connect(path).await.map_err(|error| {
        format!("no agent answers on {} ({error}); is ursa-agent running, and are you root?", path.display())
    })?;
    let (read, mut write) = stream.into_split();
    let exchange = async {
        let mut line = serde_json::to_string(request).map_err(io::Error::other)?;
        line.push('\n');
        write.write_all(line.as_bytes()).await?;
        let mut reply = String::new();
        BufReader::new(read).read_line(&mut reply).await?;
        Ok::<_, io::Error>(reply)
    };
    let reply = exchange.await.map_err(|error| format!("the agent went away: {error}"))?;
    let reply: Value =
        serde_json::from_str(&reply).map_err(|error| format!("the agent's answer isn't JSON: {error}"))?;
    if reply.get("ok").and_then(Value::as_bool) == Some(true) {
        return Ok(reply);
    }
    Err(reply.get("error").and_then(Value::as_str).unwrap_or("the agent gave no reason").to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(request: Value) -> Result<WorkloadSpec, String> {
        let Request::CniAdd(add) = serde_json::from_value(request).unwrap() else { panic!("not an ADD") };
        add.spec(&AgentConfig::default())
    }

    #[test]
    fn a_pod_becomes_a_dataplane() {
        let spec = pod(json!({
            "cmd": "cni-add", "container_id": "c1", "netns": "/run/netns/x", "ifname": "eth0",
            "args": {"K8S_POD_NAME": "web-0", "K8S_POD_NAMESPACE": "shop"},
            "annotations": {"kuma.io/workload": "web", "ursa.io/ports": "8080/http, 9090"},
            "ips": ["10.0.0.9"], "config": {"redirect": {"proxyUids": [77]}, "type": "ursa-cni"}
        }))
        .unwrap();
        assert_eq!((spec.name.as_str(), spec.mesh.as_str(), spec.uid), ("web-0.shop", "default", 77));
        assert_eq!(spec.cluster(), "web");
        assert_eq!(spec.dataplane["networking"]["inbound"].as_array().unwrap().len(), 2);
        assert!(spec.redirect.is_none(), "the plugin's work");
    }

    #[test]
    fn a_pod_that_says_nothing_has_a_valid_workload() {
        let spec = pod(json!({
            "cmd": "cni-add", "container_id": "c1", "netns": "/run/netns/x", "ips": ["10.0.0.9"],
            "args": {"K8S_POD_NAME": "web-0", "K8S_POD_NAMESPACE": "shop"},
        }))
        .unwrap();
        assert_eq!((spec.name.as_str(), spec.cluster().as_str()), ("web-0.shop", "web-0-shop"));
    }

    #[test]
    fn the_operator_says_who_a_pod_is() {
        let add = |workload: Value| {
            pod(json!({
                "cmd": "cni-add", "container_id": "c1", "netns": "/run/netns/x",
                "args": {"K8S_POD_NAME": "web-0"}, "ips": ["10.0.0.9"],
                "annotations": {"kuma.io/workload": "bank", "kuma.io/mesh": "money"},
                "config": {"workload": workload}
            }))
            .unwrap()
        };
        let spec = add(json!({"mesh": "shops", "labels": {"kuma.io/workload": "web"}}));
        assert_eq!((spec.mesh.as_str(), spec.cluster().as_str()), ("shops", "web"));
        let spec = add(json!({}));
        assert_eq!((spec.mesh.as_str(), spec.cluster().as_str()), ("money", "bank"), "the habit");
    }

    #[test]
    fn what_is_missing_is_named() {
        let error = pod(json!({"cmd": "cni-add", "container_id": "c1", "netns": "/n"})).unwrap_err();
        assert!(error.contains("K8S_POD_NAME"), "{error}");
        let error =
            pod(json!({"cmd": "cni-add", "container_id": "c1", "args": {"K8S_POD_NAME": "a"}})).unwrap_err();
        assert!(error.contains("ips"), "{error}");
    }
}
