//! Questions to a workload's Envoy over its admin socket.

use std::path::Path;
use std::time::Duration;

use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;

/// No answer of Envoy's may be larger.
const LIMIT: usize = 32 << 20;
const DEADLINE: Duration = Duration::from_secs(5);

/// Asks Envoy on `socket`. `kind` is `config-dump`, `stats` or `clusters`.
pub async fn inspect(socket: &Path, kind: &str) -> Result<serde_json::Value, String> {
    let path = match kind {
        "config-dump" | "xds" => "/config_dump?include_eds",
        "stats" => "/stats?format=json",
        "clusters" => "/clusters?format=json",
        other => {
            return Err(format!("unknown question `{other}`; config-dump, stats and clusters are known"));
        }
    };
    let body = tokio::time::timeout(DEADLINE, get(socket, path))
        .await
        .map_err(|_| format!("Envoy gave no answer on {} within {} s", socket.display(), DEADLINE.as_secs()))?
        .map_err(|error| format!("Envoy doesn't answer on {}: {error}", socket.display()))?;
    serde_json::from_slice(&body).map_err(|error| format!("Envoy's answer isn't JSON: {error}"))
}

async fn get(socket: &Path, path: &str) -> Result<bytes::Bytes, Box<dyn std::error::Error + Send + Sync>> {
    let stream = UnixStream::connect(socket).await?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let request =
        http::Request::builder().uri(path).header("host", "envoy").body(Empty::<bytes::Bytes>::new())?;
    let exchange = async {
        let response = sender.send_request(request).await?;
        Ok(Limited::new(response.into_body(), LIMIT).collect().await?.to_bytes())
    };
    tokio::pin!(connection);
    tokio::pin!(exchange);
    tokio::select! {
        body = &mut exchange => body,
        ended = &mut connection => { ended?; exchange.await }
    }
}
