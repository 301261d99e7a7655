//! `ursa-shim`: one Envoy, its sockets and its DNS. Started by the agent's launcher, not by hand.

use std::process::ExitCode;
use std::sync::Arc;

use clap::Parser;
use futures_util::future::BoxFuture;
use tokio::net::UnixListener;
use tokio_util::sync::CancellationToken;
use tracing::error;
use ursa_agent::shim::{self, Config};

#[derive(Debug, Parser)]
#[command(version, about = "Runs one Envoy and what must outlive the agent: its sockets and its DNS")]
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

fn main() -> ExitCode {
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
