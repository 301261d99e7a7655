//! The shim: one Envoy, its sockets and its DNS.
//!
//! A shim outlives the agent that asked for it. It holds what must not break while the agent is dead: the Envoy
//! process, the xDS socket that Envoy connects to, and the names that the workload resolves. Everything the agent
//! wants of it goes through `control.sock` ([`protocol`]), to which [`client`] is the agent's end.
//!
//! [`run`] is the whole life of one, in this order: enter the workload's network namespace, bind every socket, give
//! up every right but the one that a transparent Envoy needs, and only then start Envoy. A launcher gives it all it needs as arguments; as the main process of
//! `ursa-sidecar@NAME.service` it has rights and namespace from systemd, and its settings from the agent ([`unit`]).
//!
//! A newer binary takes over in place ([`handover`]): same process, same sockets, same Envoy.

mod arguments;
pub(crate) mod backoff;
pub mod client;
mod control;
pub mod directory;
pub mod dns;
pub mod envoy;
pub mod handover;
mod lines;
pub mod log;
pub mod memory;
pub mod operator;
mod pace;
pub mod peer;
pub mod privileges;
pub mod process;
pub mod protocol;
mod replace;
mod service;
pub mod unit;
mod watchdog;
mod words;
mod work;
pub mod xds;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use tracing::{info, warn};

pub use arguments::Config;
use directory::{Directory, Layout};
use dns::Sockets;
use envoy::Snapshot;
use handover::Handover;
use log::SetLogLevel;
use pace::Pace;
use work::Present;
use xds::Fallback;

/// Where the workload's DNS queries are redirected to.
pub const DNS_PORT: u16 = 15053;

/// What a process has before it serves: made anew, or left by an earlier program.
struct Ready {
    dir: PathBuf,
    directory: Directory,
    sockets: Option<Sockets>,
    present: Present,
    envoy: Option<Box<Snapshot>>,
    /// systemd knows that we are ready.
    announced: bool,
    reexecs: u32,
    /// The earlier program was told to stop.
    stop: Option<Duration>,
    /// Why the installed binary did not take over.
    failure: Option<String>,
}

/// Lives the whole life of a shim. Call it on the main thread, before any other thread exists.
pub fn run(config: &Config, fallback: &Arc<dyn Fallback>, set_log_level: &SetLogLevel) -> anyhow::Result<()> {
    // Before a package can have put another in its place.
    let binary = handover::installed_binary().context("our own path")?;
    let arguments: Vec<_> = std::env::args_os().collect();
    // Everything runs on this thread, so every line that is logged carries it.
    let (mesh, name) = match &config.workload {
        Some(workload) => workload.split_once('.').unwrap_or(("", workload)),
        None => ("", config.service.as_deref().unwrap_or_default()),
    };
    let span = tracing::error_span!("shim", mesh, workload = name, epoch = tracing::field::Empty);
    let _entered = span.enter();
    let mut left = Handover::inherited().context("what the earlier program of this process left")?;
    let pace = (left.is_none() && config.service.is_some()).then(Pace::hold_back);
    let mut failure = None;
    loop {
        let ready = match left.take() {
            Some(left) => take_over(config, left, failure.take())?,
            None => prepare(config)?,
        };
        privileges::raise_descriptor_limit()?;
        let (uid, gid) = user(config);
        let kept = config.transparent.then(privileges::for_transparent_sockets).transpose()?;
        privileges::drop_to(uid, gid, kept)?;

        // One thread is enough, and Envoy must be the child of one that lives as long as the process.
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("cannot start the event loop")?;
        let served = runtime.block_on(service::serve(
            config,
            ready,
            &binary,
            Arc::clone(fallback),
            Arc::clone(set_log_level),
            span.clone(),
        ));
        // What still runs are connections; nothing of them needs to end in order.
        runtime.shutdown_background();
        let Some(state) = served? else {
            if let Some(pace) = pace {
                pace.ended_as_told();
            }
            return Ok(());
        };
        info!(binary = %binary.display(), "this program is replaced");
        let error = state.exec(&binary, &arguments);
        warn!(binary = %binary.display(), %error, "the installed binary cannot be executed; this one goes on");
        failure = Some(format!("{} cannot be executed: {error}", binary.display()));
        left = Some(*state);
    }
}

fn user(config: &Config) -> (u32, u32) {
    let (uid, gid) = (nix::unistd::geteuid().as_raw(), nix::unistd::getegid().as_raw());
    (config.uid.unwrap_or(uid), config.gid.unwrap_or(gid))
}

/// A shim's first start.
fn prepare(config: &Config) -> anyhow::Result<Ready> {
    // A session of its own: the agent's terminal or group must not take it along. Fails only for a group's leader,
    // such as a shim that was started by hand or by systemd, which needs none.
    let _ = nix::unistd::setsid();
    let (uid, gid) = user(config);
    let (dir, layout) = match &config.service {
        Some(service) => {
            unit::check_user(service)?;
            (unit::directory(config.dir.as_deref())?, Layout::Unit)
        }
        None => (config.dir.clone().context("--dir is missing")?, Layout::Closed),
    };
    privileges::check(uid, gid)?;
    if let Some(netns) = &config.netns {
        privileges::enter_netns(netns)?;
    }
    let directory = Directory::prepare(&dir, layout, uid, gid)?;
    // In a unit the port is the agent's choice.
    let sockets = match config.service {
        Some(_) => None,
        None => Some(Sockets::bind(config.dns_port)?),
    };
    Ok(Ready {
        dir,
        directory,
        sockets,
        present: Present::default(),
        envoy: None,
        announced: false,
        reexecs: 0,
        stop: None,
        failure: None,
    })
}

/// Goes on where an earlier program of this process left off.
fn take_over(config: &Config, left: Handover, failure: Option<String>) -> anyhow::Result<Ready> {
    let dir = match &config.service {
        Some(_) => unit::directory(config.dir.as_deref())?,
        None => config.dir.clone().context("--dir is missing")?,
    };
    let Handover { control, xds, lock, dns, settings, log_level, envoy, ready, reexecs, stop_ms, .. } = left;
    Ok(Ready {
        dir,
        directory: Directory::take_over(control, xds, lock).context("the sockets that were handed over")?,
        sockets: dns.map(Sockets::take_over).transpose().context("the name server's sockets")?,
        present: Present { settings, log_level },
        envoy: Some(Box::new(envoy)),
        announced: ready,
        stop: stop_ms.map(Duration::from_millis),
        reexecs: if failure.is_some() { reexecs } else { reexecs + 1 },
        failure,
    })
}
