//! One HTTP request at a time to the control plane, over its unix socket, TCP or TLS.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncWrite};

use crate::args::Global;
use crate::config::ApiServer;

/// Where the API is.
pub(crate) enum Endpoint {
    Unix(PathBuf),
    Url(ApiServer),
}

/// The API of a control plane.
pub(crate) struct Api {
    endpoint: Endpoint,
    timeout: Duration,
    trace: bool,
    /// Whether a control plane is expected there.
    control: bool,
}

const LOG_IN: &str = "
Run this as root on the control plane's machine, or have a user token made there and give it to the context:
  ursa generate user-token --name mesh-system:admin --group mesh-system:admin --valid-for 24h
  ursa config control-planes add --name NAME --address https://HOST:5682 --auth-type tokens --auth-conf token=-";

/// A status and a body.
pub(crate) struct Answer {
    pub(crate) status: http::StatusCode,
    pub(crate) body: Bytes,
    /// What the server says beside its answer.
    warnings: Vec<String>,
}

impl Answer {
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub(crate) fn json(&self) -> anyhow::Result<Value> {
        serde_json::from_slice(&self.body).with_context(|| {
            format!("the answer (status {}) is not JSON: {:.200}", self.status.as_u16(), self.text())
        })
    }

    /// What the server found, in its own words; the status where it doesn't say.
    pub(crate) fn detail(&self) -> String {
        let body = serde_json::from_slice::<Value>(&self.body).unwrap_or_default();
        let text = |key: &str| body.get(key).and_then(Value::as_str).filter(|text| !text.is_empty());
        text("detail").or_else(|| text("details")).map_or_else(|| self.status.to_string(), str::to_owned)
    }

    /// The error that the server described, in kumactl's one-line form.
    pub(crate) fn error(&self) -> anyhow::Error {
        let Ok(Value::Object(body)) = serde_json::from_slice::<Value>(&self.body) else {
            return anyhow::anyhow!("({}): {}", self.status.as_u16(), self.text().trim());
        };
        let title = body.get("title").and_then(Value::as_str).unwrap_or_default();
        let mut message = format!("{title} ({})", self.detail());
        for parameter in body.get("invalid_parameters").and_then(Value::as_array).into_iter().flatten() {
            let part = |key: &str| parameter.get(key).and_then(Value::as_str).unwrap_or_default();
            let _ = write!(message, ";{}={} ", part("field"), part("reason"));
        }
        if self.status == http::StatusCode::UNAUTHORIZED {
            message.push_str(LOG_IN);
        }
        anyhow::anyhow!(message)
    }

    pub(crate) fn success(self) -> anyhow::Result<Self> {
        if self.status.is_success() { Ok(self) } else { Err(self.error()) }
    }
}

impl Api {
    pub(crate) fn new(endpoint: Endpoint, global: &Global) -> Self {
        Self { endpoint, timeout: global.api_timeout, trace: global.log_level != "off", control: true }
    }

    /// A server that holds files.
    pub(crate) fn of_files(server: ApiServer, global: &Global) -> Self {
        Self { control: false, ..Self::new(Endpoint::Url(server), global) }
    }

    pub(crate) async fn get(&self, path: &str) -> anyhow::Result<Value> {
        self.send("GET", path, None).await?.success()?.json()
    }

    pub(crate) async fn post(&self, path: &str, body: &Value) -> anyhow::Result<Answer> {
        self.send("POST", path, Some(body)).await?.success()
    }

    /// What a control plane says of itself to everybody; none if it can't be had. Says nothing itself.
    pub(crate) async fn index(&self) -> Option<Value> {
        let limit = if self.timeout.is_zero() { Duration::from_secs(10) } else { self.timeout };
        tokio::time::timeout(limit, self.exchange("GET", "/", None)).await.ok()?.ok()?.json().ok()
    }

    /// Sends one request. An answer with an error status is an answer.
    pub(crate) async fn send(
        &self,
        method: &str,
        path: &str,
        body: Option<&Value>,
    ) -> anyhow::Result<Answer> {
        let request = self.exchange(method, path, body);
        let answer = if self.timeout.is_zero() {
            request.await
        } else {
            match tokio::time::timeout(self.timeout, request).await {
                Ok(answer) => answer,
                Err(_) => bail!("no answer from {self} within {:?} (--api-timeout)", self.timeout),
            }
        }?;
        if self.trace {
            eprintln!("{method} {path} -> {}", answer.status.as_u16());
        }
        for warning in &answer.warnings {
            eprintln!("Warning: {warning}");
        }
        Ok(answer)
    }

    async fn exchange(&self, method: &str, path: &str, body: Option<&Value>) -> anyhow::Result<Answer> {
        let bytes = body.map(serde_json::to_vec).transpose()?.map_or_else(Bytes::new, Bytes::from);
        let mut request = http::Request::builder()
            .method(method)
            .header("accept", "application/json")
            .header("user-agent", concat!("ursa/", env!("CARGO_PKG_VERSION")));
        if body.is_some() {
            request = request.header("content-type", "application/json");
        }
        match &self.endpoint {
            Endpoint::Unix(socket) => {
                let stream = tokio::net::UnixStream::connect(socket).await.with_context(|| {
                    format!(
                        "cannot reach the control plane at {}: is ursa-control running, and may this user open \
                         its socket?",
                        socket.display()
                    )
                })?;
                let request = request.uri(path).header("host", "localhost").body(Full::new(bytes))?;
                exchange_over(stream, request).await
            }
            Endpoint::Url(server) => {
                let uri: http::Uri = server
                    .url
                    .parse()
                    .with_context(|| format!("{:?} is not a URL such as https://host:5682", server.url))?;
                let host = uri.host().with_context(|| format!("{:?} names no host", server.url))?;
                let secure = match uri.scheme_str() {
                    Some("https") => true,
                    Some("http") => false,
                    _ => bail!("{:?}: only http:// and https:// are spoken", server.url),
                };
                let port = uri.port_u16().unwrap_or(if secure { 443 } else { 80 });
                for header in &server.headers {
                    request = request.header(&header.key, &header.value);
                }
                if let Some(token) = server.auth_conf.get("token") {
                    request = request.header("authorization", format!("Bearer {token}"));
                }
                let request = request
                    .uri(format!("{}{path}", uri.path().trim_end_matches('/')))
                    .header("host", uri.authority().map_or(host, http::uri::Authority::as_str))
                    .body(Full::new(bytes))?;
                let bare = host.trim_matches(['[', ']']);
                let stream = tokio::net::TcpStream::connect((bare, port)).await.with_context(|| {
                    if self.control {
                        format!(
                            "cannot reach the control plane at {}: is it running there? (`ursa config control-planes \
                             list` shows the known ones, --socket names a local one's socket)",
                            server.url
                        )
                    } else {
                        format!("cannot reach {}", server.url)
                    }
                })?;
                if !secure {
                    return exchange_over(stream, request).await;
                }
                let name = ServerName::try_from(bare.to_owned())
                    .with_context(|| format!("{bare:?} is not a host name"))?;
                let tls = tokio_rustls::TlsConnector::from(Arc::new(tls_config(server)?));
                let stream = tls.connect(name, stream).await.with_context(|| {
                    format!("the TLS handshake with {} failed (--ca-cert-file names the CA)", server.url)
                })?;
                exchange_over(stream, request).await
            }
        }
    }
}

impl std::fmt::Display for Api {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.endpoint {
            Endpoint::Unix(socket) => socket.display().fmt(f),
            Endpoint::Url(server) => server.url.fmt(f),
        }
    }
}

/// HTTP/1.1 over any stream.
async fn exchange_over<S>(stream: S, request: http::Request<Full<Bytes>>) -> anyhow::Result<Answer>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let driver = tokio::spawn(connection);
    let response = sender.send_request(request).await.context("the control plane closed the connection")?;
    let status = response.status();
    let warnings = response.headers().get_all(http::header::WARNING).iter();
    let warnings = warnings.filter_map(|value| Some(warning_text(value.to_str().ok()?).to_owned())).collect();
    let body = response.into_body().collect().await.context("the answer broke off")?.to_bytes();
    driver.abort();
    Ok(Answer { status, body, warnings })
}

/// The text of a `Warning:` header, `299 agent "text"`.
fn warning_text(value: &str) -> &str {
    let quoted = value.splitn(3, ' ').nth(2).and_then(|text| text.strip_prefix('"')?.strip_suffix('"'));
    quoted.unwrap_or(value)
}

const SYSTEM_ROOTS: [&str; 3] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/ssl/cert.pem",
];

fn tls_config(server: &ApiServer) -> anyhow::Result<rustls::ClientConfig> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()?;
    let builder = if server.skip_verify {
        static WARNED: std::sync::Once = std::sync::Once::new();
        WARNED.call_once(|| {
            eprintln!(
                "Warning: the certificate of {} is not verified (skipVerify in the context)",
                server.url
            );
        });
        builder.dangerous().with_custom_certificate_verifier(Arc::new(AnyCertificate(provider)))
    } else {
        let bundle = if server.ca_cert_file.is_empty() {
            SYSTEM_ROOTS
                .iter()
                .find(|path| std::path::Path::new(path).exists())
                .context("this system has no CA bundle; name the control plane's CA with --ca-cert-file")?
        } else {
            server.ca_cert_file.as_str()
        };
        let mut roots = rustls::RootCertStore::empty();
        for certificate in CertificateDer::pem_file_iter(bundle)
            .with_context(|| format!("cannot read the CAs in {bundle}"))?
        {
            // A system's bundle may hold a certificate that rustls doesn't take; the others still count.
            let _ = roots.add(
                certificate.with_context(|| format!("{bundle} holds something that is no certificate"))?,
            );
        }
        builder.with_root_certificates(roots)
    };
    if server.client_cert_file.is_empty() {
        return Ok(builder.with_no_client_auth());
    }
    let chain = CertificateDer::pem_file_iter(&server.client_cert_file)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .with_context(|| format!("cannot read the certificate {}", server.client_cert_file))?;
    let key = PrivateKeyDer::from_pem_file(&server.client_key_file)
        .with_context(|| format!("cannot read the key {}", server.client_key_file))?;
    Ok(builder.with_client_auth_cert(chain, key)?)
}

/// For `skipVerify`, which the operator set by name and is warned about each time.
#[derive(Debug)]
struct AnyCertificate(Arc<rustls::crypto::CryptoProvider>);

impl rustls::client::danger::ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: rustls_pki_types::UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(
            message,
            certificate,
            signature,
            &self.0.signature_verification_algorithms,
        )
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(
            message,
            certificate,
            signature,
            &self.0.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warnings_are_read_from_their_headers() {
        assert_eq!(warning_text("299 ursa \"spec.x is ignored\""), "spec.x is ignored");
        assert_eq!(warning_text("something else"), "something else");
    }

    #[test]
    fn an_error_is_one_line_and_says_how_to_log_in() {
        let answer = |status: u16, body: &str| Answer {
            status: http::StatusCode::from_u16(status).unwrap(),
            body: Bytes::from(body.to_owned()),
            warnings: Vec::new(),
        };
        let body = r#"{"title":"T","detail":"D","invalid_parameters":[{"field":"f","reason":"r"}]}"#;
        assert_eq!(answer(400, body).error().to_string(), "T (D);f=r ");
        assert!(answer(401, body).error().to_string().contains("--auth-conf token=-"));
        assert_eq!(answer(502, "no route").error().to_string(), "(502): no route");
    }
}
