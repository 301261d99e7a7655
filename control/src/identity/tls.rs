//! The listener that nodes connect to: TLS 1.3, with the node's certificate where there is one.
//!
//! A certificate is optional during the handshake, because a node that joins has none; each service demands
//! what it needs through [`super::ControlIdentity::authenticate`]. A certificate that is shown must be valid.

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};

use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, ResolvesServerCert, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;
use rustls::{RootCertStore, ServerConfig};
use time::{Duration, OffsetDateTime};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::Connected;

use super::ca::{self, Authority};
use super::{ControlIdentity, IdentityError};

/// How long a server certificate lives; it is replaced at half of that.
pub const SERVER_LIFETIME: Duration = Duration::days(90);

/// How long a client may take for its handshake.
const HANDSHAKE: std::time::Duration = std::time::Duration::from_secs(10);

/// Handshakes that are done and not yet served.
const BACKLOG: usize = 128;

/// Who is at the other end of a connection; an extension of each request.
#[derive(Debug, Clone)]
pub struct Peer {
    /// From where.
    pub address: SocketAddr,
    /// The client certificate, verified against the control CA.
    pub certificate: Option<Arc<PeerCertificate>>,
}

/// What matters of a client certificate.
#[derive(Debug)]
pub struct PeerCertificate {
    /// Its URI SAN.
    pub uri: String,
    /// SHA-256 of its public key.
    pub key_hash: String,
}

/// A server's end of a TLS connection.
#[derive(Debug)]
pub struct Connection {
    stream: TlsStream<TcpStream>,
    peer: Peer,
}

impl Connected for Connection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, buffer)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffers: &[std::io::IoSlice<'_>],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, buffers)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

/// The server certificate, replaced before it ends.
#[derive(Debug)]
struct Resolver {
    identity: Arc<ControlIdentity>,
    current: Mutex<(Arc<CertifiedKey>, OffsetDateTime)>,
}

impl Resolver {
    fn make(identity: &ControlIdentity) -> Result<(Arc<CertifiedKey>, OffsetDateTime), IdentityError> {
        let now = OffsetDateTime::now_utc();
        let (key, issued) = identity.server_certificate(now)?;
        let chain = vec![
            CertificateDer::from(issued.der),
            // The CA goes along so that a joining node can compare its fingerprint.
            CertificateDer::from(identity.authority().certificate_der().to_vec()),
        ];
        let key = PrivateKeyDer::Pkcs8(key.serialize_der().into());
        let key = rustls::crypto::aws_lc_rs::sign::any_supported_type(&key)
            .map_err(|error| ca::CaError::Load(error.to_string()))?;
        let renew = now + (issued.not_after - now) / 2;
        Ok((Arc::new(CertifiedKey::new(chain, key)), renew))
    }
}

impl ResolvesServerCert for Resolver {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if OffsetDateTime::now_utc() >= current.1 {
            match Self::make(&self.identity) {
                Ok(fresh) => *current = fresh,
                Err(error) => tracing::error!("can't renew the server certificate: {error}"),
            }
        }
        Some(Arc::clone(&current.0))
    }
}

/// The TLS configuration of the listener.
pub fn server_config(identity: &Arc<ControlIdentity>) -> Result<ServerConfig, IdentityError> {
    let load = |error: &dyn std::fmt::Display| ca::CaError::Load(error.to_string());
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from(authority_der(identity.authority()))).map_err(|error| load(&error))?;
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
        .allow_unauthenticated()
        .build()
        .map_err(|error| load(&error))?;
    let resolver =
        Resolver { identity: Arc::clone(identity), current: Mutex::new(Resolver::make(identity)?) };
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|error| load(&error))?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(Arc::new(resolver));
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(config)
}

fn authority_der(authority: &Authority) -> Vec<u8> {
    authority.certificate_der().to_vec()
}

/// Accepts connections until `shutdown`; handshakes run beside each other, and a slow one delays nobody.
pub fn accept(
    listener: TcpListener,
    config: ServerConfig,
    shutdown: CancellationToken,
) -> mpsc::Receiver<std::io::Result<Connection>> {
    let (sender, receiver) = mpsc::channel(BACKLOG);
    let acceptor = TlsAcceptor::from(Arc::new(config));
    tokio::spawn(async move {
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = shutdown.cancelled() => return,
                () = sender.closed() => return,
            };
            match accepted {
                Ok((stream, address)) => {
                    tokio::spawn(handshake(acceptor.clone(), stream, address, sender.clone()));
                }
                Err(error) => {
                    // Out of descriptors, mostly: others must finish before it makes sense to try again.
                    tracing::warn!("can't accept a connection: {error}");
                    tokio::time::sleep(std::time::Duration::from_millis(50)).await;
                }
            }
        }
    });
    receiver
}

async fn handshake(
    acceptor: TlsAcceptor,
    stream: TcpStream,
    address: SocketAddr,
    sender: mpsc::Sender<std::io::Result<Connection>>,
) {
    let _ = stream.set_nodelay(true);
    let stream = match tokio::time::timeout(HANDSHAKE, acceptor.accept(stream)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => {
            tracing::warn!(peer = %address, "refused: TLS handshake failed: {error}");
            return;
        }
        Err(_) => {
            tracing::debug!(peer = %address, "closed: no TLS handshake within {HANDSHAKE:?}");
            return;
        }
    };
    let certificate = stream
        .get_ref()
        .1
        .peer_certificates()
        .and_then(<[_]>::first)
        .and_then(|leaf| ca::subject_of(leaf))
        .map(|(uri, key_hash)| Arc::new(PeerCertificate { uri, key_hash }));
    let _ = sender.send(Ok(Connection { stream, peer: Peer { address, certificate } })).await;
}
