//! One HTTP request over a unix socket, and which process answered it.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, bail};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};

/// What came back.
#[derive(Debug)]
pub struct Reply {
    /// The status.
    pub status: u16,
    /// The body.
    pub body: String,
    /// The process that listens there, as the kernel says.
    pub pid: i32,
}

impl Reply {
    /// Whether the request did what it should.
    pub fn ok(&self) -> bool {
        (200..300).contains(&self.status)
    }

    /// The body as JSON.
    pub fn json(&self) -> anyhow::Result<serde_json::Value> {
        serde_json::from_str(&self.body).with_context(|| format!("not JSON: {}", self.brief()))
    }

    /// In one line.
    pub fn brief(&self) -> String {
        let text: String = self.body.trim().chars().take(300).collect();
        format!("HTTP {} {}", self.status, text.replace('\n', " "))
    }
}

/// The process behind a unix socket.
pub fn listener(stream: &UnixStream) -> anyhow::Result<i32> {
    Ok(getsockopt(stream, PeerCredentials).context("the socket's peer has no credentials")?.pid())
}

/// Sends one request over a connection of its own; no read or write takes longer than `patience`.
pub fn ask(
    socket: &Path,
    method: &str,
    path: &str,
    body: Option<&str>,
    patience: Duration,
) -> anyhow::Result<Reply> {
    let mut stream =
        UnixStream::connect(socket).with_context(|| format!("cannot connect to {}", socket.display()))?;
    stream.set_read_timeout(Some(patience))?;
    stream.set_write_timeout(Some(patience))?;
    let pid = listener(&stream)?;
    let body = body.unwrap_or_default();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: application/json\r\n\
         content-length: {}\r\n\r\n",
        body.len()
    );
    // A server that refuses early doesn't read all of a long body; its answer says why.
    let sent = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body.as_bytes()));
    let mut input = BufReader::new(stream);
    let mut line = String::new();
    let answered = input.read_line(&mut line);
    if line.is_empty() {
        sent.context("the request broke off")?;
        answered.context("no answer came")?;
        bail!("the connection was closed without an answer");
    }
    let status = line.split_whitespace().nth(1).and_then(|code| code.parse().ok());
    let status = status.with_context(|| format!("not an HTTP response: {line:?}"))?;
    let (mut chunked, mut length) = (false, None);
    loop {
        line.clear();
        input.read_line(&mut line)?;
        let Some((name, value)) = line.trim_end().split_once(':') else { break };
        match name.to_ascii_lowercase().as_str() {
            "transfer-encoding" => chunked = value.trim() == "chunked",
            "content-length" => length = value.trim().parse().ok(),
            _ => {}
        }
    }
    let mut bytes = Vec::new();
    if chunked {
        loop {
            line.clear();
            input.read_line(&mut line)?;
            let size = u64::from_str_radix(line.trim(), 16).with_context(|| format!("no chunk: {line:?}"))?;
            input.by_ref().take(size).read_to_end(&mut bytes)?;
            input.read_line(&mut line)?;
            if size == 0 {
                break;
            }
        }
    } else if let Some(length) = length {
        input.take(length).read_to_end(&mut bytes)?;
    } else {
        input.read_to_end(&mut bytes)?;
    }
    Ok(Reply { status, body: String::from_utf8_lossy(&bytes).into_owned(), pid })
}
