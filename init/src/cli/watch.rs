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
use crate::watch::{Watch, Who, block_signals};

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
    /// Whether the operator's way in is to be kept open.
    host: bool,
    /// Where the workloads that are in place are kept, for the next start.
    kept: Option<PathBuf>,
    /// What is in place.
    last: Mutex<Last>,
    /// What is tried.
    next: Mutex<Option<Last>>,
}

/// What was read last.
#[derive(Default)]
struct Last {
    intent: RedirectIntent,
    /// Workloads that aren't redirected, and why.
    left_out: Vec<String>,
    /// Where sshd listens.
    ports: BTreeSet<u16>,
    /// What listened when that was looked up.
    listening: BTreeSet<(u16, u64)>,
}

impl<'a> Source<'a> {
    /// Nothing is read yet.
    fn new(options: &'a Options, host: bool, kept: Option<PathBuf>) -> Self {
        let former = kept.as_ref().and_then(|path| std::fs::read(path).ok());
        let workloads = former.and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default();
        let intent = RedirectIntent { workloads, ..RedirectIntent::default() };
        Self {
            options,
            host,
            kept,
            last: Mutex::new(Last { intent, ..Last::default() }),
            next: Mutex::default(),
        }
    }

    fn last(&self) -> MutexGuard<'_, Last> {
        // Whoever panicked while it was held left whole values.
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn next(&self) -> MutexGuard<'_, Option<Last>> {
        self.next.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The plan of the document as it is now, and of what listens in the calling thread's namespace. Workloads that are
    /// wrong are left out, or stay as they were.
    fn read(&self) -> anyhow::Result<Plan> {
        let former = self.last().intent.workloads.clone();
        let (intent, left_out) = self.options.resolve_what_fits(&former)?;
        let (listening, ports) =
            if self.host { (ssh::listening(), ssh::ports().ports) } else { Default::default() };
        let next = Last { intent, left_out, ports, listening };
        let plan = self.plan(&next)?;
        *self.next() = Some(next);
        Ok(plan)
    }

    /// What was read is in place now, or it isn't and what was there before is.
    fn settle(&self, in_place: bool) {
        let Some(next) = self.next().take() else { return };
        if !in_place {
            return;
        }
        if let Some(path) = self.kept.as_ref().filter(|_| self.options.has_parts()) {
            let written =
                serde_json::to_vec(&next.intent.workloads).map_err(std::io::Error::from).and_then(|text| {
                    let new = path.with_extension("new");
                    std::fs::write(&new, text)?;
                    std::fs::rename(&new, path)
                });
            if let Err(error) = written {
                eprintln!("ursa-init: can't keep the workloads in {}: {error}", path.display());
            }
        }
        *self.last() = next;
    }

    fn plan(&self, of: &Last) -> Result<Plan, InvalidIntent> {
        if self.options.is_idle(&of.intent) {
            return Ok(Plan::none());
        }
        let mut intent = of.intent.clone();
        if self.host {
            ssh::keep(&mut intent, &of.ports);
        }
        Plan::compile(&intent)
    }

    /// The plan if sshd listens elsewhere than when it was looked up last.
    fn follow(&self) -> Option<(Plan, String)> {
        let mut last = self.last();
        let listening = if self.host { ssh::listening() } else { return None };
        if listening == last.listening {
            return None;
        }
        last.listening = listening;
        let ports = ssh::ports().ports;
        if ports == last.ports {
            return None;
        }
        last.ports = ports;
        let list: Vec<_> = last.ports.iter().map(ToString::to_string).collect();
        // It was valid with other ports left alone.
        let plan = self.plan(&last).ok()?;
        Some((plan, format!("sshd listens on {} now, and what arrives there is left alone", list.join(", "))))
    }

    /// Who is redirected and who isn't, for the status.
    fn who(&self) -> Who {
        let last = self.last();
        let workloads = last.intent.workloads.iter().map(|workload| workload.name.clone()).collect();
        Who { workloads, left_out: last.left_out.clone() }
    }
}

/// Watches until SIGTERM. SIGHUP reads the document again.
pub(super) fn run(place: &Place, options: &Options, arguments: &Arguments) -> anyhow::Result<()> {
    // Threads inherit this: the first one starts below.
    block_signals().context("can't block signals")?;
    let netns = place.open()?;
    let status = arguments.status.clone().or_else(|| place.host.then(|| STATUS.into()));
    let kept = status.as_ref().map(|path| path.with_extension("workloads"));
    let source = Source::new(options, place.host, kept);
    let first = netns.run(|| source.read())??;
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
        let plan = source.read().map_err(|error| format!("{error:#}"))?;
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
        status,
        reload: &reload,
        follow: &|| source.follow(),
        who: &|| source.who(),
        settle: &|in_place| source.settle(in_place),
        tell: &tell,
    };
    // Which sockets are sshd's is asked again and again.
    super::drop_capabilities_but(if place.host { &[Capability::CAP_SYS_PTRACE] } else { &[] })?;
    Ok(netns.run(|| watch.run())??)
}
