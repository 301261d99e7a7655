//! `make soak`: kill -9 in a loop, with traffic and lookups flowing.

use std::process::ExitCode;

use clap::Parser;
use ursa_tests::lab::pair::Pair;
use ursa_tests::lab::soak;

#[derive(Parser)]
struct Args {
    /// How many rounds; ten make a full turn
    #[arg(long, default_value_t = 50)]
    rounds: usize,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let mut pair = match Pair::allowed() {
        Ok(pair) => pair,
        Err(error) => {
            eprintln!("soak: {error:#}");
            return ExitCode::FAILURE;
        }
    };
    let (mut good, mut bad) = (0, 0);
    let result = soak::run(&mut pair, args.rounds, |number, round| {
        good += round.good;
        bad += round.bad;
        println!(
            "{number:>3}  {:<18} {:>5} answered, {:>3} failed while Envoy was down, back after {:>5.0} ms",
            format!("{:?}", round.killed),
            round.good,
            round.bad,
            round.back_after.as_secs_f64() * 1e3
        );
    });
    match result {
        Ok(()) => {
            println!(
                "{} rounds held: {good} requests answered, {bad} failed, each while an Envoy was down",
                args.rounds
            );
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("soak: {error:#}");
            if let Some(logs) = pair.lab.save_logs() {
                eprintln!("the lab's logs: {}", logs.display());
            }
            ExitCode::FAILURE
        }
    }
}
