//! Envoy's words as our log lines.

use std::io;
use std::os::fd::OwnedFd;
use std::process::{ChildStderr, ChildStdout};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::StreamExt;
use tokio::io::AsyncRead;
use tokio::net::unix::pipe;
use tokio::time::timeout;
use tokio_util::codec::{FramedRead, LinesCodec, LinesCodecError};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tracing::{debug, error, info, trace, warn};

/// Level, component and text, separated by tabs.
pub(super) const FORMAT: &str = "%l\t%n\t%v";
const MAX_LINE: usize = 16 * 1024;

/// The reading end of one of Envoy's streams, and what was read of a line that has not ended.
#[derive(Debug)]
pub(super) struct Stream {
    pub(super) fd: OwnedFd,
    pub(super) rest: String,
}

impl<T: Into<OwnedFd>> From<T> for Stream {
    fn from(stream: T) -> Self {
        Self { fd: stream.into(), rest: String::new() }
    }
}

/// Follows both streams of one Envoy until they end.
#[derive(Debug)]
pub(super) struct Logs {
    last: Arc<Mutex<Option<String>>>,
    stop: CancellationToken,
    tasks: Vec<AbortOnDropHandle<Option<Stream>>>,
}

impl Logs {
    pub(super) fn of(epoch: u64, stdout: Option<ChildStdout>, stderr: Option<ChildStderr>) -> Self {
        let streams = stdout.map(Stream::from).into_iter().chain(stderr.map(Stream::from));
        Self::follow(epoch, streams, None)
    }

    /// Goes on where another left off; `last` is the last complaint that it saw.
    pub(super) fn follow(
        epoch: u64,
        streams: impl IntoIterator<Item = Stream>,
        last: Option<String>,
    ) -> Self {
        let (last, stop) = (Arc::new(Mutex::new(last)), CancellationToken::new());
        let tasks = streams
            .into_iter()
            .map(|stream| tokio::spawn(follow(epoch, stream, Arc::clone(&last), stop.clone())))
            .map(AbortOnDropHandle::new)
            .collect();
        Self { last, stop, tasks }
    }

    /// The last complaint, after everything was read.
    pub(super) async fn finish(mut self) -> Option<String> {
        // The streams end with Envoy, unless something it started holds them.
        let all = async {
            for task in &mut self.tasks {
                let _ = task.await;
            }
        };
        let _ = timeout(Duration::from_secs(1), all).await;
        self.last.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Stops reading; what Envoy says meanwhile waits in its pipes.
    pub(super) async fn release(mut self) -> (Vec<Stream>, Option<String>) {
        self.stop.cancel();
        let mut streams = Vec::new();
        for task in &mut self.tasks {
            streams.extend(task.await.ok().flatten());
        }
        (streams, self.last.lock().unwrap_or_else(PoisonError::into_inner).take())
    }
}

async fn follow(
    epoch: u64,
    stream: Stream,
    last: Arc<Mutex<Option<String>>>,
    stop: CancellationToken,
) -> Option<Stream> {
    let pipe = match pipe::Receiver::from_owned_fd(stream.fd) {
        Ok(pipe) => pipe,
        Err(error) => {
            warn!(%error, "Envoy's words cannot be read");
            return None;
        }
    };
    let mut lines = FramedRead::new(pipe, LinesCodec::new_with_max_length(MAX_LINE));
    lines.read_buffer_mut().extend_from_slice(stream.rest.as_bytes());
    tokio::select! {
        () = copy(epoch, &mut lines, &last) => None,
        () = stop.cancelled() => {
            let rest = String::from_utf8_lossy(lines.read_buffer()).into_owned();
            let fd: io::Result<OwnedFd> = lines.into_inner().into_nonblocking_fd();
            fd.ok().map(|fd| Stream { fd, rest })
        }
    }
}

async fn copy(
    epoch: u64,
    lines: &mut FramedRead<impl AsyncRead + Unpin, LinesCodec>,
    last: &Mutex<Option<String>>,
) {
    while let Some(line) = lines.next().await {
        match line {
            Ok(line) => {
                if say(epoch, &line) {
                    *last.lock().unwrap_or_else(PoisonError::into_inner) = Some(line.replace('\t', " "));
                }
            }
            Err(LinesCodecError::MaxLineLengthExceeded) => {
                warn!(target: "envoy", epoch, "a line over 16 KiB was left out");
            }
            Err(LinesCodecError::Io(reason)) => {
                debug!(%reason, "Envoy's output ended");
                return;
            }
        }
    }
}

/// Logs a line; true if it is a complaint that may explain an exit.
fn say(epoch: u64, line: &str) -> bool {
    let mut parts = line.splitn(3, '\t');
    let (level, component, text) = match (parts.next(), parts.next(), parts.next()) {
        (Some(level), Some(component), Some(text)) => (level, component, text),
        // A continued message, or a word of the C library.
        _ => ("info", "", line),
    };
    // Envoy hides keys in what it dumps. Whatever else prints one, a log is read by more people than may know it.
    let text = if text.contains("PRIVATE KEY") { "(left out: a line with a private key)" } else { text };
    match level {
        "trace" => trace!(target: "envoy", epoch, component, "{text}"),
        "debug" => debug!(target: "envoy", epoch, component, "{text}"),
        "warning" => warn!(target: "envoy", epoch, component, "{text}"),
        "error" | "critical" => {
            error!(target: "envoy", epoch, component, "{text}");
            return true;
        }
        _ => info!(target: "envoy", epoch, component, "{text}"),
    }
    false
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[tokio::test]
    async fn remembers_the_last_complaint() {
        let last = Mutex::default();
        let text = format!(
            "info\tmain\tfine\ncritical\tmain\tbad\tbootstrap\n{}\nwarning\tx\ty\n",
            "z".repeat(20_000)
        );
        let mut lines = FramedRead::new(text.as_bytes(), LinesCodec::new_with_max_length(MAX_LINE));
        copy(0, &mut lines, &last).await;
        assert_eq!(last.lock().unwrap().as_deref(), Some("critical main bad bootstrap"));
    }

    #[tokio::test]
    async fn a_line_that_is_half_read_is_finished_by_the_next_reader() {
        let (reader, mut writer) = io::pipe().unwrap();
        let first = Logs::follow(0, [Stream::from(reader)], None);
        writer.write_all(b"error\tmain\tone\nerror\tmain\ttw").unwrap();
        while first.last.lock().unwrap().is_none() {
            tokio::task::yield_now().await;
        }
        let (streams, last) = first.release().await;
        assert_eq!((streams.len(), last.as_deref()), (1, Some("error main one")));
        writer.write_all(b"o\n").unwrap();
        drop(writer);
        let second = Logs::follow(0, streams, last);
        assert_eq!(second.finish().await.as_deref(), Some("error main two"));
    }
}
