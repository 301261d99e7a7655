//! `ursa-control`: parses its arguments, sets up logging and calls [`ursa_control::run`].

use std::{io, path::PathBuf, process::ExitCode};

use clap::{CommandFactory as _, Parser, Subcommand};
use clap_complete::Shell;
use ursa_control::{config, config::ConfigError};

/// Ursa's control plane.
#[derive(Debug, Parser)]
#[command(name = "ursa-control", version, about)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Runs the control plane until SIGTERM or SIGINT.
    Run {
        /// The configuration file; URSA_… variables and --set are laid over it.
        #[arg(short, long, env = "URSA_CONFIG", value_name = "FILE")]
        config: Option<PathBuf>,
        /// Sets one key of the configuration, for example --set apiServer.http.port=5691.
        #[arg(long = "set", value_name = "KEY=VALUE", value_parser = setting)]
        settings: Vec<(String, String)>,
        /// Prints the effective configuration with secrets hidden, and ends.
        #[arg(long)]
        print_config: bool,
        /// What to log, for example info or ursa_control=debug,info.
        #[arg(long, env = "URSA_LOG", default_value = "info", value_name = "FILTER")]
        log: String,
    },
    /// Prints a shell's completion script.
    Completion {
        /// The shell.
        shell: Shell,
    },
    /// Prints the man page.
    Man,
}

fn setting(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or_else(|| format!("expected KEY=VALUE, found {text:?}"))?;
    Ok((key.to_owned(), value.to_owned()))
}

fn main() -> ExitCode {
    match execute(Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("Error: {error:#}");
            // A wrong configuration doesn't become right by being started again.
            if error.is::<ConfigError>() { ExitCode::from(78) } else { ExitCode::FAILURE }
        }
    }
}

fn execute(arguments: Arguments) -> anyhow::Result<()> {
    match arguments.command {
        Command::Run { config: file, settings, print_config, log } => {
            let config = config::load(file.as_deref(), std::env::vars(), &settings)?;
            if print_config {
                print!("{}", ursa_model::yaml::to_string(&config.redacted())?);
                return Ok(());
            }
            ursa_control::process::set_up_logging(&log)?;
            ursa_control::process::run(config)
        }
        Command::Completion { shell } => {
            clap_complete::generate(shell, &mut Arguments::command(), "ursa-control", &mut io::stdout());
            Ok(())
        }
        Command::Man => Ok(clap_mangen::Man::new(Arguments::command()).render(&mut io::stdout())?),
    }
}
