//! The stream to control: fills one workload's [`Cache`] and reports what Envoy refused.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use tonic::transport::Channel;
use ursa_wire::discovery::{
    AggregatedDiscoveryClient, DeltaDiscoveryRequest, DeltaDiscoveryResponse, ErrorDetail, Node, Rejection,
};

use super::{Cache, Kind, item_from_encoded};

/// Requests that wait for the connection; one per type and one answer each is all there ever is.
const QUEUE: usize = 32;

/// Who asks control.
#[derive(Clone, Debug)]
pub struct Upstream {
    /// `<mesh>.<dataplane name>`.
    pub node_id: String,
    /// The workload's name.
    pub cluster: String,
}

/// What [`Upstream::run`] tells its owner while it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UpstreamState {
    /// Control answers.
    Connected,
    /// Control has sent everything there is.
    Synced,
}

impl Upstream {
    /// Runs one stream until it ends; the caller reconnects with back-off. What the cache holds is not sent again.
    pub async fn run(
        &self,
        channel: Channel,
        cache: &Arc<Cache>,
        mut on_state: impl FnMut(UpstreamState) + Send,
    ) -> Result<(), Status> {
        let (requests, outgoing) = mpsc::channel(QUEUE);
        cache.begin_sync();
        for (index, kind) in Kind::ALL.into_iter().enumerate() {
            let request = self.subscribe(kind, cache, index == 0);
            requests.try_send(request).map_err(|_| Status::internal("the request queue is full"))?;
        }
        let _disconnect = Disconnect(cache);
        let mut responses =
            AggregatedDiscoveryClient::new(channel).delta(ReceiverStream::new(outgoing)).await?.into_inner();
        on_state(UpstreamState::Connected);

        let mut rejections = cache.rejection_changes();
        rejections.mark_changed(); // what was refused before this stream is reported to this control plane too
        let mut nonces: HashMap<Kind, String> = HashMap::new();
        let mut reported: BTreeMap<Kind, Vec<Rejection>> = BTreeMap::new();
        let mut awaited = Kind::ALL.to_vec();
        loop {
            tokio::select! {
                response = responses.message() => {
                    let Some(response) = response? else { return Ok(()) };
                    let Some(kind) = Kind::from_type_url(&response.type_url) else {
                        tracing::warn!(type_url = %response.type_url, "control sent a type that wasn't asked for");
                        continue;
                    };
                    let nonce = response.nonce.clone();
                    let synced = response.is_synced();
                    let unreadable = take_in(kind, response, cache);
                    nonces.insert(kind, nonce.clone());
                    send(&requests, answer(kind, nonce, &unreadable)).await?;
                    if synced && awaited.contains(&kind) {
                        cache.synced(kind);
                        awaited.retain(|awaited| *awaited != kind);
                        if awaited.is_empty() {
                            on_state(UpstreamState::Synced);
                        }
                    }
                }
                changed = rejections.changed() => {
                    changed.map_err(|_| Status::cancelled("the workload is gone"))?;
                    for (kind, list) in by_kind(cache) {
                        if reported.get(&kind) == Some(&list) || (list.is_empty() && !reported.contains_key(&kind)) {
                            continue;
                        }
                        let nonce = nonces.get(&kind).cloned().unwrap_or_default();
                        send(&requests, answer(kind, nonce, &list)).await?;
                        reported.insert(kind, list);
                    }
                }
            }
        }
    }

    fn subscribe(&self, kind: Kind, cache: &Cache, first: bool) -> DeltaDiscoveryRequest {
        DeltaDiscoveryRequest {
            node: first.then(|| Node {
                id: self.node_id.clone(),
                cluster: self.cluster.clone(),
                user_agent_name: "ursa-agent".to_owned(),
                user_agent_version: env!("CARGO_PKG_VERSION").to_owned(),
                ..Node::default()
            }),
            type_url: kind.type_url().to_owned(),
            resource_names_subscribe: vec!["*".to_owned()],
            initial_resource_versions: cache.held_versions(kind).into_iter().collect(),
            ..DeltaDiscoveryRequest::default()
        }
    }
}

/// Marks the cache as not live when the stream ends, however it ends.
struct Disconnect<'a>(&'a Cache);

impl Drop for Disconnect<'_> {
    fn drop(&mut self) {
        self.0.disconnected();
    }
}

fn take_in(kind: Kind, response: DeltaDiscoveryResponse, cache: &Cache) -> Vec<Rejection> {
    let mut unreadable = Vec::new();
    let mut added = Vec::with_capacity(response.resources.len());
    for bytes in response.resources {
        match item_from_encoded(bytes) {
            Ok(named) => added.push(named),
            Err(error) => unreadable.push(Rejection {
                name: String::new(),
                version: String::new(),
                message: format!("the agent can't read a resource: {error}"),
            }),
        }
    }
    cache.update(kind, added, response.removed_resources);
    unreadable
}

fn by_kind(cache: &Cache) -> BTreeMap<Kind, Vec<Rejection>> {
    let mut map: BTreeMap<Kind, Vec<Rejection>> =
        Kind::ENVOY.into_iter().map(|kind| (kind, Vec::new())).collect();
    for rejection in cache.rejections() {
        if let Some(list) = Kind::from_type_url(&rejection.type_url).and_then(|kind| map.get_mut(&kind)) {
            list.push(Rejection {
                name: rejection.name,
                version: rejection.version,
                message: rejection.message,
            });
        }
    }
    map
}

fn answer(kind: Kind, nonce: String, refused: &[Rejection]) -> DeltaDiscoveryRequest {
    /// `google.rpc.Code.INVALID_ARGUMENT`
    const INVALID_ARGUMENT: i32 = 3;
    DeltaDiscoveryRequest {
        type_url: kind.type_url().to_owned(),
        response_nonce: nonce,
        error_detail: (!refused.is_empty())
            .then(|| ErrorDetail { code: INVALID_ARGUMENT, message: Rejection::encode_all(refused) }),
        ..DeltaDiscoveryRequest::default()
    }
}

async fn send(
    requests: &mpsc::Sender<DeltaDiscoveryRequest>,
    request: DeltaDiscoveryRequest,
) -> Result<(), Status> {
    requests.send(request).await.map_err(|_| Status::unavailable("control closed its half of the stream"))
}
