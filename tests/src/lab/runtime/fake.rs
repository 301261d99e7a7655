//! A container runtime's answers without a runtime: a hundred pods that a test has made itself.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context as _;
use bytes::{BufMut as _, Bytes, BytesMut};
use http::{HeaderMap, HeaderValue, Request, Response};
use http_body_util::{BodyExt as _, Full, combinators::WithTrailers};
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo};
use prost::Message as _;
use serde_json::json;
use tokio::net::UnixListener;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::cri::{
    ListPodSandboxResponse, PodSandbox, PodSandboxMetadata, PodSandboxNetworkStatus, PodSandboxStatus,
    PodSandboxStatusRequest, PodSandboxStatusResponse,
};

/// The header of a message in gRPC: not compressed, and its length.
const PREFIX: usize = 5;

/// A pod that was there before the agent.
#[derive(Debug, Clone)]
pub struct EarlyPod {
    /// The sandbox's id.
    pub id: String,
    /// `K8S_POD_NAME`.
    pub name: String,
    /// Its network namespace.
    pub netns: PathBuf,
    /// Its address.
    pub ip: String,
}

/// The runtime, until it is dropped.
#[derive(Debug)]
pub struct FakeRuntime {
    _stop: DropGuard,
}

impl FakeRuntime {
    /// Answers on a socket.
    pub fn serve(socket: &Path, pods: Vec<EarlyPod>) -> anyhow::Result<Self> {
        let stop = CancellationToken::new();
        let listener = std::os::unix::net::UnixListener::bind(socket)?;
        listener.set_nonblocking(true)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let until = stop.clone();
        let serve = async move {
            let Ok(listener) = UnixListener::from_std(listener) else { return };
            let pods = Arc::new(pods);
            while let Ok((stream, _)) = listener.accept().await {
                let pods = Arc::clone(&pods);
                let service = hyper::service::service_fn(move |request| answer(request, Arc::clone(&pods)));
                let server = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
                tokio::spawn(server.serve_connection(TokioIo::new(stream), service));
            }
        };
        std::thread::Builder::new()
            .name("runtime".to_owned())
            .spawn(move || runtime.block_on(until.run_until_cancelled(serve)))?;
        Ok(Self { _stop: stop.drop_guard() })
    }
}

type Reply =
    WithTrailers<Full<Bytes>, std::future::Ready<Option<Result<HeaderMap, std::convert::Infallible>>>>;

async fn answer(request: Request<Incoming>, pods: Arc<Vec<EarlyPod>>) -> anyhow::Result<Response<Reply>> {
    let path = request.uri().path().to_owned();
    let question = request.into_body().collect().await?.to_bytes();
    let question = question.get(PREFIX..).context("no message")?;
    let message = if path.ends_with("/ListPodSandbox") {
        ListPodSandboxResponse { items: pods.iter().map(EarlyPod::listed).collect() }.encode_to_vec()
    } else {
        let wanted = PodSandboxStatusRequest::decode(question)?.id;
        let pod = pods.iter().find(|pod| pod.id == wanted).context("no such pod")?;
        pod.status().encode_to_vec()
    };
    let mut body = BytesMut::with_capacity(PREFIX + message.len());
    body.put_u8(0);
    body.put_u32(u32::try_from(message.len())?);
    body.put_slice(&message);
    let trailers =
        HeaderMap::from_iter([(http::HeaderName::from_static("grpc-status"), HeaderValue::from_static("0"))]);
    let body = Full::new(body.freeze()).with_trailers(std::future::ready(Some(Ok(trailers))));
    Ok(Response::builder().header("content-type", "application/grpc").body(body)?)
}

impl EarlyPod {
    fn metadata(&self) -> PodSandboxMetadata {
        PodSandboxMetadata {
            name: self.name.clone(),
            uid: format!("uid-{}", self.id),
            namespace: "shop".to_owned(),
            attempt: 0,
        }
    }

    fn listed(&self) -> PodSandbox {
        PodSandbox { id: self.id.clone(), metadata: Some(self.metadata()), state: 0 }
    }

    fn status(&self) -> PodSandboxStatusResponse {
        let network = json!({"type": "network", "path": self.netns});
        let info = json!({"runtimeSpec": {"linux": {"namespaces": [network]}}});
        PodSandboxStatusResponse {
            status: Some(PodSandboxStatus {
                id: self.id.clone(),
                metadata: Some(self.metadata()),
                state: 0,
                network: Some(PodSandboxNetworkStatus { ip: self.ip.clone(), additional_ips: Vec::new() }),
            }),
            info: HashMap::from([("info".to_owned(), info.to_string())]),
        }
    }
}
