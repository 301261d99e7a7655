//! The shim: one Envoy, its sockets and its DNS.
//!
//! A shim outlives the agent that asked for it. It holds what must not break while the agent is dead: the Envoy
//! process, the xDS socket that Envoy connects to, and the names that the workload resolves. Everything the agent
//! wants of it goes through `control.sock` ([`protocol`]), to which [`client`] is the agent's end.
//!
//! [`run`] is the whole life of one, in this order: enter the workload's network namespace, bind every socket, give
//! up every right but the one that a transparent Envoy needs, and only then start Envoy.

pub(crate) mod backoff;
pub mod client;
mod control;
pub mod directory;
pub mod dns;
pub mod envoy;
mod lines;
pub mod log;
pub mod peer;
pub mod privileges;
pub mod process;
pub mod protocol;
pub mod xds;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use tokio::net::UnixListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;
use tracing::{info, warn};

use control::Control;
use directory::Directory;
use dns::{Dns, Sockets};
use envoy::{Command, Launch, Supervisor};
use log::SetLogLevel;
use protocol::{ADMIN_SOCKET, BOOTSTRAP_FILE, DNS_FILE};
use xds::{Fallback, Xds};

/// Where the workload's DNS queries are redirected to.
pub const DNS_PORT: u16 = 15053;

/// What a shim is started with.
#[derive(Debug, Clone, clap::Args)]
pub struct Config {
    /// Name of the Dataplane, `<mesh>.<name>`.
    #[arg(long)]
    pub workload: String,
    /// The shim's directory, which holds bootstrap.json.
    #[arg(long, value_name = "DIR")]
    pub dir: PathBuf,
    /// Path of the Envoy binary.
    #[arg(long, value_name = "FILE")]
    pub envoy: PathBuf,
    /// User to run as.
    #[arg(long)]
    pub uid: u32,
    /// Group to run as.
    #[arg(long)]
    pub gid: u32,
    /// A user beside root that may use control.sock.
    #[arg(long, value_name = "UID")]
    pub agent_uid: Option<u32>,
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
    #[arg(long, default_value_t = 0)]
    pub base_id: u32,
    /// The workload's last good configuration, served to Envoy while no agent is attached.
    #[arg(long, value_name = "DIR")]
    pub last_good: PathBuf,
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

/// Lives the whole life of a shim. Call it on the main thread, before any other thread exists.
pub fn run(config: &Config, fallback: Arc<dyn Fallback>, set_log_level: SetLogLevel) -> anyhow::Result<()> {
    // Everything runs on this thread, so every line that is logged carries it.
    let _span = tracing::error_span!("shim", workload = config.workload).entered();
    // A session of its own: the agent's terminal or group must not take it along. Fails only for a group's leader,
    // such as a shim that was started by hand or by systemd, which needs none.
    let _ = nix::unistd::setsid();
    privileges::check(config.uid, config.gid)?;
    if let Some(netns) = &config.netns {
        privileges::enter_netns(netns)?;
    }
    let directory = Directory::prepare(&config.dir, config.uid, config.gid)?;
    let dns_sockets = Sockets::bind(config.dns_port).context(
        "the name server has no port; another shim or program may have it in this network namespace, or `lo` is down",
    )?;
    privileges::raise_descriptor_limit()?;
    let kept = config.transparent.then(privileges::for_transparent_sockets).transpose()?;
    privileges::drop_to(config.uid, config.gid, kept)?;

    // One thread is enough, and Envoy must be the child of one that lives as long as the process.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the event loop")?;
    let served = runtime.block_on(serve(config, directory, dns_sockets, fallback, set_log_level));
    // What still runs are connections; nothing of them needs to end in order.
    runtime.shutdown_background();
    served
}

async fn serve(
    config: &Config,
    directory: Directory,
    dns_sockets: Sockets,
    fallback: Arc<dyn Fallback>,
    set_log_level: SetLogLevel,
) -> anyhow::Result<()> {
    let Directory { control: control_socket, xds: xds_socket, lock: _lock } = directory;
    let mut signals = Signals::new().context("cannot listen for signals")?;
    let dns = Dns::new(&config.dir.join(DNS_FILE), &config.resolv_conf);
    let xds = Xds::new(xds_socket);
    let drain_time = Duration::from_secs(config.drain_time_s);
    let (supervisor, envoy) = Supervisor::new(Launch {
        binary: config.envoy.clone(),
        bootstrap: config.dir.join(BOOTSTRAP_FILE),
        admin: config.dir.join(ADMIN_SOCKET),
        base_id: config.base_id,
        concurrency: config.concurrency,
        drain_time,
        log_level: envoy_level(&config.log_level).to_owned(),
    });
    let (stop, mut stopped) = mpsc::channel(1);
    let pid = i32::try_from(std::process::id()).context("our own pid")?;
    let control = Arc::new(Control {
        workload: config.workload.clone(),
        pid,
        start_time: process::start_time(pid).context("our own start time; is /proc mounted?")?,
        agent_uid: config.agent_uid,
        envoy: envoy.clone(),
        dns: Arc::clone(&dns),
        xds: Arc::clone(&xds),
        set_log_level,
        stop,
    });
    let control_socket = UnixListener::from_std(control_socket).context("control.sock")?;

    let orders = async {
        loop {
            tokio::select! {
                drain = stopped.recv() => break drain.unwrap_or_default(),
                _ = signals.terminate.recv() => break drain_time,
                _ = signals.interrupt.recv() => break drain_time,
                // The reason of a refused table is logged and kept for `status`.
                _ = signals.hangup.recv() => drop(dns.reload()),
            }
        }
    };
    let stopping = async {
        let drain = orders.await;
        info!(?drain, "stopping");
        if envoy.commands.send(Command::Stop(drain)).await.is_err() {
            warn!("Envoy was stopped already");
        }
        std::future::pending::<()>().await;
    };
    info!(workload = config.workload, pid, uid = config.uid, "the shim is ready");
    tokio::select! {
        () = supervisor.run() => Ok(()),
        () = stopping => Ok(()),
        () = control.run(control_socket) => Ok(()),
        () = xds.run(fallback) => Ok(()),
        served = dns::serve(Arc::clone(&dns), dns_sockets) => served.context("the DNS sockets failed"),
    }
}

/// One step quieter than the shim: at `info` each start of Envoy lists all it was built with.
fn envoy_level(level: &str) -> &str {
    match level {
        "info" | "warn" => "warning",
        "debug" => "info",
        "trace" => "debug",
        other => other,
    }
}

struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }
}
