//! The stream to control: fills one workload's [`Cache`] and reports what Envoy has made of it. What was stored is
//! acknowledged at once, so that control never waits for an Envoy; what Envoy acknowledged or refused goes beside.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use tonic::transport::Channel;
use ursa_wire::discovery::{
    AggregatedDiscoveryClient, Applied, DeltaDiscoveryRequest, DeltaDiscoveryResponse, ErrorDetail, Node,
    Rejection,
};

use super::{Cache, Kind, Unapplied, item_from_encoded};

/// Requests that wait for the connection; one per type and one answer each is all there ever is.
const QUEUE: usize = 32;

/// Envoy's answers are reported at most this often: the first at once, what follows closely together.
const CADENCE: Duration = Duration::from_millis(100);

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
        let mut reported: HashMap<Kind, Unapplied> = HashMap::new();
        for (index, kind) in Kind::ALL.into_iter().enumerate() {
            let unapplied = cache.unapplied(kind);
            let request = self.subscribe(kind, cache, index == 0, &unapplied);
            reported.insert(kind, unapplied);
            requests.try_send(request).map_err(|_| Status::internal("the request queue is full"))?;
        }
        let _disconnect = Disconnect(cache);
        let mut responses =
            AggregatedDiscoveryClient::new(channel).delta(ReceiverStream::new(outgoing)).await?.into_inner();
        on_state(UpstreamState::Connected);

        let mut outcomes = cache.rejection_changes();
        // Whatever changed since the subscriptions above were made is looked at once more.
        let mut unreported = true;
        let mut report_at = tokio::time::Instant::now();
        let mut nonces: HashMap<Kind, String> = HashMap::new();
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
                    let unapplied = cache.unapplied(kind);
                    let answer = DeltaDiscoveryRequest {
                        type_url: kind.type_url().to_owned(),
                        response_nonce: nonce.clone(),
                        error_detail: refusal(&unreadable),
                        applied: kind.is_for_envoy().then(|| applied(nonce, unapplied.clone())),
                        ..DeltaDiscoveryRequest::default()
                    };
                    reported.insert(kind, unapplied);
                    send(&requests, answer).await?;
                    if synced && awaited.contains(&kind) {
                        cache.synced(kind);
                        awaited.retain(|awaited| *awaited != kind);
                        if awaited.is_empty() {
                            on_state(UpstreamState::Synced);
                        }
                    }
                }
                changed = outcomes.changed(), if !unreported => {
                    changed.map_err(|_| Status::cancelled("the workload is gone"))?;
                    unreported = true;
                }
                () = tokio::time::sleep_until(report_at), if unreported => {
                    outcomes.mark_unchanged();
                    unreported = false;
                    report_at = tokio::time::Instant::now() + CADENCE;
                    for kind in Kind::ENVOY {
                        let unapplied = cache.unapplied(kind);
                        if reported.get(&kind) == Some(&unapplied) {
                            continue;
                        }
                        let through = nonces.get(&kind).cloned().unwrap_or_default();
                        send(&requests, report(kind, through, unapplied.clone())).await?;
                        reported.insert(kind, unapplied);
                    }
                }
            }
        }
    }

    fn subscribe(
        &self,
        kind: Kind,
        cache: &Cache,
        first: bool,
        unapplied: &Unapplied,
    ) -> DeltaDiscoveryRequest {
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
            applied: kind.is_for_envoy().then(|| applied(String::new(), unapplied.clone())),
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

fn applied(through: String, unapplied: Unapplied) -> Applied {
    let refused = unapplied.refused.into_iter().map(|rejection| Rejection {
        name: rejection.name,
        version: rejection.version,
        message: rejection.message,
    });
    let refused = refused.collect();
    Applied { through, pending: unapplied.pending, refused, no_envoy: unapplied.no_envoy }
}

/// What Envoy has made of a type, beside any acknowledgement.
fn report(kind: Kind, through: String, unapplied: Unapplied) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest {
        type_url: kind.type_url().to_owned(),
        applied: Some(applied(through, unapplied)),
        ..DeltaDiscoveryRequest::default()
    }
}

fn refusal(unreadable: &[Rejection]) -> Option<ErrorDetail> {
    /// `google.rpc.Code.INVALID_ARGUMENT`
    const INVALID_ARGUMENT: i32 = 3;
    (!unreadable.is_empty())
        .then(|| ErrorDetail { code: INVALID_ARGUMENT, message: Rejection::encode_all(unreadable) })
}

async fn send(
    requests: &mpsc::Sender<DeltaDiscoveryRequest>,
    request: DeltaDiscoveryRequest,
) -> Result<(), Status> {
    requests.send(request).await.map_err(|_| Status::unavailable("control closed its half of the stream"))
}
