//! What each verb does.

use std::time::Duration;

use serde_json::{Value, json};
use ursa_init::netns::Netns;
use ursa_init::{Plan, RedirectIntent};
use ursa_model::injection::Decision;

use crate::agent::{self, AgentError, WAIT_FOR_AGENT, WAIT_FOR_SIDECAR};
use crate::config::Config;
use crate::spec::{Code, Environment, Failure};
use crate::{decide, pod, record};

/// Redirect first (it closes), then the sidecar; what was done is undone when the sidecar doesn't come.
pub(crate) fn add(environment: &Environment, config: &Config) -> Result<String, Failure> {
    let previous = config.previous()?.to_owned();
    // A stub is what an uninstalled plugin leaves for pods that still go: it asks nobody and meshes nothing.
    let is_stub = crate::install::is_stub();
    let verdict = if is_stub {
        decide::at_hand(environment, &config.conf)?
    } else {
        decide::certainly(environment, &config.conf)?
    };
    if verdict.decision != Decision::Meshed {
        return Ok(previous);
    }
    if is_stub {
        eprintln!("ursa-cni: uninstalled; this pod starts outside the mesh");
        return Ok(previous);
    }
    let addresses = config.addresses()?;
    let intent = config.conf.intent_at(&addresses)?;
    let plan = compile(&intent)?;
    let netns = pod::namespace(environment)?;
    pod::refuse_strangers(&netns, &addresses)?;
    let mut request = request("cni-add", environment, config);
    request["ips"] = json!(addresses);
    request["annotations"] = config.conf.annotations_for_agent();
    request["config"] = config.conf.for_agent(Some(&intent))?;
    // Before anything is done: a plugin that is killed from here on leaves a trace for DEL.
    record::write(&config.conf, environment).map_err(|e| {
        let hint = format!("{e}; is {} writable?", config.conf.run_dir.display());
        Failure::new(Code::Io, "what is done for the container can't be noted", hint)
    })?;
    let done = netns
        .run(|| ursa_init::apply(&plan))
        .and_then(|done| done)
        .map_err(|e| redirect_failed(&e))
        .and_then(|_| {
            agent::ask(&config.conf.run_dir, &request, WAIT_FOR_AGENT, WAIT_FOR_SIDECAR).map_err(|why| {
                // An agent that was only slow must not keep a sidecar for a pod that failed.
                if !matches!(why, AgentError::Away(..)) {
                    tell(config, &self::request("cni-del", environment, config));
                }
                not_yet(&why)
            })
        });
    match done {
        Ok(_) => Ok(previous),
        Err(failure) => {
            undo(&netns, environment, config);
            Err(failure)
        }
    }
}

fn undo(netns: &Netns, environment: &Environment, config: &Config) {
    match netns.run(ursa_init::remove).and_then(|done| done) {
        Ok(_) => record::remove(&config.conf, environment),
        // DEL tries again.
        Err(error) => {
            eprintln!("ursa-cni: the redirect could not be removed again: {}", error.with_causes());
        }
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

/// Best effort and repeatable: a pod must always be able to go. What was done for it is on record; its annotations
/// may say something else by now.
pub(crate) fn del(environment: &Environment, config: &Config) {
    let is_meshed = || {
        decide::at_hand(environment, &config.conf).is_ok_and(|verdict| verdict.decision == Decision::Meshed)
    };
    if !record::exists(&config.conf, environment) && !is_meshed() {
        return;
    }
    tell(config, &request("cni-del", environment, config));
    if let Some(path) = environment.netns.as_ref().filter(|path| path.exists()) {
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
    record::remove(&config.conf, environment);
}

/// Reads the rules back, and asks for the sidecar.
pub(crate) fn check(environment: &Environment, config: &Config) -> Result<(), Failure> {
    config.previous()?;
    if !record::exists(&config.conf, environment)
        && decide::at_hand(environment, &config.conf)?.decision != Decision::Meshed
    {
        return Ok(());
    }
    let addresses = config.addresses()?;
    let intent = config.conf.intent_at(&addresses)?;
    let plan = compile(&intent)?;
    let netns = pod::namespace(environment)?;
    pod::refuse_strangers(&netns, &addresses)?;
    let differences =
        netns.run(|| ursa_init::diff(&plan)).and_then(|found| found).map_err(|e| redirect_failed(&e))?;
    if !differences.is_empty() {
        let message = format!("the pod's redirect was changed: {} differences", differences.len());
        let details =
            format!("`-` is in the pod, `+` should be; recreate the pod:\n{}", differences.join("\n"));
        return Err(Failure::new(Code::Drifted, message, details));
    }
    let gone = |why: String| {
        let hint = "its connections are refused until it is back; `ursa-agent status` says what it waits for";
        Failure::new(Code::SidecarGone, format!("the pod's sidecar is gone: {why}"), hint)
    };
    match agent::ask(
        &config.conf.run_dir,
        &request("cni-check", environment, config),
        Duration::ZERO,
        WAIT_FOR_AGENT,
    ) {
        Ok(_) => Ok(()),
        Err(AgentError::Refused(why)) => Err(gone(why)),
        // Without an agent the sidecar goes on; whether it does can be seen from here.
        Err(_) => match pod::silent_ports(&netns, &intent).map_err(|e| redirect_failed(&e))?.as_slice() {
            [] => Ok(()),
            ports => Err(gone(format!("nobody listens on {ports:?}"))),
        },
    }
}

/// What this node lacks for a meshed pod to start: its agent, or rules in the kernel. A control plane that is away
/// isn't among that: its own pods must be able to start on this node.
pub(crate) fn status(config: &Config) -> Result<(), Failure> {
    if let Err(error) = ursa_init::show() {
        let message = "meshed pods can't start: the kernel's rules can't be read";
        return Err(Failure::new(Code::NotAvailable, message, error.with_causes()));
    }
    match agent::ask(&config.conf.run_dir, &json!({"cmd": "status"}), Duration::ZERO, WAIT_FOR_AGENT) {
        Ok(_) => Ok(()),
        Err(why) => Err(Failure::new(
            Code::NotAvailable,
            format!("meshed pods can't start: {why}"),
            "is ursa-agent running on this node? `systemctl status ursa-agent`",
        )),
    }
}

/// Frees what belongs to attachments of this network that don't exist any more.
pub(crate) fn gc(config: &Config) -> Result<(), Failure> {
    let valid = config.conf.valid_attachments()?;
    tell(config, &json!({"cmd": "cni-gc", "network": config.conf.name, "valid_attachments": valid}));
    record::retain(&config.conf, valid);
    Ok(())
}

/// Tells the agent what it may miss without harm: it finds out by itself when it is back.
fn tell(config: &Config, request: &Value) {
    if let Err(why) = agent::ask(&config.conf.run_dir, request, Duration::ZERO, WAIT_FOR_AGENT) {
        eprintln!("ursa-cni: {why}; it finds out by itself");
    }
}

fn request(command: &str, environment: &Environment, config: &Config) -> Value {
    json!({
        "cmd": command,
        "network": config.conf.name,
        "netns": environment.netns,
        "container_id": environment.container_id,
        "ifname": environment.ifname,
        "args": environment.args,
    })
}

pub(crate) fn compile(intent: &RedirectIntent) -> Result<Plan, Failure> {
    Plan::compile(intent).map_err(|e| {
        Failure::new(
            Code::InvalidConfig,
            "the redirect in ursa-cni's configuration is invalid",
            e.to_string(),
        )
    })
}

fn redirect_failed(error: &ursa_init::Error) -> Failure {
    Failure::new(Code::Redirect, "the redirect can't be put in place or read back", error.with_causes())
}
