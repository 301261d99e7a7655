//! What the agent knows, as `ursa-agent status` shows it.

use std::fmt::Write as _;

use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use ursa_init::watch::{Repair, State};

use super::cri::PodReport;
use super::identity::Leaf;
use crate::relay::{Rejection, Source};

/// Where a workload is in its life.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// It has been seen.
    #[default]
    Appeared,
    /// It is what it claims to be.
    Attested,
    /// Its traffic is redirected, hence closed until Envoy is live.
    Redirected,
    /// It has a certificate.
    Identified,
    /// It has a configuration.
    Configured,
    /// Its Envoy runs.
    Live,
    /// Its Envoy has accepted the configuration and its names resolve.
    Ready,
    /// Connections are ending.
    Draining,
    /// It is gone.
    Stopped,
}

impl Phase {
    /// The word in a status line.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Appeared => "appeared",
            Self::Attested => "attested",
            Self::Redirected => "redirected",
            Self::Identified => "identified",
            Self::Configured => "configured",
            Self::Live => "live",
            Self::Ready => "ready",
            Self::Draining => "draining",
            Self::Stopped => "stopped",
        }
    }
}

/// A workload's Envoy.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct EnvoyReport {
    /// Process id.
    pub pid: Option<i32>,
    /// `starting`, `live`, `draining`, `dead` or `backoff`.
    pub state: String,
    /// How many processes the shim has started.
    pub epoch: u64,
    /// How often it was started again.
    pub restarts: u32,
    /// How the previous one ended.
    pub last_exit: Option<String>,
}

/// A redirect that this agent keeps in place.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct RedirectReport {
    /// How it stands.
    pub state: State,
    /// Who else has the say over its namespace, so that this agent leaves it alone.
    pub kept_by: Option<String>,
    /// How often it was put back since this agent started.
    pub repairs: u64,
    /// The last time.
    pub last_repair: Option<Repair>,
    /// What the operator should know.
    pub message: Option<String>,
}

/// One workload.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct WorkloadStatus {
    /// Name of its directory.
    pub id: String,
    /// Mesh of its Dataplane.
    pub mesh: String,
    /// Name of its Dataplane.
    pub name: String,
    /// Where it came from: a file, or CNI.
    pub origin: String,
    /// Where it is in its life.
    pub state: Phase,
    /// Since when, in Unix seconds.
    pub since: i64,
    /// What keeps it from the next state: cause and remedy.
    pub error: Option<String>,
    /// The last error that is over.
    pub last_error: Option<String>,
    /// What control says about its Dataplane: `pending`, `registered`, or why it was refused.
    pub registration: String,
    /// The shim's process id.
    pub shim_pid: Option<i32>,
    /// `started` or `adopted`.
    pub shim_origin: Option<String>,
    /// Its Envoy.
    pub envoy: EnvoyReport,
    /// Its certificate.
    pub certificate: Option<Leaf>,
    /// Why it has no certificate, or why it isn't renewed.
    pub certificate_error: Option<String>,
    /// Where its configuration came from.
    pub config_source: Source,
    /// What its Envoy refused, in Envoy's words.
    pub rejections: Vec<Rejection>,
    /// Names that resolve.
    pub names: usize,
    /// Whether the configuration couldn't be kept for a restart, and why.
    pub disk_error: Option<String>,
    /// Its redirect, which it may share with neighbours; absent where this agent keeps none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub redirect: Option<RedirectReport>,
}

/// The agent.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct AgentStatus {
    /// Version of the program.
    pub version: String,
    /// Process id.
    pub pid: u32,
    /// The node's id, once it has joined.
    pub node_id: Option<String>,
    /// The zone, once it has joined.
    pub zone: Option<String>,
    /// When the node's certificate ends, in Unix seconds.
    pub node_certificate_until: Option<i64>,
    /// Where control is.
    pub control_plane: Option<String>,
    /// Whether the session with control is open.
    pub connected: bool,
    /// Why it isn't.
    pub connection_error: Option<String>,
    /// Files that describe no workload, and why.
    pub broken_files: Vec<BrokenFile>,
    /// The workloads of this node.
    pub workloads: Vec<WorkloadStatus>,
    /// What the container runtime showed, where one is configured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pods: Option<PodReport>,
}

/// A file that describes no workload.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BrokenFile {
    /// The file.
    pub path: String,
    /// What is wrong with it.
    pub error: String,
    /// Whether a former version of it is still running.
    #[serde(default)]
    pub running: bool,
}

impl AgentStatus {
    /// For people.
    pub fn to_text(&self) -> String {
        let now = OffsetDateTime::now_utc().unix_timestamp();
        let mut text = String::new();
        self.write(&mut text, now);
        text
    }

    fn write(&self, out: &mut String, now: i64) {
        let node = self.node_id.as_deref().map_or_else(
            || "not joined: run `ursa-agent join TICKET`".to_owned(),
            |id| {
                format!(
                    "{id} in zone {}, certificate valid {}",
                    self.zone.as_deref().unwrap_or("?"),
                    span(self.node_certificate_until.unwrap_or(now) - now)
                )
            },
        );
        line(out, 0, "agent", &format!("{} pid {}", self.version, self.pid));
        line(out, 0, "node", &node);
        let control = self.control_plane.as_deref().unwrap_or("unknown");
        let connection = if self.connected {
            "connected".to_owned()
        } else {
            format!("not connected: {}", self.connection_error.as_deref().unwrap_or("not tried yet"))
        };
        line(out, 0, "control", &format!("{control} {connection}"));
        for file in &self.broken_files {
            let running = if file.running { " (its former version keeps running)" } else { "" };
            line(out, 0, "broken file", &format!("{}{running}: {}", file.path, file.error));
        }
        if let Some(pods) = &self.pods {
            pods.write(out);
        }
        for workload in &self.workloads {
            workload.write(out, now);
        }
        if self.workloads.is_empty() {
            line(out, 0, "workloads", "none");
        }
    }
}

impl PodReport {
    fn write(&self, out: &mut String) {
        let seen = match &self.error {
            Some(error) => error.clone(),
            None => format!(
                "{} run at {}, {} of them in the mesh, {} put there after their start",
                self.sandboxes,
                self.runtime.display(),
                self.meshed,
                self.repaired
            ),
        };
        line(out, 0, "pods", &seen);
        for problem in &self.problems {
            line(out, 2, &problem.pod, &problem.error);
        }
    }
}

impl RedirectReport {
    fn to_text(&self, now: i64) -> String {
        let mut text = match (&self.kept_by, self.state) {
            (Some(by), _) => format!("kept by {by}"),
            (None, State::Fighting) => "somebody keeps changing it".to_owned(),
            (None, State::Failing) => "NOT in place".to_owned(),
            (None, State::InPlace | State::Stopped) => "in place".to_owned(),
        };
        if let Some(last) = &self.last_repair {
            let whom = last.by.as_ref().map_or_else(|| "somebody".to_owned(), ToString::to_string);
            let ago = span(now.saturating_sub(i64::try_from(last.at).unwrap_or(now)));
            let _ = write!(text, ", repaired {} times, last {ago} ago after {whom} changed it", self.repairs);
        }
        if let Some(message) = &self.message {
            let _ = write!(text, ": {message}");
        }
        text
    }
}

impl WorkloadStatus {
    fn write(&self, out: &mut String, now: i64) {
        let _ = writeln!(
            out,
            "\n{}.{}: {} for {}",
            self.mesh,
            self.name,
            self.state.as_str(),
            span(now - self.since)
        );
        line(out, 2, "from", &self.origin);
        if let Some(error) = &self.error {
            line(out, 2, "error", error);
        } else if let Some(error) = &self.last_error {
            line(out, 2, "last error", error);
        }
        line(out, 2, "registration", &self.registration);
        if let Some(redirect) = &self.redirect {
            line(out, 2, "redirect", &redirect.to_text(now));
        }
        let shim = self.shim_pid.map_or_else(
            || "not running".to_owned(),
            |pid| format!("pid {pid}, {}", self.shim_origin.as_deref().unwrap_or("started")),
        );
        line(out, 2, "shim", &shim);
        let mut envoy = match self.envoy.pid {
            Some(pid) => format!("pid {pid}, {}, restarts {}", self.envoy.state, self.envoy.restarts),
            None => format!("{}, restarts {}", self.envoy.state, self.envoy.restarts),
        };
        if let Some(exit) = &self.envoy.last_exit {
            let _ = write!(envoy, ", last exit: {exit}");
        }
        line(out, 2, "envoy", &envoy);
        let certificate =
            self.certificate.as_ref().map_or_else(|| "none".to_owned(), |leaf| describe(leaf, now));
        line(out, 2, "certificate", &certificate);
        if let Some(error) = &self.certificate_error {
            line(out, 2, "certificate error", error);
        }
        let source = match self.config_source {
            Source::None => "none yet",
            Source::Disk => "disk (last good; control hasn't answered since)",
            Source::Live => "live",
        };
        line(out, 2, "configuration", source);
        line(out, 2, "names", &self.names.to_string());
        if let Some(error) = &self.disk_error {
            line(out, 2, "disk", error);
        }
        for rejection in &self.rejections {
            line(
                out,
                2,
                "refused by Envoy",
                &format!("{} (version {}): {}", rejection.name, rejection.version, rejection.message),
            );
        }
    }
}

/// A certificate's age, what is left of it, and when the next one is asked for.
fn describe(leaf: &Leaf, now: i64) -> String {
    let (id, age) = (&leaf.spiffe_id, span(now - leaf.issued_at));
    if leaf.not_after <= now {
        let ago = span(now - leaf.not_after);
        return format!("{id}, issued {age} ago, EXPIRED {ago} ago: new connections are refused");
    }
    let left = span(leaf.not_after - now);
    let renews = if leaf.is_overdue(now) {
        let due = span(now - leaf.renew_at.max(leaf.issued_at));
        format!("renewal due for {due}; new connections are refused after that")
    } else {
        format!("renews in {}", span(leaf.renew_at - now))
    };
    format!("{id}, issued {age} ago, valid for {left} more, {renews}")
}

fn line(out: &mut String, indent: usize, key: &str, value: &str) {
    let _ = writeln!(out, "{:indent$}{key}: {value}", "");
}

fn span(seconds: i64) -> String {
    match seconds.max(0) {
        s @ 0..=119 => format!("{s} s"),
        s @ 120..=7199 => format!("{} min", s / 60),
        s @ 7200..=172_799 => format!("{} h", s / 3600),
        s => format!("{} days", s / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_certificate_is_as_old_as_its_issue() {
        const HOUR: i64 = 3600;
        let leaf = Leaf {
            secret_name: "s".into(),
            spiffe_id: "spiffe://m/workload/web".into(),
            generation: "g".into(),
            issued_at: 1000,
            renew_at: 1000 + 24 * HOUR,
            not_after: 1000 + 48 * HOUR,
        };
        let at = |now| describe(&leaf, now);
        assert_eq!(at(1007), "spiffe://m/workload/web, issued 7 s ago, valid for 47 h more, renews in 23 h");
        assert!(at(1000 + 30 * HOUR).contains("valid for 18 h more, renewal due for 6 h; new connections"));
        assert!(at(1000 + 50 * HOUR).contains("EXPIRED 2 h ago"));
    }
}
