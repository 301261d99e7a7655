//! `ursa-init`: puts a workload's redirect in place, shows it and takes it back.

use std::process::ExitCode;

use clap::Parser as _;
use ursa_init::cli;

fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_env_filter(tracing_subscriber::EnvFilter::from_env("URSA_LOG"))
        .without_time()
        .init();
    match cli::run(cli::Cli::parse()) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("ursa-init: {error:#}");
            ExitCode::from(cli::exit_code(&error))
        }
    }
}
