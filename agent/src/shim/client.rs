//! The agent's end of a shim's `control.sock`.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use std::collections::VecDeque;

use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{sleep, timeout};
use tracing::debug;

use super::lines::{Receiver, send};
use super::peer;
use super::protocol::{CONTROL_SOCKET, EnvoyStatus, Event, Message, Reply, Request, Settings, Status};

/// How often more, and after which time, a connection is tried that ended without a greeting.
const ATTEMPTS: u32 = 5;
const AGAIN: Duration = Duration::from_millis(100);

/// Why a shim could not be asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// Nobody listens.
    #[error("no shim answers on {}", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// The shim went away, or said something that isn't the protocol.
    #[error("the connection to the shim on {} ended: {reason}", path.display())]
    Lost {
        /// The socket.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// No answer in time.
    #[error("the shim on {} gave no answer to {request} within {deadline:?}; it may be stopped (SIGSTOP) or starved", path.display())]
    Timeout {
        /// The socket.
        path: PathBuf,
        /// What was asked.
        request: &'static str,
        /// For how long.
        deadline: Duration,
    },
    /// The shim refused.
    #[error("the shim refused {request}: {reason}")]
    Refused {
        /// What was asked.
        request: &'static str,
        /// In the shim's words.
        reason: String,
    },
}

impl ClientError {
    /// Whether it means that no shim runs, rather than that it can't be asked.
    pub fn is_nobody(&self) -> bool {
        matches!(self, Self::Connect { source, .. } if is_nobody(source))
    }
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn is_nobody(error: &std::io::Error) -> bool {
    matches!(error.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::ConnectionRefused)
}

type Answer = Result<(Reply, Option<OwnedFd>), String>;

/// A connection to one shim. Cheap to clone; the connection closes with its last clone, and with it the xDS role.
#[derive(Debug, Clone)]
pub struct ShimClient {
    path: PathBuf,
    hello: Status,
    peer: Peer,
    requests: mpsc::Sender<Question>,
    envoy: watch::Receiver<EnvoyStatus>,
}

/// Who bound the socket, as the kernel says: nothing that the shim's own user could forge.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer {
    /// The process that called `listen`.
    pub pid: i32,
    /// Its user at that time.
    pub uid: u32,
}

impl ShimClient {
    /// Connects to the shim whose directory this is, and waits for its greeting.
    pub async fn connect(dir: &Path) -> Result<Self, ClientError> {
        for _ in 0..ATTEMPTS {
            match Self::attempt(dir).await {
                // It may be replacing itself at this very moment.
                Err(ClientError::Lost { .. }) => sleep(AGAIN).await,
                done => return done,
            }
        }
        Self::attempt(dir).await
    }

    async fn attempt(dir: &Path) -> Result<Self, ClientError> {
        let path = dir.join(CONTROL_SOCKET);
        let failed = |source| ClientError::Connect { path: path.clone(), source };
        let stream = peer::connect(&path).await.map_err(failed)?;
        let credentials = stream.peer_cred().map_err(failed)?;
        let peer = Peer { pid: credentials.pid().unwrap_or(0), uid: credentials.uid() };
        let mut receiver = Receiver::default();
        let first = timeout(Self::DEADLINE, receiver.line(&stream)).await.map_err(|_| {
            ClientError::Timeout { path: path.clone(), request: "the connection", deadline: Self::DEADLINE }
        })?;
        let lost = |reason: String| ClientError::Lost { path: path.clone(), reason };
        let line = first
            .map_err(|error| lost(error.to_string()))?
            .ok_or_else(|| lost("it closed without a greeting".into()))?;
        let hello = match serde_json::from_slice(&line) {
            Ok(Message::Hello(hello)) => *hello,
            Ok(Message::Reply(Reply { error: Some(reason), .. })) => {
                return Err(ClientError::Refused { request: "the connection", reason });
            }
            _ => return Err(lost(format!("its greeting is none: {}", String::from_utf8_lossy(&line)))),
        };
        let (state, envoy) = watch::channel(hello.envoy.clone());
        let (requests, queue) = mpsc::channel(16);
        tokio::spawn(exchange(stream, receiver, queue, state));
        Ok(Self { path, hello, peer, requests, envoy })
    }

    /// Who listens in that directory, if anybody does, without waiting for a greeting.
    pub async fn listener(dir: &Path) -> Result<Option<Peer>, ClientError> {
        let path = dir.join(CONTROL_SOCKET);
        match peer::connect(&path).await.and_then(|stream| stream.peer_cred()) {
            Ok(credentials) => Ok(Some(Peer { pid: credentials.pid().unwrap_or(0), uid: credentials.uid() })),
            Err(error) if is_nobody(&error) => Ok(None),
            Err(source) => Err(ClientError::Connect { path, source }),
        }
    }

    /// What the shim said when greeting.
    pub fn hello(&self) -> &Status {
        &self.hello
    }

    /// Who bound the socket.
    pub fn peer(&self) -> Peer {
        self.peer
    }

    /// The socket.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Envoy's state, latest wins. The channel closes when the connection ends.
    pub fn envoy(&self) -> watch::Receiver<EnvoyStatus> {
        self.envoy.clone()
    }

    /// Waits until the connection ended: the shim is gone, or another agent took the xDS role from this one. Stop
    /// accepting on the xDS listener then.
    pub async fn closed(&self) {
        self.requests.closed().await;
    }

    /// The state now.
    pub async fn status(&self) -> Result<Status, ClientError> {
        let (reply, _) = self.ask("status", Request::Status).await?;
        reply.status.map(|status| *status).ok_or_else(|| self.lost("the reply to status has no status"))
    }

    /// Takes the xDS role: the listening socket, non-blocking, while this connection (or a clone) is open.
    pub async fn take_xds(&self) -> Result<UnixListener, ClientError> {
        let (_, fd) = self.ask("take-xds", Request::TakeXds).await?;
        fd.map(UnixListener::from).ok_or_else(|| self.lost("the reply to take-xds carried no socket"))
    }

    /// Makes the shim read its DNS table again. An error names what is wrong with the new table; the old one stays.
    pub async fn reload_dns(&self) -> Result<(), ClientError> {
        self.ask("reload-dns", Request::ReloadDns).await.map(drop)
    }

    /// Stops Envoy and starts it again.
    pub async fn restart_envoy(&self) -> Result<(), ClientError> {
        self.ask("restart-envoy", Request::RestartEnvoy).await.map(drop)
    }

    /// Begins to drain inbound connections; [`envoy`](Self::envoy) tells when that is over.
    pub async fn drain(&self, deadline: Option<Duration>) -> Result<(), ClientError> {
        let deadline_ms = deadline.map(milliseconds);
        self.ask("drain", Request::Drain { deadline_ms }).await.map(drop)
    }

    /// Takes inbound connections again after a drain.
    pub async fn resume(&self) -> Result<(), ClientError> {
        self.ask("resume", Request::Resume).await.map(drop)
    }

    /// Gives the shim its settings. See [`Request::Configure`] for when they take effect.
    pub async fn configure(&self, settings: Settings) -> Result<(), ClientError> {
        self.ask("configure", Request::Configure { settings: Box::new(settings) }).await.map(drop)
    }

    /// Tells the shim, and through it systemd, what the agent waits for.
    pub async fn waiting(&self, text: &str) -> Result<(), ClientError> {
        self.ask("waiting", Request::Waiting { text: text.to_owned() }).await.map(drop)
    }

    /// A connection to Envoy's admin interface.
    pub async fn connect_admin(&self) -> Result<std::os::unix::net::UnixStream, ClientError> {
        let (_, fd) = self.ask("connect-admin", Request::ConnectAdmin).await?;
        fd.map(Into::into).ok_or_else(|| self.lost("the reply to connect-admin carried no socket"))
    }

    /// Makes the shim replace itself by the binary that is installed now. The connection ends soon after.
    pub async fn re_exec(&self) -> Result<(), ClientError> {
        self.ask("re-exec", Request::ReExec).await.map(drop)
    }

    /// Asks the shim to drain for at most `drain`, stop Envoy and exit. Returns once it has begun to.
    pub async fn stop(&self, drain: Duration) -> Result<(), ClientError> {
        self.ask("stop", Request::Stop { drain_ms: milliseconds(drain) }).await.map(drop)
    }

    /// Changes the shim's and Envoy's log level.
    pub async fn set_log_level(&self, level: &str) -> Result<(), ClientError> {
        self.ask("set-log-level", Request::SetLogLevel { level: level.to_owned() }).await.map(drop)
    }

    /// How long an answer may take: every request is answered at once by a healthy shim.
    const DEADLINE: Duration = Duration::from_secs(5);

    async fn ask(
        &self,
        name: &'static str,
        request: Request,
    ) -> Result<(Reply, Option<OwnedFd>), ClientError> {
        let (answer, answered) = oneshot::channel();
        let exchange = async {
            self.requests.send((request, answer)).await.map_err(|_| "the connection is closed".to_owned())?;
            answered.await.map_err(|_| "it closed before it answered".to_owned())?
        };
        match timeout(Self::DEADLINE, exchange).await {
            Err(_) => {
                Err(ClientError::Timeout { path: self.path.clone(), request: name, deadline: Self::DEADLINE })
            }
            Ok(Err(reason)) => Err(self.lost(&reason)),
            Ok(Ok((reply, _))) if !reply.ok => Err(ClientError::Refused {
                request: name,
                reason: reply.error.unwrap_or_else(|| "no reason given".into()),
            }),
            Ok(Ok(done)) => Ok(done),
        }
    }

    fn lost(&self, reason: &str) -> ClientError {
        ClientError::Lost { path: self.path.clone(), reason: reason.to_owned() }
    }
}

type Question = (Request, oneshot::Sender<Answer>);

/// Owns the connection: pairs replies with requests, and publishes events, until either side is done.
async fn exchange(
    stream: UnixStream,
    mut receiver: Receiver,
    mut queue: mpsc::Receiver<Question>,
    envoy: watch::Sender<EnvoyStatus>,
) {
    // Whether a descriptor belongs to the reply, and who waits for it.
    let mut waiting: VecDeque<(bool, oneshot::Sender<Answer>)> = VecDeque::new();
    let reason = loop {
        tokio::select! {
            line = receiver.line(&stream) => match line {
                Ok(Some(line)) => match serde_json::from_slice(&line) {
                    Ok(Message::Reply(reply)) => {
                        let Some((with_fd, answer)) = waiting.pop_front() else {
                            break "it answered what nobody asked".to_owned();
                        };
                        if let Some(status) = &reply.status {
                            // The event says the same, later.
                            envoy.send_if_modified(|known| {
                                let news = *known != status.envoy;
                                known.clone_from(&status.envoy);
                                news
                            });
                        }
                        let fd = if with_fd && reply.ok { receiver.descriptor() } else { None };
                        // Whoever asked may have given up.
                        let _ = answer.send(Ok((reply, fd)));
                    }
                    Ok(Message::Event(Event::Envoy(status))) => {
                        envoy.send_replace(status);
                    }
                    Ok(Message::Hello(status)) => {
                        envoy.send_replace(status.envoy);
                    }
                    // A later version's event: not for us.
                    Ok(Message::Event(Event::Unknown)) => {}
                    Err(error) => debug!(%error, "a line of the shim is not understood"),
                },
                Ok(None) => break "it hung up".to_owned(),
                Err(error) => break error.to_string(),
            },
            question = queue.recv() => {
                let Some((request, answer)) = question else { return };
                let line = match serde_json::to_vec(&request) {
                    Ok(line) => line,
                    Err(error) => break error.to_string(),
                };
                waiting.push_back((request.wants_descriptor(), answer));
                if let Err(error) = send(&stream, &line, None).await {
                    break error.to_string();
                }
            }
        }
    };
    queue.close();
    for (_, answer) in waiting {
        let _ = answer.send(Err(reason.clone()));
    }
    while let Some((_, answer)) = queue.recv().await {
        let _ = answer.send(Err(reason.clone()));
    }
}
