//! The shim's log: fields for journald, text for a terminal, JSON lines for a pipe or a file.

mod journal;

use std::io::{self, IsTerminal, Stderr, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::sys::stat::{SFlag, fstat};
use nix::unistd::ftruncate;
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, fmt, reload};

/// A log file that grows longer starts again from nothing: the directory of a shim may be in memory, and nobody
/// rotates what lies there.
const MAX_FILE: u64 = 8 * 1024 * 1024;

/// Changes the level of the log.
pub type SetLogLevel = Arc<dyn Fn(&str) -> Result<(), String> + Send + Sync>;

/// Starts logging: to journald where that reads our stderr, to stderr otherwise.
pub fn init(level: &str) -> Result<SetLogLevel, String> {
    let (filter, handle) = reload::Layer::new(parse(level)?);
    let lines = match journal::Journal::of_stderr() {
        Some(journal) => journal.boxed(),
        None if io::stderr().is_terminal() => fmt::layer().with_writer(Capped::new()).boxed(),
        None => fmt::layer().with_writer(Capped::new()).json().with_span_list(false).boxed(),
    };
    tracing_subscriber::registry().with(filter).with(lines).init();
    Ok(Arc::new(move |level| handle.reload(parse(level)?).map_err(|error| error.to_string())))
}

/// Whether there is such a level.
pub fn check(level: &str) -> Result<(), String> {
    parse(level).map(drop)
}

fn parse(level: &str) -> Result<LevelFilter, String> {
    level.parse().map_err(|_| format!("{level:?} is no log level; take trace, debug, info, warn or error"))
}

/// Stderr, emptied when it is a file that has grown too long.
#[derive(Debug)]
struct Capped {
    /// Bytes in the file; `None` if it is none.
    length: Option<Arc<AtomicU64>>,
}

impl Capped {
    fn new() -> Self {
        let file = fstat(io::stderr())
            .ok()
            .filter(|stat| SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT == SFlag::S_IFREG);
        Self { length: file.map(|stat| Arc::new(AtomicU64::new(u64::try_from(stat.st_size).unwrap_or(0)))) }
    }
}

impl<'a> MakeWriter<'a> for Capped {
    type Writer = Lines;

    fn make_writer(&'a self) -> Lines {
        Lines { stderr: io::stderr(), length: self.length.clone() }
    }
}

struct Lines {
    stderr: Stderr,
    length: Option<Arc<AtomicU64>>,
}

impl Write for Lines {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if let Some(length) = &self.length {
            let added = u64::try_from(line.len()).unwrap_or(0);
            if length.fetch_add(added, Ordering::Relaxed) + added > MAX_FILE {
                // The file is open for appending, so the next line begins it.
                ftruncate(&self.stderr, 0)?;
                length.store(added, Ordering::Relaxed);
            }
        }
        self.stderr.write(line)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stderr.flush()
    }
}
