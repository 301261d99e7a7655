//! What of a supervisor goes on in the binary that replaces this one.

use std::io;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::logs::{Logs, Stream};
use super::process::Process;
use super::{Drain, Running};
use crate::shim::handover::Passed;
use crate::shim::protocol::EnvoyStatus;

/// A supervisor's state between two binaries.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Snapshot {
    /// As it was told last.
    #[serde(default)]
    pub status: EnvoyStatus,
    /// Hash of the running Envoy's bootstrap.
    #[serde(default)]
    pub config_hash: String,
    /// Ends in a row.
    #[serde(default)]
    pub(super) failures: u32,
    /// Epoch of the Envoy that runs, or of the next one.
    #[serde(default)]
    pub(super) next_epoch: u64,
    /// What the agent waits for.
    #[serde(default)]
    pub(super) awaited: Option<String>,
    /// The Envoy that runs.
    #[serde(default)]
    pub(super) running: Option<Left>,
    /// What is left of the wait before the next start.
    #[serde(default)]
    pub(super) pause_ms: Option<u64>,
}

/// A running Envoy, beside what its status says.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Left {
    pid: i32,
    start_time: u64,
    #[serde(default)]
    streams: Vec<LeftStream>,
    #[serde(default)]
    last: Option<String>,
    /// For how long it has been live, if it is.
    #[serde(default)]
    live_ms: Option<u64>,
    /// What is left of a drain that isn't over.
    #[serde(default)]
    drain_ms: Option<u64>,
}

#[derive(Debug, Serialize, Deserialize)]
struct LeftStream {
    fd: Passed,
    rest: String,
}

impl Snapshot {
    /// Of one whose Envoy isn't handed over.
    pub(in crate::shim) fn sample(status: EnvoyStatus) -> Self {
        Self { status, ..Self::default() }
    }
}

impl Left {
    /// Lets go of a running Envoy, which notices nothing.
    pub(super) async fn of(running: Running) -> Self {
        let (streams, last) = running.logs.release().await;
        let streams = streams.into_iter().filter_map(|stream| {
            // One that can't be passed on is lost to the log, and closing it would end Envoy: better to leave it open.
            let fd = Passed::copy(&stream.fd).inspect_err(|_| std::mem::forget(stream.fd)).ok()?;
            Some(LeftStream { fd, rest: stream.rest })
        });
        let drain = running.drain.filter(|drain| !drain.over);
        Self {
            pid: running.process.pid(),
            start_time: running.process.start_time(),
            streams: streams.collect(),
            last,
            live_ms: running.live_since.map(|since| milliseconds(since.elapsed())),
            drain_ms: drain
                .map(|drain| milliseconds(drain.deadline.saturating_duration_since(Instant::now()))),
        }
    }

    /// Takes it over.
    pub(super) fn adopt(self, epoch: u64, draining: bool) -> io::Result<Running> {
        let process = Process::adopt(self.pid, self.start_time)?;
        let mut streams = Vec::new();
        for stream in self.streams {
            streams.push(Stream { fd: stream.fd.claim()?, rest: stream.rest });
        }
        let now = Instant::now();
        let over = self.drain_ms.is_none();
        Ok(Running {
            process,
            logs: Logs::follow(epoch, streams, self.last),
            live_since: self.live_ms.map(|ms| now.checked_sub(Duration::from_millis(ms)).unwrap_or(now)),
            drain: draining.then(|| Drain {
                over,
                ..Drain::until(now + Duration::from_millis(self.drain_ms.unwrap_or(0)))
            }),
        })
    }
}

pub(super) fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
