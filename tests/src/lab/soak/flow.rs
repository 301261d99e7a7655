//! What flows all the time: requests and lookups of ordinary programs, with the time of each failure.

use std::io::{BufRead as _, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, ensure};

use crate::lab::program::Answer;
use crate::lab::wait;

/// Seconds since 1970: the clock that all programs of a lab share.
pub fn now() -> f64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

/// Something that failed, and in which stretch of time.
#[derive(Debug, Clone)]
pub struct Failure {
    /// When it began, in seconds since 1970.
    pub began: f64,
    /// When it was over.
    pub ended: f64,
    /// What came of it.
    pub what: String,
}

/// What came of everything so far.
#[derive(Debug, Default)]
pub struct Record {
    /// How many went well.
    pub good: usize,
    /// Those that didn't.
    pub failures: Vec<Failure>,
}

/// A program that asks all the time, until this is dropped.
#[derive(Debug)]
pub struct Flow {
    what: String,
    child: Child,
    record: Arc<Mutex<Record>>,
    reader: Option<JoinHandle<()>>,
}

impl Flow {
    /// Starts a command that prints one [`Answer`] per line.
    pub fn start(what: &str, command: &mut Command) -> anyhow::Result<Self> {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .with_context(|| format!("cannot start {what}"))?;
        let output = BufReader::new(child.stdout.take().context("invariant: piped")?);
        let record = Arc::new(Mutex::new(Record::default()));
        let collected = Arc::clone(&record);
        let reader = std::thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                let Ok(answer) = serde_json::from_str::<Answer>(&line) else { continue };
                let mut record = collected.lock().unwrap_or_else(PoisonError::into_inner);
                if answer.ok() {
                    record.good += 1;
                } else {
                    let kept = if answer.kept { " over a kept connection" } else { "" };
                    record.failures.push(Failure {
                        began: answer.began,
                        ended: answer.began + answer.ms / 1e3,
                        what: format!("{}{kept}", answer.brief()),
                    });
                }
            }
        });
        Ok(Self { what: what.to_owned(), child, record, reader: Some(reader) })
    }

    /// What it is.
    pub fn what(&self) -> &str {
        &self.what
    }

    /// What came of everything so far.
    pub fn record(&self) -> MutexGuard<'_, Record> {
        self.record.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until so many more have gone well.
    pub fn more(&mut self, count: usize, deadline: Duration) -> anyhow::Result<()> {
        let enough = self.record().good + count;
        self.until(&format!("{count} more {}", self.what), deadline, |record| record.good >= enough)
    }

    /// Waits until so many more have failed.
    pub fn fewer(&mut self, count: usize, deadline: Duration) -> anyhow::Result<()> {
        let enough = self.record().failures.len() + count;
        self.until(&format!("{count} failing {}", self.what), deadline, |record| {
            record.failures.len() >= enough
        })
    }

    fn until(
        &mut self,
        what: &str,
        deadline: Duration,
        reached: impl Fn(&Record) -> bool,
    ) -> anyhow::Result<()> {
        ensure!(matches!(self.child.try_wait(), Ok(None)), "the program behind {} has ended", self.what);
        wait::until(what, deadline, || {
            let record = self.record();
            if reached(&record) {
                return Ok(());
            }
            let last = record.failures.last().map(|failure| failure.what.clone()).unwrap_or_default();
            Err(format!("{} good, {} failed, lastly {last}", record.good, record.failures.len()))
        })
        .map(drop)
    }
}

impl Drop for Flow {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
    }
}
