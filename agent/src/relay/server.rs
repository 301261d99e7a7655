//! Serves Envoys on a unix socket: each stream is a [`Downstream`] over a shared [`Cache`].

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::future::BoxFuture;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio_stream::wrappers::{ReceiverStream, UnixListenerStream};
use tokio_util::sync::CancellationToken;
use tonic::{Status, Streaming};
use ursa_wire::discovery::{
    AggregatedDiscovery, AggregatedDiscoveryServer, ControlPlane, DeltaDiscoveryRequest,
    DeltaDiscoveryResponse,
};

use super::{Cache, Downstream, LastGood, LastGoodError, Request, Response};
use crate::shim::peer::PeerProcess;

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

/// Decides whether the process that has connected may have the workload's configuration and its key.
pub type Admit = Arc<dyn Fn(PeerProcess) -> BoxFuture<'static, Result<(), String>> + Send + Sync>;

/// Admits the children of one process, as Envoy is of its shim. A process of the same user that anybody else started
/// isn't that Envoy.
pub fn children_of(parent: i32, user: u32) -> Admit {
    Arc::new(move |peer| {
        let admitted = is_of(&peer, user).and_then(|()| match peer.parent() {
            Ok(found) if found == parent => Ok(()),
            Ok(found) => {
                Err(format!("pid {} was started by pid {found}, not by the shim (pid {parent})", peer.pid()))
            }
            Err(error) => Err(format!("the parent of pid {} can't be told: {error}", peer.pid())),
        });
        Box::pin(std::future::ready(admitted))
    })
}

/// Whether it runs as the workload's sidecar does.
pub fn is_of(peer: &PeerProcess, user: u32) -> Result<(), String> {
    if peer.uid() == user {
        return Ok(());
    }
    Err(format!("pid {} runs as uid {}, not as this workload's Envoy (uid {user})", peer.pid(), peer.uid()))
}

/// How long it may take to tell who has connected.
const ADMISSION: Duration = Duration::from_secs(10);
/// Connections that are judged at the same time.
const JUDGED: usize = 8;

/// Serves `cache` to every Envoy that is admitted, until `stop`; then all streams end and Envoy keeps what it has. The
/// socket's directory is closed to other users already; but this socket gives out a private key, so whoever came in by
/// another way is asked too.
pub async fn serve(
    listener: UnixListener,
    cache: Arc<Cache>,
    admit: Admit,
    stop: CancellationToken,
) -> Result<(), ServeError> {
    let service = AggregatedDiscoveryServer::new(Arc::new(Relay { cache, stop: stop.clone() }));
    let incoming = UnixListenerStream::new(listener)
        .map(move |accepted| {
            let admit = Arc::clone(&admit);
            async move {
                match accepted {
                    Ok(stream) => is_admitted(&stream, &admit).await.then_some(Ok(stream)),
                    Err(error) => Some(Err(error)),
                }
            }
        })
        .buffer_unordered(JUDGED)
        .filter_map(std::future::ready);
    tonic::transport::Server::builder()
        .add_service(service)
        .serve_with_incoming_shutdown(incoming, stop.cancelled_owned())
        .await
        .map_err(ServeError::Accept)
}

async fn is_admitted(stream: &UnixStream, admit: &Admit) -> bool {
    let judged = match PeerProcess::of(stream) {
        Ok(peer) => tokio::time::timeout(ADMISSION, admit(peer)).await.unwrap_or_else(|_| {
            Err(format!("it couldn't be told within {} s who it is", ADMISSION.as_secs()))
        }),
        Err(error) => Err(format!("its process can't be told: {error}")),
    };
    match judged {
        Ok(()) => true,
        Err(reason) => {
            tracing::warn!(%reason, "refused a client of xds.sock");
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
    let own = nix::unistd::getpid().as_raw();
    serve(listener, cache, children_of(own, nix::unistd::geteuid().as_raw()), stop).await
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
