//! kill -9 of control plane, agent, shim or Envoy, each alone and any two together, with traffic flowing.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};

use super::daemon::kill_pid;
use super::pair::{Pair, SOON, URL};
use super::program::Load;
use super::wait;

/// A part that can die.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// The control plane.
    Control,
    /// The agent of `web`'s node.
    Agent,
    /// `web`'s shim.
    Shim,
    /// `web`'s Envoy.
    Envoy,
}

use Part::{Agent, Control, Envoy, Shim};

/// Each part alone, then any two: ten rounds make a full turn.
pub const TURNS: [&[Part]; 10] = [
    &[Control],
    &[Agent],
    &[Shim],
    &[Envoy],
    &[Control, Agent],
    &[Control, Shim],
    &[Control, Envoy],
    &[Agent, Shim],
    &[Agent, Envoy],
    &[Shim, Envoy],
];

/// What a round showed.
#[derive(Debug)]
pub struct Round {
    /// What died.
    pub killed: &'static [Part],
    /// Requests that succeeded.
    pub good: usize,
    /// Requests that failed; only where Envoy was down.
    pub bad: usize,
    /// From the kill until requests succeed and everything runs again.
    pub back_after: Duration,
}

/// What runs, as the system sees it; equal before and after, or something leaks.
fn census(pair: &Pair) -> Vec<(&'static str, usize)> {
    let hosts =
        [&pair.web.host, &pair.backend.host, &pair.node_a.host, &pair.node_b.host, &pair.control.host];
    let count = |program| hosts.iter().map(|host| host.running(program).len()).sum();
    let sockets = walk(pair.lab.dir());
    vec![
        ("envoy", count("envoy")),
        ("ursa-shim", count("ursa-shim")),
        ("ursa-agent", count("ursa-agent")),
        ("ursa-control", count("ursa-control")),
        ("sockets", sockets),
    ]
}

fn walk(dir: &std::path::Path) -> usize {
    use std::os::unix::fs::FileTypeExt as _;
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .map(|entry| match entry.file_type() {
            Ok(kind) if kind.is_dir() => walk(&entry.path()),
            Ok(kind) => usize::from(kind.is_socket()),
            Err(_) => 0,
        })
        .sum()
}

/// Runs rounds one after the other, telling `report` of each.
pub fn run(pair: &mut Pair, rounds: usize, mut report: impl FnMut(usize, &Round)) -> anyhow::Result<()> {
    let before = census(pair);
    for (number, killed) in TURNS.iter().cycle().take(rounds).enumerate() {
        let round = self::round(pair, number, killed)
            .with_context(|| format!("round {number}: kill -9 of {killed:?}"))?;
        report(number, &round);
        // A shim that died with its Envoy may take a moment to be replaced.
        wait::until("as many processes and sockets as before", SOON, || match census(pair) {
            now if now == before => Ok(()),
            now => Err(format!("{now:?} instead of {before:?}")),
        })
        .with_context(|| format!("after round {number}, kill -9 of {killed:?}"))?;
    }
    Ok(())
}

fn round(pair: &mut Pair, number: usize, killed: &'static [Part]) -> anyhow::Result<Round> {
    let load = Load::start(&pair.lab, &pair.web.host, URL, Duration::from_millis(5))?;
    let flowing = |count: usize| {
        wait::until("traffic to flow", SOON, || match load.count() {
            now if now >= count => Ok(()),
            now => Err(format!("{now} answers")),
        })
    };
    flowing(20)?;

    // Acknowledged just before the kill, so it must be there afterwards.
    let name = format!("soak-{number}");
    pair.control.apply(&format!(
        "type: MeshTimeout\nmesh: default\nname: {name}\nspec:\n  targetRef: {{kind: Mesh}}\n  to:\n  \
         - targetRef: {{kind: Mesh}}\n    default: {{http: {{requestTimeout: {}s}}}}\n",
        10 + number
    ))?;

    // Looked up before the first kill: an Envoy dies with its shim.
    let (shims, envoys) = (pair.web.host.running("ursa-shim"), pair.web.host.running("envoy"));
    let begin = Instant::now();
    for part in killed {
        match part {
            Control => pair.control.daemon.kill(),
            Agent => pair.node_a.agent.kill(),
            Shim => kill_all(&shims)?,
            Envoy => kill_all(&envoys)?,
        }
    }
    // Envoy goes with its shim.
    let path_is_cut = killed.contains(&Envoy) || killed.contains(&Shim);
    // A shim is started again by its agent, so an agent that died comes back before requests can.
    if killed.contains(&Agent) {
        if !path_is_cut {
            flowing(load.count() + 50)?;
        }
        pair.node_a.agent.restart()?;
    }
    pair.until_served()?;
    if killed.contains(&Control) {
        flowing(load.count() + 50)?;
        pair.control.restart()?;
    }
    pair.node_a.wait_ready("web", SOON)?;
    let back_after = begin.elapsed();

    let settled = Instant::now();
    flowing(load.count() + 50)?;
    let after = load.tally(settled);
    ensure!(after.bad.is_empty(), "requests fail although everything is back: {}", after.bad[0].brief());
    let tally = load.tally(begin);
    ensure!(
        path_is_cut || tally.bad.is_empty(),
        "{} requests failed although Envoy was up the whole time; the first: {}",
        tally.bad.len(),
        tally.bad[0].brief()
    );
    let kept = pair.control.get("meshtimeout", &name).context("an acknowledged write is lost")?;
    ensure!(kept["spec"]["to"].is_array(), "an acknowledged write is changed: {kept}");
    pair.control.ursa(&["delete", "meshtimeout", &name])?;
    Ok(Round { killed, good: tally.good, bad: tally.bad.len(), back_after })
}

fn kill_all(pids: &[i32]) -> anyhow::Result<()> {
    ensure!(!pids.is_empty(), "there is nothing to kill");
    let unique: BTreeSet<_> = pids.iter().collect();
    for &pid in unique {
        // One that went with the other, killed just before, is as dead as wanted.
        if kill_pid(pid).is_err() {
            ensure!(!std::path::Path::new(&format!("/proc/{pid}")).exists(), "cannot kill {pid}");
        }
    }
    Ok(())
}
