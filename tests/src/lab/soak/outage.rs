//! When a part was down: from just before its kill until an observer finds its successor serving.

use std::io::Read as _;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use super::flow::{Failure, now};
use crate::lab::{http, wait};

/// A stretch of time in which a part was down.
#[derive(Debug, Clone, Copy)]
pub struct Outage {
    /// Just before the kill, in seconds since 1970.
    pub from: f64,
    /// When its successor was found to serve; still to come if infinite.
    pub to: f64,
}

impl Outage {
    /// How long it was.
    pub fn ms(&self) -> f64 {
        (self.to - self.from) * 1e3
    }

    /// Whether a failure has to do with it.
    pub fn explains(&self, failure: &Failure) -> bool {
        failure.began <= self.to && failure.ended >= self.from
    }
}

/// What is looked at.
#[derive(Debug, Clone)]
pub enum Probe {
    /// Envoy says `LIVE` on this admin socket.
    Envoy(PathBuf),
    /// The shim greets on this control socket.
    Shim(PathBuf),
}

impl Probe {
    /// The process that serves, if one does.
    fn look(&self) -> Option<i32> {
        const PATIENCE: Duration = Duration::from_secs(1);
        match self {
            Self::Envoy(admin) => {
                let reply = http::ask(admin, "GET", "/ready", None, PATIENCE).ok()?;
                (reply.ok() && reply.body.trim() == "LIVE").then_some(reply.pid)
            }
            Self::Shim(control) => {
                let mut stream = UnixStream::connect(control).ok()?;
                stream.set_read_timeout(Some(PATIENCE)).ok()?;
                stream.read_exact(&mut [0]).ok()?;
                http::listener(&stream).ok()
            }
        }
    }
}

#[derive(Debug, Default)]
struct Seen {
    /// Who serves, or served before the outage.
    pid: i32,
    outages: Vec<Outage>,
    surprises: Vec<String>,
}

impl Seen {
    fn down(&self) -> bool {
        self.outages.last().is_some_and(|outage| outage.to.is_infinite())
    }
}

/// Watches one part from outside.
#[derive(Debug)]
pub struct Watch {
    what: String,
    seen: Arc<Mutex<Seen>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    /// Starts to watch a part that serves.
    pub fn start(what: &str, probe: Probe, deadline: Duration) -> anyhow::Result<Self> {
        let (pid, _) = wait::until(&format!("{what} to serve"), deadline, || {
            probe.look().ok_or_else(|| "nobody answers".to_owned())
        })?;
        let seen = Arc::new(Mutex::new(Seen { pid, ..Seen::default() }));
        let stop = Arc::new(AtomicBool::new(false));
        let thread = std::thread::spawn({
            let (what, seen, stop) = (what.to_owned(), Arc::clone(&seen), Arc::clone(&stop));
            move || watch(&what, &probe, &seen, &stop)
        });
        Ok(Self { what: what.to_owned(), seen, stop, thread: Some(thread) })
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its process is about to be killed, if it hasn't been already.
    pub fn falls(&self) {
        let mut seen = self.seen();
        if !seen.down() {
            seen.outages.push(Outage { from: now(), to: f64::INFINITY });
        }
    }

    /// Waits until its successor serves.
    pub fn until_back(&self, deadline: Duration) -> anyhow::Result<()> {
        wait::until(&format!("{} to serve again", self.what), deadline, || {
            if self.seen().down() { Err("it is down".to_owned()) } else { Ok(()) }
        })
        .map(drop)
    }

    /// Every outage so far.
    pub fn outages(&self) -> Vec<Outage> {
        self.seen().outages.clone()
    }

    /// What happened to it that nobody did.
    pub fn surprises(&self) -> Vec<String> {
        self.seen().surprises.clone()
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn watch(what: &str, probe: &Probe, seen: &Mutex<Seen>, stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        let found = probe.look();
        let at = now();
        let down = {
            let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
            let former = seen.pid;
            match found {
                Some(pid) if pid != former => {
                    seen.pid = pid;
                    if seen.down() {
                        if let Some(last) = seen.outages.last_mut() {
                            last.to = at;
                        }
                    } else {
                        let text =
                            format!("{what} is process {pid} instead of {former}, which nobody killed");
                        seen.surprises.push(text);
                    }
                }
                _ => {}
            }
            seen.down()
        };
        // What it looks at has no other way to tell; while it is down each look counts.
        std::thread::sleep(Duration::from_millis(if down { 3 } else { 50 }));
    }
}
