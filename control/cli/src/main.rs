//! `ursa`: the operator's command line.

use std::process::ExitCode;

use clap::Parser;

mod agent;
mod apply;
mod args;
mod client;
mod config;
mod examples;
mod generate;
mod inspect;
mod mesh;
mod node;
mod output;
mod resources;
mod up;
mod version;

fn main() -> ExitCode {
    // A service's join is said to the agent's program as it is.
    if let Some(args) = agent::service_join(std::env::args_os()) {
        let Err(error) = agent::exec(args);
        eprintln!("Error: {error:#}");
        return ExitCode::FAILURE;
    }
    let cli = args::Cli::parse();
    match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => match runtime.block_on(run(cli)) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("Error: {error:#}");
                ExitCode::FAILURE
            }
        },
        Err(error) => {
            eprintln!("Error: cannot start the runtime: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn run(cli: args::Cli) -> anyhow::Result<()> {
    let args::Cli { global, command } = cli;
    if !asks_a_server(&command) {
        return execute(&global, command).await;
    }
    // Beside the command, which doesn't wait for it.
    tokio::join!(execute(&global, command), version::check(&global)).0
}

/// Whether a command is about what a control plane holds.
fn asks_a_server(command: &args::Command) -> bool {
    use args::Command;
    match command {
        Command::Apply(args) => !args.dry_run,
        Command::Get(_)
        | Command::Delete(_)
        | Command::Inspect(_)
        | Command::Node(_)
        | Command::Ticket(_)
        | Command::Allow(_) => true,
        _ => false,
    }
}

async fn execute(global: &args::Global, command: args::Command) -> anyhow::Result<()> {
    use args::Command;
    match command {
        Command::Apply(args) => apply::run(global, args).await,
        Command::Get(args) if node::is_meant(&args.kind) => {
            node::show(global, args.names.first().map(String::as_str), args.output, false).await
        }
        Command::Get(args) => resources::get(global, args).await,
        Command::Delete(args) => resources::delete(global, args).await,
        Command::Inspect(args) if node::is_meant(&args.kind) => {
            node::show(global, args.name.as_deref(), args.output, true).await
        }
        Command::Node(args) => node::run(global, args).await,
        Command::Inspect(args) => inspect::run(global, args).await,
        Command::Generate(args) => generate::run(global, args).await,
        Command::Config(args) => config::run(global, args).await,
        Command::Ticket(args) => mesh::ticket(global, args).await,
        Command::Allow(args) => mesh::allow(global, args).await,
        Command::Up(args) => up::run(global, args).await,
        Command::Join(args) => mesh::join(&args).await,
        Command::Leave(args) => agent::exec(agent::named("leave", args.args)).map(|never| match never {}),
        Command::Doctor(args) => agent::exec(agent::named("doctor", args.args)).map(|never| match never {}),
        Command::Version(args) => version::run(global, &args).await,
        Command::Completion { shell } => {
            use clap::CommandFactory as _;
            clap_complete::generate(shell, &mut args::Cli::command(), "ursa", &mut std::io::stdout());
            Ok(())
        }
        Command::Man { dir } => {
            use clap::CommandFactory as _;
            let command = args::Cli::command();
            match dir {
                None => Ok(clap_mangen::Man::new(command).render(&mut std::io::stdout())?),
                Some(dir) => clap_mangen::generate_to(command, &dir).map_err(|error| {
                    anyhow::anyhow!("cannot write manual pages to {}: {error}", dir.display())
                }),
            }
        }
    }
}
