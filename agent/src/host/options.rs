//! What the operator says.

use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};

/// The protocol that an application speaks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// Bytes
    #[default]
    Tcp,
    /// HTTP/1.1 or 2, with routes, retries and statistics per request
    Http,
}

impl Protocol {
    /// As a Dataplane says it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Http => "http",
        }
    }
}

/// `join` beyond the ticket.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "A service")]
pub struct JoinOptions {
    /// Put this systemd service into the mesh: give it a sidecar, an identity and a redirect
    #[arg(long, value_name = "UNIT")]
    pub unit: Option<String>,
    /// The port on which it listens
    #[arg(long, requires = "unit", value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    pub port: Option<u16>,
    /// The protocol that it speaks there [default: tcp]
    #[arg(long, requires = "unit", value_enum)]
    pub protocol: Option<Protocol>,
    /// Its mesh [default: default]
    #[arg(long, requires = "unit")]
    pub mesh: Option<String>,
    /// The workload that it is, as in the ticket and in `ursa allow` [default: the unit's name]
    #[arg(long, requires = "unit")]
    pub workload: Option<String>,
    /// Name of its Dataplane [default: WORKLOAD-HOSTNAME]
    #[arg(long, requires = "unit", value_name = "NAME")]
    pub dataplane: Option<String>,
    /// The address at which others reach it [default: the one from which this machine reaches the control plane]
    #[arg(long, requires = "unit", value_name = "IP")]
    pub address: Option<std::net::IpAddr>,
    /// Tell it apart by a slice of its own, where its user isn't its own: it runs as root, under DynamicUser=, or as
    /// somebody else does. A running service is restarted for that
    #[arg(long, requires = "unit")]
    pub slice: bool,
    /// Limit of its sidecar's memory, as in 256M
    #[arg(long, requires = "unit", value_name = "BYTES")]
    pub memory_max: Option<String>,
    /// Restart the service at the end (or start it): connections that are older than the redirect end with that
    #[arg(long, requires = "unit")]
    pub restart: bool,
    /// Print what would change, and change nothing
    #[arg(long, requires = "unit")]
    pub dry_run: bool,
}

/// `leave`.
#[derive(Args, Clone, Debug, Default)]
pub struct LeaveOptions {
    /// The service that leaves the mesh. It keeps running
    #[arg(long, value_name = "UNIT", required_unless_present_any = ["all", "node"])]
    pub unit: Option<String>,
    /// Every service that `join` has put into the mesh
    #[arg(long, conflicts_with = "unit")]
    pub all: bool,
    /// The node's own identity as well, once no service is left
    #[arg(long)]
    pub node: bool,
    /// Print what would change, and change nothing
    #[arg(long)]
    pub dry_run: bool,
}

/// `doctor`.
#[derive(Args, Clone, Debug, Default)]
pub struct DoctorOptions {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}
