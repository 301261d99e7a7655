//! `agent.sock`: one JSON object per line from the CLI and the CNI plugin, one back. Root only.

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
use tokio::sync::{Semaphore, watch};
use tokio_util::sync::CancellationToken;
use ursa_cni_protocol::{Call, Records};
use ursa_model::injection::Decision;

use super::cni::Decisions;
use super::config::AgentConfig;
use super::control::{Control, chain};
use super::cri::PodReport;
use super::session::{ConnectionState, Session};
use super::status::{AgentStatus, Phase};
use super::supervisor::Supervisor;
use super::workload::Origin;
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
    CniAdd(Box<Call>),
    /// Is this container meshed? The answer holds a verdict.
    CniDecide(Box<Call>),
    /// Is this container's sidecar live? An error if it isn't.
    CniCheck {
        /// `CNI_CONTAINERID`.
        container_id: String,
    },
    /// A container disappeared. No error if it was never there.
    CniDel {
        /// `CNI_CONTAINERID`.
        container_id: String,
    },
    /// Records have gone: of containers that have none any more, sidecars stop.
    CniGc,
}

/// The agent's socket.
#[derive(Debug)]
pub struct AgentSocket {
    listener: UnixListener,
    /// The socket's file, if this process made it; systemd's stays, and callers wait for the next agent.
    made: Option<PathBuf>,
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
    /// What is known of pods.
    pub decisions: Arc<Decisions>,
    /// What the container runtime showed.
    pub pods: watch::Receiver<PodReport>,
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
        Ok(Self { listener, made: Some(path.to_owned()), parts: Arc::new(parts) })
    }

    /// Answers on a socket that systemd has opened (`ursa-agent.socket`).
    pub fn given(listener: std::os::unix::net::UnixListener, parts: Parts) -> io::Result<Self> {
        Ok(Self { listener: UnixListener::from_std(listener)?, made: None, parts: Arc::new(parts) })
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
            let Ok(permit) = Arc::clone(&callers).try_acquire_owned() else {
                // Who isn't told waits, or takes the agent for dead.
                let busy = json!({ "error": format!("the agent answers {CALLERS} others; try again") });
                let _ = stream.try_write(format!("{busy}\n").as_bytes());
                continue;
            };
            let parts = Arc::clone(&self.parts);
            tasks.spawn(async move {
                let _permit = permit;
                if let Err(error) = answer_all(stream, &parts).await {
                    tracing::debug!(%error, "a caller on the agent's socket went away");
                }
            });
        }
        if let Some(path) = &self.made {
            let _ = fs::remove_file(path);
        }
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
                let records = Records::below(&self.config.run_dir);
                if !records.has(&add.container_id) {
                    return Err(format!(
                        "container {} isn't on record in {}: its plugin has given up meanwhile, or uses another runDir \
                         than this agent",
                        add.container_id,
                        records.dir().display()
                    ));
                }
                let spec = self.decisions.spec(&add, &self.config)?;
                self.supervisor.add(spec).await?;
                Ok(json!({ "ok": true }))
            }
            Request::CniDecide(call) => {
                let verdict = self.decisions.decide(&call).map_err(|error| error.to_string())?;
                if verdict.decision == Decision::Undecided {
                    tracing::warn!(pod = %call.pod(), reason = %verdict.reason, "a pod can't be decided about");
                }
                Ok(json!({ "ok": true, "verdict": verdict }))
            }
            Request::CniCheck { container_id } => self.check(container_id).await,
            Request::CniDel { container_id } => {
                let removed = self.supervisor.remove(&container_id).await?;
                Ok(json!({ "ok": true, "removed": removed }))
            }
            Request::CniGc => {
                let removed = self.supervisor.sweep().await?;
                Ok(json!({ "ok": true, "removed": removed }))
            }
        }
    }

    async fn check(&self, container: String) -> Result<Value, String> {
        let origin = Origin::Cni(container).to_string();
        let (workloads, _) = self.supervisor.status().await;
        let found = workloads.into_iter().find(|workload| workload.origin == origin);
        let found = found.ok_or("the agent knows no sidecar of this container; recreate the pod")?;
        if matches!(found.state, Phase::Live | Phase::Ready) {
            return Ok(json!({ "ok": true }));
        }
        let why = found.error.map(|error| format!(": {error}")).unwrap_or_default();
        Err(format!("{}.{} is {}{why}", found.mesh, found.name, found.state.as_str()))
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
            pods: self.config.cri.is_some().then(|| self.pods.borrow().clone()),
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
