//! The redirect put into fresh namespaces: Ursa's netlink batch, and the same rules by the programs that others start.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use ursa_init::plan::Family;
use ursa_init::{Plan, RedirectIntent, iptables, nft};

use super::space::{Call, Space, Times, alone};
use super::trace::{self, Counts};

/// The proxy's user.
const PROXY: u32 = 5678;
/// One namespace in so many gets its rules by a process per rule, which takes a hundred times as long.
const SLOW: usize = 10;

/// One way to put the rules in place.
#[derive(Debug, Clone, Default)]
pub struct Way {
    /// From the call to the rules in place, in a fresh namespace each.
    pub times: Times,
    /// What it asks of the kernel; none for what is no program of its own.
    pub counts: Option<Counts>,
    /// How many programs that takes.
    pub programs: usize,
}

/// Everything that was measured.
#[derive(Debug)]
pub struct Rules {
    /// How many rules: all of Ursa's, and all of iptables' for both families.
    pub rules: (usize, usize),
    /// In this process: rules in one netlink batch, and their read-back.
    pub batch: Way,
    /// The same with the routes of mesh addresses.
    pub whole: Way,
    /// Once more with nothing to change.
    pub again: Way,
    /// `ursa-init apply`, the whole process.
    pub program: Way,
    /// `nft -f`.
    pub nft: Way,
    /// `iptables-nft-restore` and `ip6tables-nft-restore`.
    pub restore: Way,
    /// A process per rule.
    pub each: Way,
}

/// The plan of a workload with all defaults.
pub fn plan() -> anyhow::Result<Plan> {
    Ok(Plan::compile(&RedirectIntent { proxy_uids: vec![PROXY], ..RedirectIntent::default() })?)
}

/// `ursa-init apply` of the same plan.
pub fn apply_call(bin_dir: &Path) -> Call {
    Call::new(bin_dir.join("ursa-init"), &["apply", "--proxy-uid", &PROXY.to_string()])
}

/// The calls of one way that others go.
struct Peers {
    nft: Call,
    restore: Vec<Call>,
    each: Vec<Call>,
}

/// Measures all ways in turn, so that what disturbs one disturbs all.
pub fn measure(bin_dir: &Path, namespaces: usize, say: fn(&str)) -> anyhow::Result<Rules> {
    let plan = &plan()?;
    let scratch = tempfile::tempdir().context("cannot create a folder")?;
    let peers = &peers(plan, bin_dir, scratch.path())?;
    let program = &apply_call(bin_dir);
    say(&format!(
        "the redirect in {namespaces} namespaces for each of six ways, and by a process per rule in {}",
        namespaces.div_ceil(SLOW)
    ));
    // The kernel patches its own code when the first namespace of the machine gets rules, and back after the last:
    // one stays for as long as others come and go.
    let stays = {
        let (plan, restore) = (plan.clone(), peers.restore.clone());
        Space::new(move || {
            nft::apply(&plan)?;
            restore.iter().try_for_each(|call| call.run().map(drop))
        })?
    };
    let mut ways: [Way; 7] = Default::default();
    for run in 0..namespaces {
        ways[0].times.push(alone(|| timed(|| Ok(nft::apply(plan)?)))?);
        let (whole, again) = alone(|| {
            let apply = || Ok(ursa_init::apply(plan)?);
            Ok((timed(apply)?, timed(apply)?))
        })?;
        ways[1].times.push(whole);
        ways[2].times.push(again);
        let all = |calls: &[Call]| -> anyhow::Result<Duration> {
            alone(|| calls.iter().map(|call| call.run().map(|(_, took)| took)).sum())
        };
        ways[3].times.push(all(std::slice::from_ref(program))?);
        ways[4].times.push(all(std::slice::from_ref(&peers.nft))?);
        ways[5].times.push(all(&peers.restore)?);
        if run % SLOW == 0 {
            ways[6].times.push(all(&peers.each)?);
        }
    }
    drop(stays);
    let counted = [
        (3, std::slice::from_ref(program)),
        (4, std::slice::from_ref(&peers.nft)),
        (5, peers.restore.as_slice()),
        (6, peers.each.as_slice()),
    ];
    for (way, calls) in counted {
        ways[way].counts = Some(count_all(calls, scratch.path())?);
        ways[way].programs = calls.len();
    }
    let [batch, whole, again, program, nft, restore, each] = ways;
    let rules = (plan.chains.iter().map(|chain| chain.rules.len()).sum(), peers.each.len());
    Ok(Rules { rules, batch, whole, again, program, nft, restore, each })
}

fn timed<T>(work: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<Duration> {
    let start = Instant::now();
    work()?;
    Ok(start.elapsed())
}

/// What one call of each does in one fresh namespace. Programs, netlink messages and sockets are those of all.
pub fn count_all(calls: &[Call], scratch: &Path) -> anyhow::Result<Counts> {
    alone(|| {
        let mut all = Counts::default();
        for call in calls {
            all += trace::count(call, scratch)?;
        }
        Ok(all)
    })
}

/// The rules in the others' words. nft's must load to Ursa's own, to the byte.
fn peers(plan: &Plan, bin_dir: &Path, scratch: &Path) -> anyhow::Result<Peers> {
    let render = Call::new(bin_dir.join("ursa-init"), &["render", "--proxy-uid", &PROXY.to_string()]);
    let file = scratch.join("rules.nft");
    std::fs::write(&file, render.run()?.0).with_context(|| format!("cannot write {}", file.display()))?;
    let nft = Call::new("nft", &["-f", &file.to_string_lossy()]);
    let differences = alone(|| {
        nft.run()?;
        Ok(nft::diff(plan)?)
    })?;
    if !differences.is_empty() {
        bail!("nft loads something else than Ursa's rules: {}", differences.join("\n"));
    }
    let (mut restore, mut each) = (Vec::new(), Vec::new());
    let tables = iptables::render(plan)?;
    for (of, program) in [(Family::V4, "iptables-nft"), (Family::V6, "ip6tables-nft")] {
        let mut input = String::new();
        for (_, table, text) in tables.iter().filter(|(family, ..)| *family == of) {
            input.push_str(text);
            each.extend(text.lines().filter_map(|line| one_rule(program, table.name(), line)));
        }
        restore.push(Call { input, ..Call::new(format!("{program}-restore"), &["--noflush"]) });
    }
    Ok(Peers { nft, restore, each })
}

/// A line for `iptables-restore` as a call of its own; none for what isn't a chain or rule.
fn one_rule(program: &str, table: &str, line: &str) -> Option<Call> {
    let args = match line.strip_prefix(':') {
        Some(chain) => vec!["-N".to_owned(), chain.split(' ').next()?.to_owned()],
        None if line.starts_with('-') => words(line),
        None => return None,
    };
    let mut call = Call::new(program, &["-t", table]);
    call.args.extend(args);
    Some(call)
}

/// Words apart, quoted ones whole.
fn words(line: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut quoted = false;
    for c in line.chars() {
        match c {
            '"' => quoted = !quoted,
            ' ' if !quoted => words.push(String::new()),
            c => words.last_mut().into_iter().for_each(|word| word.push(c)),
        }
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_restore_is_a_call() {
        let args = |line| one_rule("iptables", "raw", line).map(|call| call.args);
        assert_eq!(args("*raw"), None);
        assert_eq!(args(":URSA_X - [0:0]").unwrap(), ["-t", "raw", "-N", "URSA_X"]);
        let rule = r#"-A URSA_X -m comment --comment "two words" -j DROP"#;
        let expected = ["-t", "raw", "-A", "URSA_X", "-m", "comment", "--comment", "two words", "-j", "DROP"];
        assert_eq!(args(rule).unwrap(), expected);
    }
}
