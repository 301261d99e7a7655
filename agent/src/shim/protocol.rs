//! What agent and shim say to each other on `control.sock`: one JSON object per line.
//!
//! The shim greets with a [`Status`], answers every [`Request`] with one [`Reply`] in order and at once, and pushes
//! [`Event`]s in between. An agent must understand shims of two versions back and the other way round, so unknown
//! fields are ignored and every field added later has a default; `tests/daemon/transcripts` holds what earlier
//! versions said.
//!
//! # Who may ask what
//!
//! Peer credentials decide. Root and the agent may ask everything. In a unit, the user that the shim itself runs as may ask
//! for [`Request::Status`], [`Request::Drain`] and [`Request::Resume`]. Nobody else is answered.
//!
//! # A shim in a unit
//!
//! `ursa-shim --service NAME` is started by systemd as `ursa-sidecar@NAME.service`, before or after any agent. Its
//! directory ([`unit_dir`]) is 0711 with [`CONTROL_SOCKET`] 0666; [`XDS_SOCKET`], [`ADMIN_SOCKET`] and
//! [`BOOTSTRAP_FILE`] are in [`PRIVATE_DIR`] below it, which is 0700: the bootstrap must name the sockets there.
//!
//! - It reads [`SETTINGS_FILE`] in the agent's state directory of this workload (`/var/lib/ursa/agent/w/NAME`), which
//!   holds a whole [`Settings`]. With one, it starts Envoy at once: so it is after a reboot without an agent.
//! - Without one it waits ([`EnvoyState::Waiting`], `workload` is empty) for [`Request::Configure`]. Until it can send
//!   that, the agent says by [`Request::Waiting`] what it waits for itself, which systemd shows in `STATUS=`.
//! - The agent writes the same [`Settings`] to the file and sends them, on every attach: equal ones change nothing.
//!   The file, the DNS table and the last-good directory that it names must be readable to the shim's user.
//!
//! [`Request::ReExec`] (or SIGHUP) makes the shim replace itself by the binary that is installed now. Its process,
//! Envoy, and every listening socket stay; connections to `control.sock` end, so the agent attaches again.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::redirected::RedirectFile;

/// The version of this protocol, sent as `shim` in [`Status`]. Version 1 knew no [`Settings`]: its shims got theirs
/// as arguments, could not replace themselves, and drained without telling when they were done.
pub const VERSION: u32 = 2;

/// Where systemd makes the directories of sidecars (`RuntimeDirectory=ursa-sidecar/%i`).
pub const UNITS_DIR: &str = "/run/ursa-sidecar";
/// What only the sidecar's user may open, in the directory of a shim that runs in a unit.
pub const PRIVATE_DIR: &str = "private";
/// A shim's settings in the agent's state directory of its workload: JSON of [`Settings`], written atomically.
pub const SETTINGS_FILE: &str = "shim.json";

/// The agent's end of the shim, in the shim's directory.
pub const CONTROL_SOCKET: &str = "control.sock";
/// Where Envoy connects for its configuration.
pub const XDS_SOCKET: &str = "xds.sock";
/// Envoy's admin interface.
pub const ADMIN_SOCKET: &str = "admin.sock";
/// Envoy's bootstrap, written by the agent before it starts the shim, or by a shim from its [`Settings`].
pub const BOOTSTRAP_FILE: &str = "bootstrap.json";
/// The names that this workload resolves ([`DnsTable`]), replaced atomically by the agent.
pub const DNS_FILE: &str = "dns.json";

/// The directory of the shim that is the main process of `ursa-sidecar@SERVICE.service`.
pub fn unit_dir(service: &str) -> PathBuf {
    Path::new(UNITS_DIR).join(service)
}

/// What an agent asks of a shim.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "cmd", rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Request {
    /// The current [`Status`].
    Status,
    /// Pass me the listening xDS socket. The shim stops serving it until this connection closes.
    TakeXds,
    /// Read [`DNS_FILE`] again.
    ReloadDns,
    /// Stop Envoy and start it again, without back-off.
    RestartEnvoy,
    /// Fail Envoy's health check and ask inbound connections to go; Envoy keeps running, and outbound traffic works.
    /// The state is [`EnvoyState::Draining`] from now on, and [`EnvoyStatus::drained`] once no inbound connection is
    /// left or the deadline has passed. A drain that is under way goes on, to the earlier of both deadlines.
    Drain {
        /// How long inbound connections may take to end; the shim's drain time when absent.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        deadline_ms: Option<u64>,
    },
    /// Take inbound connections again: an Envoy that drains is replaced by a new one. Nothing otherwise.
    Resume,
    /// Drain for at most `drain_ms`, stop Envoy, and exit.
    Stop {
        /// How long connections may take to end; 0 stops at once.
        #[serde(default)]
        drain_ms: u64,
    },
    /// Change the shim's and Envoy's log level.
    SetLogLevel {
        /// `trace`, `debug`, `info`, `warn` or `error`.
        level: String,
    },
    /// Work by these settings. An Envoy that waits for its first is started. One that runs is left alone: log level,
    /// DNS and drain time change at once, everything else with its next start ([`Request::RestartEnvoy`]). Refused if
    /// they can't be used; the former ones stay.
    Configure {
        /// All of them.
        settings: Box<Settings>,
    },
    /// What the agent waits for before it can configure or complete this sidecar, in words for the operator; an empty
    /// text takes it back. Kept until the next one, or until Envoy is live.
    Waiting {
        /// For example `the control plane 10.0.0.1:5678: connection refused`.
        text: String,
    },
    /// Pass me a connection to Envoy's admin interface, for one request.
    ConnectAdmin,
    /// Replace yourself by the binary that is installed now. Answered before it happens, and refused if that binary
    /// can't take over; then everything goes on as it was.
    ReExec,
}

impl Request {
    /// Whether the answer carries a descriptor.
    pub fn wants_descriptor(&self) -> bool {
        matches!(self, Self::TakeXds | Self::ConnectAdmin)
    }
}

/// What a shim works by.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    /// `<mesh>.<name>` of the Dataplane.
    pub workload: String,
    /// Path of the Envoy binary.
    pub envoy: PathBuf,
    /// Envoy's bootstrap. Its admin and xDS addresses are in [`PRIVATE_DIR`]. The shim adds the overload manager, from
    /// the memory limit that it finds when it starts Envoy.
    pub bootstrap: serde_json::Value,
    /// The workload's last-good directory, served to Envoy while no agent is attached.
    pub last_good: PathBuf,
    /// The file of the names that it resolves ([`DnsTable`]).
    pub dns_table: PathBuf,
    /// Where it is told that the workload's redirect is in place. Before it is, the sidecar isn't ready for systemd, or
    /// the service would start with its traffic open.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub redirect: Option<RedirectFile>,
    /// Port of the name server on the loopback addresses.
    #[serde(default = "default_dns_port")]
    pub dns_port: u16,
    /// The resolver configuration that the workload would have used.
    #[serde(default = "default_resolv_conf")]
    pub resolv_conf: PathBuf,
    /// Envoy's worker threads.
    #[serde(default = "default_concurrency")]
    pub concurrency: u32,
    /// Seconds over which a drain discourages connections, and how long a stop waits for them to end.
    #[serde(default = "default_drain_time")]
    pub drain_time_s: u64,
    /// `trace`, `debug`, `info`, `warn` or `error`, of shim and Envoy.
    #[serde(default = "default_log_level")]
    pub log_level: String,
}

impl Settings {
    /// The mesh and the Dataplane's name: a mesh's name holds no dot.
    pub fn mesh_and_name(&self) -> (&str, &str) {
        self.workload.split_once('.').unwrap_or(("", &self.workload))
    }
}

fn default_dns_port() -> u16 {
    super::DNS_PORT
}

fn default_resolv_conf() -> PathBuf {
    "/etc/resolv.conf".into()
}

fn default_concurrency() -> u32 {
    2
}

fn default_drain_time() -> u64 {
    5
}

fn default_log_level() -> String {
    "info".into()
}

/// A line from the shim.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Message {
    /// The greeting.
    Hello(Box<Status>),
    /// Something happened.
    Event(Event),
    /// The answer to the oldest unanswered request.
    Reply(Reply),
}

/// The answer to a [`Request`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reply {
    /// Whether it was done.
    #[serde(default)]
    pub ok: bool,
    /// Why it was not done.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Answer to [`Request::Status`], and the state after any other request.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<Box<Status>>,
}

/// What a shim tells without being asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Event {
    /// Envoy changed its state.
    Envoy(EnvoyStatus),
    /// Something that a later version tells.
    #[serde(other)]
    Unknown,
}

/// All there is to know about a shim.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// [`VERSION`] of the protocol that this shim speaks.
    pub shim: u32,
    /// `<mesh>.<name>` of the Dataplane; empty while it isn't configured.
    pub workload: String,
    /// The shim's process id.
    pub pid: i32,
    /// When that process started, in clock ticks after boot (`/proc/<pid>/stat`): tells a reused pid.
    pub start_time: u64,
    /// Version of the program.
    #[serde(default)]
    pub version: String,
    /// Envoy.
    pub envoy: EnvoyStatus,
    /// Hash of the bootstrap that the current Envoy was started with.
    #[serde(default)]
    pub config_hash: String,
    /// Who answers Envoy on the xDS socket.
    #[serde(default)]
    pub xds: XdsRole,
    /// Its name server.
    #[serde(default)]
    pub dns: DnsStatus,
    /// The `NAME` of `ursa-sidecar@NAME.service`, if it runs in that unit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<String>,
    /// How often this process has replaced itself by a newly installed binary.
    #[serde(default)]
    pub reexecs: u32,
    /// The binary that is installed now is another one than the one that runs: [`Request::ReExec`] changes that.
    #[serde(default)]
    pub outdated: bool,
    /// Bytes that shim and Envoys may use together, if their cgroup is limited.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_limit: Option<u64>,
}

/// Who answers Envoy on the xDS socket.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum XdsRole {
    /// The shim itself, from the last-good directory.
    #[default]
    LastGood,
    /// An attached agent.
    Agent,
    /// Something that a later version knows.
    #[serde(other)]
    Unknown,
}

/// The state of Envoy.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EnvoyState {
    /// Running, but `/ready` has not said LIVE.
    #[default]
    Starting,
    /// `/ready` said LIVE.
    Live,
    /// Inbound listeners are closing.
    Draining,
    /// Not running and not to be started again.
    Dead,
    /// Waiting before the next start.
    Backoff,
    /// Never started: no settings have come yet.
    Waiting,
    /// Something that a later version knows.
    #[serde(other)]
    Unknown,
}

/// One Envoy process after another.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EnvoyStatus {
    /// Its process id, when it runs.
    #[serde(default)]
    pub pid: Option<i32>,
    /// When it started, in clock ticks after boot.
    #[serde(default)]
    pub start_time: Option<u64>,
    /// Counts the Envoys that this shim started, from 0. A new epoch has lost everything it was sent.
    #[serde(default)]
    pub epoch: u64,
    /// Its state.
    pub state: EnvoyState,
    /// How often it was started again.
    #[serde(default)]
    pub restarts: u32,
    /// How the previous one ended, in words.
    #[serde(default)]
    pub last_exit: Option<String>,
    /// What it waits for: what `/ready` last said when it wasn't LIVE (e.g. `PRE_INITIALIZING`), what the agent says
    /// that it waits for, or that no agent has come.
    #[serde(default)]
    pub waiting: Option<String>,
    /// What Envoy calls its version.
    #[serde(default)]
    pub version: Option<String>,
    /// Inbound connections that were left when last looked at, while it drains.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub inbound: Option<u64>,
    /// The drain is over: no inbound connection was left, or the deadline passed.
    #[serde(default)]
    pub drained: bool,
}

/// The state of the shim's name server.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DnsStatus {
    /// Whether a table was ever loaded. Until then mesh names answer SERVFAIL, which clients retry.
    #[serde(default)]
    pub loaded: bool,
    /// Names in the table.
    #[serde(default)]
    pub names: usize,
    /// Why the last table was refused; the one before it is still served.
    #[serde(default)]
    pub error: Option<String>,
    /// Queries answered from the table since start.
    #[serde(default)]
    pub answered: u64,
    /// Queries forwarded since start.
    #[serde(default)]
    pub forwarded: u64,
    /// Queries refused or dropped, because they made no sense or a limit was reached.
    #[serde(default)]
    pub refused: u64,
}

/// The names that one workload resolves: the content of [`DNS_FILE`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DnsTable {
    /// Hostname (the trailing dot is optional) to addresses.
    pub names: BTreeMap<String, Vec<IpAddr>>,
    /// Domains that are ours: unknown names below them do not exist, and are never asked of anybody else.
    pub domains: Vec<String>,
    /// Seconds for which an answer may be kept.
    #[serde(default = "default_ttl")]
    pub ttl: u32,
}

fn default_ttl() -> u32 {
    30
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_spelled_as_agreed() {
        for (text, request) in [
            (r#"{"cmd":"status"}"#, Request::Status),
            (r#"{"cmd":"take-xds"}"#, Request::TakeXds),
            (r#"{"cmd":"reload-dns"}"#, Request::ReloadDns),
            (r#"{"cmd":"restart-envoy"}"#, Request::RestartEnvoy),
            (r#"{"cmd":"drain"}"#, Request::Drain { deadline_ms: None }),
            (r#"{"cmd":"drain","deadline_ms":10}"#, Request::Drain { deadline_ms: Some(10) }),
            (r#"{"cmd":"resume"}"#, Request::Resume),
            (r#"{"cmd":"waiting","text":"x"}"#, Request::Waiting { text: "x".into() }),
            (r#"{"cmd":"connect-admin"}"#, Request::ConnectAdmin),
            (r#"{"cmd":"re-exec"}"#, Request::ReExec),
            (r#"{"cmd":"stop"}"#, Request::Stop { drain_ms: 0 }),
            (r#"{"cmd":"set-log-level","level":"debug"}"#, Request::SetLogLevel { level: "debug".into() }),
        ] {
            assert_eq!(serde_json::from_str::<Request>(text).unwrap(), request);
        }
    }

    #[test]
    fn settings_need_only_what_has_no_default() {
        let text = r#"{"cmd":"configure","later":1,"settings":{"workload":"default.web","envoy":"/e","bootstrap":{"node":{}},
            "last_good":"/l","dns_table":"/l/dns.json","later":1}}"#;
        let Ok(Request::Configure { settings }) = serde_json::from_str(text) else { panic!("{text}") };
        assert_eq!((settings.dns_port, settings.concurrency, settings.drain_time_s), (15053, 2, 5));
        assert_eq!(settings.mesh_and_name(), ("default", "web"));
        let again: Settings = serde_json::from_slice(&serde_json::to_vec(&settings).unwrap()).unwrap();
        assert_eq!(again, *settings);
    }

    #[test]
    fn what_a_later_version_says_is_survived() {
        let hello = r#"{"shim":9,"workload":"a.b","pid":7,"start_time":9,"envoy":{"state":"hibernating"},"xds":"moon"}"#;
        let Ok(Message::Hello(status)) = serde_json::from_str(hello) else { panic!("no greeting") };
        assert_eq!((status.envoy.state, status.xds), (EnvoyState::Unknown, XdsRole::Unknown));
        let event = serde_json::from_str(r#"{"event":"eclipse","of":"moon"}"#).unwrap();
        assert!(matches!(event, Message::Event(Event::Unknown)), "{event:?}");
    }

    #[test]
    fn each_line_of_a_shim_is_told_apart() {
        let hello = r#"{"shim":1,"workload":"default.web","pid":7,"start_time":9,"envoy":{"state":"live"},"later":1}"#;
        assert!(matches!(serde_json::from_str(hello).unwrap(), Message::Hello(status) if status.pid == 7));
        let event = r#"{"event":"envoy","state":"backoff","restarts":2}"#;
        assert!(matches!(
            serde_json::from_str(event).unwrap(),
            Message::Event(Event::Envoy(EnvoyStatus { state: EnvoyState::Backoff, restarts: 2, .. }))
        ));
        assert!(matches!(
            serde_json::from_str(r#"{"ok":true}"#).unwrap(),
            Message::Reply(Reply { ok: true, .. })
        ));
        assert!(matches!(
            serde_json::from_str(r#"{"error":"no"}"#).unwrap(),
            Message::Reply(Reply { ok: false, error: Some(_), .. })
        ));
    }
}
