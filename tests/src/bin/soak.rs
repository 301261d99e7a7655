//! `make soak`: kill -9 of everything, in a loop, with requests, lookups and writes flowing; very many resources; very
//! many pods.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;
use ursa_tests::lab::machine::Machine;
use ursa_tests::lab::mesh::Control;
use ursa_tests::lab::pair::Pair;
use ursa_tests::lab::runtime::Runtime;
use ursa_tests::lab::runtime::containerd::Containerd;
use ursa_tests::lab::runtime::driver::Driver;
use ursa_tests::lab::runtime::network::Networks;
use ursa_tests::lab::runtime::podman::Podman;
use ursa_tests::lab::runtime::storm::Storm;
use ursa_tests::lab::soak::{self, Round, flow, part};
use ursa_tests::lab::{Lab, Programs, flood};

#[derive(Parser)]
struct Args {
    /// How many rounds; 28 hold each part alone and any two
    #[arg(long, default_value_t = 50)]
    rounds: usize,
    /// What the order is drawn from; another one each time unless given
    #[arg(long)]
    seed: Option<u64>,
    /// How many resources to apply at once in the end; none if 0
    #[arg(long, default_value_t = 0)]
    resources: usize,
    /// How many pods to start at once, a fifth of them in the mesh, and then to let come and go while agent and plugins
    /// die; none if 0
    #[arg(long, default_value_t = 0)]
    pods: usize,
}

#[derive(Default)]
struct Sum {
    rounds: usize,
    requests: (usize, usize),
    lookups: (usize, usize),
    writes: (usize, usize),
    outage: Duration,
    open_files: BTreeMap<&'static str, usize>,
}

impl Sum {
    fn add(&mut self, number: usize, round: &Round) {
        self.rounds += 1;
        for (sum, good, bad) in [
            (&mut self.requests, round.requests, round.cut),
            (&mut self.lookups, round.lookups, round.unresolved),
            (&mut self.writes, round.writes, round.unwritten),
        ] {
            *sum = (sum.0 + good, sum.1 + bad);
        }
        self.outage = self.outage.max(round.outage);
        for (program, count) in &round.open_files {
            let most = self.open_files.entry(program).or_default();
            *most = (*most).max(*count);
        }
        println!(
            "{number:>3}  {:<34} path cut {:>5.0} ms, back after {:>5.0} ms; requests {:>5} good {:>3} cut, \
             lookups {:>5} good {:>4} without shim, writes {:>4} good {:>3} without control",
            part::names(&round.killed),
            round.outage.as_secs_f64() * 1e3,
            round.back_after.as_secs_f64() * 1e3,
            round.requests,
            round.cut,
            round.lookups,
            round.unresolved,
            round.writes,
            round.unwritten,
        );
    }
}

fn main() -> ExitCode {
    let args = Args::parse();
    let held = rounds(&args).and_then(|()| flood(args.resources)).and_then(|()| storms(&args));
    match held {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("soak: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn rounds(args: &Args) -> anyhow::Result<()> {
    if args.rounds == 0 {
        return Ok(());
    }
    // Any number will do; the clock's smallest digits are as good as others.
    let seed = args.seed.unwrap_or_else(|| flow::now().to_bits());
    println!("{} rounds from seed {seed}", args.rounds);
    let mut pair = Pair::allowed()?;
    let start = Instant::now();
    let mut sum = Sum::default();
    soak::run(&mut pair, &part::drawn(args.rounds, seed), |number, round| sum.add(number, round)).map_err(
        |error| {
            let logs = pair.lab.save_logs().map_or_else(String::new, |logs| logs.display().to_string());
            error.context(format!("repeat it with --seed {seed}; the lab's logs: {logs}"))
        },
    )?;
    println!(
        "{} rounds held in {:.0} s: {} requests answered, {} failed, each while an Envoy on its path was down \
         (at most {:.0} ms); {} lookups answered, {} failed, each while its shim was down; {} writes acknowledged \
         and none lost, {} failed, each while the control plane was down; nothing leaked (open files at most {:?})",
        sum.rounds,
        start.elapsed().as_secs_f64(),
        sum.requests.0,
        sum.requests.1,
        sum.outage.as_secs_f64() * 1e3,
        sum.lookups.0,
        sum.lookups.1,
        sum.writes.0,
        sum.writes.1,
        sum.open_files,
    );
    Ok(())
}

fn flood(resources: usize) -> anyhow::Result<()> {
    if resources == 0 {
        return Ok(());
    }
    println!("{resources} resources in one `ursa apply`");
    let mut lab = Lab::new(&Programs::discover()?)?;
    let control = Control::start(&mut lab)?;
    let flood = flood::run(&lab, &control, resources)?;
    println!(
        "{resources} resources applied in {:.1} s; GET / meanwhile {:.1} ms for 99 of 100, {:.1} ms at most; \
         ursa-control went from {} to {} MiB and worked {:.1} s",
        flood.took.as_secs_f64(),
        flood.index.0.as_secs_f64() * 1e3,
        flood.index.1.as_secs_f64() * 1e3,
        flood.memory.0 / 1024,
        flood.memory.1 / 1024,
        flood.processor.as_secs_f64(),
    );
    anyhow::ensure!(flood.index.0 < Duration::from_millis(100), "the server was not responsive meanwhile");
    Ok(())
}

fn storms(args: &Args) -> anyhow::Result<()> {
    if args.pods == 0 {
        return Ok(());
    }
    let seed = args.seed.unwrap_or_else(|| flow::now().to_bits());
    let meshed = args.pods.div_ceil(5);
    let crowd = Storm { pods: args.pods, meshed, lives: 1, kills: false, seed };
    let (pods, meshed) = (args.pods.div_ceil(4), args.pods.div_ceil(8));
    let kills = Storm { pods, meshed, lives: 5, kills: true, seed };
    for each in [&crowd, &kills] {
        let held = storm(each, "containerd", Containerd::start)
            .and_then(|()| storm(each, "podman", Podman::start))
            .and_then(|()| storm(each, "a bare driver", Driver::start));
        held.map_err(|error| error.context(format!("repeat it with --seed {seed}")))?;
    }
    Ok(())
}

fn storm<R: Runtime>(
    storm: &Storm,
    under: &str,
    start: impl FnOnce(&Lab, &Machine, &Networks) -> anyhow::Result<R>,
) -> anyhow::Result<()> {
    let what = if storm.kills { "while agent and plugins are killed" } else { "all at once" };
    println!(
        "{} pods under {under}, {} of them meshed, {} times each, {what}",
        storm.pods, storm.meshed, storm.lives
    );
    let (ground, sum) = storm.on(start)?;
    ground.wait_gone_after_kills(Duration::from_secs(60)).map_err(|error| {
        let logs = ground.lab.save_logs().map_or_else(String::new, |logs| logs.display().to_string());
        error.context(format!("the lab's logs: {logs}"))
    })?;
    let worst = |times: &[Duration], part: usize| {
        times.get(times.len() * part / 100).or(times.last()).map_or(0.0, Duration::as_secs_f64)
    };
    println!(
        "all held within {:.0} s: {} starts outside the mesh in {:.1} s (50 of 100) and {:.1} s (99 of 100), {} in it in \
         {:.1} and {:.1} s; the agent was killed {} times, plugins {} times, and {} tries were made again",
        sum.took.as_secs_f64(),
        sum.plain.len(),
        worst(&sum.plain, 50),
        worst(&sum.plain, 99),
        sum.meshed.len(),
        worst(&sum.meshed, 50),
        worst(&sum.meshed, 99),
        sum.agents,
        sum.plugins,
        sum.again,
    );
    Ok(())
}
