//! `ursa-cni`: puts pods into the mesh. Chained after the plugin that gives the pod its addresses.
//!
//! It calls no API server, holds no token and starts no other program: the decision comes with the
//! configuration, the redirect goes to the kernel by netlink, the sidecar is the agent's work.

mod agent;
mod config;
mod spec;
mod verbs;

use std::io::{IsTerminal as _, Read as _};
use std::process::ExitCode;

use serde_json::json;

use config::Config;
use spec::{Code, Environment, Failure, NEWEST, VERSIONS, Verb};

const HELP: &str = "\
ursa-cni: the CNI plugin of Ursa (CNI 0.3.0 to 1.1.0). The container runtime starts it, chained in a conflist:

  {\"cniVersion\": \"1.0.0\", \"name\": \"pods\", \"plugins\": [
    {\"type\": \"bridge\", \"bridge\": \"cni0\", \"ipam\": {\"type\": \"host-local\", \"subnet\": \"10.9.0.0/16\"}},
    {\"type\": \"ursa-cni\",
     \"capabilities\": {\"io.kubernetes.cri.pod-annotations\": true},
     \"excludeNamespaces\": [\"kube-system\"]}]}

A pod is meshed when its annotation kuma.io/sidecar-injection is `enabled`; `annotations` and `labels` in the
plugin's configuration apply to every pod of the network, and the pod's own win.
Other keys: runDir (/run/ursa; where agent.sock is), redirect (see `ursa-init --help`; by default group 5678 is exempt, and
each proxy has a user of its own), workload (for the agent: name, mesh, labels, ports).

A pod's annotations kuma.io/mesh and kuma.io/workload say its mesh and, with that, its SPIFFE id, except where
workload.mesh and the label kuma.io/workload in workload.labels are set: these win, always. Set them wherever
those who write pods aren't trusted to choose an identity.

By hand: CNI_COMMAND=VERSION ursa-cni < /dev/null
";

fn main() -> ExitCode {
    if std::env::args().nth(1).is_some_and(|a| a == "--help" || a == "-h" || a == "help") {
        print!("{HELP}");
        return ExitCode::SUCCESS;
    }
    if std::env::args().nth(1).is_some_and(|a| a == "--version" || a == "-V") {
        println!("ursa-cni {}", env!("CARGO_PKG_VERSION"));
        return ExitCode::SUCCESS;
    }
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
            eprintln!("ursa-cni: {} ({})", failure.message, failure.details);
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

fn run(environment: &Environment, input: &str, version: &str) -> Result<Option<serde_json::Value>, Failure> {
    match environment.verb {
        Verb::Version => Ok(Some(json!({"cniVersion": version, "supportedVersions": VERSIONS}))),
        _ => verbs::run(environment, &Config::parse(input)?),
    }
}
