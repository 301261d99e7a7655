//! The agents' sessions: registration and liveness of Dataplanes.
//!
//! A node holds one stream open; that is its liveness. It registers its Dataplanes on it, each checked against
//! the node's grant. When the stream ends, its Dataplanes stay for a grace time, so that a node may reconnect,
//! and are then taken out of everybody's endpoints. What is known of a proxy at run time goes into its
//! `DataplaneInsight`, written when it changes and not otherwise.

mod insights;
mod registration;
mod registry;
mod requests;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::mpsc;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};
use ursa_engine::ProxyKey;
use ursa_model::labels::Context;
use ursa_wire::session::{
    ControlEvent, ControlMessage, NodeEvent, NodeMessage, ProxyRef, ProxyStatus, Session,
};

pub use insights::{InsightTask, Insights, run as run_insights};
pub use registry::{Registry, Vouched};
pub use requests::{AskError, Requests};

use crate::diagnostics::Metrics;
use crate::identity::ControlIdentity;
use crate::identity::nodes::{NodeRecord, REVOKED};
use crate::store::Store;
use crate::tokens::Tokens;
use crate::world::World;

/// Answers that a slow node may leave unread.
const ANSWERS: usize = 64;

/// Bytes that what a node says of a proxy's version may have: it is stored.
const LONGEST_VERSION: usize = 4096;

/// What sessions work with.
#[derive(Debug)]
pub struct Sessions {
    /// Who a node is.
    pub identity: Arc<ControlIdentity>,
    /// Where Dataplanes go.
    pub store: Store,
    /// What is known.
    pub world: World,
    /// Who owns which Dataplane.
    pub registry: Arc<Registry>,
    /// Questions to nodes.
    pub requests: Requests,
    /// What is known of proxies at run time.
    pub insights: Insights,
    /// For computing labels.
    pub labels: Context,
    /// For workloads that a dataplane token vouches for.
    pub tokens: Tokens,
    /// Whether a node's grant isn't enough (`dpServer.authn.dpProxy.type: dpToken`).
    pub token_required: bool,
    /// How long a closed session's Dataplanes are kept.
    pub grace: Duration,
    /// Ends all sessions; a restarted control plane gives them their grace again.
    pub shutdown: CancellationToken,
    /// Counts.
    pub metrics: Arc<Metrics>,
}

/// Serves sessions.
#[derive(Debug)]
pub struct SessionService {
    shared: Arc<Sessions>,
    next: AtomicU64,
}

impl SessionService {
    /// A service around its parts.
    pub fn new(shared: Arc<Sessions>) -> Self {
        Self { shared, next: AtomicU64::new(1) }
    }
}

impl Session for SessionService {
    type Stream = ReceiverStream<Result<ControlMessage, Status>>;

    async fn open(
        &self,
        messages: Request<Streaming<NodeMessage>>,
    ) -> Result<Response<Self::Stream>, Status> {
        let node = self.shared.identity.authenticate(&messages)?;
        let revoked = self.shared.identity.nodes().end_of(&node.id);
        // Once more: it may have been revoked before there was something to end.
        let node = self.shared.identity.authenticate(&messages).map(|_| node)?;
        let (sender, receiver) = mpsc::channel(ANSWERS);
        let open = Open {
            shared: Arc::clone(&self.shared),
            node,
            number: self.next.fetch_add(1, Ordering::Relaxed),
            sender,
            revoked,
        };
        tokio::spawn(open.serve(messages.into_inner()));
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}

/// One open session.
struct Open {
    shared: Arc<Sessions>,
    node: Arc<NodeRecord>,
    number: u64,
    sender: mpsc::Sender<Result<ControlMessage, Status>>,
    revoked: CancellationToken,
}

impl Open {
    async fn serve(self, mut messages: Streaming<NodeMessage>) {
        tracing::info!(node = self.node.id, name = self.node.name, "a node's session opened");
        self.shared.metrics.session_opened();
        self.shared.requests.opened(&self.node.id, self.number, self.sender.clone());
        // A node that doesn't read its answers is not waited for when the session has to end.
        tokio::select! {
            biased;
            () = self.revoked.cancelled() => {
                let _ = self.sender.try_send(Err(Status::unauthenticated(REVOKED)));
            }
            () = self.shared.shutdown.cancelled() => {
                let _ = self.sender.try_send(Err(Status::unavailable("the control plane is shutting down")));
            }
            () = self.read(&mut messages) => {}
        }
        self.shared.metrics.session_closed();
        self.shared.requests.closed(&self.node.id, self.number);
        if self.revoked.is_cancelled() {
            tracing::warn!(node = self.node.id, name = self.node.name, "ended a revoked node's session");
            self.shared.expel(&self.node.id);
            return;
        }
        if self.shared.shutdown.is_cancelled() {
            return;
        }
        let left = self.shared.registry.leave(self.number);
        tracing::info!(
            node = self.node.id,
            name = self.node.name,
            dataplanes = left,
            "a node's session closed; its Dataplanes stay for {:?}",
            self.shared.grace
        );
        let Self { shared, number, .. } = self;
        tokio::select! {
            () = tokio::time::sleep(shared.grace) => {
                shared.registry.expire(number, |proxy| shared.withdraw(proxy, "its node did not come back"));
            }
            () = shared.shutdown.cancelled() => {}
        }
    }

    /// Takes messages until the stream ends.
    async fn read(&self, messages: &mut Streaming<NodeMessage>) {
        while let Some(message) = messages.next().await {
            match message {
                Ok(message) => self.take(message).await,
                Err(status) => {
                    tracing::debug!(node = self.node.id, "session ended: {status}");
                    return;
                }
            }
        }
    }

    async fn take(&self, message: NodeMessage) {
        match message.event {
            Some(NodeEvent::Register(register)) => {
                let answer = match self.register(&register).await {
                    Ok(proxy) => ControlEvent::Registered(ProxyRef { mesh: proxy.mesh, name: proxy.name }),
                    Err(refused) => {
                        tracing::warn!(
                            node = self.node.id,
                            mesh = refused.mesh,
                            dataplane = refused.name,
                            "refused a registration: {}",
                            refused.reason
                        );
                        ControlEvent::Refused(refused)
                    }
                };
                self.answer(answer).await;
            }
            Some(NodeEvent::Deregister(proxy)) => self.deregister(proxy).await,
            Some(NodeEvent::Status(status)) => self.status(&status),
            Some(NodeEvent::Reply(reply)) => {
                self.shared.requests.replied(&self.node.id, reply.id, &reply.json);
            }
            None => {}
        }
    }

    async fn answer(&self, event: ControlEvent) {
        // A closed stream is noticed by reading from it.
        let _ = self.sender.send(Ok(event.into())).await;
    }

    async fn deregister(&self, proxy: ProxyRef) {
        let key = ProxyKey { mesh: proxy.mesh, name: proxy.name };
        if !self.shared.registry.owns(&self.node.id, &key.mesh, &key.name) {
            return;
        }
        // It stays the node's until it is removed: what another node registers under this name meanwhile would be
        // removed with it.
        if let Err(error) = self.shared.remove_dataplane(&key).await {
            tracing::error!(
                mesh = key.mesh,
                dataplane = key.name,
                "can't remove the Dataplane, which is only taken out of everybody's endpoints: {error}"
            );
            self.shared.withdraw(&key, "it was deregistered");
        } else {
            tracing::info!(node = self.node.id, mesh = key.mesh, dataplane = key.name, "deregistered");
            self.shared.insights.gone(&key);
        }
        self.shared.registry.release(&self.node.id, &key);
    }

    fn status(&self, status: &ProxyStatus) {
        if !self.shared.registry.owns(&self.node.id, &status.mesh, &status.name) {
            return;
        }
        let Ok(serde_json::Value::Object(mut fields)) = serde_json::from_str(&status.json) else {
            return;
        };
        if let Some(version) = fields.remove("version") {
            let size = version.to_string().len();
            if size > LONGEST_VERSION {
                tracing::warn!(
                    node = self.node.id,
                    mesh = status.mesh,
                    dataplane = status.name,
                    "ignored a status: its version has {size} bytes, and at most {LONGEST_VERSION} are kept"
                );
                return;
            }
            let proxy = ProxyKey { mesh: status.mesh.clone(), name: status.name.clone() };
            self.shared.insights.version(&proxy, version);
        }
    }
}

impl Sessions {
    /// Takes everything of a node that may not come back out of everybody's endpoints, at once. Its sessions and
    /// streams end by themselves.
    pub fn expel(&self, node: &str) {
        self.registry.expel(node, |proxy| self.withdraw(proxy, "its node was revoked"));
    }

    /// Takes a proxy out of everybody's endpoints.
    fn withdraw(&self, proxy: &ProxyKey, why: &str) {
        tracing::info!(mesh = proxy.mesh, dataplane = proxy.name, "withdrawn: {why}");
        self.world.set_liveness(proxy, false);
        self.insights.offline(proxy);
    }

    /// After a start: proxies that were offline stay so, and those that were online get their grace. Returns
    /// at once; the grace runs in the background.
    pub fn restore(self: &Arc<Self>) {
        let (online, offline) = self.world.read(insights::split_by_state);
        for proxy in &offline {
            self.world.set_liveness(proxy, false);
        }
        let shared = Arc::clone(self);
        tokio::spawn(async move {
            tokio::select! {
                () = tokio::time::sleep(shared.grace) => {}
                () = shared.shutdown.cancelled() => return,
            }
            for proxy in online {
                let withdraw = || shared.withdraw(&proxy, "its node did not come back");
                shared.registry.unless_registered(&proxy, withdraw);
            }
        });
    }
}
