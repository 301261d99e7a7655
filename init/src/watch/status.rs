//! What the agent and the operator can read about a watched redirect.

use std::io;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::Process;
use crate::slices::Missing;

/// How it stands.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum State {
    /// The rules are as they should be.
    #[default]
    InPlace,
    /// Another program keeps changing them; they are repaired with pauses.
    Fighting,
    /// They differ and can't be repaired.
    Failing,
    /// Nobody watches any more; what was in place is left there.
    Stopped,
}

/// The state and how it came about.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    /// How it stands.
    pub state: State,
    /// Who watches.
    pub pid: u32,
    /// Since when, in seconds since 1970.
    pub started: u64,
    /// How often something was put back.
    pub repairs: u64,
    /// The last time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_repair: Option<Repair>,
    /// Slices that don't exist: what their workloads open can't be told apart.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub missing_slices: Vec<Missing>,
    /// The workloads that are redirected, where several share the namespace.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub workloads: Vec<String>,
    /// Those that aren't although they should be, and why.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub left_out: Vec<String>,
    /// What the operator should know; empty when all is well.
    pub message: String,
}

/// Something was put back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Repair {
    /// When, in seconds since 1970.
    pub at: u64,
    /// From noticing to being in place again.
    pub microseconds: u64,
    /// Who had changed it, if the kernel said so.
    pub by: Option<Process>,
    /// The first differences: `-` lines were there, `+` lines were missing.
    pub differences: Vec<String>,
}

impl Status {
    pub(super) fn new() -> Self {
        Self {
            state: State::InPlace,
            pid: std::process::id(),
            started: now(),
            repairs: 0,
            last_repair: None,
            missing_slices: Vec::new(),
            workloads: Vec::new(),
            left_out: Vec::new(),
            message: String::new(),
        }
    }

    pub(super) fn recovered(&mut self) {
        self.state = State::InPlace;
        self.message = self.lacks();
    }

    /// What there is to be said while all that can be in place is.
    fn lacks(&self) -> String {
        let missing = self.missing_slices.iter().map(ToString::to_string);
        missing.chain(self.left_out.iter().cloned()).collect::<Vec<_>>().join("; ")
    }

    pub(super) fn repaired(&mut self, took: Duration, by: Option<Process>, differences: Vec<String>) {
        self.repairs += 1;
        self.message = self.lacks();
        let microseconds = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        self.last_repair = Some(Repair { at: now(), microseconds, by, differences });
    }

    /// Replaces the file as a whole: a reader never sees a half.
    pub(super) fn write(&self, path: &Path) -> io::Result<()> {
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder)?;
        }
        let new = path.with_extension("new");
        std::fs::write(&new, serde_json::to_vec_pretty(self)?)?;
        std::fs::rename(&new, path)
    }
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
