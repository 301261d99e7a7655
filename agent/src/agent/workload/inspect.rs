//! Questions to a workload's Envoy over its admin socket.

use std::path::Path;
use std::time::Duration;

use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;

use crate::shim::client::ShimClient;
use crate::shim::peer;
use crate::shim::protocol::ADMIN_SOCKET;

/// No answer of Envoy's may be larger.
const LIMIT: usize = 16 << 20;
const DEADLINE: Duration = Duration::from_secs(5);

/// Fields that may hold a key or a password, at any depth of a dump. Envoy hides most of them itself; what it
/// doesn't must not leave the node either.
const SECRET: [&str; 6] =
    ["private_key", "password", "generic_secret", "session_ticket_keys", "pkcs12", "private_key_provider"];

/// Asks the Envoy of the shim in `dir`. `kind` is `config-dump` (JSON, keys removed), `stats` or `clusters` (text, or JSON if
/// the parameter `format` says so).
pub async fn inspect(
    dir: &Path,
    kind: &str,
    parameters: &serde_json::Value,
) -> Result<serde_json::Value, String> {
    let json = parameters.get("format").and_then(serde_json::Value::as_str) == Some("json");
    let eds = parameters.get("includeEds").and_then(serde_json::Value::as_bool) == Some(true);
    let used = parameters.get("usedOnly").and_then(serde_json::Value::as_bool) == Some(true);
    let path = match (kind, json) {
        ("config-dump", _) if eds => "/config_dump?include_eds",
        ("config-dump", _) => "/config_dump",
        ("stats", true) if used => "/stats?format=json&usedonly",
        ("stats", true) => "/stats?format=json",
        ("stats", false) if used => "/stats?usedonly",
        ("stats", false) => "/stats",
        ("clusters", true) => "/clusters?format=json",
        ("clusters", false) => "/clusters",
        (other, _) => {
            return Err(format!("unknown question `{other}`; config-dump, stats and clusters are known"));
        }
    };
    let body = tokio::time::timeout(DEADLINE, get(dir, path))
        .await
        .map_err(|_| {
            format!("the Envoy of {} gave no answer within {} s", dir.display(), DEADLINE.as_secs())
        })?
        .map_err(|error| format!("the Envoy of {} doesn't answer: {error}", dir.display()))?;
    if kind != "config-dump" && !json {
        return Ok(String::from_utf8_lossy(&body).into());
    }
    let mut value =
        serde_json::from_slice(&body).map_err(|error| format!("Envoy's answer isn't JSON: {error}"))?;
    redact(&mut value);
    Ok(value)
}

fn redact(value: &mut serde_json::Value) {
    match value {
        serde_json::Value::Object(fields) => {
            for (name, field) in fields {
                if SECRET.contains(&name.as_str()) {
                    *field = "[redacted]".into();
                } else {
                    redact(field);
                }
            }
        }
        serde_json::Value::Array(items) => items.iter_mut().for_each(redact),
        _ => {}
    }
}

async fn get(dir: &Path, path: &str) -> Result<bytes::Bytes, Box<dyn std::error::Error + Send + Sync>> {
    let stream = connect(dir).await?;
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

/// By the shim, who alone may reach Envoy's socket; one of an earlier version is older than that, and its socket is open
/// to us.
async fn connect(dir: &Path) -> Result<UnixStream, Box<dyn std::error::Error + Send + Sync>> {
    let shim = ShimClient::connect(dir).await?;
    if shim.hello().shim < 2 {
        return Ok(peer::connect(&dir.join(ADMIN_SOCKET)).await?);
    }
    let stream = shim.connect_admin().await?;
    stream.set_nonblocking(true)?;
    Ok(UnixStream::from_std(stream)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_key_leaves_the_node() {
        let mut dump = serde_json::json!({"configs": [{"secret": {
            "name": "s",
            "tls_certificate": {
                "certificate_chain": {"inline_bytes": "Y2VydA=="},
                "private_key": {"inline_bytes": "a2V5"},
            },
        }}]});
        redact(&mut dump);
        let text = dump.to_string();
        assert!(!text.contains("a2V5") && text.contains("Y2VydA==") && text.contains("[redacted]"), "{text}");
    }
}
