//! `ursa-shim`: one Envoy, its sockets and its DNS. Started by systemd or the agent's launcher, not by hand.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::{CommandFactory, Parser, Subcommand};
use futures_util::future::BoxFuture;
use tokio::net::UnixListener;
use tokio_util::sync::CancellationToken;
use tracing::error;
use ursa_agent::shim::operator::{self, OperatorError, Target};
use ursa_agent::shim::{self, Config, handover};

#[derive(Debug, Parser)]
#[command(
    name = "ursa-shim",
    version,
    about = "Runs one Envoy and what must outlive the agent: its sockets and its DNS",
    after_help = "systemd starts it as ursa-sidecar@NAME.service, other launchers of ursa-agent with arguments; nobody does by \
                  hand. `ursa-agent status` shows what runs. SIGHUP makes it replace itself by the installed version, in \
                  place: same process, same Envoy.\n\n\
                  Exit codes: 0 ended as told, 1 failed, 2 wrong usage.",
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true
)]
struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    config: Config,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Ask a sidecar's inbound connections to go, and wait until they have. Outbound ones work on. For ExecStop= of the
    /// service, with the prefix `+`: root may, and so may the sidecar's own user.
    Drain {
        #[command(flatten)]
        target: Target,
        /// How long connections may take to end; then this returns as well. As the agent's `drainSeconds` unless given.
        #[arg(long, value_name = "SECONDS")]
        deadline: Option<u64>,
    },
    /// Make a sidecar that was drained take inbound connections again, and wait until it does. For ExecStartPre= of the
    /// service: it is restarted without its sidecar.
    Resume {
        #[command(flatten)]
        target: Target,
    },
    /// Tell a running shim whether this binary takes over its state, which is on standard input.
    #[command(name = handover::QUESTION, hide = true)]
    TakesOver,
    /// Print the manual page, or write all of them to a directory.
    #[command(hide = true)]
    Man {
        /// Where.
        dir: Option<PathBuf>,
    },
    /// Print a completion script.
    #[command(hide = true)]
    Completion {
        /// For bash, elvish, fish, powershell or zsh.
        shell: clap_complete::Shell,
    },
}

/// The last good configuration, as the agent's relay serves it.
#[derive(Debug)]
struct LastGood;

impl shim::xds::Fallback for LastGood {
    fn serve(
        &self,
        last_good: &Path,
        listener: UnixListener,
        stop: CancellationToken,
    ) -> BoxFuture<'static, Result<(), Box<dyn std::error::Error + Send + Sync>>> {
        let dir = last_good.to_owned();
        Box::pin(async move { Ok(ursa_agent::relay::serve_last_good(listener, dir, stop).await?) })
    }
}

fn obey(command: Command) -> Result<String, String> {
    let ask = |work: &dyn Fn() -> BoxFuture<'static, Result<String, OperatorError>>| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|error| error.to_string())?;
        runtime.block_on(work()).map(|words| words + "\n").map_err(|error| {
            let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}"));
            format!("{error}{}", cause.unwrap_or_default())
        })
    };
    match command {
        // systemd runs ExecStop= also after a service that ended by itself, and says so: nobody is left to call it.
        Command::Drain { target, .. } if std::env::var_os("EXIT_CODE").is_some() => {
            Ok(format!("{} has ended already; nothing to drain\n", target.service))
        }
        Command::Drain { target, deadline } => ask(&|| {
            let target = target.clone();
            Box::pin(async move { operator::drain(&target, deadline.map(Duration::from_secs)).await })
        }),
        Command::Resume { target } => ask(&|| {
            let target = target.clone();
            Box::pin(async move { operator::resume(&target).await })
        }),
        Command::TakesOver => handover::answer().map(|consent| consent + "\n"),
        Command::Man { dir } => {
            let written = match dir {
                Some(dir) => clap_mangen::generate_to(Arguments::command(), dir),
                None => clap_mangen::Man::new(Arguments::command()).render(&mut std::io::stdout()),
            };
            written.map(|()| String::new()).map_err(|error| error.to_string())
        }
        Command::Completion { shell } => {
            clap_complete::generate(shell, &mut Arguments::command(), "ursa-shim", &mut std::io::stdout());
            Ok(String::new())
        }
    }
}

fn main() -> ExitCode {
    let Arguments { command, config } = Arguments::parse();
    if let Some(command) = command {
        return match obey(command) {
            Ok(words) => {
                print!("{words}");
                ExitCode::SUCCESS
            }
            Err(reason) => {
                eprintln!("ursa-shim: {reason}");
                ExitCode::FAILURE
            }
        };
    }
    let set_log_level = match shim::log::init(&config.log_level) {
        Ok(set) => set,
        Err(reason) => {
            eprintln!("ursa-shim: {reason}");
            return ExitCode::from(2);
        }
    };
    let fallback: Arc<dyn shim::xds::Fallback> = Arc::new(LastGood);
    match shim::run(&config, &fallback, &set_log_level) {
        Ok(()) => ExitCode::SUCCESS,
        Err(reason) => {
            error!("{reason:#}");
            ExitCode::FAILURE
        }
    }
}
