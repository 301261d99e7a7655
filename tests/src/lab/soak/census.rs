//! What there is, as the system sees it; more after a round than before it is a leak.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use ursa_init::nft::{self, Counters};

use crate::lab::net::Host;
use crate::lab::pair::Pair;

/// The programs that are counted, and how many more open files than at the start each may have: connections come
/// and go with the traffic.
const PROGRAMS: [(&str, usize); 4] =
    [("ursa-control", 24), ("ursa-agent", 24), ("ursa-shim", 16), ("envoy", 64)];

/// Everything that must not grow.
#[derive(Debug, Clone, Default)]
pub struct Census {
    /// (host, program) → processes.
    processes: BTreeMap<(String, &'static str), usize>,
    /// Rules, routes and addresses: host → lines.
    rules: BTreeMap<String, Vec<String>>,
    /// Files, sockets and folders in the lab's folder, logs apart.
    files: BTreeSet<String>,
    /// Named network namespaces of the lab, and their folders of settings.
    namespaces: BTreeSet<PathBuf>,
    /// Envoy's shared memory.
    memory: BTreeSet<PathBuf>,
    /// (host, program) → open files of the one that has most.
    open_files: BTreeMap<(String, &'static str), usize>,
    /// Processes that ended and were not collected.
    zombies: Vec<String>,
}

impl Census {
    /// Counts.
    pub fn take(pair: &Pair) -> anyhow::Result<Self> {
        let hosts = hosts(pair);
        let mut census = Self::default();
        let mut ours = BTreeSet::from([std::process::id().cast_signed()]);
        for host in &hosts {
            ours.extend(host.pids());
            for (program, _) in PROGRAMS {
                let pids = host.running(program);
                let key = (short(host, pair), program);
                let most = pids.iter().map(|pid| open_files(*pid)).max().unwrap_or(0);
                census.processes.insert(key.clone(), pids.len());
                census.open_files.insert(key, most);
            }
            census.rules.insert(short(host, pair), network(host)?);
        }
        census.zombies = zombies(&ours);
        census.files = walk(pair.lab.dir());
        census.namespaces = listed("/run/netns", &pair.lab.prefix);
        census.namespaces.extend(listed("/etc/netns", &pair.lab.prefix));
        // Named by Envoy after ten times its base id; other labs have their own.
        for host in &hosts {
            for pid in host.running("envoy") {
                if let Some(id) = base_id(pid) {
                    census.memory.extend(listed("/dev/shm", &format!("envoy_shared_memory_{}", id * 10)));
                }
            }
        }
        Ok(census)
    }

    /// Without files that are only being written right now, and may stay in no later census.
    #[must_use]
    pub fn settled(mut self) -> Self {
        self.files.retain(|path| Path::new(path).extension().is_none_or(|kind| kind != "tmp"));
        self
    }

    /// Whether an address is still being looked for on the link.
    pub fn tentative(&self) -> bool {
        self.rules.values().flatten().any(|line| line.contains(" tentative"))
    }

    /// What differs from `before`, in words; nothing if nothing leaked.
    pub fn against(&self, before: &Self) -> Vec<String> {
        let mut leaks = Vec::new();
        for (key, count) in &self.processes {
            let expected = before.processes.get(key).copied().unwrap_or(0);
            if *count != expected {
                leaks.push(format!("{count} {} on {} instead of {expected}", key.1, key.0));
            }
        }
        for (host, lines) in &self.rules {
            let former = before.rules.get(host).cloned().unwrap_or_default();
            leaks.extend(different(&former, lines).map(|line| format!("on {host}: {line}")));
        }
        for (what, now, then) in [
            ("namespace", &self.namespaces, &before.namespaces),
            ("shared memory", &self.memory, &before.memory),
        ] {
            leaks.extend(now.difference(then).map(|path| format!("{what} {} is new", path.display())));
            leaks.extend(then.difference(now).map(|path| format!("{what} {} is gone", path.display())));
        }
        leaks.extend(self.files.difference(&before.files).map(|path| format!("{path} is new")));
        leaks.extend(before.files.difference(&self.files).map(|path| format!("{path} is gone")));
        for (key, count) in &self.open_files {
            let most = before.open_files.get(key).copied().unwrap_or(0)
                + PROGRAMS.iter().find(|(program, _)| *program == key.1).map_or(0, |(_, slack)| *slack);
            if *count > most {
                leaks.push(format!("{} on {} has {count} open files, more than {most}", key.1, key.0));
            }
        }
        leaks.extend(self.zombies.iter().cloned());
        leaks
    }

    /// Open files of the process of each program that has most.
    pub fn open_files(&self) -> BTreeMap<&'static str, usize> {
        let mut most = BTreeMap::new();
        for ((_, program), count) in &self.open_files {
            let entry: &mut usize = most.entry(*program).or_default();
            *entry = (*entry).max(*count);
        }
        most
    }
}

/// Every host on which something of the mesh runs.
pub fn hosts(pair: &Pair) -> [&Host; 6] {
    [
        &pair.web.host,
        &pair.backend.host,
        &pair.node_a.host,
        &pair.node_b.host,
        &pair.control.host,
        &pair.stranger,
    ]
}

fn short(host: &Host, pair: &Pair) -> String {
    host.netns.trim_start_matches(&pair.lab.prefix).trim_start_matches('-').to_owned()
}

/// The redirect's rules and every route, rule of routing and address of a host, without counters and times.
pub fn network(host: &Host) -> anyhow::Result<Vec<String>> {
    let path = host.path();
    let mut lines = ursa_init::in_netns(&path, || {
        let rules = nft::read_back()?.map(|found| found.lines(Counters::Hide)).unwrap_or_default();
        Ok::<_, ursa_init::Error>(rules)
    })
    .and_then(|result| result)
    .with_context(|| format!("the rules of {} can't be read", host.netns))?;
    for args in [
        &["-4", "route", "show", "table", "all"][..],
        &["-6", "route", "show", "table", "all"],
        &["-4", "rule"],
        &["-6", "rule"],
        &["-o", "addr"],
    ] {
        let text = host.ip(args)?;
        let mut found: Vec<String> = text.lines().map(without_times).collect();
        found.sort();
        lines.extend(found);
    }
    Ok(lines)
}

/// Lifetimes count down, and a cloned route is a cache.
fn without_times(line: &str) -> String {
    let mut words = Vec::new();
    let mut all = line.split_whitespace();
    while let Some(word) = all.next() {
        if ["expires", "valid_lft", "preferred_lft"].contains(&word) {
            all.next();
        } else {
            words.push(word);
        }
    }
    words.join(" ")
}

fn different<'a>(before: &'a [String], now: &'a [String]) -> impl Iterator<Item = String> + 'a {
    let gone = before.iter().filter(|line| !now.contains(line)).map(|line| format!("- {line}"));
    let new = now.iter().filter(|line| !before.contains(line)).map(|line| format!("+ {line}"));
    let doubled = (before.len() != now.len())
        .then(|| format!("{} rules and routes instead of {}", now.len(), before.len()));
    gone.chain(new).chain(doubled)
}

fn open_files(pid: i32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count)
}

/// What is in a folder, by path below it and kind. Logs grow and are looked at by people.
fn walk(root: &Path) -> BTreeSet<String> {
    fn descend(root: &Path, dir: &Path, found: &mut BTreeSet<String>) {
        for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
            let path = entry.path();
            let name = path.strip_prefix(root).unwrap_or(&path).display().to_string();
            if name == "log" || name.ends_with("/run/log") || name == "bin" {
                continue;
            }
            let Ok(kind) = entry.file_type() else { continue };
            found.insert(format!("{} {name}", if kind.is_dir() { "folder" } else { "file" }));
            if kind.is_dir() {
                descend(root, &path, found);
            }
        }
    }
    let mut found = BTreeSet::new();
    descend(root, root, &mut found);
    found
}

fn listed(dir: &str, prefix: &str) -> BTreeSet<PathBuf> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(prefix))
        .map(|entry| entry.path())
        .collect()
}

fn base_id(pid: i32) -> Option<u64> {
    let arguments = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let mut arguments = arguments.split(|byte| *byte == 0);
    arguments.find(|argument| *argument == b"--base-id")?;
    std::str::from_utf8(arguments.next()?).ok()?.parse().ok()
}

/// Processes that ended and that a process of ours should have collected.
fn zombies(ours: &BTreeSet<i32>) -> Vec<String> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Ok(stat) = std::fs::read_to_string(entry.path().join("stat")) else { continue };
        // The name is in parentheses and may hold anything.
        let Some((head, tail)) = stat.rsplit_once(')') else { continue };
        let mut fields = tail.split_whitespace();
        let (state, parent) = (fields.next(), fields.next().and_then(|pid| pid.parse().ok()));
        if state == Some("Z") && parent.is_some_and(|parent| ours.contains(&parent)) {
            found.push(format!("{head}) is a zombie of process {}", parent.unwrap_or_default()));
        }
    }
    found
}
