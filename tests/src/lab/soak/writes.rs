//! Writes that flow all the time, and a ledger of what was acknowledged.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use serde_json::json;

use super::flow::{Failure, now};
use crate::lab::{http, wait};

/// The policy that reaches every Envoy: of equal ones the first by name counts, so it comes before the defaults.
const LIVE: &str = "a-soak-live";
/// Policies that are rewritten in turn and concern nobody.
const OTHERS: u64 = 4;
const COLLECTION: &str = "/meshes/default/meshtimeouts";
/// No write takes longer.
const PATIENCE: Duration = Duration::from_secs(10);

/// What is known of one resource: the number it carries is in its label `soak`.
#[derive(Debug, Default)]
struct Entry {
    /// The last acknowledged one.
    acknowledged: Option<u64>,
    /// Later ones, whose answers never came: each may be there or not.
    perhaps: Vec<u64>,
}

#[derive(Debug, Default)]
struct Ledger {
    entries: BTreeMap<String, Entry>,
    /// The number that the live policy carries.
    live: u64,
    good: usize,
    failures: Vec<Failure>,
}

/// Writes until dropped.
#[derive(Debug)]
pub struct Writes {
    socket: PathBuf,
    ledger: Arc<Mutex<Ledger>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Writes {
    /// Starts to write through the operator's socket.
    pub fn start(socket: &Path) -> Self {
        let ledger = Arc::new(Mutex::new(Ledger::default()));
        let stop = Arc::new(AtomicBool::new(false));
        let thread = std::thread::spawn({
            let (socket, ledger, stop) = (socket.to_owned(), Arc::clone(&ledger), Arc::clone(&stop));
            move || {
                for number in 1.. {
                    if stop.load(Ordering::Relaxed) {
                        return;
                    }
                    write(&socket, &ledger, number);
                    std::thread::sleep(Duration::from_millis(15));
                }
            }
        });
        Self { socket: socket.to_owned(), ledger, stop, thread: Some(thread) }
    }

    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many were acknowledged.
    pub fn good(&self) -> usize {
        self.ledger().good
    }

    /// Those that weren't.
    pub fn failures(&self) -> Vec<Failure> {
        self.ledger().failures.clone()
    }

    /// Waits until so many more are acknowledged.
    pub fn more(&self, count: usize, deadline: Duration) -> anyhow::Result<()> {
        let enough = self.good() + count;
        wait::until(&format!("{count} more writes"), deadline, || {
            let ledger = self.ledger();
            if ledger.good >= enough {
                return Ok(());
            }
            Err(ledger.failures.last().map_or_else(String::new, |failure| failure.what.clone()))
        })
        .map(drop)
    }

    /// Holds writing up, and checks that everything acknowledged is there and that each Envoy has the last one.
    pub fn verify(&self, admins: &[PathBuf], deadline: Duration) -> anyhow::Result<()> {
        // A write is made under the same lock: none is under way while it is held.
        let mut ledger = self.ledger();
        let stored = self.stored()?;
        for (name, entry) in &mut ledger.entries {
            let found = stored.get(name).copied();
            let possible =
                found == entry.acknowledged || found.is_some_and(|number| entry.perhaps.contains(&number));
            ensure!(
                possible,
                "an acknowledged write is lost: MeshTimeout {name:?} carries {found:?}; acknowledged was {:?}, and \
                 without an answer remained {:?}",
                entry.acknowledged,
                entry.perhaps
            );
            // What is there now stays: a write without an answer that comes to light later would be as wrong.
            entry.acknowledged = found;
            entry.perhaps.clear();
        }
        ledger.live = stored.get(LIVE).copied().unwrap_or(ledger.live);
        let wanted = format!("\"{}\"", shown(ledger.live));
        for admin in admins {
            wait::until(&format!("the Envoy of {} to have {wanted}", admin.display()), deadline, || {
                let dump = http::ask(admin, "GET", "/config_dump", None, PATIENCE)
                    .map_err(|error| error.to_string())?;
                if dump.body.contains(&wanted) {
                    return Ok(());
                }
                let others: Vec<&str> =
                    dump.body.lines().map(str::trim).filter(|line| line.starts_with("\"timeout\"")).collect();
                Err(format!("{others:?}"))
            })?;
        }
        Ok(())
    }

    /// Name → number of what is in the store.
    fn stored(&self) -> anyhow::Result<BTreeMap<String, u64>> {
        let mut found = BTreeMap::new();
        loop {
            let path = format!("{COLLECTION}?name=soak-&size=500&offset={}", found.len());
            let reply = http::ask(&self.socket, "GET", &path, None, PATIENCE)?;
            ensure!(reply.ok(), "the writes can't be read back: {}", reply.brief());
            let page = reply.json()?;
            let items = page["items"].as_array().context("a list has items")?;
            for item in items {
                let number = item["labels"]["soak"].as_str().and_then(|text| text.parse().ok());
                let number = number.with_context(|| format!("a write is changed: {item}"))?;
                found.insert(item["name"].as_str().unwrap_or_default().to_owned(), number);
            }
            if items.is_empty() || page["next"].is_null() {
                return Ok(found);
            }
        }
    }
}

impl Drop for Writes {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Every fourth reaches the Envoys, every tenth is new, the others go round.
fn write(socket: &Path, ledger: &Mutex<Ledger>, number: u64) {
    let name = match number {
        number if number % 10 == 9 => format!("soak-made-{number}"),
        number if number % 4 == 0 => LIVE.to_owned(),
        number => format!("soak-{}", number % OTHERS),
    };
    let target = if name == LIVE {
        json!({"kind": "Mesh"})
    } else {
        json!({"kind": "Dataplane", "labels": {"nobody": "has-this"}})
    };
    let body = json!({
        "type": "MeshTimeout", "mesh": "default", "name": name, "labels": {"soak": number.to_string()},
        "spec": {"targetRef": target, "to": [{
            "targetRef": {"kind": "Mesh"},
            "default": {"http": {"requestTimeout": format!("{}ms", milliseconds(number))}},
        }]},
    });
    let mut ledger = ledger.lock().unwrap_or_else(PoisonError::into_inner);
    let began = now();
    let answer = http::ask(socket, "PUT", &format!("{COLLECTION}/{name}"), Some(&body.to_string()), PATIENCE);
    let ended = now();
    let entry = ledger.entries.entry(name.clone()).or_default();
    match answer {
        Ok(reply) if reply.ok() => {
            entry.acknowledged = Some(number);
            entry.perhaps.clear();
            ledger.good += 1;
            if name == LIVE {
                ledger.live = number;
            }
        }
        other => {
            entry.perhaps.push(number);
            let what = other.map_or_else(|error| format!("{error:#}"), |reply| reply.brief());
            ledger.failures.push(Failure { began, ended, what: format!("write {number} of {name}: {what}") });
        }
    }
}

fn milliseconds(number: u64) -> u64 {
    20_000 + number
}

/// The timeout as Envoy prints it.
fn shown(number: u64) -> String {
    let all = milliseconds(number);
    let (seconds, rest) = (all / 1000, all % 1000);
    if rest == 0 { format!("{seconds}s") } else { format!("{seconds}.{rest:03}s") }
}
