//! `make bench`: prints what was measured, and writes it to a page.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::Context as _;
use clap::Parser;
use ursa_tests::bench::node::Size;
use ursa_tests::bench::{self, Options, bare, machine, process, report};

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
    /// Leaves out what needs root: redirect, DNS, agent and shim
    #[arg(long)]
    control_only: bool,
    /// Write the page to this file
    #[arg(long)]
    output: Option<PathBuf>,
    /// Be the bare server
    #[arg(long, hide = true)]
    bare: bool,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let done =
        if args.bare { runtime().and_then(|runtime| runtime.block_on(bare::serve())) } else { run(&args) };
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
    let machine = if args.control_only {
        None
    } else if nix::unistd::geteuid().is_root() {
        Some(machine::measure(say)?)
    } else {
        say("redirect, DNS, agent and shim are left out: they need root");
        None
    };
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
    let results = runtime()?.block_on(bench::run(&options))?;
    let page = report::page(&results, machine.as_ref(), &on);
    println!("{page}");
    if let Some(file) = &args.output {
        std::fs::write(file, &page).with_context(|| format!("cannot write {}", file.display()))?;
        say(&format!("written to {}", file.display()));
    }
    say(&format!("took {:.0} s", start.elapsed().as_secs_f64()));
    Ok(())
}
