//! The operator's end: one kept HTTP connection over the control plane's unix socket.

use std::path::Path;

use anyhow::{Context as _, bail};
use http::{Method, Request, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Bytes;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::UnixStream;

/// Sends one request after the other.
#[derive(Debug)]
pub struct Operator {
    sender: SendRequest<Full<Bytes>>,
}

impl Operator {
    /// Connects to the socket at `path`.
    pub async fn connect(path: &Path) -> anyhow::Result<Self> {
        let stream = UnixStream::connect(path)
            .await
            .with_context(|| format!("cannot connect to {}", path.display()))?;
        let (sender, connection) = handshake(TokioIo::new(stream)).await?;
        // Ends with the sender; what goes wrong on the way is the error of the request that it concerns.
        tokio::spawn(connection);
        Ok(Self { sender })
    }

    /// Writes a resource; `path` is relative to `/`.
    pub async fn put(&mut self, path: &str, resource: &Value) -> anyhow::Result<()> {
        let body = serde_json::to_vec(resource)?;
        self.request(Method::PUT, path, body).await.map(drop)
    }

    /// Reads JSON.
    pub async fn get(&mut self, path: &str) -> anyhow::Result<Value> {
        let body = self.request(Method::GET, path, Vec::new()).await?;
        serde_json::from_slice(&body).with_context(|| format!("GET {path} is not JSON"))
    }

    async fn request(&mut self, method: Method, path: &str, body: Vec<u8>) -> anyhow::Result<Bytes> {
        let request = Request::builder()
            .method(method.clone())
            .uri(path)
            .header(http::header::HOST, "localhost")
            .header(http::header::CONTENT_TYPE, "application/json")
            .body(Full::from(body))?;
        self.sender.ready().await?;
        let response = self.sender.send_request(request).await?;
        let status = response.status();
        let body = response.into_body().collect().await?.to_bytes();
        if !matches!(status, StatusCode::OK | StatusCode::CREATED) {
            bail!("{method} {path}: {status}: {}", String::from_utf8_lossy(&body));
        }
        Ok(body)
    }
}
