//! `ursa-init watch`.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use clap::Args;

use super::options::Options;
use super::place::Place;
use super::probation::RunDir;
use crate::backend::Backend;
use crate::intent::RedirectIntent;
use crate::plan::Plan;
use crate::ssh;
use crate::watch::{Watch, block_signals};

/// Where the agent looks for the state of the host's redirect.
const STATUS: &str = "/run/ursa/redirect.json";

#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Watching")]
pub(super) struct Arguments {
    /// What puts the rules in place: auto, nftables, iptables, iptables-nft, iptables-legacy
    #[arg(long, env = "URSA_BACKEND", default_value_t)]
    backend: Backend,
    /// Write the state here, as JSON [default: /run/ursa/redirect.json with --host, else nowhere]
    #[arg(long, env = "URSA_STATUS", value_name = "FILE")]
    status: Option<PathBuf>,
    #[command(flatten)]
    run_dir: RunDir,
    /// How often to look without being told of a change, in seconds (rules of iptables-legacy, of which the kernel tells
    /// nothing: every second at least)
    #[arg(long, env = "URSA_INTERVAL", value_name = "SECONDS", default_value = "30",
          value_parser = clap::value_parser!(u64).range(1..=86400))]
    interval: u64,
}

/// Watches until SIGTERM. SIGHUP reads the document again.
pub(super) fn run(place: &Place, options: &Options, arguments: &Arguments) -> anyhow::Result<()> {
    // Threads inherit this: the first one starts below.
    block_signals().context("can't block signals")?;
    let netns = place.open()?;
    // Looked up once: it needs rights that are dropped below.
    let ssh = if place.host { Some(netns.run(ssh::ports)?) } else { None };
    let plan = |mut intent: RedirectIntent| {
        if let Some(found) = &ssh {
            ssh::keep(&mut intent, &found.ports);
        }
        Plan::compile(&intent)
    };
    let first = plan(options.resolve()?.0)?;
    let reload = || {
        if options.reads_stdin() {
            return Err("it came by standard input, which is read only once".to_owned());
        }
        let (intent, _) = options.resolve().map_err(|error| format!("{error:#}"))?;
        plan(intent).map_err(|error| error.to_string())
    };
    arguments.run_dir.settle(&netns)?;
    // From here on the agent leaves this namespace to us.
    let _claim = arguments.run_dir.claim(&netns)?;
    let tell = |message: &str| eprintln!("ursa-init: {message}");
    let watch = Watch {
        plan: first,
        backend: arguments.backend,
        interval: Duration::from_secs(arguments.interval),
        status: arguments.status.clone().or_else(|| place.host.then(|| STATUS.into())),
        reload: &reload,
        tell: &tell,
    };
    super::drop_capabilities()?;
    Ok(netns.run(|| watch.run())??)
}
