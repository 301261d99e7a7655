//! A call by the container runtime: variables and JSON on standard input, JSON on standard output, words on
//! standard error.

use std::io::{IsTerminal as _, Read as _};
use std::process::ExitCode;

use serde_json::json;

use crate::config::{self, Config};
use crate::install::is_stub;
use crate::spec::{Code, Environment, Failure, NEWEST, VERSIONS, Verb};
use crate::verbs;

/// Answers the call that the process's environment and standard input hold.
pub fn main() -> ExitCode {
    let mut input = String::new();
    let version;
    let result = match Environment::read(|name| std::env::var(name).ok()) {
        Err(failure) => {
            version = NEWEST.to_owned();
            Err(failure)
        }
        Ok(environment) => {
            let read = read_input(&mut input);
            version = config::version_of(&input);
            read.and_then(|()| run(&environment, &input, &version))
        }
    };
    match result {
        Ok(None) => ExitCode::SUCCESS,
        Ok(Some(value)) => {
            println!("{value}");
            ExitCode::SUCCESS
        }
        Err(failure) => {
            // libcni reads the error from standard output; people read the log.
            println!("{}", failure.to_json(&version));
            eprintln!("ursa-cni: {failure}");
            ExitCode::FAILURE
        }
    }
}

fn read_input(input: &mut String) -> Result<(), Failure> {
    let mut stdin = std::io::stdin();
    if stdin.is_terminal() {
        return Ok(());
    }
    stdin.read_to_string(input).map(drop).map_err(|e| {
        Failure::new(Code::Io, "the network configuration can't be read from standard input", e.to_string())
    })
}

fn run(environment: &Environment, input: &str, version: &str) -> Result<Option<String>, Failure> {
    match environment.verb {
        Verb::Version => {
            // Old runtimes send nothing, newer ones {"cniVersion": …}.
            if !input.trim().is_empty() {
                Config::check_syntax(input)?;
            }
            Ok(Some(json!({"cniVersion": version, "supportedVersions": VERSIONS}).to_string()))
        }
        // Uninstalled: nothing that this pod or its network says is any of our business any more.
        Verb::Add if is_stub() => {
            eprintln!("ursa-cni: uninstalled; whoever starts now starts outside the mesh");
            config::previous_of(input).map(|previous| Some(previous.to_owned()))
        }
        Verb::Status if is_stub() => Ok(None),
        Verb::Add => verbs::add(environment, &Config::parse(input)?).map(Some),
        // A pod must always be able to go, whatever became of the configuration.
        Verb::Del => {
            if let Err(failure) = Config::check_syntax(input) {
                eprintln!("ursa-cni: {failure}; what is known of the container is removed all the same");
            }
            verbs::del(environment, &Config::for_departure(input));
            Ok(None)
        }
        Verb::Check => verbs::check(environment, &Config::parse(input)?).map(|()| None),
        Verb::Status => verbs::status(&Config::parse(input)?).map(|()| None),
        Verb::Gc => verbs::gc(&Config::parse(input)?).map(|()| None),
    }
}
