//! A process is killed at random points under load; no acknowledged write may be lost.
//!
//! The parent runs this very test binary again as a child, which writes as fast as it can and sends a
//! line over a socket for each acknowledgement. Lines that reached the socket before the kill are what
//! the child's clients would have seen.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{BufRead, BufReader, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::Path,
    process::{Command, Stdio},
    sync::{Arc, Mutex},
    time::Duration,
};

use super::{mesh, mesh_key, secret};
use crate::store::StoreOptions;

const FOLDER: &str = "URSA_TEST_STORE_CHILD";
const ROUNDS: u32 = 20;
const WRITERS: u32 = 16;

/// The child; does nothing when the tests run by themselves.
#[test]
fn child() {
    let Ok(folder) = std::env::var(FOLDER) else { return };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(write_forever(Path::new(&folder)));
}

async fn write_forever(folder: &Path) {
    // First of all, so that the parent sees the end of this process even if it ends at once.
    let acks = Arc::new(Mutex::new(UnixStream::connect(folder.join("acks")).unwrap()));
    let store = super::reopen(&StoreOptions::in_dir(folder)).await;
    let run = uuid::Uuid::new_v4().simple().to_string();
    let mut tasks = tokio::task::JoinSet::new();
    for writer in 0..WRITERS {
        let (store, acks, run) = (store.clone(), acks.clone(), run.clone());
        tasks.spawn(async move {
            let ack = |line: String| acks.lock().unwrap().write_all(line.as_bytes()).unwrap();
            let counter = store.create(secret(&format!("{run}-counter-{writer}"), "MA==")).await.unwrap();
            let mut counter = (*counter).clone();
            for i in 0_u32.. {
                let name = format!("{run}-{writer}-{i}");
                store.create(mesh(&name)).await.unwrap();
                ack(format!("create {name}\n"));
                counter.spec["data"] = format!("{i:08}").into();
                counter = (*store.update(counter).await.unwrap()).clone();
                ack(format!("count {} {i}\n", counter.meta.name));
                if i % 3 == 0 {
                    // Announced first: from here on the object may be there or not.
                    ack(format!("deleting {name}\n"));
                    store.delete(&mesh_key(&name), None).await.unwrap();
                    ack(format!("deleted {name}\n"));
                }
            }
        });
    }
    tasks.join_all().await;
}

#[derive(Default)]
struct Acknowledged {
    present: BTreeSet<String>,
    absent: BTreeSet<String>,
    counters: BTreeMap<String, u32>,
}

impl Acknowledged {
    fn note(&mut self, line: &str) {
        let words: Vec<&str> = line.split(' ').collect();
        match words[..] {
            ["create", name] => drop(self.present.insert(name.into())),
            ["deleting", name] => drop(self.present.remove(name)),
            ["deleted", name] => drop(self.absent.insert(name.into())),
            ["count", name, value] => drop(self.counters.insert(name.into(), value.parse().unwrap())),
            // The kill cut this line off, so nobody has read it as an acknowledgement.
            _ => {}
        }
    }
}

#[test]
fn no_acknowledged_write_is_lost_by_kill_9() {
    let folder = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(folder.path().join("acks")).unwrap();
    let mut acknowledged = Acknowledged::default();
    for round in 0..ROUNDS {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["store::tests::crash::child", "--exact", "--nocapture"])
            .env(FOLDER, folder.path())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let (stream, _) = listener.accept().unwrap();
        let mut lines = BufReader::new(stream).split(b'\n');
        let first = lines.next().expect("the child acknowledges something").unwrap();
        acknowledged.note(&String::from_utf8(first).unwrap());
        // Under load from the first acknowledgement on; killed somewhere in the next 100 ms.
        let delay = u64::from(uuid::Uuid::new_v4().as_bytes()[0]) * 400;
        std::thread::sleep(Duration::from_micros(delay));
        child.kill().unwrap();
        child.wait().unwrap();
        for line in lines {
            acknowledged.note(&String::from_utf8(line.unwrap()).unwrap());
        }
        check(folder.path(), &acknowledged, round);
    }
    assert!(acknowledged.present.len() > 100, "the load was too small to prove anything");
}

fn check(folder: &Path, acknowledged: &Acknowledged, round: u32) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let store = super::reopen(&StoreOptions::in_dir(folder)).await;
        let listing = store.list_all().await.unwrap();
        let stored: BTreeMap<&str, _> =
            listing.resources.iter().map(|found| (found.meta.name.as_str(), found)).collect();
        for name in &acknowledged.present {
            assert!(stored.contains_key(name.as_str()), "round {round}: the create of {name} was lost");
        }
        for name in &acknowledged.absent {
            assert!(!stored.contains_key(name.as_str()), "round {round}: the delete of {name} was lost");
        }
        for (name, value) in &acknowledged.counters {
            let data = stored[name.as_str()].spec["data"].as_str().unwrap().to_owned();
            assert!(data.parse::<u32>().unwrap() >= *value, "round {round}: {name} went back to {data}");
        }
    });
    // Dropping the runtime's store ends its writer; the next child may find the file still locked.
    let db = loop {
        match rusqlite::Connection::open(folder.join("store.db")) {
            Ok(db) => break db,
            Err(_) => std::thread::yield_now(),
        }
    };
    let verdict: String = db.query_row("PRAGMA integrity_check", [], |row| row.get(0)).unwrap();
    assert_eq!(verdict, "ok", "round {round}");
}
