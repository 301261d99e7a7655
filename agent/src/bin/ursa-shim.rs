//! `ursa-shim`: one Envoy, its sockets and its DNS. Started by the agent's launcher, not by hand.

use std::process::ExitCode;
use std::sync::Arc;

use clap::{CommandFactory, Parser};
use futures_util::future::BoxFuture;
use tokio::net::UnixListener;
use tokio_util::sync::CancellationToken;
use tracing::error;
use ursa_agent::shim::{self, Config};

#[derive(Debug, Parser)]
#[command(
    name = "ursa-shim",
    version,
    about = "Runs one Envoy and what must outlive the agent: its sockets and its DNS",
    after_help = "Started by ursa-agent's launcher, not by hand; `ursa-agent status` shows what runs.\n\n\
                  Exit codes: 0 ended as told, 1 failed, 2 wrong usage."
)]
struct Arguments {
    #[command(flatten)]
    config: Config,
}

/// The last good configuration, as the agent's relay serves it.
#[derive(Debug)]
struct LastGood(std::path::PathBuf);

impl shim::xds::Fallback for LastGood {
    fn serve(
        &self,
        listener: UnixListener,
        stop: CancellationToken,
    ) -> BoxFuture<'static, Result<(), Box<dyn std::error::Error + Send + Sync>>> {
        let dir = self.0.clone();
        Box::pin(async move { Ok(ursa_agent::relay::serve_last_good(listener, dir, stop).await?) })
    }
}

/// `ursa-shim man [DIR]` and `ursa-shim completion SHELL`, beside the flags that everything else requires.
fn documentation() -> Option<ExitCode> {
    let mut args = std::env::args().skip(1);
    let written = match (args.next()?.as_str(), args.next()) {
        ("man", None) => clap_mangen::Man::new(Arguments::command()).render(&mut std::io::stdout()),
        ("man", Some(dir)) => clap_mangen::generate_to(Arguments::command(), dir),
        ("completion", Some(shell)) => match shell.parse::<clap_complete::Shell>() {
            Ok(shell) => {
                clap_complete::generate(
                    shell,
                    &mut Arguments::command(),
                    "ursa-shim",
                    &mut std::io::stdout(),
                );
                Ok(())
            }
            Err(reason) => Err(std::io::Error::other(reason)),
        },
        _ => return None,
    };
    Some(match written {
        Ok(()) => ExitCode::SUCCESS,
        Err(reason) => {
            eprintln!("ursa-shim: {reason}");
            ExitCode::FAILURE
        }
    })
}

fn main() -> ExitCode {
    if let Some(code) = documentation() {
        return code;
    }
    let Arguments { config } = Arguments::parse();
    let set_log_level = match shim::log::init(&config.log_level) {
        Ok(set) => set,
        Err(reason) => {
            eprintln!("ursa-shim: {reason}");
            return ExitCode::from(2);
        }
    };
    let last_good = Arc::new(LastGood(config.last_good.clone()));
    match shim::run(&config, last_good, set_log_level) {
        Ok(()) => ExitCode::SUCCESS,
        Err(reason) => {
            error!("{reason:#}");
            ExitCode::FAILURE
        }
    }
}
