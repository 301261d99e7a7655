//! The shim's end of `control.sock`.

use std::io::Write as _;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tracing::{debug, info, warn};

use super::envoy::{Command, Handle};
use super::lines::{Receiver, send};
use super::memory;
use super::peer;
use super::protocol::{self, Event, Message, Reply, Request, Status};
use super::replace::Replacement;
use super::work::Work;
use super::xds::{Holder, Xds};

/// Agents and curious operators at a time.
const MAX_CLIENTS: usize = 16;
/// Clients that run as our own user, which Envoy does, too. They must not take the agent's places.
const MAX_OWN_CLIENTS: usize = 4;
/// How long a client may take to read what it is told.
const PATIENCE: Duration = Duration::from_secs(5);

/// What a control connection sees of the shim.
pub(super) struct Control {
    pub(super) service: Option<String>,
    pub(super) pid: i32,
    pub(super) start_time: u64,
    pub(super) reexecs: u32,
    /// Users beside root that may give orders.
    pub(super) agent_uid: Option<u32>,
    pub(super) work: Arc<Work>,
    pub(super) envoy: Handle,
    pub(super) xds: Arc<Xds>,
    pub(super) replacement: Arc<Replacement>,
    /// Ends the shim, draining for at most this long.
    pub(super) stop: mpsc::Sender<Duration>,
}

/// What a client may ask.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    /// Everything.
    Full,
    /// What does its own user no good but that it could do to Envoy anyway.
    Own,
}

impl Role {
    fn may(self, request: &Request) -> bool {
        self == Self::Full || matches!(request, Request::Status | Request::Drain { .. } | Request::Resume)
    }
}

impl Control {
    /// Accepts clients until dropped.
    pub(super) async fn run(self: Arc<Self>, listener: UnixListener) {
        let slots = Arc::new(Semaphore::new(MAX_CLIENTS));
        let own_slots = Arc::new(Semaphore::new(MAX_OWN_CLIENTS));
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
            let Some(role) = self.role(&stream) else {
                let refusal = "only root and the agent may use this socket";
                let refusal = Reply { error: Some(refusal.into()), ..Reply::default() };
                let line = serde_json::to_vec(&refusal).unwrap_or_default();
                // A few words always fit into a new socket, which doesn't block.
                let said = stream.into_std();
                let _ = said.and_then(|mut stream| stream.write_all(&[line.as_slice(), b"\n"].concat()));
                continue;
            };
            let slots = if role == Role::Full { &slots } else { &own_slots };
            let Ok(slot) = Arc::clone(slots).try_acquire_owned() else {
                warn!(?role, "too many clients on control.sock; the newest is closed");
                continue;
            };
            next += 1;
            let (control, id) = (Arc::clone(&self), next);
            clients.spawn(async move {
                if let Err(reason) = control.client(&stream, role, id).await {
                    debug!(%reason, "a control connection ended");
                }
                control.xds.release(id);
                drop(slot);
            });
        }
    }

    fn role(&self, stream: &UnixStream) -> Option<Role> {
        match peer::uid(stream) {
            Ok(uid) if uid == 0 || Some(uid) == self.agent_uid => Some(Role::Full),
            // Elsewhere nobody but root gets in.
            Ok(uid) if self.service.is_some() && uid == nix::unistd::geteuid().as_raw() => Some(Role::Own),
            // Everybody may knock here, as often as they like.
            Ok(uid) if self.service.is_some() => {
                debug!(uid, "refused a client of control.sock that is neither root nor the agent");
                None
            }
            Ok(uid) => {
                warn!(uid, "refused a client of control.sock that is neither root nor the agent");
                None
            }
            Err(error) => {
                warn!(%error, "refused a client of control.sock whose process cannot be told");
                None
            }
        }
    }

    async fn client(&self, stream: &UnixStream, role: Role, id: Holder) -> Result<(), String> {
        let mut envoy = self.envoy.status.clone();
        envoy.mark_unchanged();
        say(stream, &Message::Hello(Box::new(self.status())), None).await?;
        let mut receiver = Receiver::default();
        let mut holds_xds = false;
        loop {
            tokio::select! {
                line = receiver.line(stream) => {
                    let Some(line) = line.map_err(|error| error.to_string())? else { return Ok(()) };
                    let (mut reply, mut fd, mut replaces) = (None, None, false);
                    match serde_json::from_slice::<Request>(&line) {
                        Ok(request) if !role.may(&request) => {
                            reply = Some(refused("only root and the agent may ask for that".into()));
                        }
                        Ok(request) => {
                            holds_xds |= request == Request::TakeXds;
                            replaces = request == Request::ReExec;
                            match self.handle(request, id).await {
                                Ok(passed) => fd = passed,
                                Err(reason) => reply = Some(refused(reason)),
                            }
                        }
                        Err(error) => reply = Some(refused(format!("no such command: {error}"))),
                    }
                    let reply = reply.unwrap_or_else(|| self.done());
                    say(stream, &reply, fd).await?;
                    if replaces && reply.ok {
                        self.replacement.begin();
                    }
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

    /// What is passed along with the answer, or why it was not done.
    async fn handle(&self, request: Request, id: Holder) -> Result<Option<OwnedFd>, String> {
        match request {
            Request::Status => {}
            Request::TakeXds => {
                let listener = self.xds.take(id).await;
                let listener =
                    listener.map_err(|error| format!("the xDS socket cannot be passed: {error}"))?;
                return Ok(Some(listener.into()));
            }
            Request::ConnectAdmin => {
                let admin = self.work.private.join(protocol::ADMIN_SOCKET);
                let connected = UnixStream::connect(&admin).await.and_then(UnixStream::into_std);
                let connected = connected
                    .map_err(|error| format!("Envoy doesn't answer on {}: {error}", admin.display()))?;
                return Ok(Some(connected.into()));
            }
            Request::ReloadDns => self.work.dns.reload().map(drop)?,
            Request::RestartEnvoy => self.work.command(Command::Restart)?,
            Request::Drain { deadline_ms } => {
                self.work.command(Command::Drain(deadline_ms.map(Duration::from_millis)))?;
                // Whoever waits for the end wants to know that it has begun.
                self.work.obeyed().await?;
            }
            Request::Resume => self.work.command(Command::Resume)?,
            Request::Stop { drain_ms } => {
                // A second stop changes nothing: the first is under way.
                let _ = self.stop.try_send(Duration::from_millis(drain_ms));
            }
            Request::SetLogLevel { level } => self.work.set_log_level(&level)?,
            Request::Configure { settings } => self.work.configure(*settings)?,
            Request::Waiting { text } => self.work.command(Command::Awaited(text))?,
            Request::ReExec => {
                self.replacement.check().await?;
            }
        }
        Ok(None)
    }

    fn done(&self) -> Reply {
        Reply { ok: true, status: Some(Box::new(self.status())), error: None }
    }

    fn status(&self) -> Status {
        Status {
            shim: protocol::VERSION,
            workload: self.work.workload.borrow().clone(),
            pid: self.pid,
            start_time: self.start_time,
            version: env!("CARGO_PKG_VERSION").into(),
            envoy: self.envoy.status.borrow().clone(),
            config_hash: self.envoy.config_hash.borrow().clone(),
            xds: self.xds.role(),
            dns: self.work.dns.status(),
            service: self.service.clone(),
            reexecs: self.reexecs,
            outdated: self.replacement.is_outdated(),
            memory_limit: memory::limit(),
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
