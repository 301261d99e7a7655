//! What agent and shim say to each other on `control.sock`: one JSON object per line.
//!
//! The shim greets with a [`Status`], answers every [`Request`] with one [`Reply`] in order, and pushes [`Event`]s
//! in between. An agent must understand shims of two versions back and the other way round, so unknown fields are
//! ignored and every field added later has a default.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

/// The version of this protocol, sent as `shim` in [`Status`].
pub const VERSION: u32 = 1;

/// The agent's end of the shim, in the shim's directory.
pub const CONTROL_SOCKET: &str = "control.sock";
/// Where Envoy connects for its configuration.
pub const XDS_SOCKET: &str = "xds.sock";
/// Envoy's admin interface.
pub const ADMIN_SOCKET: &str = "admin.sock";
/// Envoy's bootstrap, written by the agent before it starts the shim.
pub const BOOTSTRAP_FILE: &str = "bootstrap.json";
/// The names that this workload resolves ([`DnsTable`]), replaced atomically by the agent.
pub const DNS_FILE: &str = "dns.json";

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
    /// Close inbound listeners gracefully; Envoy keeps running.
    Drain,
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
}

/// All there is to know about a shim.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// [`VERSION`] of the protocol that this shim speaks.
    pub shim: u32,
    /// `<mesh>.<name>` of the Dataplane.
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
    /// What `/ready` last said when it wasn't LIVE, e.g. `PRE_INITIALIZING`.
    #[serde(default)]
    pub waiting: Option<String>,
    /// What Envoy calls its version.
    #[serde(default)]
    pub version: Option<String>,
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
            (r#"{"cmd":"drain"}"#, Request::Drain),
            (r#"{"cmd":"stop"}"#, Request::Stop { drain_ms: 0 }),
            (r#"{"cmd":"set-log-level","level":"debug"}"#, Request::SetLogLevel { level: "debug".into() }),
        ] {
            assert_eq!(serde_json::from_str::<Request>(text).unwrap(), request);
        }
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
