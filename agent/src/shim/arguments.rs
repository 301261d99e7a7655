//! What a shim is started with.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::envoy::{Launch, base_id};
use super::protocol::{ADMIN_SOCKET, BOOTSTRAP_FILE};
use super::work::envoy_level;
use super::{DNS_PORT, unit};

/// The command line of a running shim. Everything but `--service` is for launchers.
#[derive(Debug, Clone, clap::Args)]
pub struct Config {
    /// The service whose sidecar this is, as the main process of ursa-sidecar@NAME.service. Settings come from the agent
    /// then, not from arguments.
    #[arg(long, value_name = "NAME", conflicts_with_all = ["workload", "envoy", "uid", "gid", "last_good", "netns"])]
    pub service: Option<String>,
    /// Name of the Dataplane, `<mesh>.<name>`.
    #[arg(long, required_unless_present = "service")]
    pub workload: Option<String>,
    /// The shim's directory, which holds bootstrap.json. With --service, $RUNTIME_DIRECTORY unless given.
    #[arg(long, value_name = "DIR", required_unless_present = "service")]
    pub dir: Option<PathBuf>,
    /// Path of the Envoy binary.
    #[arg(long, value_name = "FILE", required_unless_present = "service")]
    pub envoy: Option<PathBuf>,
    /// User to run as.
    #[arg(long, required_unless_present = "service")]
    pub uid: Option<u32>,
    /// Group to run as.
    #[arg(long, required_unless_present = "service")]
    pub gid: Option<u32>,
    /// A user beside root that may use control.sock.
    #[arg(long, value_name = "UID")]
    pub agent_uid: Option<u32>,
    /// With --service: the name of that user, unless --agent-uid says.
    #[arg(long, value_name = "USER", default_value = unit::AGENT_USER)]
    pub agent_user: String,
    /// With --service: the agent's state directory, where this sidecar's settings are.
    #[arg(long, value_name = "DIR", default_value = unit::STATE_DIR)]
    pub state_dir: PathBuf,
    /// Network namespace to enter.
    #[arg(long, value_name = "FILE")]
    pub netns: Option<PathBuf>,
    /// Let Envoy use addresses that it hasn't got and mark what it sends, for a redirect by TPROXY: it keeps CAP_NET_RAW,
    /// or CAP_NET_ADMIN where the kernel asks for that.
    #[arg(long)]
    pub transparent: bool,
    /// Envoy's worker threads.
    #[arg(long, default_value_t = 2)]
    pub concurrency: u32,
    /// Tells the Envoys of one host apart.
    #[arg(long)]
    pub base_id: Option<u32>,
    /// The workload's last good configuration, served to Envoy while no agent is attached.
    #[arg(long, value_name = "DIR", required_unless_present = "service")]
    pub last_good: Option<PathBuf>,
    /// The resolver configuration that the workload would have used.
    #[arg(long, value_name = "FILE", default_value = "/etc/resolv.conf")]
    pub resolv_conf: PathBuf,
    /// Port of the name server.
    #[arg(long, default_value_t = DNS_PORT)]
    pub dns_port: u16,
    /// Seconds over which a graceful drain discourages connections, and how long SIGTERM waits for them to end.
    #[arg(long, value_name = "SECONDS", default_value_t = 5)]
    pub drain_time_s: u64,
    /// trace, debug, info, warn or error.
    #[arg(long, default_value = "info")]
    pub log_level: String,
}

impl Config {
    /// How Envoy is started by these arguments, if they say.
    pub(super) fn launch(&self, dir: &Path) -> Option<Launch> {
        Some(Launch {
            binary: self.envoy.clone()?,
            bootstrap: dir.join(BOOTSTRAP_FILE),
            admin: dir.join(ADMIN_SOCKET),
            base_id: self.base_id(dir),
            concurrency: self.concurrency,
            drain_time: Duration::from_secs(self.drain_time_s),
            log_level: envoy_level(&self.log_level).to_owned(),
        })
    }

    pub(super) fn base_id(&self, dir: &Path) -> u32 {
        self.base_id.unwrap_or_else(|| base_id(dir))
    }
}
