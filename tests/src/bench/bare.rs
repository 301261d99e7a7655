//! The floor: a server of the same crates that does nothing but push shared bytes.
//!
//! It runs in a process of its own, with the TLS of the real one (same acceptor, client certificates demanded),
//! and obeys one line per push on standard input. What it says at the start is how to reach it.

use std::collections::BTreeMap;
use std::pin::pin;
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, bail};
use bytes::Bytes;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpListener;
use tokio::process::{Child, ChildStdin};
use tokio::sync::mpsc;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};
use ursa_control::identity::tls;
use ursa_wire::BoxStream;
use ursa_wire::discovery::{
    AggregatedDiscovery, AggregatedDiscoveryServer, ControlPlane, DeltaDiscoveryRequest,
    DeltaDiscoveryResponse, Resource, SYNCED,
};
use ursa_wire::tls::SERVER_NAME;
use ursa_wire::type_url;

use super::node::Node;
use super::process;

/// How to reach the bare server, as its first line of output.
#[derive(Debug, Serialize, Deserialize)]
struct Access {
    address: String,
    ca_pem: String,
    chain_pem: String,
    key_pem: String,
}

/// The floor's process, as the bench sees it.
#[derive(Debug)]
pub struct Bare {
    child: Child,
    orders: ChildStdin,
    /// Who may connect.
    pub node: Arc<Node>,
}

impl Bare {
    /// Starts this very program once more, in its other role.
    pub async fn start(program: &std::path::Path, pin: bool) -> anyhow::Result<Self> {
        let mut child = process::pinned(program, pin)
            .arg("--bare")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {}", program.display()))?;
        let orders = child.stdin.take().context("invariant: piped")?;
        let output = child.stdout.take().context("invariant: piped")?;
        let line = BufReader::new(output).lines().next_line().await?;
        let access: Access = serde_json::from_str(&line.context("the bare server has ended")?)?;
        let node = Node::new(&access.address, &access.ca_pem, &access.chain_pem, &access.key_pem)?;
        Ok(Self { child, orders, node: Arc::new(node) })
    }

    /// Its process id.
    pub fn pid(&self) -> anyhow::Result<u32> {
        self.child.id().context("the bare server has ended")
    }

    /// Has it push a message of about `bytes` to the first `count` proxies.
    pub async fn push(&mut self, count: usize, bytes: u64) -> anyhow::Result<()> {
        self.orders.write_all(format!("{count} {bytes}\n").as_bytes()).await?;
        Ok(self.orders.flush().await?)
    }
}

/// Serves until standard input ends.
pub async fn serve() -> anyhow::Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let (config, access) = access(listener.local_addr()?.to_string())?;
    let shutdown = CancellationToken::new();
    let floor = Floor::default();
    let connections = tls::accept(listener, config, shutdown.clone());
    // The settings of the real one.
    let server = tonic::transport::Server::builder()
        .http2_keepalive_interval(Some(Duration::from_secs(10)))
        .http2_keepalive_timeout(Some(Duration::from_secs(10)))
        .add_service(AggregatedDiscoveryServer::new(Arc::new(floor.clone())))
        .serve_with_incoming(ReceiverStream::new(connections));
    println!("{}", serde_json::to_string(&access)?);
    let mut orders = BufReader::new(tokio::io::stdin()).lines();
    let mut server = pin!(server);
    loop {
        tokio::select! {
            ended = &mut server => bail!("the bare server ended: {ended:?}"),
            line = orders.next_line() => {
                let Some(line) = line? else { return Ok(()) };
                let (count, bytes) = line.split_once(' ').context("an order is `<count> <bytes>`")?;
                floor.push(count.parse()?, bytes.parse()?);
            }
        }
    }
}

fn access(address: String) -> anyhow::Result<(ServerConfig, Access)> {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
    let (server_key, client_key) = (KeyPair::generate()?, KeyPair::generate()?);
    let server = CertificateParams::new(vec![SERVER_NAME.to_owned()])?.signed_by(&server_key, &ca)?;
    let client = CertificateParams::new(vec!["node".to_owned()])?.signed_by(&client_key, &ca)?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut roots = RootCertStore::empty();
    roots.add(ca.der().clone())?;
    let verifier =
        WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider)).build()?;
    let chain: Vec<CertificateDer<'static>> = vec![server.der().clone(), ca.der().clone()];
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, PrivateKeyDer::Pkcs8(server_key.serialize_der().into()))?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    let (ca_pem, chain_pem, key_pem) = (ca.pem(), client.pem(), client_key.serialize_pem());
    Ok((config, Access { address, ca_pem, chain_pem, key_pem }))
}

/// Streams by the number of their proxy.
#[derive(Debug, Clone, Default)]
struct Floor {
    streams: Arc<Mutex<BTreeMap<usize, mpsc::Sender<Bytes>>>>,
}

impl Floor {
    fn push(&self, count: usize, bytes: usize) {
        // Name, version and type are about that long.
        let content = vec![b'.'; bytes.saturating_sub(250)];
        let resource = Resource::new(type_url::ENDPOINT, "floor", &"0".repeat(32), content.into()).encoded();
        let streams = self.streams.lock().unwrap_or_else(PoisonError::into_inner);
        for sender in streams.range(..count).map(|(_, sender)| sender) {
            // A stream that is so far behind shows as a missing receipt.
            let _ = sender.try_send(resource.clone());
        }
    }
}

/// One stream: its requests, what is to be pushed to it, and how many responses it had.
struct Serving {
    floor: Floor,
    requests: Streaming<DeltaDiscoveryRequest>,
    pushes: mpsc::Receiver<Bytes>,
    sender: mpsc::Sender<Bytes>,
    nonce: u64,
}

impl AggregatedDiscovery for Floor {
    type Stream = BoxStream<DeltaDiscoveryResponse>;

    async fn delta(
        &self,
        requests: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::Stream>, Status> {
        let (sender, pushes) = mpsc::channel(64);
        let requests = requests.into_inner();
        let serving = Serving { floor: self.clone(), requests, pushes, sender, nonce: 0 };
        Ok(Response::new(Box::pin(futures_util::stream::unfold(serving, |mut serving| async {
            let response = serving.next().await?;
            Some((Ok(response), serving))
        }))))
    }
}

impl Serving {
    async fn next(&mut self) -> Option<DeltaDiscoveryResponse> {
        loop {
            tokio::select! {
                request = self.requests.next() => {
                    let request = request?.ok()?;
                    if let Some(proxy) = request.node.as_ref().and_then(|node| number(&node.id)) {
                        let mut streams = self.floor.streams.lock().unwrap_or_else(PoisonError::into_inner);
                        streams.insert(proxy, self.sender.clone());
                    }
                    if request.response_nonce.is_empty() {
                        return Some(self.response(request.type_url, Vec::new()));
                    }
                }
                Some(bytes) = self.pushes.recv() => {
                    return Some(self.response(type_url::ENDPOINT.to_owned(), vec![bytes]));
                }
            }
        }
    }

    fn response(&mut self, type_url: String, resources: Vec<Bytes>) -> DeltaDiscoveryResponse {
        self.nonce += 1;
        DeltaDiscoveryResponse {
            system_version_info: SYNCED.to_owned(),
            resources,
            type_url,
            nonce: self.nonce.to_string(),
            removed_resources: Vec::new(),
            control_plane: Some(ControlPlane { identifier: "bare".to_owned() }),
        }
    }
}

/// The number in a node id such as `default.proxy-00007`.
fn number(id: &str) -> Option<usize> {
    id.rsplit_once('-')?.1.parse().ok()
}
