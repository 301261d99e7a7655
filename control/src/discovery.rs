//! Delta ADS towards agents: streams, subscriptions, dirty sets.
//!
//! One stream serves one Dataplane to the node that registered it. [`stream`] is the protocol as a pure state
//! machine; this file connects it to the wire, the world and the metrics. Nothing runs by a clock: a stream
//! sleeps until its client speaks or its inbox has something, and what a slow client has not acknowledged yet
//! keeps later changes of that type in a set, where they replace each other.

mod progress;
mod stream;
mod tally;

use std::collections::HashMap;
use std::sync::Arc;

use time::OffsetDateTime;

use tokio::net::TcpListener;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};
use ursa_engine::{ProxyKey, TypeUrl};
use ursa_model::types::dataplane_insight::DataplaneInsight;
use ursa_model::{ResourceKey, ResourceSpec as _};
use ursa_wire::BoxStream;
use ursa_wire::discovery::{
    AggregatedDiscovery, AggregatedDiscoveryServer, DeltaDiscoveryRequest, DeltaDiscoveryResponse, Rejection,
};
use ursa_wire::identity::IdentityServer;
use ursa_wire::join::JoinServer;
use ursa_wire::session::SessionServer;

use crate::diagnostics::Metrics;
use crate::identity::nodes::{NodeRecord, REVOKED};
use crate::identity::service::IdentityService;
use crate::identity::{ControlIdentity, tls};
use crate::session::{Insights, Registry, SessionService};
use crate::world::{Subscription, World};

pub use progress::{Counts, Progress};
pub use stream::{Answered, DeltaStream};
pub use tally::{Taken, Tally};

/// Streams on one node's connection: each of its workloads has one.
const STREAMS_PER_NODE: u32 = 10_000;

/// Rejections of one answer that are looked at.
const REJECTIONS: usize = 64;

/// Refused resources that a stream remembers: far more than there are unless a client invents names.
const REFUSED: usize = 4096;

/// What streams work with.
#[derive(Debug)]
pub struct Discovery {
    /// Who a node is.
    pub identity: Arc<ControlIdentity>,
    /// Who owns which Dataplane.
    pub registry: Arc<Registry>,
    /// Where configuration comes from.
    pub world: World,
    /// Where rejections go.
    pub insights: Insights,
    /// Counts.
    pub metrics: Arc<Metrics>,
    /// Ends all streams.
    pub shutdown: CancellationToken,
}

/// The services of the nodes' port.
#[derive(Debug)]
pub struct NodeServices {
    /// Delta ADS.
    pub discovery: Arc<Discovery>,
    /// Joining and issuing.
    pub identity: Arc<IdentityService>,
    /// Sessions.
    pub sessions: Arc<SessionService>,
}

/// Serves nodes on `listener` until `shutdown`.
pub async fn serve(
    services: NodeServices,
    listener: TcpListener,
    config: rustls::ServerConfig,
    shutdown: CancellationToken,
) -> Result<(), tonic::transport::Error> {
    let connections = tls::accept(listener, config, shutdown.clone());
    tonic::transport::Server::builder()
        .max_concurrent_streams(STREAMS_PER_NODE)
        // A node that died without a word is noticed within 20 s.
        .http2_keepalive_interval(Some(std::time::Duration::from_secs(10)))
        .http2_keepalive_timeout(Some(std::time::Duration::from_secs(10)))
        .add_service(AggregatedDiscoveryServer::new(services.discovery))
        .add_service(JoinServer::new(Arc::clone(&services.identity)))
        .add_service(IdentityServer::new(services.identity))
        .add_service(SessionServer::new(services.sessions))
        .serve_with_incoming_shutdown(ReceiverStream::new(connections), shutdown.cancelled_owned())
        .await
}

impl AggregatedDiscovery for Discovery {
    type Stream = BoxStream<DeltaDiscoveryResponse>;

    async fn delta(
        &self,
        requests: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::Stream>, Status> {
        let node = self.identity.authenticate(&requests)?;
        let revoked = self.identity.nodes().end_of(&node.id);
        // Once more: it may have been revoked before there was something to end.
        let node = self.identity.authenticate(&requests).map(|_| node)?;
        let serving = Serving {
            parts: Parts {
                registry: Arc::clone(&self.registry),
                world: self.world.clone(),
                insights: self.insights.clone(),
                metrics: Arc::clone(&self.metrics),
                shutdown: self.shutdown.clone(),
            },
            node,
            revoked,
            requests: requests.into_inner(),
            open: None,
        };
        let responses = futures_util::stream::unfold(Some(serving), |serving| async {
            let mut serving = serving?;
            match serving.next().await {
                Ok(Some(response)) => Some((Ok(response), Some(serving))),
                Ok(None) => None,
                Err(status) => Some((Err(status), None)),
            }
        });
        Ok(Response::new(Box::pin(responses)))
    }
}

#[derive(Debug)]
struct Parts {
    registry: Arc<Registry>,
    world: World,
    insights: Insights,
    metrics: Arc<Metrics>,
    shutdown: CancellationToken,
}

/// One stream being served.
struct Serving {
    parts: Parts,
    node: Arc<NodeRecord>,
    revoked: CancellationToken,
    requests: Streaming<DeltaDiscoveryRequest>,
    open: Option<OpenStream>,
}

/// A stream that has said whom it is for.
struct OpenStream {
    subscription: Subscription,
    stream: DeltaStream,
    /// What the insight says was refused, with the version, so that only what changes it is reported.
    refused: HashMap<(TypeUrl, Arc<str>), String>,
    /// What the insight is to hear of this stream when it is time.
    tally: Arc<Tally>,
    _counted: CountedStream,
}

struct CountedStream(Arc<Metrics>);

impl Drop for CountedStream {
    fn drop(&mut self) {
        self.0.stream_closed();
    }
}

impl Serving {
    /// The next response; none when the client has gone.
    async fn next(&mut self) -> Result<Option<DeltaDiscoveryResponse>, Status> {
        loop {
            let request = if let Some(open) = &mut self.open {
                if let Some(response) = open.stream.next_response() {
                    self.check_owner()?;
                    self.parts.metrics.pushed(&response);
                    if let (Some(open), Some(kind)) = (&self.open, TypeUrl::parse(&response.type_url)) {
                        open.note(kind, Some(OffsetDateTime::now_utc()), &self.parts.insights);
                    }
                    return Ok(Some(response));
                }
                tokio::select! {
                    biased;
                    () = self.revoked.cancelled() => return Err(revoked(&self.node)),
                    request = self.requests.next() => request,
                    dirty = open.subscription.inbox().next() => {
                        open.stream.on_change(dirty);
                        continue;
                    }
                    () = self.parts.shutdown.cancelled() => return Err(shutting_down()),
                }
            } else {
                tokio::select! {
                    () = self.revoked.cancelled() => return Err(revoked(&self.node)),
                    request = self.requests.next() => request,
                    () = self.parts.shutdown.cancelled() => return Err(shutting_down()),
                }
            };
            match request {
                Some(Ok(request)) => self.on_request(request).await?,
                // The client has closed the stream, or its connection broke.
                Some(Err(_)) | None => return Ok(None),
            }
        }
    }

    async fn on_request(&mut self, request: DeltaDiscoveryRequest) -> Result<(), Status> {
        let open = match &mut self.open {
            Some(open) => open,
            none => none.insert(open_stream(&self.parts, &self.node, &request).await?),
        };
        let Some(answered) = open.stream.on_request(request) else { return Ok(()) };
        let kind = match answered {
            Answered::Accepted { kind, names } => {
                open.accepted(kind, names, &self.parts);
                kind
            }
            Answered::Reported { kind } => {
                open.reported(kind, &self.parts);
                kind
            }
            Answered::Rejected { kind, message } => {
                open.rejected(kind, Rejection::decode_all(&message), &self.parts);
                kind
            }
        };
        open.note(kind, None, &self.parts.insights);
        Ok(())
    }

    /// A Dataplane may have gone to another node, or for good, since the stream was opened.
    fn check_owner(&self) -> Result<(), Status> {
        let Some(open) = &self.open else { return Ok(()) };
        let proxy = open.subscription.proxy();
        if self.parts.registry.owns(&self.node.id, &proxy.mesh, &proxy.name) {
            return Ok(());
        }
        Err(not_yours(&self.node, &proxy.mesh, &proxy.name))
    }
}

impl OpenStream {
    /// Counts; what is new for the insight's writer wakes it once.
    fn note(&self, kind: TypeUrl, sent_at: Option<OffsetDateTime>, insights: &Insights) {
        if self.tally.note(kind, &self.stream, sent_at) {
            insights.progress(self.subscription.proxy(), &self.tally);
        }
    }

    /// A client that applies what it acknowledges has taken these.
    fn accepted(&mut self, kind: TypeUrl, names: Vec<Arc<str>>, parts: &Parts) {
        if self.refused.is_empty() {
            return;
        }
        let healed: Vec<_> = names
            .into_iter()
            .filter(|name| self.refused.remove(&(kind, Arc::clone(name))).is_some())
            .collect();
        if !healed.is_empty() {
            parts.insights.accepted(self.subscription.proxy(), kind.as_str(), healed);
        }
    }

    /// A client refused these, beside whatever it refused before.
    fn rejected(&mut self, kind: TypeUrl, rejections: Vec<Rejection>, parts: &Parts) {
        parts.metrics.rejected(kind, rejections.len());
        let proxy = self.subscription.proxy();
        let rejections: Vec<Rejection> = rejections.into_iter().take(REJECTIONS).map(shorten).collect();
        for rejection in &rejections {
            warn_of(proxy, kind, rejection);
            let key = (kind, Arc::from(rejection.name.as_str()));
            if self.refused.len() < REFUSED || self.refused.contains_key(&key) {
                self.refused.insert(key, rejection.version.clone());
            }
        }
        parts.insights.rejected(proxy, kind.as_str(), rejections);
    }

    /// An agent has said what its Envoy refuses now: that is the whole list. What stood before and is under way
    /// once more, in the same version, stands until Envoy has answered.
    fn reported(&mut self, kind: TypeUrl, parts: &Parts) {
        let progress = self.stream.progress(kind);
        if progress.refused().len() == 0 && !self.refused.keys().any(|(other, _)| *other == kind) {
            return;
        }
        let news: Vec<Rejection> = progress
            .refused()
            .filter(|refused| {
                let key = (kind, Arc::from(refused.name.as_str()));
                self.refused.get(&key) != Some(&refused.version)
            })
            .cloned()
            .collect();
        let mut healed = Vec::new();
        self.refused.retain(|(other, name), version| {
            let stands =
                *other != kind || progress.is_refused(name) || self.stream.awaits(kind, name, version);
            if !stands {
                healed.push(Arc::clone(name));
            }
            stands
        });
        let proxy = self.subscription.proxy();
        if !healed.is_empty() {
            tracing::info!(mesh = proxy.mesh, dataplane = proxy.name, kind = ?kind, names = ?healed,
                "what Envoy refused is replaced, removed or accepted");
            parts.insights.accepted(proxy, kind.as_str(), healed);
        }
        if !news.is_empty() {
            self.rejected(kind, news, parts);
        }
    }
}

/// A rejection is a client's text, which is stored: as much of it as says something.
fn shorten(rejection: Rejection) -> Rejection {
    let cut = |mut text: String, most: usize| -> String {
        let end = (0..=most.min(text.len())).rev().find(|end| text.is_char_boundary(*end));
        text.truncate(end.unwrap_or_default());
        text
    };
    Rejection {
        name: cut(rejection.name, 1024),
        version: cut(rejection.version, 256),
        message: cut(rejection.message, 4096),
    }
}

fn warn_of(proxy: &ProxyKey, kind: TypeUrl, rejection: &Rejection) {
    tracing::warn!(
        mesh = proxy.mesh,
        dataplane = proxy.name,
        kind = ?kind,
        name = rejection.name,
        version = rejection.version,
        "Envoy refused a resource: {}",
        rejection.message
    );
}

async fn open_stream(
    parts: &Parts,
    node: &NodeRecord,
    request: &DeltaDiscoveryRequest,
) -> Result<OpenStream, Status> {
    let id = request.node.as_ref().map(|node| node.id.as_str()).unwrap_or_default();
    let (mesh, name) = id.split_once('.').ok_or_else(|| {
        Status::invalid_argument(format!(
            "the first request's node id is {id:?}; it must be `<mesh>.<dataplane>`"
        ))
    })?;
    if !parts.registry.owns(&node.id, mesh, name) {
        return Err(not_yours(node, mesh, name));
    }
    let proxy = ProxyKey { mesh: mesh.to_owned(), name: name.to_owned() };
    let subscription =
        parts.world.subscribe(&proxy).await.map_err(|ended| Status::unavailable(ended.to_string()))?;
    let insight = parts.world.get(&ResourceKey::new(DataplaneInsight::DESCRIPTOR, mesh, name));
    let refused = insight
        .and_then(|insight| insight.spec_as::<DataplaneInsight>().ok())
        .map(|insight| insight.rejections)
        .unwrap_or_default()
        .into_iter()
        .filter_map(|known| Some(((TypeUrl::parse(&known.type_url)?, Arc::from(known.name)), known.version)))
        .collect();
    parts.metrics.stream_opened();
    tracing::debug!(node = node.id, mesh, dataplane = name, "a discovery stream opened");
    Ok(OpenStream {
        subscription,
        stream: DeltaStream::default(),
        refused,
        tally: Arc::default(),
        _counted: CountedStream(Arc::clone(&parts.metrics)),
    })
}

fn not_yours(node: &NodeRecord, mesh: &str, name: &str) -> Status {
    tracing::warn!(
        node = node.id,
        mesh,
        dataplane = name,
        "refused a discovery stream: the Dataplane is not registered by this node"
    );
    Status::permission_denied(format!(
        "Dataplane {name:?} in mesh {mesh:?} is not registered by this node; register it in the session first"
    ))
}

fn revoked(node: &NodeRecord) -> Status {
    tracing::warn!(node = node.id, name = node.name, "ended a revoked node's discovery stream");
    Status::unauthenticated(REVOKED)
}

fn shutting_down() -> Status {
    Status::unavailable("the control plane is shutting down; reconnect")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rejection_is_cut_between_characters() {
        let long = Rejection { name: "n".into(), version: "1".into(), message: "aä".repeat(4096) };
        let short = shorten(long);
        assert_eq!((short.name.as_str(), short.message.len()), ("n", 4096));
        let odd =
            shorten(Rejection { name: "ä".repeat(1024), message: "ä".into(), version: String::new() });
        assert_eq!((odd.name.len(), odd.message.as_str()), (1024, "ä"));
        let off = shorten(Rejection { message: format!("a{}", "ä".repeat(4096)), ..odd });
        assert_eq!(off.message.len(), 4095, "a character would be cut in two");
    }
}
