//! Envoy's admin interface on its Unix socket: one request per connection, so that nothing is left open.

use std::io;
use std::path::Path;
use std::time::Duration;

use serde::Deserialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::{Instant, sleep, timeout};

/// How long one request may take.
const DEADLINE: Duration = Duration::from_secs(2);
/// The shortest and the longest wait between two looks at `/ready`, which Envoy has no event for.
const FIRST_LOOK: Duration = Duration::from_millis(4);
const LAST_LOOK: Duration = Duration::from_millis(200);
/// Between them a look comes after this part of the time waited so far, which bounds both the looks and the delay
/// that they add to a start.
const LOOK_PART: u32 = 16;
const MAX_BODY: u64 = 256 * 1024;

/// Returns Envoy's version once `/ready` says LIVE and, if it has any to fetch, it has got a first configuration: it
/// also becomes live when it has waited for one in vain. `waiting` hears what it says before. An error means that the
/// interface did not even open, or stopped answering, for `patience`.
pub(super) async fn until_live(
    socket: &Path,
    patience: Duration,
    mut waiting: impl FnMut(&str),
) -> Result<Option<String>, String> {
    let begun = Instant::now();
    let mut answered = begun;
    loop {
        match request(socket, "GET", "/ready").await {
            Ok((200, _)) if !is_configured(socket).await => {
                answered = Instant::now();
                waiting("its first configuration, which nobody has sent yet");
            }
            Ok((200, _)) => {
                #[derive(Deserialize)]
                struct ServerInfo {
                    version: String,
                }
                let info = request(socket, "GET", "/server_info").await.ok();
                return Ok(info
                    .and_then(|(_, body)| serde_json::from_slice::<ServerInfo>(&body).ok())
                    .map(|info| info.version));
            }
            Ok((_, body)) => {
                answered = Instant::now();
                waiting(String::from_utf8_lossy(&body).trim());
            }
            Err(error) if answered.elapsed() > patience => {
                return Err(format!(
                    "its admin interface {} gave no answer for {patience:?}: {error}",
                    socket.display()
                ));
            }
            Err(_) => {}
        }
        sleep((begun.elapsed() / LOOK_PART).clamp(FIRST_LOOK, LAST_LOOK)).await;
    }
}

/// A request that changes something.
pub(super) async fn post(socket: &Path, path: &str) -> io::Result<()> {
    match request(socket, "POST", path).await? {
        (200, _) => Ok(()),
        (code, body) => Err(io::Error::other(format!("{code}: {}", String::from_utf8_lossy(&body).trim()))),
    }
}

/// How many connections the listeners hold, if the bootstrap keeps that statistic.
pub(super) async fn connections(socket: &Path) -> io::Result<Option<u64>> {
    let (_, body) = request(socket, "GET", "/stats?filter=^server\\.total_connections$").await?;
    Ok(String::from_utf8_lossy(&body)
        .trim()
        .strip_prefix("server.total_connections:")
        .and_then(|n| n.trim().parse().ok()))
}

/// How many connections the inbound listeners hold: those with `inbound` in their names, as all of ours have.
pub(super) async fn inbound_connections(socket: &Path) -> io::Result<u64> {
    let path = "/stats?filter=^listener\\..*inbound.*\\.downstream_cx_active$";
    let (_, body) = request(socket, "GET", path).await?;
    Ok(sum(&String::from_utf8_lossy(&body)))
}

/// Adds up statistics, leaving out those of single worker threads.
fn sum(stats: &str) -> u64 {
    stats
        .lines()
        .filter(|line| !line.contains(".worker_"))
        .filter_map(|line| line.rsplit_once(':')?.1.trim().parse::<u64>().ok())
        .sum()
}

/// Whether listeners have come, or none are to be fetched.
async fn is_configured(socket: &Path) -> bool {
    match request(socket, "GET", "/stats?filter=^listener_manager\\.lds\\.update_success$").await {
        Ok((200, body)) => {
            let body = String::from_utf8_lossy(&body);
            body.trim().rsplit_once(':').is_none_or(|(_, count)| count.trim() != "0")
        }
        _ => true,
    }
}

async fn request(socket: &Path, method: &str, path: &str) -> io::Result<(u16, Vec<u8>)> {
    let exchange = async {
        let mut stream = UnixStream::connect(socket).await?;
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: envoy\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
        );
        stream.write_all(head.as_bytes()).await?;
        let mut response = Vec::new();
        stream.take(MAX_BODY).read_to_end(&mut response).await?;
        parse(&response).ok_or_else(|| io::Error::other("its response is no HTTP"))
    };
    timeout(DEADLINE, exchange).await?
}

/// Status and body. The connection closes after it, so the body ends with the stream or is chunked.
fn parse(response: &[u8]) -> Option<(u16, Vec<u8>)> {
    let end = response.windows(4).position(|four| four == b"\r\n\r\n")?;
    let head = std::str::from_utf8(&response[..end]).ok()?;
    let mut lines = head.split("\r\n");
    let status = lines.next()?.strip_prefix("HTTP/1.1 ")?.get(..3)?.parse().ok()?;
    let chunked = lines.any(|line| line.eq_ignore_ascii_case("transfer-encoding: chunked"));
    let body = &response[end + 4..];
    Some((status, if chunked { unchunk(body)? } else { body.to_vec() }))
}

fn unchunk(mut rest: &[u8]) -> Option<Vec<u8>> {
    let mut body = Vec::with_capacity(rest.len());
    loop {
        let end = rest.windows(2).position(|two| two == b"\r\n")?;
        let size = usize::from_str_radix(std::str::from_utf8(&rest[..end]).ok()?.trim(), 16).ok()?;
        if size == 0 {
            return Some(body);
        }
        body.extend_from_slice(rest.get(end + 2..end.checked_add(2)?.checked_add(size)?)?);
        rest = rest.get(end + 2 + size + 2..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adds_up_each_listener_once() {
        let stats = "listener.self_inbound_dp_8080.downstream_cx_active: 2\n\
                     listener.self_inbound_dp_8080.worker_0.downstream_cx_active: 2\n\
                     listener.[__1]_inbound_9.downstream_cx_active: 1\n";
        assert_eq!(sum(stats), 3);
        assert_eq!(sum(""), 0);
    }

    #[test]
    fn reads_both_kinds_of_body() {
        let plain = b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: text\r\n\r\nINITIALIZING\n";
        assert_eq!(parse(plain), Some((503, b"INITIALIZING\n".to_vec())));
        let chunked =
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nLIVE\n\r\n1\r\nx\r\n0\r\n\r\n";
        assert_eq!(parse(chunked), Some((200, b"LIVE\nx".to_vec())));
        for broken in [
            &b""[..],
            b"HTTP/1.1 2",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nfffffffffffffffe\r\nx",
        ] {
            assert_eq!(parse(broken), None);
        }
    }
}
