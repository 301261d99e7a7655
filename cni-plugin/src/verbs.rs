//! What each verb does.

use std::time::Duration;

use serde_json::json;
use ursa_cni_protocol::records::Record;
use ursa_cni_protocol::{Attachment, Call, Records};
use ursa_init::netns::Netns;
use ursa_init::{Plan, RedirectIntent};
use ursa_model::injection::Decision;

use crate::agent::{self, AgentError, WAIT_FOR_AGENT, WAIT_FOR_SIDECAR};
use crate::config::Config;
use crate::install::is_stub;
use crate::spec::{Code, Environment, Failure};
use crate::{decide, pod};

/// Redirect first (it closes), then the sidecar; what was done is undone when the sidecar doesn't come.
pub(crate) fn add(environment: &Environment, config: &Config) -> Result<String, Failure> {
    let previous = config.previous()?.to_owned();
    if decide::certainly(environment, &config.conf)?.decision != Decision::Meshed {
        return Ok(previous);
    }
    let addresses = config.addresses()?;
    let intent = config.conf.intent_at(&addresses)?;
    let own = config.conf.meshed_call(environment, addresses, intent)?;
    compile(own.config.redirect.as_ref())?;
    let netns = pod::namespace(environment)?;
    pod::refuse_strangers(&netns, &own.ips)?;
    let records = config.conf.records();
    let former = first_other(&records, &own.attachment());
    // A container has one sidecar and one redirect, whatever the number of its networks: those of the first.
    let call = former.as_ref().unwrap_or(&own);
    let plan = compile(call.config.redirect.as_ref())?;
    // Before anything is done: a plugin that is killed from here on leaves a trace for DEL.
    records.write(&own).map_err(|e| {
        let hint = format!("{e}; is {} writable?", records.dir().display());
        Failure::new(Code::Io, "what is done for the container can't be noted", hint)
    })?;
    let done = netns
        .run(|| ursa_init::apply(&plan))
        .and_then(|done| done)
        .map_err(|e| redirect_failed(&e))
        .and_then(|_| {
            let request = agent::request("cni-add", call);
            agent::ask(&config.conf.run_dir, &request, WAIT_FOR_AGENT, WAIT_FOR_SIDECAR).map_err(|why| {
                // An agent that was only slow must not keep a sidecar for a pod that failed.
                if former.is_none() && !matches!(why, AgentError::Away(..)) {
                    tell(config, "cni-del", call);
                }
                not_yet(&why)
            })
        });
    match done {
        Ok(_) => Ok(previous),
        Err(failure) => {
            if former.is_some() {
                forget(&records, &own.attachment());
            } else {
                undo(&netns, &records, &own.attachment());
            }
            Err(failure)
        }
    }
}

/// The first attachment of the container, where that is another one.
fn first_other(records: &Records, own: &Attachment) -> Option<Call> {
    let first = records.of(&own.container_id).into_iter().next()?;
    if first.attachment == *own { None } else { records.read(&first) }
}

fn undo(netns: &Netns, records: &Records, own: &Attachment) {
    match netns.run(ursa_init::remove).and_then(|done| done) {
        Ok(_) => forget(records, own),
        // DEL tries again.
        Err(error) => {
            eprintln!("ursa-cni: the redirect could not be removed again: {}", error.with_causes());
        }
    }
}

fn forget(records: &Records, own: &Attachment) {
    for record in records.of(&own.container_id).iter().filter(|record| record.attachment == *own) {
        remove_record(records, record);
    }
}

fn remove_record(records: &Records, record: &Record) {
    if let Err(error) = records.remove(record) {
        let Attachment { container_id, network, ifname } = &record.attachment;
        eprintln!("ursa-cni: the record of container {container_id} in {network} ({ifname}) stays: {error}");
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
/// may say something else by now. Rules and sidecar stay until the container's last attachment goes.
pub(crate) fn del(environment: &Environment, config: &Config) {
    let is_meshed = || {
        decide::at_hand(environment, &config.conf).is_ok_and(|verdict| verdict.decision == Decision::Meshed)
    };
    let records = config.conf.records();
    let call = config.conf.call(environment);
    let all = records.of(&call.container_id);
    let (own, rest) = leaving(all.clone(), &call.attachment());
    if own.is_empty() && (!rest.is_empty() || !is_meshed()) {
        return;
    }
    if rest.is_empty() {
        tell(config, "cni-del", &call);
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
    } else if rest[0] != all[0] {
        pass_on(config, &records, &rest[0]);
    }
    for record in &own {
        remove_record(&records, record);
    }
}

/// The records of the attachment that goes, and those that stay. A pod that the agent has found by itself is known by no
/// network, and leaves with any that isn't on record; a network whose name can't be read is any.
fn leaving(all: Vec<Record>, own: &Attachment) -> (Vec<Record>, Vec<Record>) {
    let is_own = |record: &Record| {
        let (network, ifname) = (&record.attachment.network, &record.attachment.ifname);
        *ifname == own.ifname && (*network == own.network || own.network.is_empty())
    };
    let known = all.iter().any(is_own);
    all.into_iter().partition(|record| if known { is_own(record) } else { record.attachment.is_found() })
}

/// The attachment that described rules and sidecar goes, and this one is the first now.
fn pass_on(config: &Config, records: &Records, next: &Record) {
    let Some(call) = records.read(next) else {
        eprintln!("ursa-cni: the record of {:?} can't be read; all stays as it is", next.attachment);
        return;
    };
    let apply = || {
        let netns = pod::namespace_at(&call.netns)?;
        pod::refuse_strangers(&netns, &call.ips)?;
        let plan = compile(call.config.redirect.as_ref())?;
        netns.run(|| ursa_init::apply(&plan)).and_then(|done| done).map_err(|e| redirect_failed(&e))
    };
    if let Err(why) = apply() {
        eprintln!("ursa-cni: the redirect stays as the attachment that goes described it: {why}");
    }
    tell(config, "cni-add", &call);
}

/// Reads the rules back, and asks for the sidecar.
pub(crate) fn check(environment: &Environment, config: &Config) -> Result<(), Failure> {
    config.previous()?;
    let records = config.conf.records();
    let call = config.conf.call(environment);
    let (own, _) = leaving(records.of(&call.container_id), &call.attachment());
    // A stub meshes nobody, whatever a pod says.
    if own.is_empty()
        && (is_stub() || decide::at_hand(environment, &config.conf)?.decision != Decision::Meshed)
    {
        return Ok(());
    }
    let addresses = config.addresses()?;
    let intent = match first_other(&records, &call.attachment()).and_then(|first| first.config.redirect) {
        Some(first) => first,
        None => config.conf.intent_at(&addresses)?,
    };
    let plan = compile(Some(&intent))?;
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
        &agent::request("cni-check", &call),
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
/// isn't among that: its own pods must be able to start on this node. While an agent is away, sidecars go on without it:
/// connections are limited only where one isn't there.
pub(crate) fn status(config: &Config) -> Result<(), Failure> {
    if let Err(error) = ursa_init::show() {
        let message = "meshed pods can't start: the kernel's rules can't be read";
        return Err(Failure::new(Code::NotAvailable, message, error.with_causes()));
    }
    match agent::ask(&config.conf.run_dir, &json!({"cmd": "status"}), Duration::ZERO, WAIT_FOR_AGENT) {
        Ok(_) => Ok(()),
        Err(why) => {
            let hint = "is ursa-agent running on this node? `systemctl status ursa-agent`";
            Err(match cut_off(config).as_slice() {
                [] => Failure::new(Code::NotAvailable, format!("meshed pods can't start: {why}"), hint),
                pods => Failure::new(
                    Code::LimitedConnectivity,
                    format!("meshed pods can't start, and {} have no proxy: {why}", pods.len()),
                    format!("connections of {} are refused until the agent is back; {hint}", pods.join(", ")),
                ),
            })
        }
    }
}

/// This network's pods whose redirect leads to nobody.
fn cut_off(config: &Config) -> Vec<String> {
    let records = config.conf.records();
    let is_silent = |call: &Call| {
        let intent = call.config.redirect.clone().unwrap_or_default();
        let silent = Netns::open(&call.netns).and_then(|netns| pod::silent_ports(&netns, &intent));
        // A namespace that is gone has no connections.
        silent.is_ok_and(|ports| !ports.is_empty())
    };
    let of = |container: &String| {
        let all = records.of(container);
        let ours = all.iter().any(|record| record.attachment.network == config.conf.network.name);
        ours.then(|| all.first().and_then(|first| records.read(first))).flatten()
    };
    let calls = records.containers().iter().filter_map(of).collect::<Vec<_>>();
    calls.iter().filter(|call| is_silent(call)).map(Call::pod).collect()
}

/// Frees what belongs to attachments of this network that don't exist any more: their records, by which the agent sees
/// whose sidecar nobody needs. Rules end with their namespace; until then they keep it closed.
pub(crate) fn gc(config: &Config) -> Result<(), Failure> {
    let valid = config.conf.valid_attachments()?;
    let records = config.conf.records();
    for container in records.containers() {
        let all = records.of(&container);
        let (gone, rest): (Vec<_>, Vec<_>) = all.iter().cloned().partition(|record| {
            record.attachment.network == config.conf.network.name
                && !valid.iter().any(|valid| valid.is(&record.attachment))
        });
        if let Some(next) = rest.first().filter(|next| **next != all[0]) {
            pass_on(config, &records, next);
        }
        for record in &gone {
            remove_record(&records, record);
        }
    }
    let request = json!({"cmd": "cni-gc"});
    if let Err(why) = agent::ask(&config.conf.run_dir, &request, Duration::ZERO, WAIT_FOR_AGENT) {
        eprintln!("ursa-cni: {why}; it finds out by itself");
    }
    Ok(())
}

/// Tells the agent what it may miss without harm: it finds out by itself when it is back.
fn tell(config: &Config, command: &str, call: &Call) {
    let request = agent::request(command, call);
    if let Err(why) = agent::ask(&config.conf.run_dir, &request, Duration::ZERO, WAIT_FOR_AGENT) {
        eprintln!("ursa-cni: {why}; it finds out by itself");
    }
}

pub(crate) fn compile(intent: Option<&RedirectIntent>) -> Result<Plan, Failure> {
    Plan::compile(intent.unwrap_or(&RedirectIntent::default())).map_err(|e| {
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
