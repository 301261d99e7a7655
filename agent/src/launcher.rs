//! Launchers start, stop, list and adopt shims.
//!
//! An agent says which shims should run; a [`Launcher`] keeps them running, adopts those that a previous agent
//! started, and removes every trace of those it is told to stop. It decides nothing about Envoy: the shim does.

pub mod fork;
mod own;
mod process;
pub mod unit;

use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::sync::watch;

use crate::relay::Admit;
use crate::systemd::ActiveState;

/// What it takes to run one shim.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShimSpec {
    /// Name of its directory below `<run>/w`: a single path component.
    pub id: String,
    /// `<mesh>.<name>` of the Dataplane.
    pub workload: String,
    /// Path of the Envoy binary.
    pub envoy: PathBuf,
    /// The systemd unit of the application that it belongs to, with which it starts and stops.
    pub unit: Option<String>,
    /// User that shim and Envoy run as; not root.
    pub uid: u32,
    /// Group that shim and Envoy run as.
    pub gid: u32,
    /// Network namespace to enter; the agent's own when absent.
    pub netns: Option<PathBuf>,
    /// The port of its DNS.
    pub dns_port: u16,
    /// Whether Envoy may use addresses that it hasn't got and mark what it sends, for a redirect by TPROXY.
    pub transparent: bool,
    /// Envoy's worker threads.
    pub concurrency: u32,
    /// The last-good directory, which the shim serves while no agent is attached. `uid` must be able to read it.
    pub last_good: PathBuf,
    /// The resolver configuration that the workload would have used.
    pub resolv_conf: PathBuf,
    /// `trace`, `debug`, `info`, `warn` or `error`.
    pub log_level: String,
}

/// How a shim came to be ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// It was started.
    Started,
    /// It was running already.
    Adopted,
}

/// What a launcher knows about a shim that it keeps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ShimState {
    /// It runs and its control socket answers.
    Running {
        /// Its process id.
        pid: i32,
        /// When the process started, in clock ticks after boot.
        start_time: u64,
        /// Whether this launcher started it.
        origin: Origin,
    },
    /// It ended, or could not be started; another attempt follows.
    Backoff {
        /// What happened and what to do about it.
        reason: String,
        /// Failures in a row.
        failures: u32,
    },
    /// It was stopped on request.
    Stopped,
}

/// A shim directory that was found, whoever started its shim.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Name of the directory.
    pub id: String,
    /// The directory.
    pub dir: PathBuf,
    /// The process that listens there, if any does.
    pub pid: Option<i32>,
}

/// Why a launcher could not do as told.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LaunchError {
    /// The request itself is wrong.
    #[error("shim {id}: {reason}")]
    Invalid {
        /// Which shim.
        id: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The shim did not come up.
    #[error("shim {id} did not start: {reason}")]
    Start {
        /// Which shim.
        id: String,
        /// In the words of its log, where there are any.
        reason: String,
    },
    /// Someone else listens where the shim should, or it doesn't answer.
    #[error("shim {id} cannot be adopted: {reason}")]
    Adopt {
        /// Which shim.
        id: String,
        /// What was found.
        reason: String,
    },
    /// Its application doesn't run, and it runs only with it.
    #[error("{unit} is {state}; its sidecar starts with it")]
    NotWanted {
        /// Which shim.
        id: String,
        /// The application's unit.
        unit: String,
        /// What it does.
        state: ActiveState,
    },
    /// The shim could not be stopped, or left something behind.
    #[error("shim {id} was not stopped cleanly: {reason}")]
    Stop {
        /// Which shim.
        id: String,
        /// Everything that failed.
        reason: String,
    },
}

/// How a shim gets what it works by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Handover {
    /// As arguments, and as files in its directory that are there before it starts.
    Files,
    /// As [`Settings`](crate::shim::protocol::Settings), which are sent to it and kept where its user can read them:
    /// somebody else starts it.
    Settings,
}

/// Keeps shims running. One per agent.
pub trait Launcher: Send + Sync + std::fmt::Debug {
    /// The directory of this shim, with its `control.sock`. With [`Handover::Files`], make it, and write
    /// `bootstrap.json` and `dns.json` there before [`ensure`](Launcher::ensure), readable by everybody: the shim
    /// closes the directory to others, and what is replaced later isn't handed to its user again.
    fn dir(&self, id: &str) -> PathBuf;

    /// How its shims get what they work by.
    fn handover(&self) -> Handover {
        Handover::Files
    }

    /// Adopts the shim if it runs, starts it otherwise, and from then on keeps it running. Returns when its control
    /// socket answers, so a [`ShimClient`](crate::shim::client::ShimClient) can connect; Envoy is only starting
    /// then. Repeating it with the same specification changes nothing; another specification takes effect with the
    /// next start of the shim.
    fn ensure(&self, spec: ShimSpec) -> BoxFuture<'_, Result<watch::Receiver<ShimState>, LaunchError>>;

    /// Stops the shim, which drains for at most `drain`, and removes its directory and shared memory. Also works
    /// for a shim that this launcher never started, as found by [`list`](Launcher::list); it is no error when
    /// there is none.
    fn stop<'a>(&'a self, id: &'a str, drain: Duration) -> BoxFuture<'a, Result<(), LaunchError>>;

    /// Who may have the configuration and the key of a shim's workload: its Envoy, and nobody who merely runs as the
    /// same user.
    fn admission(&self, spec: &ShimSpec, shim: i32) -> Admit;

    /// Returns when it may be worth while to try [`ensure`](Launcher::ensure) again, because something that it waited
    /// for has appeared. Without news it never returns.
    fn appeared(&self) -> BoxFuture<'_, ()> {
        Box::pin(std::future::pending())
    }

    /// Every shim directory there is, including those left by others.
    fn list(&self) -> BoxFuture<'_, Result<Vec<Found>, LaunchError>>;
}

/// An id names a directory, and must name no other.
fn is_id(id: &str) -> Result<(), LaunchError> {
    let mut components = Path::new(id).components();
    match (components.next(), components.next()) {
        (Some(Component::Normal(name)), None) if name == id => Ok(()),
        _ => Err(LaunchError::Invalid {
            id: id.to_owned(),
            reason: "its id is no single path component".into(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_stays_in_its_directory() {
        for good in ["web", "default.web-1"] {
            is_id(good).unwrap();
        }
        for bad in ["", ".", "..", "/", "/etc", "a/b", "a/", "../w"] {
            assert!(is_id(bad).is_err(), "{bad:?}");
        }
    }
}
