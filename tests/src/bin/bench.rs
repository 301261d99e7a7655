//! `make bench`: prints what was measured, and writes it to a page.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::{Parser, ValueEnum};
use ursa_tests::bench::node::Size;
use ursa_tests::bench::report::Measured;
use ursa_tests::bench::{self, Options, bare, cni, connection, machine, process, relay, report, rules};

#[derive(Parser)]
struct Args {
    /// Services
    #[arg(long, default_value_t = 1000)]
    services: usize,
    /// Proxies, which are the endpoints of the services
    #[arg(long, default_value_t = 2000)]
    proxies: usize,
    /// Nodes that the proxies register through
    #[arg(long, default_value_t = 20)]
    nodes: usize,
    /// Changes of one endpoint
    #[arg(long, default_value_t = 200)]
    changes: usize,
    /// Changes that reach every proxy
    #[arg(long, default_value_t = 20)]
    wide_changes: usize,
    /// Namespaces that get the redirect by each way
    #[arg(long, default_value_t = 1000)]
    namespaces: usize,
    /// Pods that the CNI plugin adds by each way
    #[arg(long, default_value_t = 1000)]
    pods: usize,
    /// Connections one after the other by each way
    #[arg(long, default_value_t = 2000)]
    connections: usize,
    /// Milliseconds of requests, and of bytes, by each way
    #[arg(long, default_value_t = 2000)]
    sending: u64,
    /// Only these sections; without root only `control`
    #[arg(long, value_delimiter = ',')]
    only: Vec<Section>,
    /// Write the page to this file
    #[arg(long)]
    output: Option<PathBuf>,
    /// Be a relay from these ports: PORT=redirect, PORT=tproxy, or PORT=PORT of the application
    #[arg(long, hide = true, value_delimiter = ',')]
    relay: Vec<String>,
    /// Be the bare server
    #[arg(long, hide = true)]
    bare: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Section {
    /// Configuration on its way to proxies
    Control,
    /// DNS, agent and shim
    Machine,
    /// The redirect's rules
    Rules,
    /// The CNI plugin
    Cni,
    /// Redirected connections
    Connections,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let done = if args.bare {
        runtime().and_then(|runtime| runtime.block_on(bare::serve()))
    } else if !args.relay.is_empty() {
        let mark = ursa_init::RedirectIntent::default().tproxy.mark;
        runtime().and_then(|runtime| runtime.block_on(relay::serve(&args.relay, mark)))
    } else {
        run(&args)
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_multi_thread().enable_all().build()?)
}

fn say(words: &str) {
    eprintln!("bench: {words}");
}

fn run(args: &Args) -> anyhow::Result<()> {
    let start = Instant::now();
    let on = process::machine();
    let program = std::env::current_exe().context("cannot tell where this program is")?;
    let bin_dir = program.parent().context("this program is nowhere")?.to_owned();
    let root = nix::unistd::geteuid().is_root();
    let wanted = |section| {
        let named = args.only.is_empty() || args.only.contains(&section);
        if named && !root && section != Section::Control {
            say(&format!("{section:?} is left out: it needs root"));
            return false;
        }
        named
    };
    let mut measured = Measured::default();
    if wanted(Section::Rules) {
        measured.rules = Some(rules::measure(&bin_dir, args.namespaces.max(1), say)?);
    }
    if wanted(Section::Cni) {
        measured.cni = Some(cni::measure(&bin_dir, args.pods.max(2), say)?);
    }
    if wanted(Section::Connections) {
        let sending = Duration::from_millis(args.sending.max(1));
        let effort = connection::Effort { connections: args.connections.max(1), sending };
        measured.connections = Some(connection::measure(&program, effort, say)?);
    }
    if wanted(Section::Machine) {
        measured.machine = Some(machine::measure(say)?);
    }
    if wanted(Section::Control) {
        measured.control = Some(control(args, bin_dir, program)?);
    }
    let page = report::page(&measured, &on);
    println!("{page}");
    if let Some(file) = &args.output {
        std::fs::write(file, &page).with_context(|| format!("cannot write {}", file.display()))?;
        say(&format!("written to {}", file.display()));
    }
    say(&format!("took {:.0} s", start.elapsed().as_secs_f64()));
    Ok(())
}

fn control(args: &Args, bin_dir: PathBuf, program: PathBuf) -> anyhow::Result<bench::Results> {
    let options = Options {
        size: Size { services: args.services.max(2), proxies: args.proxies.max(args.services) },
        nodes: args.nodes.max(1),
        changes: args.changes.max(2) & !1,
        wide_changes: args.wide_changes.max(1),
        bin_dir,
        bare: Some(program),
        // Before the runtime's threads are started, which inherit it.
        pin: process::pin_load(),
        progress: say,
    };
    runtime()?.block_on(bench::run(&options))
}
