//! journald's native protocol: <https://systemd.io/JOURNAL_NATIVE_PROTOCOL>. A line of ours is an entry with fields, so
//! that `journalctl MESH=default WORKLOAD=web-1` finds it.
//!
//! Entries are sent without waiting. A journald that hangs costs lines; waiting for it would cost the service.

use std::fmt::{Debug, Write as _};
use std::fs;
use std::io;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::atomic::{AtomicU64, Ordering};

use nix::sys::stat::fstat;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;
use tracing_subscriber::registry::LookupSpan;

const SOCKET: &str = "/run/systemd/journal/socket";
/// Longer values are cut: the socket takes about 200 KiB in one datagram.
const MAX_VALUE: usize = 48 * 1024;

/// Sends what is logged to journald.
#[derive(Debug)]
pub(super) struct Journal {
    socket: UnixDatagram,
    /// Named anew with each entry, so that a journald that starts again is found.
    journald: SocketAddr,
    lost: AtomicU64,
}

impl Journal {
    /// If journald reads our stderr, as `JOURNAL_STREAM` says, and takes entries.
    pub(super) fn of_stderr() -> Option<Self> {
        let stream = std::env::var("JOURNAL_STREAM").ok()?;
        let stat = fstat(io::stderr()).ok()?;
        if !is(&stream, stat.st_dev, stat.st_ino) {
            return None;
        }
        Self::connect(SOCKET).ok()
    }

    fn connect(path: &str) -> io::Result<Self> {
        fs::metadata(path)?;
        let socket = UnixDatagram::unbound()?;
        socket.set_nonblocking(true)?;
        Ok(Self { socket, journald: SocketAddr::from_pathname(path)?, lost: AtomicU64::new(0) })
    }

    fn send(&self, entry: &Entry) {
        match self.socket.send_to_addr(&entry.bytes, &self.journald) {
            Ok(_) => {
                let lost = self.lost.swap(0, Ordering::Relaxed);
                if lost > 0 {
                    let mut entry = Entry::new(Level::WARN, "ursa_agent::shim::log");
                    entry.add(
                        "MESSAGE",
                        &format!("{lost} lines before this one were lost: journald took none"),
                    );
                    self.send(&entry);
                }
            }
            Err(_) => {
                self.lost.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
}

/// Whether `device:inode` is that file.
fn is(stream: &str, device: u64, inode: u64) -> bool {
    stream.split_once(':').is_some_and(|(dev, ino)| dev.parse() == Ok(device) && ino.parse() == Ok(inode))
}

/// What a span says, kept with it.
#[derive(Debug, Default)]
struct Fields(Vec<(String, String)>);

impl Fields {
    fn set(&mut self, field: &Field, value: String) {
        let name = name(field.name());
        match self.0.iter_mut().find(|(known, _)| *known == name) {
            Some((_, known)) => *known = value,
            None => self.0.push((name, value)),
        }
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.set(field, format!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.set(field, value.to_owned());
    }
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Journal {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let Some(span) = context.span(id) else { return };
        let mut fields = Fields::default();
        attributes.record(&mut fields);
        span.extensions_mut().insert(fields);
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, context: Context<'_, S>) {
        let Some(span) = context.span(id) else { return };
        if let Some(fields) = span.extensions_mut().get_mut::<Fields>() {
            values.record(fields);
        }
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        let mut entry = Entry::new(*event.metadata().level(), event.metadata().target());
        let mut fields = Fields::default();
        event.record(&mut fields);
        for span in context.event_scope(event).into_iter().flatten() {
            if let Some(known) = span.extensions().get::<Fields>() {
                for (name, value) in &known.0 {
                    // What is nearer to the event counts.
                    if !fields.0.iter().any(|(other, _)| other == name) {
                        fields.0.push((name.clone(), value.clone()));
                    }
                }
            }
        }
        // Whoever reads lines wants to see what isn't in the message.
        let mut message = String::new();
        for (name, value) in &fields.0 {
            match name.as_str() {
                "MESSAGE" => message.insert_str(0, value),
                "MESH" | "WORKLOAD" | "EPOCH" => {}
                _ if value.is_empty() => {}
                _ => {
                    let _ = write!(message, " {}={value}", name.to_ascii_lowercase());
                }
            }
        }
        entry.add("MESSAGE", message.trim_start());
        for (name, value) in fields.0.iter().filter(|(name, _)| name != "MESSAGE") {
            entry.add(name, value);
        }
        self.send(&entry);
    }
}

/// One datagram.
struct Entry {
    bytes: Vec<u8>,
}

impl Entry {
    fn new(level: Level, target: &str) -> Self {
        let mut entry = Self { bytes: Vec::with_capacity(512) };
        // As syslog counts: error, warning, notice, informational, debug.
        let priority = match level {
            Level::ERROR => "3",
            Level::WARN => "4",
            Level::INFO => "6",
            _ => "7",
        };
        entry.add("PRIORITY", priority);
        entry.add("SYSLOG_IDENTIFIER", "ursa-shim");
        entry.add("TARGET", target);
        entry
    }

    fn add(&mut self, name: &str, value: &str) {
        let mut end = value.len().min(MAX_VALUE);
        while !value.is_char_boundary(end) {
            end -= 1;
        }
        let value = &value.as_bytes()[..end];
        self.bytes.extend_from_slice(name.as_bytes());
        if value.contains(&b'\n') {
            self.bytes.push(b'\n');
            self.bytes.extend_from_slice(&u64::try_from(value.len()).unwrap_or(0).to_le_bytes());
        } else {
            self.bytes.push(b'=');
        }
        self.bytes.extend_from_slice(value);
        self.bytes.push(b'\n');
    }
}

/// A field's name as journald takes it: upper case, digits and underscores, beginning with a letter.
fn name(field: &str) -> String {
    let name: String = field
        .chars()
        .map(|character| if character.is_ascii_alphanumeric() { character.to_ascii_uppercase() } else { '_' })
        .take(64)
        .collect();
    match name.chars().next() {
        Some('A'..='Z') => name,
        _ => format!("F{name}"),
    }
}

#[cfg(test)]
mod tests {
    use tracing_subscriber::layer::SubscriberExt;

    use super::*;

    #[test]
    fn an_entry_has_the_workload_and_what_was_said() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        let journald = UnixDatagram::bind(&path).unwrap();
        let journal = Journal::connect(path.to_str().unwrap()).unwrap();
        let mut buffer = [0; 4096];
        let mut read = || {
            let length = journald.recv(&mut buffer).unwrap();
            String::from_utf8_lossy(&buffer[..length]).into_owned()
        };
        tracing::subscriber::with_default(tracing_subscriber::registry().with(journal), || {
            let span = tracing::error_span!(
                "shim",
                mesh = tracing::field::Empty,
                workload = "web",
                epoch = tracing::field::Empty
            );
            let _entered = span.enter();
            tracing::info!("first");
            let entry = read();
            assert!(entry.contains("WORKLOAD=web\n") && !entry.contains("MESH="), "{entry}");
            span.record("mesh", "default");
            span.record("workload", "web-1");
            span.record("epoch", 1);
            tracing::warn!(target: "envoy", epoch = 2, component = "main", reason = %"a\nb", "second");
            let entry = read();
            for line in
                ["PRIORITY=4", "MESH=default", "WORKLOAD=web-1", "EPOCH=2", "COMPONENT=main", "TARGET=envoy"]
            {
                assert!(entry.lines().any(|found| found == line), "{line}: {entry}");
            }
            assert!(!entry.contains("EPOCH=1"), "{entry}");
            assert!(
                entry.contains("MESSAGE\n\u{20}\0\0\0\0\0\0\0second component=main reason=a\nb\n"),
                "{entry:?}"
            );
        });
    }

    #[test]
    fn a_journald_that_does_not_read_costs_lines_and_says_so() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        let journald = UnixDatagram::bind(&path).unwrap();
        let journal = Journal::connect(path.to_str().unwrap()).unwrap();
        let mut entry = Entry::new(Level::INFO, "x");
        entry.add("MESSAGE", &"y".repeat(10_000));
        let mut sent = 0;
        while journal.lost.load(Ordering::Relaxed) == 0 {
            journal.send(&entry);
            sent += 1;
            assert!(sent < 100_000, "it takes everything");
        }
        let mut buffer = vec![0; 20_000];
        journald.set_nonblocking(true).unwrap();
        while journald.recv(&mut buffer).is_ok() {}
        journal.send(&entry);
        journald.recv(&mut buffer).unwrap();
        let length = journald.recv(&mut buffer).unwrap();
        let text = String::from_utf8_lossy(&buffer[..length]);
        assert!(text.contains("1 lines before this one were lost"), "{text}");
    }

    #[test]
    fn names_and_streams_are_understood() {
        assert_eq!(name("log.target"), "LOG_TARGET");
        assert_eq!(name("_1"), "F_1");
        assert!(is("8:17", 8, 17));
        assert!(!is("8:18", 8, 17) && !is("8", 8, 17));
    }
}
