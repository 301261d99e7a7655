//! The node's session with control: which workloads live here, and what becomes of them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use ursa_wire::session::{
    ControlEvent, ControlRequest, NodeEvent, NodeMessage, ProxyRef, ProxyStatus, Register, Reply,
    SessionClient,
};

use super::control::Link;
use super::node::reason;
use super::retry::Backoff;
use super::token;

/// Commands from workloads to the session; a workload sends a handful in its life.
const COMMANDS: usize = 256;
/// Messages on their way to control.
const OUTGOING: usize = 64;
/// A refused Dataplane is offered again this often.
const REFUSED_AGAIN: Duration = Duration::from_secs(10);
/// How many deregistrations are kept for a reconnect. Control takes what isn't registered again out of everybody's
/// endpoints anyway.
const DEPARTED: usize = 4096;

/// What control says about a Dataplane of ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Registration {
    /// Not yet asked, or not yet answered.
    Pending,
    /// It is stored; its streams may open.
    Registered,
    /// It was refused, in control's words.
    Refused(String),
}

/// What control is shown of a workload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Offer {
    /// The Dataplane in its REST form.
    pub dataplane_json: String,
    /// The file with its dataplane token, read anew each time, so that a replaced token needs no restart.
    pub token_file: Option<PathBuf>,
}

/// The state of the connection to control.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ConnectionState {
    /// This node hasn't joined.
    NotJoined,
    /// The last attempt failed, or the session ended.
    Disconnected(String),
    /// The session is open.
    Connected,
}

#[derive(Debug)]
enum Command {
    Register { key: (String, String), offer: Offer, answer: watch::Sender<Registration> },
    Deregister { key: (String, String) },
    Status { key: (String, String), json: String },
    Reply { id: u64, json: String },
}

/// Answers control's requests about a workload (dumps, statistics).
pub trait Inspector: Send + Sync + 'static {
    /// The answer to a request as JSON, or an error in words.
    fn inspect(
        &self,
        kind: &str,
        parameters: serde_json::Value,
    ) -> futures_util::future::BoxFuture<'static, Result<serde_json::Value, String>>;
}

/// A handle to the session task. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Session {
    commands: mpsc::Sender<Command>,
    state: watch::Receiver<ConnectionState>,
}

impl Session {
    /// Starts the session task; it ends with `stop`.
    pub fn start(
        links: watch::Receiver<Option<Link>>,
        inspector: Arc<dyn Inspector>,
        stop: CancellationToken,
    ) -> (Self, tokio::task::JoinHandle<()>) {
        let (commands, queue) = mpsc::channel(COMMANDS);
        let (state_sender, state) = watch::channel(ConnectionState::NotJoined);
        let task = Task {
            links,
            queue,
            replies: commands.clone(),
            state: state_sender,
            inspector,
            entries: BTreeMap::new(),
            departed: BTreeSet::new(),
        };
        let join = tokio::spawn(async move {
            tokio::select! {
                () = stop.cancelled() => {}
                () = task.run() => {}
            }
        });
        (Self { commands, state }, join)
    }

    /// Registers a Dataplane now and on every reconnect, until it is deregistered or registered differently.
    /// Control's answers go to `answer`.
    pub async fn register(&self, mesh: &str, name: &str, offer: Offer, answer: watch::Sender<Registration>) {
        let key = (mesh.to_owned(), name.to_owned());
        // It fails only while the agent shuts down; the registration then stays pending.
        let _ = self.commands.send(Command::Register { key, offer, answer }).await;
    }

    /// Withdraws a Dataplane.
    pub async fn deregister(&self, mesh: &str, name: &str) {
        let _ = self.commands.send(Command::Deregister { key: (mesh.to_owned(), name.to_owned()) }).await;
    }

    /// Reports what belongs into the Dataplane's insight. Dropped while the queue is full: the next one says more.
    pub fn report(&self, mesh: &str, name: &str, json: String) {
        let _ = self.commands.try_send(Command::Status { key: (mesh.to_owned(), name.to_owned()), json });
    }

    /// The connection's state as it changes.
    pub fn state(&self) -> watch::Receiver<ConnectionState> {
        self.state.clone()
    }
}

#[derive(Debug)]
struct Registered {
    offer: Offer,
    answer: watch::Sender<Registration>,
    status: Option<String>,
}

struct Task {
    links: watch::Receiver<Option<Link>>,
    queue: mpsc::Receiver<Command>,
    replies: mpsc::Sender<Command>,
    state: watch::Sender<ConnectionState>,
    inspector: Arc<dyn Inspector>,
    entries: BTreeMap<(String, String), Registered>,
    /// Deregistered when control perhaps couldn't hear of it: said again on a reconnect.
    departed: BTreeSet<(String, String)>,
}

impl Task {
    async fn run(mut self) {
        let mut backoff = Backoff::connection();
        loop {
            let link = self.links.borrow_and_update().clone();
            let Some(link) = link else {
                tokio::select! {
                    changed = self.links.changed() => if changed.is_err() { return },
                    command = self.queue.recv() => match command {
                        Some(command) => { self.remember(command); }
                        None => return,
                    }
                }
                continue;
            };
            let ended = self.connected(&link, &mut backoff).await;
            if let ConnectionState::Disconnected(why) = &ended
                && *self.state.borrow() != ended
            {
                tracing::warn!(address = %link.node.address, reason = %why,
                    "the session with control ended; what runs goes on with its last configuration");
            }
            self.state.send_replace(ended);
            for entry in self.entries.values() {
                entry.answer.send_if_modified(|registration| {
                    let modified = *registration == Registration::Registered;
                    if modified {
                        *registration = Registration::Pending;
                    }
                    modified
                });
            }
            let wait = backoff.step();
            let deadline = tokio::time::Instant::now() + wait;
            loop {
                tokio::select! {
                    () = tokio::time::sleep_until(deadline) => break,
                    changed = self.links.changed() => if changed.is_err() { return } else { break },
                    command = self.queue.recv() => match command {
                        Some(command) => { self.remember(command); }
                        None => return,
                    }
                }
            }
        }
    }

    /// One session from opening to end.
    async fn connected(&mut self, link: &Link, backoff: &mut Backoff) -> ConnectionState {
        let (outgoing, messages) = mpsc::channel(OUTGOING);
        let mut client = SessionClient::new(link.channel.clone());
        let mut incoming = match client.open(ReceiverStream::new(messages)).await {
            Ok(response) => response.into_inner(),
            Err(status) => return ConnectionState::Disconnected(reason(&status)),
        };
        tracing::info!(address = %link.node.address, "connected to control");
        self.state.send_replace(ConnectionState::Connected);
        backoff.reset();
        let opened = tokio::time::Instant::now();
        let mut again = tokio::time::interval(REFUSED_AGAIN);
        again.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        // All of them at once may be more than the queue holds: they are sent while answers are read.
        let departed = self.departed.iter().map(deregistration);
        let entries = self.entries.iter().flat_map(|(key, entry)| entry.events(key));
        let mut backlog: std::collections::VecDeque<NodeEvent> = departed.chain(entries).collect();
        loop {
            tokio::select! {
                message = incoming.message() => match message {
                    Ok(Some(message)) => {
                        if let Some(event) = message.event {
                            self.on_control(event);
                        }
                    }
                    Ok(None) => return ConnectionState::Disconnected("control closed the session".to_owned()),
                    Err(status) => return ConnectionState::Disconnected(reason(&status)),
                },
                permit = outgoing.reserve(), if !backlog.is_empty() => match permit {
                    Ok(permit) => {
                        if let Some(event) = backlog.pop_front() {
                            permit.send(NodeMessage::from(event));
                        }
                    }
                    Err(_) => return ConnectionState::Disconnected("control closed the session".to_owned()),
                },
                command = self.queue.recv() => match command {
                    Some(command) => backlog.extend(self.remember(command)),
                    None => return ConnectionState::Disconnected("the agent stops".to_owned()),
                },
                _ = again.tick() => {
                    if opened.elapsed() >= REFUSED_AGAIN {
                        self.departed.clear(); // control has heard of them
                    }
                    // What was refused may be possible now: a mesh that was created, a grant that was extended.
                    let refused = |entry: &Registered| matches!(*entry.answer.borrow(), Registration::Refused(_));
                    let again = self.entries.iter().filter(|(_, entry)| refused(entry));
                    backlog.extend(again.filter_map(|(key, entry)| entry.register(key)));
                }
                changed = self.links.changed() => {
                    if changed.is_err() {
                        return ConnectionState::Disconnected("the agent stops".to_owned());
                    }
                    // A renewed certificate: what is open stays valid, the next connection uses the new one.
                    let renewed = self.links.borrow_and_update().as_ref().is_some_and(|new| {
                        new.node.node_id == link.node.node_id && new.node.address == link.node.address
                    });
                    if !renewed {
                        return ConnectionState::Disconnected("this node has joined anew".to_owned());
                    }
                }
            }
        }
    }

    /// Keeps what must be repeated on a reconnect; returns what is to be sent now.
    fn remember(&mut self, command: Command) -> Option<NodeEvent> {
        match command {
            Command::Register { key, offer, answer } => {
                let entry = Registered { offer, answer, status: None };
                let event = entry.register(&key);
                self.departed.remove(&key);
                self.entries.insert(key, entry);
                event
            }
            Command::Deregister { key } => {
                // An agent that removes what its predecessor left has never registered it.
                self.entries.remove(&key);
                let event = deregistration(&key);
                self.departed.insert(key);
                if self.departed.len() > DEPARTED {
                    self.departed.pop_first();
                }
                Some(event)
            }
            Command::Status { key, json } => {
                let entry = self.entries.get_mut(&key)?;
                entry.status = Some(json.clone());
                Some(NodeEvent::Status(ProxyStatus { mesh: key.0, name: key.1, json }))
            }
            Command::Reply { id, json } => Some(NodeEvent::Reply(Reply { id, json })),
        }
    }

    fn on_control(&self, event: ControlEvent) {
        match event {
            ControlEvent::Registered(ProxyRef { mesh, name }) => {
                if let Some(entry) = self.entries.get(&(mesh, name)) {
                    entry.answer.send_replace(Registration::Registered);
                }
            }
            ControlEvent::Refused(refused) => {
                let Some(entry) = self.entries.get(&(refused.mesh.clone(), refused.name.clone())) else {
                    return;
                };
                if entry.refuse(&refused.reason) {
                    tracing::error!(mesh = %refused.mesh, dataplane = %refused.name, reason = %refused.reason,
                        "control refused a Dataplane of this node");
                }
            }
            ControlEvent::Request(ControlRequest { id, kind, json }) => {
                let parameters = serde_json::from_str(&json).unwrap_or_default();
                let work = self.inspector.inspect(&kind, parameters);
                let replies = self.replies.clone();
                tokio::spawn(async move {
                    let json = match work.await {
                        Ok(value) => serde_json::json!({ "result": value }),
                        Err(error) => serde_json::json!({ "error": error }),
                    };
                    // Control asks again if the session ended meanwhile.
                    let _ = replies.send(Command::Reply { id, json: json.to_string() }).await;
                });
            }
        }
    }
}

fn deregistration((mesh, name): &(String, String)) -> NodeEvent {
    NodeEvent::Deregister(ProxyRef { mesh: mesh.clone(), name: name.clone() })
}

impl Registered {
    /// What is to be sent; nothing if the token can't be read, which is then the reason that status shows.
    fn register(&self, (mesh, name): &(String, String)) -> Option<NodeEvent> {
        let token = match self.offer.token_file.as_deref().map(token::read) {
            None => String::new(),
            Some(Ok(token)) => token,
            Some(Err(reason)) => {
                if self.refuse(&reason) {
                    tracing::error!(%mesh, dataplane = %name, %reason, "a Dataplane can't be registered");
                }
                return None;
            }
        };
        Some(NodeEvent::Register(Register { dataplane_json: self.offer.dataplane_json.clone(), token }))
    }

    /// Remembers a refusal; whether it is news.
    fn refuse(&self, reason: &str) -> bool {
        self.answer.send_if_modified(|registration| {
            let news = Registration::Refused(reason.to_owned());
            let modified = *registration != news;
            *registration = news;
            modified
        })
    }

    /// Everything that a new session must hear.
    fn events(&self, key: &(String, String)) -> Vec<NodeEvent> {
        let (mesh, name) = key;
        let mut events: Vec<NodeEvent> = self.register(key).into_iter().collect();
        events.extend(
            self.status
                .clone()
                .map(|json| NodeEvent::Status(ProxyStatus { mesh: mesh.clone(), name: name.clone(), json })),
        );
        events
    }
}
