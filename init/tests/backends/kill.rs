//! `kill -9` at every system call of `apply`.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use ursa_init::backend::Backend;
use ursa_init::intent::{InboundMode, RedirectIntent};
use ursa_init::{Plan, nft};

use crate::lab::Namespace;
use crate::support::{moved, plan};
use crate::tracer::{Ended, Victim, run};

/// Points of a run, spread over all of it; `URSA_KILLS` says how many there are in `runs` of them, and more than a run
/// has hit each at least once.
fn points(all: usize, few: usize, runs: usize) -> Vec<usize> {
    let asked = std::env::var("URSA_KILLS").ok().and_then(|n| n.parse::<usize>().ok());
    let wanted = asked.map_or(few, |n| n.div_ceil(runs));
    (1..=wanted).map(|i| (i * all / wanted).max(1)).collect()
}

/// A document on disk for the program, gone when dropped.
struct Document(PathBuf);

impl Document {
    fn new(name: &str, intent: &RedirectIntent) -> Self {
        let path = std::env::temp_dir().join(format!("ursa-kill-{}-{name}.json", std::process::id()));
        std::fs::write(&path, serde_json::to_string(intent).unwrap()).unwrap();
        Self(path)
    }

    fn apply(&self, ns: &Namespace, backend: Backend) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ursa-init"));
        command.args(["apply", "--netns", ns.path().to_str().unwrap(), "--backend", &backend.to_string()]);
        command.arg("--config").arg(&self.0).stdout(Stdio::null());
        command
    }
}

impl Drop for Document {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn remove(ns: &Namespace) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ursa-init"));
    command
        .args(["remove", "--netns", ns.path().to_str().unwrap()])
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    command
}

/// How many stops a whole run has.
fn length(command: Command) -> usize {
    match run(command, usize::MAX, Victim::Everybody) {
        Ended::Itself { code: 0, stops } => stops,
        other => panic!("{other:?}"),
    }
}

/// What should be there and isn't, of routes and addresses: no rule may be in place before what it needs.
fn missing(ns: &Namespace, plan: &Plan) -> Vec<String> {
    let lines = ns.run(|| ursa_init::diff(plan)).unwrap();
    lines.into_iter().filter(|line| line.starts_with('+')).collect()
}

/// From nothing to a transparent redirect, to another one, and to nothing again.
#[test]
fn nftables_holds_the_old_rules_or_the_new() {
    let web = Namespace::alone();
    let mut intents = [moved(0), moved(100)];
    intents[0].inbound.mode = InboundMode::Tproxy;
    intents[1].vip_ranges = vec!["242.0.0.0/8".parse().unwrap(), "fd75:7273:6101::/64".parse().unwrap()];
    let plans: Vec<Plan> = intents.iter().map(plan).collect();
    let documents = [Document::new("nftables-a", &intents[0]), Document::new("nftables-b", &intents[1])];
    let steps = [("first", None, Some(0)), ("change", Some(0), Some(1)), ("remove", Some(1), None)];
    for (name, from, to) in steps {
        let prepare = || match from {
            Some(i) => length(documents[i].apply(&web, Backend::Nftables)),
            None => length(remove(&web)),
        };
        let command = || match to {
            Some(i) => documents[i].apply(&web, Backend::Nftables),
            None => remove(&web),
        };
        prepare();
        let all = length(command());
        let mut seen = [0, 0];
        for at in points(all, 24, steps.len()) {
            prepare();
            let _ = run(command(), at, Victim::Everybody);
            let rules = web.run(nft::read_back).unwrap();
            let is = |which: Option<usize>| match (which, &rules) {
                (None, found) => found.is_none(),
                (Some(_), None) => false,
                (Some(i), Some(_)) => web.run(|| nft::diff(&plans[i])).unwrap().is_empty(),
            };
            let (old, new) = (is(from), is(to));
            assert!(old != new, "{name}, killed at stop {at} of {all}: {rules:?}");
            if let Some(i) = if new { to } else { from } {
                assert_eq!(missing(&web, &plans[i]), Vec::<String>::new(), "{name}, stop {at} of {all}");
            }
            seen[usize::from(new)] += 1;
        }
        assert!(seen[0] > 0 && seen[1] > 0, "{name}: {seen:?}");
        println!("nftables, {name}: {} kills over {all} stops: {seen:?} old and new", seen[0] + seen[1]);
    }
    // Whatever was left, the next one ends it.
    length(documents[0].apply(&web, Backend::Nftables));
    assert!(web.run(|| ursa_init::diff(&plans[0])).unwrap().is_empty());
}

/// Our rules per family and table, as text.
type Tables = BTreeMap<(&'static str, String), Vec<String>>;

fn tables(ns: &Namespace, kind: &str) -> Tables {
    let mut tables = Tables::new();
    for family in ["iptables", "ip6tables"] {
        let mut table = String::new();
        for line in ns.sh(&format!("{family}-{kind}-save")).lines() {
            if let Some(name) = line.strip_prefix('*') {
                name.clone_into(&mut table);
            } else if line.starts_with("-A") && line.contains("URSA_") {
                tables.entry((family, table.clone())).or_default().push(line.to_owned());
            }
        }
    }
    tables
}

fn of(tables: &Tables, family: &'static str, table: &str) -> Vec<String> {
    let mut lines = tables.get(&(family, table.to_owned())).cloned().unwrap_or_default();
    lines.sort();
    lines
}

/// Each table is that of one plan, or while one plan follows the other the guards of both; and where a plan redirects,
/// all of its guards stand.
fn whole(now: &Tables, before: &Tables, after: &Tables, what: &str) {
    const GUARDS: [&str; 3] = ["raw", "mangle", "filter"];
    for family in ["iptables", "ip6tables"] {
        let nat = of(now, family, "nat");
        let (old, new) = (of(before, family, "nat"), of(after, family, "nat"));
        assert!(nat == old || nat == new, "{what}: {family} nat is {nat:#?}");
        for table in GUARDS {
            let lines = of(now, family, table);
            let (old_guards, new_guards) = (of(before, family, table), of(after, family, table));
            let mut both: Vec<_> = old_guards.iter().chain(&new_guards).cloned().collect();
            both.sort();
            both.dedup();
            assert!(
                lines == old_guards || lines == new_guards || lines == both,
                "{what}: {family} {table} is a mix: {lines:#?}"
            );
            let guards_of = |guards: &[String]| guards.iter().all(|line| lines.contains(line));
            if !nat.is_empty() {
                let old_stands = nat == old && guards_of(&old_guards);
                let new_stands = nat == new && guards_of(&new_guards);
                assert!(old_stands || new_stands, "{what}: {family} redirects without {table}: {lines:#?}");
            }
        }
    }
}

fn iptables_tables_are_whole(backend: Backend, kind: &str) {
    let intents = [moved(0), moved(100)];
    let documents =
        [Document::new(&format!("{kind}-a"), &intents[0]), Document::new(&format!("{kind}-b"), &intents[1])];
    let reference: Vec<Tables> = intents
        .iter()
        .map(|intent| {
            let ns = Namespace::alone();
            ns.apply(&plan(intent), backend).unwrap();
            tables(&ns, kind)
        })
        .collect();
    let nothing = Tables::new();
    let mut kills = 0;
    for (name, from, to) in
        [("first", None, Some(0)), ("change", Some(0), Some(1)), ("remove", Some(1), None)]
    {
        let web = Namespace::alone();
        let prepare = || match from {
            Some(i) => drop(web.apply(&plan(&intents[i]), backend).unwrap()),
            None => drop(web.run(ursa_init::remove).unwrap()),
        };
        let command = || match to {
            Some(i) => documents[i].apply(&web, backend),
            None => remove(&web),
        };
        let state = |which: Option<usize>| which.map_or(&nothing, |i| &reference[i]);
        prepare();
        let all = length(command());
        assert_eq!(tables(&web, kind), *state(to), "{name}");
        for (i, at) in points(all, 14, 3).into_iter().enumerate() {
            prepare();
            assert_eq!(tables(&web, kind), *state(from), "{name}");
            let victim = if i % 2 == 0 { Victim::Everybody } else { Victim::Program };
            let ended = run(command(), at, victim);
            kills += usize::from(ended == Ended::Killed);
            whole(&tables(&web, kind), state(from), state(to), &format!("{kind} {name}, stop {at} of {all}"));
        }
    }
    assert!(kills > 10, "{kills}");
    println!("iptables-{kind}: {kills} kills");
}

#[test]
fn iptables_on_nf_tables_has_whole_tables_and_guards() {
    iptables_tables_are_whole(Backend::IptablesNft, "nft");
}

#[test]
fn old_iptables_has_whole_tables_and_guards() {
    iptables_tables_are_whole(Backend::IptablesLegacy, "legacy");
}
