//! What each verb does.

use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};
use ursa_init::netns::Netns;
use ursa_init::{Plan, RedirectIntent};

use crate::agent::{self, AgentError, WAIT_FOR_AGENT, WAIT_FOR_SIDECAR};
use crate::config::Config;
use crate::spec::{Code, Environment, Failure, Verb};

/// Runs a verb that needs the configuration; the value is what goes to standard output.
pub(crate) fn run(environment: &Environment, config: &Config) -> Result<Option<Value>, Failure> {
    match environment.verb {
        Verb::Add => add(environment, config).map(Some),
        Verb::Del => {
            del(environment, config);
            Ok(None)
        }
        Verb::Check => check(environment, config).map(|()| None),
        Verb::Status => status(config).map(|()| None),
        Verb::Gc => {
            gc(config);
            Ok(None)
        }
        Verb::Version => Ok(None),
    }
}

/// Redirect first (it closes), then the sidecar; what was done is undone when the sidecar doesn't come.
fn add(environment: &Environment, config: &Config) -> Result<Value, Failure> {
    let previous = config.conf.previous()?.clone();
    if !config.conf.is_meshed(environment) {
        return Ok(previous);
    }
    if crate::install::is_stub() {
        eprintln!("ursa-cni: uninstalled; this pod starts outside the mesh");
        return Ok(previous);
    }
    let intent = config.conf.intent()?;
    let plan = compile(&intent)?;
    let netns = namespace(environment)?;
    netns.run(|| ursa_init::apply(&plan)).and_then(|done| done).map_err(|e| redirect_failed(&e))?;
    let mut request = request("cni-add", environment, config);
    // The agent runs the sidecar as the user that the redirect exempts, wherever it was named.
    request["config"]["redirect"] = serde_json::to_value(&intent)
        .map_err(|e| Failure::new(Code::Io, "the redirect can't be written as JSON", e.to_string()))?;
    match agent::ask(&config.conf.run_dir, &request, WAIT_FOR_AGENT, WAIT_FOR_SIDECAR) {
        Ok(_) => Ok(previous),
        Err(why) => {
            undo(&netns, environment, config, &why);
            Err(not_yet(&why))
        }
    }
}

fn undo(netns: &Netns, environment: &Environment, config: &Config, why: &AgentError) {
    if let Err(error) = netns.run(ursa_init::remove).and_then(|done| done) {
        eprintln!("ursa-cni: the redirect could not be removed again: {}", error.with_causes());
    }
    // An agent that was only slow must not keep a sidecar for a pod that failed.
    if !matches!(why, AgentError::Away(..)) {
        tell(config, &request("cni-del", environment, config));
    }
}

fn not_yet(why: &AgentError) -> Failure {
    let hint = match why {
        AgentError::Away(..) => "is ursa-agent running on this node? `systemctl status ursa-agent`",
        AgentError::Slow(_) => "`ursa-agent status` shows what the workload waits for",
        AgentError::Gone => "the agent stopped meanwhile; the runtime will try again",
        AgentError::Unreadable(_) => "plugin and agent must be of the same or neighbouring versions",
        AgentError::Refused(_) => "`ursa-agent status` and the agent's log say more",
    };
    Failure::new(Code::TryAgain, format!("the pod's sidecar isn't ready: {why}"), hint)
}

/// Best effort and repeatable: a pod must always be able to go.
fn del(environment: &Environment, config: &Config) {
    if !config.conf.is_meshed(environment) {
        return;
    }
    tell(config, &request("cni-del", environment, config));
    let Some(path) = &environment.netns else { return };
    if !path.exists() {
        return;
    }
    let removed = Netns::open(path)
        .and_then(|netns| netns.refuse_own_or_host().map(|()| netns))
        .and_then(|netns| netns.run(ursa_init::remove)?);
    if let Err(error) = removed {
        eprintln!(
            "ursa-cni: the redirect of {} is left to its namespace's end: {}",
            path.display(),
            error.with_causes()
        );
    }
}

fn check(environment: &Environment, config: &Config) -> Result<(), Failure> {
    config.conf.previous()?;
    if !config.conf.is_meshed(environment) {
        return Ok(());
    }
    let plan = compile(&config.conf.intent()?)?;
    let differences = namespace(environment)?
        .run(|| ursa_init::diff(&plan))
        .and_then(|found| found)
        .map_err(|e| redirect_failed(&e))?;
    if differences.is_empty() {
        return Ok(());
    }
    let message = format!("the pod's redirect was changed: {} differences", differences.len());
    Err(Failure::new(Code::Drifted, message, differences.join("\n")))
}

/// A meshed pod needs the agent, so without it ADD would fail.
fn status(config: &Config) -> Result<(), Failure> {
    match agent::ask(&config.conf.run_dir, &json!({"cmd": "status"}), Duration::ZERO, WAIT_FOR_AGENT) {
        Ok(_) => Ok(()),
        Err(why) => Err(Failure::new(
            Code::NotAvailable,
            format!("meshed pods can't start: {why}"),
            "is ursa-agent running on this node? `systemctl status ursa-agent`",
        )),
    }
}

fn gc(config: &Config) {
    let valid = config.document.get("cni.dev/valid-attachments").cloned().unwrap_or_else(|| json!([]));
    tell(config, &json!({"cmd": "cni-gc", "valid_attachments": valid}));
}

/// Tells the agent what it may miss without harm: it finds out by itself when it is back.
fn tell(config: &Config, request: &Value) {
    if let Err(why) = agent::ask(&config.conf.run_dir, request, Duration::ZERO, WAIT_FOR_AGENT) {
        eprintln!("ursa-cni: {why}");
    }
}

fn request(command: &str, environment: &Environment, config: &Config) -> Value {
    json!({
        "cmd": command,
        "netns": environment.netns,
        "container_id": environment.container_id,
        "ifname": environment.ifname,
        "args": environment.args,
        "annotations": config.conf.pod_annotations(),
        "ips": config.conf.addresses(),
        "config": config.document,
    })
}

fn compile(intent: &RedirectIntent) -> Result<Plan, Failure> {
    Plan::compile(intent).map_err(|e| {
        Failure::new(
            Code::InvalidConfig,
            "the redirect in ursa-cni's configuration is invalid",
            e.to_string(),
        )
    })
}

/// The pod's namespace, never the machine's own.
fn namespace(environment: &Environment) -> Result<Netns, Failure> {
    let path = environment.netns.as_deref().unwrap_or(Path::new(""));
    let netns = Netns::open(path).and_then(|netns| netns.refuse_own_or_host().map(|()| netns));
    netns.map_err(|e| {
        Failure::new(Code::InvalidNamespace, "the pod's network namespace can't be used", e.with_causes())
    })
}

fn redirect_failed(error: &ursa_init::Error) -> Failure {
    Failure::new(Code::Redirect, "the redirect can't be put in place", error.with_causes())
}
