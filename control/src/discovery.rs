//! Delta ADS towards agents: streams, subscriptions, dirty sets.
//!
//! One stream serves one Dataplane to the node that registered it. [`stream`] is the protocol as a pure state
//! machine; this file connects it to the wire, the world and the metrics. Nothing runs by a clock: a stream
//! sleeps until its client speaks or its inbox has something, and what a slow client has not acknowledged yet
//! keeps later changes of that type in a set, where they replace each other.

mod stream;

use std::collections::HashSet;
use std::sync::Arc;

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
use crate::identity::nodes::NodeRecord;
use crate::identity::service::IdentityService;
use crate::identity::{ControlIdentity, tls};
use crate::session::{Insights, Registry, SessionService};
use crate::world::{Subscription, World};

pub use stream::{Answered, DeltaStream};

/// Streams on one node's connection: each of its workloads has one.
const STREAMS_PER_NODE: u32 = 10_000;

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
        let serving = Serving {
            parts: Parts {
                registry: Arc::clone(&self.registry),
                world: self.world.clone(),
                insights: self.insights.clone(),
                metrics: Arc::clone(&self.metrics),
                shutdown: self.shutdown.clone(),
            },
            node,
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
    requests: Streaming<DeltaDiscoveryRequest>,
    open: Option<OpenStream>,
}

/// A stream that has said whom it is for.
struct OpenStream {
    subscription: Subscription,
    stream: DeltaStream,
    /// What the insight says was refused, so that an acceptance is reported only where it changes something.
    refused: HashSet<(TypeUrl, Arc<str>)>,
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
                    return Ok(Some(response));
                }
                tokio::select! {
                    biased;
                    request = self.requests.next() => request,
                    dirty = open.subscription.inbox().next() => {
                        open.stream.on_change(dirty);
                        continue;
                    }
                    () = self.parts.shutdown.cancelled() => return Err(shutting_down()),
                }
            } else {
                tokio::select! {
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
        let proxy = open.subscription.proxy();
        match answered {
            Answered::Accepted { kind, names } => {
                if open.refused.is_empty() {
                    return Ok(());
                }
                let healed: Vec<_> =
                    names.into_iter().filter(|name| open.refused.remove(&(kind, Arc::clone(name)))).collect();
                if !healed.is_empty() {
                    self.parts.insights.accepted(proxy, kind.as_str(), healed);
                }
            }
            Answered::Rejected { kind, message } => {
                let rejections = Rejection::decode_all(&message);
                self.parts.metrics.rejected(kind, rejections.len());
                for rejection in &rejections {
                    tracing::warn!(
                        mesh = proxy.mesh,
                        dataplane = proxy.name,
                        kind = ?kind,
                        name = rejection.name,
                        version = rejection.version,
                        "Envoy refused a resource: {}",
                        rejection.message
                    );
                    open.refused.insert((kind, Arc::from(rejection.name.as_str())));
                }
                self.parts.insights.rejected(proxy, kind.as_str(), rejections);
            }
        }
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
        .filter_map(|known| Some((TypeUrl::parse(&known.type_url)?, Arc::from(known.name))))
        .collect();
    parts.metrics.stream_opened();
    tracing::debug!(node = node.id, mesh, dataplane = name, "a discovery stream opened");
    Ok(OpenStream {
        subscription,
        stream: DeltaStream::default(),
        refused,
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

fn shutting_down() -> Status {
    Status::unavailable("the control plane is shutting down; reconnect")
}
