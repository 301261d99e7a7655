//! The shim's end of `control.sock`.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tracing::{debug, info, warn};

use super::dns::Dns;
use super::envoy::{Command, Handle};
use super::lines::{Receiver, send};
use super::log::SetLogLevel;
use super::peer;
use super::protocol::{self, Event, Message, Reply, Request, Status};
use super::xds::{Holder, Xds};

/// Agents and curious operators at a time.
const MAX_CLIENTS: usize = 16;
/// How long a client may take to read what it is told.
const PATIENCE: Duration = Duration::from_secs(5);

/// What a control connection sees of the shim.
pub(super) struct Control {
    pub(super) workload: String,
    pub(super) pid: i32,
    pub(super) start_time: u64,
    /// Users beside root that may give orders.
    pub(super) agent_uid: Option<u32>,
    pub(super) envoy: Handle,
    pub(super) dns: Arc<Dns>,
    pub(super) xds: Arc<Xds>,
    pub(super) set_log_level: SetLogLevel,
    /// Ends the shim, draining for at most this long.
    pub(super) stop: mpsc::Sender<Duration>,
}

impl Control {
    /// Accepts clients until dropped.
    pub(super) async fn run(self: Arc<Self>, listener: UnixListener) {
        let slots = Arc::new(Semaphore::new(MAX_CLIENTS));
        let mut clients = JoinSet::new();
        let mut next: Holder = 0;
        loop {
            while clients.try_join_next().is_some() {}
            let stream = match listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    warn!(%error, "cannot accept on control.sock");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let Ok(slot) = Arc::clone(&slots).try_acquire_owned() else {
                warn!("more than {MAX_CLIENTS} clients on control.sock; the newest is closed");
                continue;
            };
            next += 1;
            let (control, id) = (Arc::clone(&self), next);
            clients.spawn(async move {
                if let Err(reason) = control.client(&stream, id).await {
                    debug!(%reason, "a control connection ended");
                }
                control.xds.release(id);
                drop(slot);
            });
        }
    }

    async fn client(&self, stream: &UnixStream, id: Holder) -> Result<(), String> {
        match peer::uid(stream) {
            Ok(uid) if uid == 0 || Some(uid) == self.agent_uid => {}
            Ok(uid) => {
                warn!(uid, "refused a client of control.sock that is neither root nor the agent");
                let refusal = "only root and the agent may use this socket";
                return say(stream, &Reply { error: Some(refusal.into()), ..Reply::default() }, None).await;
            }
            Err(error) => {
                warn!(%error, "refused a client of control.sock whose process cannot be told");
                return Err(error.to_string());
            }
        }
        let mut envoy = self.envoy.status.clone();
        envoy.mark_unchanged();
        say(stream, &Message::Hello(Box::new(self.status())), None).await?;
        let mut receiver = Receiver::default();
        let mut holds_xds = false;
        loop {
            tokio::select! {
                line = receiver.line(stream) => {
                    let Some(line) = line.map_err(|error| error.to_string())? else { return Ok(()) };
                    let (reply, fd) = match serde_json::from_slice(&line) {
                        Ok(request) => {
                            holds_xds |= request == Request::TakeXds;
                            self.handle(request, id).await
                        }
                        Err(error) => (refused(format!("no such command: {error}")), None),
                    };
                    say(stream, &reply, fd).await?;
                }
                changed = envoy.changed() => {
                    if changed.is_err() {
                        return Ok(());
                    }
                    let event = Event::Envoy(envoy.borrow_and_update().clone());
                    say(stream, &event, None).await?;
                }
                () = self.xds.lost(id), if holds_xds => {
                    info!("another agent took the xDS role; the one before it is hung up");
                    return Ok(());
                }
            }
        }
    }

    async fn handle(&self, request: Request, id: Holder) -> (Reply, Option<OwnedFd>) {
        let done = match request {
            Request::Status => Ok(()),
            Request::TakeXds => match self.xds.take(id).await {
                Ok(listener) => return (self.done(), Some(listener.into())),
                Err(error) => Err(format!("the xDS socket cannot be passed: {error}")),
            },
            Request::ReloadDns => self.dns.reload().map(drop),
            Request::RestartEnvoy => self.envoy(Command::Restart),
            Request::Drain { .. } => self.envoy(Command::Drain),
            Request::Stop { drain_ms } => {
                // A second stop changes nothing: the first is under way.
                let _ = self.stop.try_send(Duration::from_millis(drain_ms));
                Ok(())
            }
            Request::SetLogLevel { level } => (self.set_log_level)(&level)
                .and_then(|()| self.envoy(Command::LogLevel(super::envoy_level(&level).to_owned()))),
            Request::Configure { .. }
            | Request::Waiting { .. }
            | Request::Resume
            | Request::ConnectAdmin
            | Request::ReExec => Err("this shim was configured by its arguments".into()),
        };
        match done {
            Ok(()) => (self.done(), None),
            Err(reason) => (refused(reason), None),
        }
    }

    fn envoy(&self, command: Command) -> Result<(), String> {
        self.envoy.commands.try_send(command).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => {
                "Envoy's supervisor is busy with earlier commands; try again".into()
            }
            mpsc::error::TrySendError::Closed(_) => "Envoy is being stopped for good".into(),
        })
    }

    fn done(&self) -> Reply {
        Reply { ok: true, status: Some(Box::new(self.status())), error: None }
    }

    fn status(&self) -> Status {
        Status {
            shim: protocol::VERSION,
            workload: self.workload.clone(),
            pid: self.pid,
            start_time: self.start_time,
            version: env!("CARGO_PKG_VERSION").into(),
            envoy: self.envoy.status.borrow().clone(),
            config_hash: self.envoy.config_hash.borrow().clone(),
            xds: self.xds.role(),
            dns: self.dns.status(),
            service: None,
            reexecs: 0,
            memory_limit: None,
        }
    }
}

fn refused(reason: String) -> Reply {
    Reply { ok: false, error: Some(reason), status: None }
}

async fn say(stream: &UnixStream, message: &impl Serialize, fd: Option<OwnedFd>) -> Result<(), String> {
    let line = serde_json::to_vec(message).map_err(|error| error.to_string())?;
    timeout(PATIENCE, send(stream, &line, fd.as_ref().map(AsFd::as_fd)))
        .await
        .map_err(|_| "the client does not read".to_owned())?
        .map_err(|error| error.to_string())
}
