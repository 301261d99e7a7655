//! Envoy's words as our log lines.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::StreamExt;
use tokio::io::AsyncRead;
use tokio::process::{ChildStderr, ChildStdout};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::codec::{FramedRead, LinesCodec, LinesCodecError};
use tracing::{debug, error, info, trace, warn};

/// Level, component and text, separated by tabs.
pub(super) const FORMAT: &str = "%l\t%n\t%v";
const MAX_LINE: usize = 16 * 1024;

/// Follows both streams of one Envoy until they end.
#[derive(Debug)]
pub(super) struct Logs {
    last: Arc<Mutex<Option<String>>>,
    tasks: JoinSet<()>,
}

impl Logs {
    pub(super) fn follow(stdout: Option<ChildStdout>, stderr: Option<ChildStderr>) -> Self {
        let mut logs = Self { last: Arc::default(), tasks: JoinSet::new() };
        if let Some(stdout) = stdout {
            logs.tasks.spawn(copy(stdout, Arc::clone(&logs.last)));
        }
        if let Some(stderr) = stderr {
            logs.tasks.spawn(copy(stderr, Arc::clone(&logs.last)));
        }
        logs
    }

    /// The last complaint, after everything was read.
    pub(super) async fn finish(mut self) -> Option<String> {
        // The streams end with Envoy, unless something it started holds them.
        let _ =
            timeout(Duration::from_secs(1), async { while self.tasks.join_next().await.is_some() {} }).await;
        self.last.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

async fn copy(stream: impl AsyncRead + Unpin, last: Arc<Mutex<Option<String>>>) {
    let mut lines = FramedRead::new(stream, LinesCodec::new_with_max_length(MAX_LINE));
    while let Some(line) = lines.next().await {
        match line {
            Ok(line) => {
                if say(&line) {
                    *last.lock().unwrap_or_else(PoisonError::into_inner) = Some(line.replace('\t', " "));
                }
            }
            Err(LinesCodecError::MaxLineLengthExceeded) => {
                warn!(target: "envoy", "a line over 16 KiB was left out");
            }
            Err(LinesCodecError::Io(reason)) => {
                debug!(%reason, "Envoy's output ended");
                return;
            }
        }
    }
}

/// Logs a line; true if it is a complaint that may explain an exit.
fn say(line: &str) -> bool {
    let mut parts = line.splitn(3, '\t');
    let (level, component, text) = match (parts.next(), parts.next(), parts.next()) {
        (Some(level), Some(component), Some(text)) => (level, component, text),
        // A continued message, or a word of the C library.
        _ => ("info", "", line),
    };
    match level {
        "trace" => trace!(target: "envoy", component, "{text}"),
        "debug" => debug!(target: "envoy", component, "{text}"),
        "warning" => warn!(target: "envoy", component, "{text}"),
        "error" | "critical" => {
            error!(target: "envoy", component, "{text}");
            return true;
        }
        _ => info!(target: "envoy", component, "{text}"),
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn remembers_the_last_complaint() {
        let last = Arc::default();
        let text = format!(
            "info\tmain\tfine\ncritical\tmain\tbad\tbootstrap\n{}\nwarning\tx\ty\n",
            "z".repeat(20_000)
        );
        copy(text.as_bytes(), Arc::clone(&last)).await;
        assert_eq!(last.lock().unwrap().as_deref(), Some("critical main bad bootstrap"));
    }
}
