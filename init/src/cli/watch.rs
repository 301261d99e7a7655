//! `ursa-init watch`.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use caps::Capability;
use clap::Args;

use super::options::Options;
use super::place::Place;
use super::probation::RunDir;
use crate::backend::Backend;
use crate::intent::{InvalidIntent, RedirectIntent};
use crate::plan::Plan;
use crate::slices;
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
    /// Have systemd start the slices that tell workloads apart, before the rules are loaded
    #[arg(long, env = "URSA_START_SLICES")]
    start_slices: bool,
    #[command(flatten)]
    run_dir: RunDir,
    /// How often to look without being told of a change, in seconds (rules of iptables-legacy, of which the kernel tells
    /// nothing: every second at least)
    #[arg(long, env = "URSA_INTERVAL", value_name = "SECONDS", default_value = "30",
          value_parser = clap::value_parser!(u64).range(1..=86400))]
    interval: u64,
}

/// What the redirect is made of: the document, and the ports that sshd listens on. The two change by themselves.
struct Source<'a> {
    options: &'a Options,
    /// `None` where the operator's way in is nobody's business.
    way_in: Option<Mutex<WayIn>>,
}

struct WayIn {
    /// The document as it was read last.
    intent: RedirectIntent,
    ports: BTreeSet<u16>,
    /// What listened when they were looked up.
    listening: BTreeSet<(u16, u64)>,
}

impl<'a> Source<'a> {
    /// Reads the document, and what listens in the calling thread's namespace.
    fn read(options: &'a Options, host: bool) -> anyhow::Result<Self> {
        let way_in = if host {
            let intent = options.resolve()?.0;
            let listening = ssh::listening();
            Some(Mutex::new(WayIn { intent, ports: ssh::ports().ports, listening }))
        } else {
            None
        };
        Ok(Self { options, way_in })
    }

    fn way_in(&self) -> Option<MutexGuard<'_, WayIn>> {
        // Whoever panicked while it was held left whole values.
        self.way_in.as_ref().map(|way_in| way_in.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The plan of the document as it is now.
    fn plan(&self) -> anyhow::Result<Plan> {
        let intent = self.options.resolve()?.0;
        let Some(mut way_in) = self.way_in() else { return Ok(Plan::compile(&intent)?) };
        let listening = ssh::listening();
        let now = WayIn { intent, ports: ssh::ports().ports, listening };
        let plan = now.plan()?;
        *way_in = now;
        Ok(plan)
    }

    /// The plan if sshd listens elsewhere than when it was looked up last.
    fn follow(&self) -> Option<(Plan, String)> {
        let mut way_in = self.way_in()?;
        let listening = ssh::listening();
        if listening == way_in.listening {
            return None;
        }
        way_in.listening = listening;
        let ports = ssh::ports().ports;
        if ports == way_in.ports {
            return None;
        }
        way_in.ports = ports;
        let list: Vec<_> = way_in.ports.iter().map(ToString::to_string).collect();
        // It was valid with other ports left alone.
        let plan = way_in.plan().ok()?;
        Some((plan, format!("sshd listens on {} now, and what arrives there is left alone", list.join(", "))))
    }
}

impl WayIn {
    fn plan(&self) -> Result<Plan, InvalidIntent> {
        let mut intent = self.intent.clone();
        ssh::keep(&mut intent, &self.ports);
        Plan::compile(&intent)
    }
}

/// Watches until SIGTERM. SIGHUP reads the document again.
pub(super) fn run(place: &Place, options: &Options, arguments: &Arguments) -> anyhow::Result<()> {
    // Threads inherit this: the first one starts below.
    block_signals().context("can't block signals")?;
    let netns = place.open()?;
    let source = netns.run(|| Source::read(options, place.host))??;
    let first = match source.way_in() {
        Some(way_in) => way_in.plan()?,
        None => source.plan()?,
    };
    let tell = |message: &str| eprintln!("ursa-init: {message}");
    let start_slices = |plan: &Plan| {
        if arguments.start_slices
            && let Err(why) = slices::start(&slices::missing(plan))
        {
            tell(&why);
        }
    };
    let reload = || {
        if options.reads_stdin() {
            return Err("it came by standard input, which is read only once".to_owned());
        }
        let plan = source.plan().map_err(|error| format!("{error:#}"))?;
        start_slices(&plan);
        Ok(plan)
    };
    arguments.run_dir.settle(&netns)?;
    // From here on the agent leaves this namespace to us.
    let _claim = arguments.run_dir.claim(&netns)?;
    start_slices(&first);
    let watch = Watch {
        plan: first,
        backend: arguments.backend,
        interval: Duration::from_secs(arguments.interval),
        status: arguments.status.clone().or_else(|| place.host.then(|| STATUS.into())),
        reload: &reload,
        follow: &|| source.follow(),
        tell: &tell,
    };
    // Which sockets are sshd's is asked again and again.
    super::drop_capabilities_but(if place.host { &[Capability::CAP_SYS_PTRACE] } else { &[] })?;
    Ok(netns.run(|| watch.run())??)
}
