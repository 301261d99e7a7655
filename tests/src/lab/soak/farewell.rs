//! Workloads removed, agents and control stopped: nothing is left but what the operator put there.

use std::collections::BTreeMap;

use anyhow::ensure;

use super::census::{hosts, network};
use crate::lab::net::Host;
use crate::lab::pair::{Pair, SOON};
use crate::lab::wait;

/// Removes the workloads, stops agents and control, and looks for what is left.
pub fn leave(pair: &mut Pair) -> anyhow::Result<()> {
    pair.node_a.remove("web")?;
    pair.node_b.remove("backend")?;
    for node in [&pair.node_a, &pair.node_b] {
        wait::until(&format!("no workload on {}", node.name), SOON, || {
            let status = node.status().map_err(|error| format!("{error:#}"))?;
            match status["workloads"].as_array() {
                Some(workloads) if workloads.is_empty() => Ok(()),
                _ => Err(status.to_string()),
            }
        })?;
    }
    wait::until("the Dataplanes to be gone", SOON, || {
        let text =
            pair.control.ursa(&["get", "dataplanes", "-o", "json"]).map_err(|error| error.to_string())?;
        let list: serde_json::Value = serde_json::from_str(&text).map_err(|error| error.to_string())?;
        if list["total"] == 0 { Ok(()) } else { Err(text) }
    })?;
    pair.node_a.agent.stop(SOON)?;
    pair.node_b.agent.stop(SOON)?;
    pair.control.daemon.stop(SOON)?;
    // A host that was never in the mesh: what the others must be like again.
    let plain = anonymous(&pair.stranger)?;
    let mut left = Vec::new();
    for host in hosts(pair) {
        for program in ["envoy", "ursa-shim", "ursa-agent", "ursa-control"] {
            left.extend(host.running(program).iter().map(|pid| format!("{program} {pid} on {}", host.netns)));
        }
        let now = anonymous(host)?;
        left.extend(
            now.iter().filter(|line| !plain.contains(line)).map(|line| format!("{}: {line}", host.netns)),
        );
        ensure!(now.len() >= plain.len(), "{} has lost routes or addresses: {now:?}", host.netns);
    }
    for node in [&pair.node_a, &pair.node_b] {
        // The node's own identity and what it knows of pods stay for its next agent, and logs stay for people.
        let run = (node.run_dir(), &["w", "log", "cni"][..]);
        for (dir, kept) in [run, (node.state_dir(), &["w", "node", "decisions.json"])] {
            for entry in std::fs::read_dir(&dir)?.flatten() {
                let name = entry.file_name().to_string_lossy().into_owned();
                if !kept.contains(&name.as_str()) {
                    left.push(entry.path().display().to_string());
                }
            }
            for of_each in ["w", "cni"].map(|name| dir.join(name)).iter().filter(|dir| dir.exists()) {
                let entries = std::fs::read_dir(of_each)?.flatten();
                left.extend(entries.map(|entry| entry.path().display().to_string()));
            }
        }
    }
    if pair.control.socket.exists() {
        left.push(pair.control.socket.display().to_string());
    }
    ensure!(left.is_empty(), "left behind: {}", left.join("; "));
    Ok(())
}

/// A host's rules, routes and addresses without what tells it from others.
fn anonymous(host: &Host) -> anyhow::Result<Vec<String>> {
    let lines = network(host)?;
    let own: BTreeMap<&str, &str> =
        BTreeMap::from([(host.v4.as_str(), "OWN-V4"), (host.v6.as_str(), "OWN-V6")]);
    let mut found: Vec<String> = lines
        .iter()
        .map(|line| {
            let words: Vec<String> = line
                .split_whitespace()
                .map(|word| {
                    let (address, length) = word.split_once('/').unwrap_or((word, ""));
                    let shown = match own.get(address) {
                        Some(own) => (*own).to_owned(),
                        None if address.starts_with("fe80::") && address.len() > 6 => "LINK-LOCAL".to_owned(),
                        None => address.to_owned(),
                    };
                    if length.is_empty() { shown } else { format!("{shown}/{length}") }
                })
                // The numbers of interfaces count up over the machine.
                .filter(|word| !word.ends_with(':') && !word.starts_with("eth0@"))
                .collect();
            words.join(" ")
        })
        .collect();
    found.sort();
    Ok(found)
}
