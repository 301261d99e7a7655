//! Serves Envoys on a unix socket: each stream is a [`Downstream`] over a shared [`Cache`].

use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::{ReceiverStream, UnixListenerStream};
use tokio_util::sync::CancellationToken;
use tonic::{Status, Streaming};
use ursa_wire::discovery::{
    AggregatedDiscovery, AggregatedDiscoveryServer, ControlPlane, DeltaDiscoveryRequest,
    DeltaDiscoveryResponse,
};

use super::{Cache, Downstream, LastGood, LastGoodError, Request, Response};
use crate::shim::peer;

/// At most one response per type is on its way, so this never fills unless Envoy stops reading.
const QUEUE: usize = 8;

/// The xDS socket can't be served.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The last-good configuration can't be read.
    #[error(transparent)]
    LastGood(#[from] LastGoodError),
    /// The socket isn't usable.
    #[error("can't accept on the xDS socket")]
    Accept(#[source] tonic::transport::Error),
    /// Reading the disk was interrupted.
    #[error("reading the last-good configuration was interrupted")]
    Interrupted,
}

/// Serves `cache` to every Envoy of this user (and root) that connects, until `stop`; then all streams end and Envoy keeps what
/// it has. The socket's directory is closed to other users already; but this socket gives out a private key, so whoever
/// came in by another way is asked too.
pub async fn serve(
    listener: UnixListener,
    cache: Arc<Cache>,
    user: u32,
    stop: CancellationToken,
) -> Result<(), ServeError> {
    let service = AggregatedDiscoveryServer::new(Arc::new(Relay { cache, stop: stop.clone() }));
    let incoming = UnixListenerStream::new(listener)
        .filter(move |accepted| accepted.as_ref().map_or(true, |stream| is_envoy(stream, user)));
    tonic::transport::Server::builder()
        .add_service(service)
        .serve_with_incoming_shutdown(incoming, stop.cancelled_owned())
        .await
        .map_err(ServeError::Accept)
}

fn is_envoy(stream: &UnixStream, user: u32) -> bool {
    match peer::uid(stream) {
        // Root could become that user anyway.
        Ok(uid) if uid == user || uid == 0 => true,
        Ok(uid) => {
            tracing::warn!(
                uid,
                expected = user,
                "refused a client of xds.sock that isn't this workload's Envoy"
            );
            false
        }
        Err(error) => {
            tracing::warn!(%error, "refused a client of xds.sock whose process cannot be told");
            false
        }
    }
}

/// Serves the last-good configuration in `dir` (a workload's directory below the agent's state directory), read
/// once, until `stop`. For a shim without an agent: an Envoy that starts gets what its predecessor had accepted.
pub async fn serve_last_good(
    listener: UnixListener,
    dir: PathBuf,
    stop: CancellationToken,
) -> Result<(), ServeError> {
    let cache = Arc::new(Cache::new());
    let into = Arc::clone(&cache);
    tokio::task::spawn_blocking(move || load(&dir, &into)).await.map_err(|_| ServeError::Interrupted)??;
    serve(listener, cache, nix::unistd::geteuid().as_raw(), stop).await
}

/// Fills `cache` with what is on disk for a workload: configuration in `xds`, its own leaf in `identity`.
fn load(dir: &Path, cache: &Cache) -> Result<(), LastGoodError> {
    let mut items = LastGood::new(dir.join("xds")).load()?;
    items.extend(LastGood::new(dir.join("identity")).load()?);
    cache.load(items);
    Ok(())
}

#[derive(Debug)]
struct Relay {
    cache: Arc<Cache>,
    stop: CancellationToken,
}

impl AggregatedDiscovery for Relay {
    type Stream = ReceiverStream<Result<DeltaDiscoveryResponse, Status>>;

    async fn delta(
        &self,
        requests: tonic::Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<tonic::Response<Self::Stream>, Status> {
        let (responses, stream) = mpsc::channel(QUEUE);
        let (cache, stop) = (Arc::clone(&self.cache), self.stop.clone());
        // The task ends with the stream: when Envoy hangs up, `requests` ends or `responses` closes.
        tokio::spawn(async move {
            let mut downstream = Downstream::new();
            tokio::select! {
                () = stop.cancelled() => {}
                result = run(requests.into_inner(), &responses, &cache, &mut downstream) => {
                    if let Err(error) = result {
                        tracing::debug!(%error, "an Envoy's discovery stream ended");
                    }
                }
            }
            downstream.close(&cache);
        });
        Ok(tonic::Response::new(ReceiverStream::new(stream)))
    }
}

async fn run(
    mut requests: Streaming<DeltaDiscoveryRequest>,
    responses: &mpsc::Sender<Result<DeltaDiscoveryResponse, Status>>,
    cache: &Cache,
    downstream: &mut Downstream,
) -> Result<(), Status> {
    let mut changes = cache.changes();
    loop {
        while let Some(response) = downstream.next(cache) {
            if responses.send(Ok(to_wire(response))).await.is_err() {
                return Ok(());
            }
        }
        tokio::select! {
            request = requests.message() => match request? {
                Some(request) => downstream.on_request(&from_wire(request), cache),
                None => return Ok(()),
            },
            changed = changes.changed() => {
                if changed.is_err() {
                    return Ok(());
                }
            }
        }
    }
}

fn from_wire(request: DeltaDiscoveryRequest) -> Request {
    Request {
        type_url: request.type_url,
        subscribe: request.resource_names_subscribe,
        unsubscribe: request.resource_names_unsubscribe,
        initial_versions: request.initial_resource_versions.into_iter().collect(),
        nonce: request.response_nonce,
        error: request.error_detail.map(|detail| detail.message),
    }
}

fn to_wire(response: Response) -> DeltaDiscoveryResponse {
    DeltaDiscoveryResponse {
        system_version_info: String::new(),
        resources: response.items.into_iter().map(|(_, item)| item.bytes).collect(),
        type_url: response.kind.type_url().to_owned(),
        nonce: response.nonce,
        removed_resources: response.removed,
        control_plane: Some(ControlPlane { identifier: "ursa-agent".to_owned() }),
    }
}
