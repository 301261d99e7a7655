//! The plugin's side of the agent's socket: one JSON line there, one JSON line back.

use std::io::{self, BufRead as _, BufReader, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect as connect_socket, socket};
use serde_json::{Value, json};
use ursa_cni_protocol::Call;

/// How long an agent may be away (it restarts in less).
pub(crate) const WAIT_FOR_AGENT: Duration = Duration::from_secs(2);
/// How long the agent may take until the sidecar is live.
pub(crate) const WAIT_FOR_SIDECAR: Duration = Duration::from_secs(20);
const RETRY: Duration = Duration::from_millis(50);

/// Why the agent didn't do it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AgentError {
    #[error("no agent answers on {0}: {1}")]
    Away(String, io::Error),
    #[error("the agent didn't answer within {} s", .0.as_secs())]
    Slow(Duration),
    #[error("the agent closed the connection without an answer")]
    Gone,
    #[error("the agent's answer can't be understood: {0}")]
    Unreadable(String),
    #[error("the agent refused: {0}")]
    Refused(String),
}

/// A request about a container.
pub(crate) fn request(command: &str, call: &Call) -> Value {
    let mut request = json!(call);
    request["cmd"] = command.into();
    request
}

/// Asks the agent. `patience` is how long it may be away, `deadline` how long an answer may take.
pub(crate) fn ask(
    run_dir: &Path,
    request: &Value,
    patience: Duration,
    deadline: Duration,
) -> Result<Value, AgentError> {
    let path = run_dir.join("agent.sock");
    let mut stream = connect(&path, patience).map_err(|e| AgentError::Away(path.display().to_string(), e))?;
    let failed = |e: io::Error| match e.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => AgentError::Slow(deadline),
        _ => AgentError::Gone,
    };
    stream.set_read_timeout(Some(deadline)).map_err(failed)?;
    stream.set_write_timeout(Some(deadline)).map_err(failed)?;
    let mut line = request.to_string();
    line.push('\n');
    stream.write_all(line.as_bytes()).map_err(failed)?;
    let mut answer = String::new();
    if BufReader::new(stream).read_line(&mut answer).map_err(failed)? == 0 {
        return Err(AgentError::Gone);
    }
    let answer: Value = serde_json::from_str(&answer).map_err(|e| AgentError::Unreadable(e.to_string()))?;
    match answer.get("error") {
        Some(Value::String(why)) => Err(AgentError::Refused(why.clone())),
        Some(why) if !why.is_null() => Err(AgentError::Refused(why.to_string())),
        _ => Ok(answer),
    }
}

/// An agent that restarts is away for a moment; there is nothing to wait on but its socket.
fn connect(path: &Path, patience: Duration) -> io::Result<UnixStream> {
    let start = Instant::now();
    loop {
        match connect_now(path) {
            Ok(stream) => return Ok(stream),
            Err(e) if start.elapsed() >= patience => return Err(e),
            Err(_) => thread::sleep(RETRY),
        }
    }
}

/// Connects or fails, but never waits: an agent that is stopped accepts nobody, and its queue may be full.
fn connect_now(path: &Path) -> io::Result<UnixStream> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    connect_socket(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    let stream = UnixStream::from(socket);
    stream.set_nonblocking(false)?;
    Ok(stream)
}
