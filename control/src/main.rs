//! `ursa-control`: parses its arguments, sets up logging and calls [`ursa_control::run`].

use std::{io, path::PathBuf, process::ExitCode};

use anyhow::Context as _;
use clap::{CommandFactory as _, Parser, Subcommand};
use clap_complete::Shell;
use ursa_control::{config, config::ConfigError};

const EXAMPLES: &str = "\
Examples:
  ursa-control run                                  # with /etc/ursa/control.yaml, if it exists
  ursa-control run --config control.yaml --set multizone.zone.name=east
  URSA_API_SERVER_HTTP_PORT=5691 ursa-control run   # every key has a variable
  ursa-control run --print-config                   # what holds, with secrets hidden

A first start makes its store, keys and certificates in general.workDir (/var/lib/ursa/control).

Exit codes: 0 stopped by SIGTERM or SIGINT, 1 failed, 2 wrong usage, 78 wrong configuration.";

/// Ursa's control plane.
#[derive(Debug, Parser)]
#[command(name = "ursa-control", version, about, after_help = EXAMPLES, max_term_width = 120)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Runs the control plane until SIGTERM or SIGINT.
    Run {
        /// The configuration file [default: /etc/ursa/control.yaml, if it exists]; URSA_… variables and --set are laid
        /// over it.
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
    /// Prints the manual page, or writes the pages of all commands into a folder.
    #[command(hide = true)]
    Man {
        /// The folder.
        dir: Option<PathBuf>,
    },
}

fn setting(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or_else(|| format!("expected KEY=VALUE, found {text:?}"))?;
    Ok((key.to_owned(), value.to_owned()))
}

/// The environment; what isn't text is none of ours.
fn variables() -> impl Iterator<Item = (String, String)> {
    std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
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
            let file =
                file.or_else(|| Some(PathBuf::from(config::DEFAULT_PATH)).filter(|path| path.exists()));
            let config = config::load(file.as_deref(), variables(), &settings)?;
            if print_config {
                print!("{}", ursa_model::yaml::to_string(&config.redacted())?);
                return Ok(());
            }
            ursa_control::process::set_up_logging(&log)?;
            for variable in config::misspelled(variables().map(|(name, _)| name)) {
                tracing::warn!("{variable}");
            }
            ursa_control::process::run(config)
        }
        Command::Completion { shell } => {
            clap_complete::generate(shell, &mut Arguments::command(), "ursa-control", &mut io::stdout());
            Ok(())
        }
        Command::Man { dir: None } => {
            Ok(clap_mangen::Man::new(Arguments::command()).render(&mut io::stdout())?)
        }
        Command::Man { dir: Some(dir) } => clap_mangen::generate_to(Arguments::command(), &dir)
            .with_context(|| format!("can't write manual pages to {}", dir.display())),
    }
}
