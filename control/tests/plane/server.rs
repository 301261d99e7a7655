//! The API on the wire: certificates and tokens, who is behind the socket, and how serving ends.

use std::path::Path;
use std::sync::Arc;

use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use serde_json::json;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpStream, UnixStream};
use ursa_control::api::{self, ApiState, server::Servers};
use ursa_control::config::Config;
use ursa_control::tokens::TokenKind;
use ursa_control::{ControlPlane, store::Store};

use crate::support::PATIENCE;

struct Api {
    control: Arc<ControlPlane>,
    http: std::net::SocketAddr,
    https: std::net::SocketAddr,
    dir: tempfile::TempDir,
}

impl Api {
    async fn start(settings: &[(&str, serde_json::Value)]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("control.sock");
        let common = [
            ("general.workDir", json!(dir.path())),
            ("apiServer.socket", json!(socket)),
            ("apiServer.http.port", json!(0)),
            ("apiServer.https.port", json!(0)),
            ("apiServer.https.interface", json!("127.0.0.1")),
        ];
        let settings: Vec<_> =
            common.iter().chain(settings).map(|(key, value)| ((*key).to_owned(), value.clone())).collect();
        let config = Config::default().with(&settings).unwrap();
        let servers = Servers::bind(&config).await.unwrap();
        let (http, https) = (servers.http_address().unwrap(), servers.https_address().unwrap());
        let store = Store::open(&config.store_options()).unwrap();
        let control = Arc::new(ControlPlane::new(config, store));
        control.tokens.ensure_signing_key(&TokenKind::User).await.unwrap();
        let router = api::router(ApiState::new(control.clone()));
        servers.serve(&control.config, &router, &control.tasks, &control.shutdown).unwrap();
        Self { control, http, https, dir }
    }

    async fn token(&self) -> String {
        self.control.tokens.user_token("mesh-system:admin", &[], time::Duration::hours(1)).await.unwrap()
    }
}

/// One request on a connection that ends with it; the whole answer.
async fn ask(
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    path: &str,
    token: Option<&str>,
) -> std::io::Result<String> {
    let token = token.map(|token| format!("Authorization: Bearer {token}\r\n")).unwrap_or_default();
    let head = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{token}\r\n");
    stream.write_all(head.as_bytes()).await?;
    let mut answer = String::new();
    tokio::time::timeout(PATIENCE, stream.read_to_string(&mut answer)).await.expect("an answer")?;
    Ok(answer)
}

async fn tls(
    api: &Api,
    client: Option<(CertificateDer<'static>, PrivateKeyDer<'static>)>,
) -> std::io::Result<tokio_rustls::client::TlsStream<TcpStream>> {
    let mut roots = rustls::RootCertStore::empty();
    let own = pem::parse(std::fs::read(api.dir.path().join("api-tls.crt")).unwrap()).unwrap();
    roots.add(CertificateDer::from(own.into_contents())).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots);
    let config = match client {
        Some((certificate, key)) => builder.with_client_auth_cert(vec![certificate], key).unwrap(),
        None => builder.with_no_client_auth(),
    };
    let stream = TcpStream::connect(api.https).await?;
    let name = ServerName::try_from("localhost").unwrap();
    tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, stream).await
}

/// A CA in a file, and a client's certificate from it.
fn client(ca_file: &Path) -> (CertificateDer<'static>, PrivateKeyDer<'static>) {
    let ca_key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca = params.self_signed(&ca_key).unwrap();
    std::fs::write(ca_file, ca.pem()).unwrap();
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(vec!["client".to_owned()]).unwrap();
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    let issuer = Issuer::from_ca_cert_der(ca.der(), &ca_key).unwrap();
    let leaf = params.signed_by(&key, &issuer).unwrap();
    (leaf.der().clone(), PrivateKeyDer::Pkcs8(key.serialize_der().into()))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn https_wants_the_clients_certificate_and_a_token_as_well() {
    let files = tempfile::tempdir().unwrap();
    let ca = files.path().join("ca.pem");
    let (certificate, key) = client(&ca);
    let settings =
        [("apiServer.https.tlsCaFile", json!(ca)), ("apiServer.https.requireClientCert", json!(true))];
    let api = Api::start(&settings).await;

    // In TLS 1.3 the client's handshake is over before the server has judged it.
    let nobody = match tls(&api, None).await {
        Ok(stream) => ask(stream, "/", None).await,
        Err(error) => Err(error),
    };
    assert!(nobody.is_err(), "{nobody:?}");
    let (other, other_key) = client(&files.path().join("other.pem"));
    let stranger = match tls(&api, Some((other, other_key))).await {
        Ok(stream) => ask(stream, "/", None).await,
        Err(error) => Err(error),
    };
    assert!(stranger.is_err(), "{stranger:?}");

    let connect = async || tls(&api, Some((certificate.clone(), key.clone_key()))).await.unwrap();
    let index = ask(connect().await, "/", None).await.unwrap();
    assert!(index.starts_with("HTTP/1.1 200"), "{index}");
    // A certificate opens the door and makes nobody anybody.
    let anonymous = ask(connect().await, "/who-am-i", None).await.unwrap();
    assert!(anonymous.starts_with("HTTP/1.1 401"), "{anonymous}");
    let admin = ask(connect().await, "/who-am-i", Some(&api.token().await)).await.unwrap();
    assert!(admin.starts_with("HTTP/1.1 200") && admin.contains("mesh-system:admin"), "{admin}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn https_without_client_certificates_takes_tokens() {
    let api = Api::start(&[]).await;
    let admin = ask(tls(&api, None).await.unwrap(), "/who-am-i", Some(&api.token().await)).await.unwrap();
    assert!(admin.starts_with("HTTP/1.1 200"), "{admin}");
    let wrong = ask(tls(&api, None).await.unwrap(), "/who-am-i", Some("wrong")).await.unwrap();
    assert!(wrong.starts_with("HTTP/1.1 401"), "{wrong}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_operator_is_known_on_the_socket_and_not_on_tcp() {
    let api = Api::start(&[]).await;
    let socket = UnixStream::connect(api.dir.path().join("control.sock")).await.unwrap();
    let admin = ask(socket, "/who-am-i", None).await.unwrap();
    assert!(admin.starts_with("HTTP/1.1 200") && admin.contains("mesh-system:admin"), "{admin}");
    let tcp = TcpStream::connect(api.http).await.unwrap();
    let nobody = ask(tcp, "/who-am-i", None).await.unwrap();
    assert!(nobody.starts_with("HTTP/1.1 401"), "{nobody}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_under_way_finishes_and_nothing_new_begins() {
    let api = Api::start(&[]).await;
    let mut stream = UnixStream::connect(api.dir.path().join("control.sock")).await.unwrap();
    let body = json!({"type": "Mesh", "name": "late"}).to_string();
    let head = format!(
        "PUT /meshes/late HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    // The server says so once it reads the body: from here on the request is under way.
    let mut go_on = [0; 25];
    stream.read_exact(&mut go_on).await.unwrap();
    assert!(go_on.starts_with(b"HTTP/1.1 100"));
    let idle = TcpStream::connect(api.http).await.unwrap();

    api.control.shutdown.cancel();
    api.control.tasks.close();
    stream.write_all(body.as_bytes()).await.unwrap();
    let mut answer = String::new();
    tokio::time::timeout(PATIENCE, stream.read_to_string(&mut answer)).await.unwrap().unwrap();
    assert!(answer.starts_with("HTTP/1.1 201"), "{answer}");
    tokio::time::timeout(PATIENCE, api.control.tasks.wait()).await.expect("connections end");
    drop(idle);
    assert!(TcpStream::connect(api.http).await.is_err());
}
