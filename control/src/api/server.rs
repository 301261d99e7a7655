//! The API on the wire: plain HTTP on loopback, HTTPS, and the operator's unix socket.

mod operator;

use std::{
    fs, io,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::Context as _;
use axum::Router;
use http::Request;
use hyper::body::Incoming;
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
};
use rustls::ServerConfig;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
};
use tokio_rustls::TlsAcceptor;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tower::ServiceExt as _;

use self::operator::OperatorSocket;
use super::OverTls;
use crate::{
    access::Peer,
    config::{Config, General, HttpsServer},
};

/// A client that hasn't sent its request's head by then isn't waited for.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// How long open requests may take when the process ends.
const DRAIN: Duration = Duration::from_secs(10);

/// The bound listeners of the API.
#[derive(Debug)]
pub struct Servers {
    http: Option<TcpListener>,
    https: Option<TcpListener>,
    unix: Option<OperatorSocket>,
}

impl Servers {
    /// Binds everything that the configuration asks for. Nothing is served yet.
    pub async fn bind(config: &Config) -> anyhow::Result<Self> {
        let api = &config.api_server;
        let http = if api.http.enabled {
            Some(listen(&api.http.interface, api.http.port, "apiServer.http.port").await?)
        } else {
            None
        };
        let https = if api.https.enabled {
            Some(listen(&api.https.interface, api.https.port, "apiServer.https.port").await?)
        } else {
            None
        };
        let unix = OperatorSocket::open(&api.socket)?;
        Ok(Self { http, https, unix })
    }

    /// The address of plain HTTP, where a port was chosen by the system.
    pub fn http_address(&self) -> Option<SocketAddr> {
        self.http.as_ref().and_then(|listener| listener.local_addr().ok())
    }

    /// The address of HTTPS.
    pub fn https_address(&self) -> Option<SocketAddr> {
        self.https.as_ref().and_then(|listener| listener.local_addr().ok())
    }

    /// Serves until `shutdown` is cancelled, in tasks of `tasks`. A certificate that is made for HTTPS lies in the
    /// work folder, so the caller holds the store's lock by now: two first starts must not mix their files.
    pub fn serve(
        self,
        config: &Config,
        router: &Router,
        tasks: &TaskTracker,
        shutdown: &CancellationToken,
    ) -> anyhow::Result<()> {
        let tls = match &self.https {
            Some(_) => Some(tls_config(&config.api_server.https, &config.general)?),
            None => None,
        };
        let serving = Serving { router: router.clone(), tasks: tasks.clone(), shutdown: shutdown.clone() };
        if let Some(listener) = self.http {
            tasks.spawn(serving.clone().tcp(listener, None));
        }
        if let (Some(listener), Some(tls)) = (self.https, tls) {
            tasks.spawn(serving.clone().tcp(listener, Some(TlsAcceptor::from(tls))));
        }
        if let Some(listener) = self.unix {
            tasks.spawn(serving.unix(listener));
        }
        Ok(())
    }
}

#[derive(Clone)]
struct Serving {
    router: Router,
    tasks: TaskTracker,
    shutdown: CancellationToken,
}

impl Serving {
    async fn tcp(self, listener: TcpListener, tls: Option<TlsAcceptor>) {
        while let Some(accepted) = self.shutdown.run_until_cancelled(listener.accept()).await {
            let Some((stream, remote)) = accepted_or_pause(accepted).await else { continue };
            let (serving, tls) = (self.clone(), tls.clone());
            self.tasks.spawn(async move { serving.connection(stream, remote, tls).await });
        }
    }

    async fn connection(self, stream: TcpStream, remote: SocketAddr, tls: Option<TlsAcceptor>) {
        let peer = Peer::Tcp(remote);
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "TCP_NODELAY can't be set");
        }
        let Some(acceptor) = tls else {
            return self.requests(stream, peer, false).await;
        };
        match tokio::time::timeout(HEAD_TIMEOUT, acceptor.accept(stream)).await {
            Ok(Ok(stream)) => self.requests(stream, peer, true).await,
            Ok(Err(error)) => tracing::debug!(%remote, %error, "TLS handshake failed"),
            Err(_) => tracing::debug!(%remote, "TLS handshake took too long"),
        }
    }

    async fn unix(self, socket: OperatorSocket) {
        while let Some(accepted) = self.shutdown.run_until_cancelled(socket.accept()).await {
            let Some((stream, _)) = accepted_or_pause(accepted).await else { continue };
            match stream.peer_cred() {
                Ok(credentials) => {
                    let (serving, peer) = (self.clone(), Peer::Unix { uid: credentials.uid() });
                    self.tasks.spawn(async move { serving.requests(stream, peer, false).await });
                }
                Err(error) => tracing::warn!(%error, "a client of the socket has no credentials"),
            }
        }
    }

    async fn requests<S>(self, stream: S, peer: Peer, over_tls: bool)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let router = self.router;
        let service = hyper::service::service_fn(move |mut request: Request<Incoming>| {
            request.extensions_mut().insert(peer);
            if over_tls {
                request.extensions_mut().insert(OverTls);
            }
            router.clone().oneshot(request.map(axum::body::Body::new))
        });
        let mut builder = auto::Builder::new(TokioExecutor::new());
        builder.http1().timer(TokioTimer::new()).header_read_timeout(HEAD_TIMEOUT);
        builder.http2().timer(TokioTimer::new());
        let connection = builder.serve_connection_with_upgrades(TokioIo::new(stream), service);
        tokio::pin!(connection);
        let ended = tokio::select! {
            result = connection.as_mut() => result,
            () = self.shutdown.cancelled() => {
                connection.as_mut().graceful_shutdown();
                match tokio::time::timeout(DRAIN, connection).await {
                    Ok(result) => result,
                    Err(_) => return,
                }
            }
        };
        if let Err(error) = ended {
            tracing::debug!(%error, ?peer, "a connection ended with an error");
        }
    }
}

/// The accepted connection. Without file descriptors accepting fails at once and again: then others
/// must get the chance to close theirs.
async fn accepted_or_pause<T>(accepted: io::Result<T>) -> Option<T> {
    match accepted {
        Ok(accepted) => Some(accepted),
        Err(error) => {
            tracing::warn!(%error, "can't accept a connection; if files are used up, raise LimitNOFILE");
            tokio::time::sleep(Duration::from_millis(50)).await;
            None
        }
    }
}

/// Listens on a port; the error says what to do about a port that is taken.
pub async fn listen(interface: &str, port: u16, key: &str) -> anyhow::Result<TcpListener> {
    let address =
        SocketAddr::new(interface.parse::<IpAddr>().with_context(|| format!("{interface:?}"))?, port);
    TcpListener::bind(address).await.map_err(|error| {
        let remedy = match error.kind() {
            io::ErrorKind::AddrInUse => format!(
                "another process listens there (see it with: ss -ltnp 'sport = :{port}'); stop it, or set {key} to another port"
            ),
            io::ErrorKind::PermissionDenied => {
                format!("this user may not; choose a port of 1024 or above in {key}, or grant CAP_NET_BIND_SERVICE")
            }
            io::ErrorKind::AddrNotAvailable => format!("no interface of this machine has the address {interface}"),
            _ => format!("check {key}"),
        };
        anyhow::anyhow!("can't listen on {address}: {error}: {remedy}")
    })
}

/// TLS by the configured files, or by a certificate that is made in the work folder once.
fn tls_config(https: &HttpsServer, general: &General) -> anyhow::Result<Arc<ServerConfig>> {
    let configured =
        [(&https.tls_cert_file, &https.tls_key_file), (&general.tls_cert_file, &general.tls_key_file)];
    let (cert, key) = match configured.into_iter().find(|(cert, _)| !cert.is_empty()) {
        Some((cert, key)) => (cert.into(), key.into()),
        None => self_signed(&general.work_dir)?,
    };
    let chain = CertificateDer::pem_file_iter(&cert)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .with_context(|| format!("can't read the API's certificate {}", cert.display()))?;
    let private = PrivateKeyDer::from_pem_file(&key)
        .with_context(|| format!("can't read the API's key {}", key.display()))?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ServerConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .context("no TLS version can be used")?;
    let builder = match client_verifier(https, provider)? {
        Some(verifier) => builder.with_client_cert_verifier(verifier),
        None => builder.with_no_client_auth(),
    };
    let mut config = builder
        .with_single_cert(chain, private)
        .with_context(|| format!("the API's certificate {} and its key don't fit", cert.display()))?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

/// What client certificates are checked with; none if nobody is asked for one.
fn client_verifier(
    https: &HttpsServer,
    provider: Arc<rustls::crypto::CryptoProvider>,
) -> anyhow::Result<Option<Arc<dyn rustls::server::danger::ClientCertVerifier>>> {
    let file = &https.tls_ca_file;
    if file.is_empty() {
        return Ok(None);
    }
    let what = || format!("can't read the clients' CAs in {file} (apiServer.https.tlsCaFile)");
    let mut roots = rustls::RootCertStore::empty();
    for certificate in CertificateDer::pem_file_iter(file).with_context(what)? {
        roots.add(certificate.with_context(what)?).with_context(what)?;
    }
    anyhow::ensure!(!roots.is_empty(), "{}: it holds no certificate", what());
    let builder = rustls::server::WebPkiClientVerifier::builder_with_provider(roots.into(), provider);
    let builder = if https.require_client_cert { builder } else { builder.allow_unauthenticated() };
    Ok(Some(builder.build().with_context(what)?))
}

fn self_signed(dir: &Path) -> anyhow::Result<(PathBuf, PathBuf)> {
    let (cert, key) = (dir.join("api-tls.crt"), dir.join("api-tls.key"));
    if cert.exists() && key.exists() {
        return Ok((cert, key));
    }
    let hostname =
        nix::unistd::gethostname().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let mut names = vec!["localhost".to_owned(), "127.0.0.1".into(), "::1".into(), "ursa-control".into()];
    if !hostname.is_empty() && !names.contains(&hostname) {
        names.push(hostname);
    }
    let made = rcgen::generate_simple_self_signed(names).context("can't make a certificate for the API")?;
    fs::create_dir_all(dir).with_context(|| format!("can't create {}", dir.display()))?;
    // Each whole or not at all, the certificate last: it is there only with its own key.
    write(&key, made.signing_key.serialize_pem().as_bytes(), 0o600)?;
    write(&cert, made.cert.pem().as_bytes(), 0o644)?;
    tracing::info!(cert = %cert.display(), "made a self-signed certificate for the API");
    Ok((cert, key))
}

fn write(path: &Path, content: &[u8], mode: u32) -> anyhow::Result<()> {
    use std::{io::Write as _, os::unix::fs::OpenOptionsExt as _};
    let draft = path.with_extension("new");
    let write = || {
        let mut file =
            fs::OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(&draft)?;
        file.write_all(content)?;
        file.sync_all()?;
        fs::rename(&draft, path)
    };
    write().with_context(|| format!("can't write {}", path.display()))
}
