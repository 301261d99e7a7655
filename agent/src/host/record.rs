//! What `join` makes, written down before it is made: what an interrupted join left can be gone on with or undone, and
//! `leave` takes away this and nothing else.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use super::names::SidecarPorts;
use super::options::Protocol;
use super::{HostError, Result};
use crate::relay::write_atomic;

/// Where records are; root's alone.
pub(super) const DIR: &str = "/var/lib/ursa/join";

/// How a service's traffic is told from others'.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", tag = "by", content = "what")]
pub(super) enum Apart {
    /// By its user, which nothing else has.
    Uid(u32),
    /// By its slice, which join made.
    Slice(String),
    /// It has a network namespace of its own.
    Namespace(PathBuf),
}

/// What the operator asked for, defaults filled in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Settings {
    /// The unit, with its suffix.
    pub(super) unit: String,
    /// Its port.
    pub(super) port: u16,
    /// What it speaks there.
    pub(super) protocol: Protocol,
    /// Its mesh.
    pub(super) mesh: String,
    /// The workload.
    pub(super) workload: String,
    /// Its Dataplane.
    pub(super) dataplane: String,
    /// The address at which others reach it.
    pub(super) address: String,
    /// Limit of its sidecar's memory.
    pub(super) memory_max: Option<String>,
    /// How it is told apart.
    pub(super) apart: Apart,
}

/// A joined service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Record {
    /// The form of this file.
    pub(super) version: u32,
    /// Name of the service, which is that of its workload, sidecar and files.
    pub(super) service: String,
    /// What was asked for.
    pub(super) settings: Settings,
    /// Its sidecar's ports.
    pub(super) ports: SidecarPorts,
    /// Its sidecar's user.
    pub(super) user: String,
    /// Whether join makes that user; one that was there before stays.
    pub(super) makes_user: bool,
    /// Folders that weren't there before, outermost first.
    pub(super) folders: Vec<PathBuf>,
    /// Files that join makes, in this order.
    pub(super) files: Vec<PathBuf>,
    /// Units that join enables.
    pub(super) enables: Vec<String>,
    /// Digest of the ticket that was used last.
    pub(super) ticket: Option<String>,
    /// Whether join came to its end.
    pub(super) complete: bool,
}

impl Record {
    /// The unit of its sidecar.
    pub(super) fn sidecar(&self) -> String {
        crate::launcher::unit::unit_name(&self.service)
    }

    /// The unit of its redirect.
    pub(super) fn redirect(&self) -> String {
        match self.settings.apart {
            Apart::Namespace(_) => format!("ursa-redirect@{}.service", self.service),
            Apart::Uid(_) | Apart::Slice(_) => super::plan::HOST_REDIRECT.to_owned(),
        }
    }

    /// Where that unit says how it stands.
    pub(super) fn redirect_status(&self) -> PathBuf {
        match self.settings.apart {
            Apart::Namespace(_) => format!("/run/ursa/redirect@{}.json", self.service).into(),
            Apart::Uid(_) | Apart::Slice(_) => "/run/ursa/redirect.json".into(),
        }
    }
}

/// The records of this machine. Whoever changes them holds a lock.
#[derive(Debug)]
pub(super) struct Records {
    dir: PathBuf,
    _lock: Option<Flock<File>>,
}

impl Records {
    /// Opens the folder to change something; refuses while another command does.
    pub(super) fn lock(dir: &Path) -> Result<Self> {
        let failed = |what: &str, error: &dyn std::fmt::Display| {
            HostError::new(format!("can't {what} {}: {error}; are you root?", dir.display()))
        };
        fs::create_dir_all(dir).map_err(|error| failed("make", &error))?;
        let file = File::open(dir).map_err(|error| failed("open", &error))?;
        let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, error)| match error {
            nix::Error::EWOULDBLOCK => HostError::new(
                "another `join` or `leave` is at work on this machine; wait for it, or end it: what it has made so far is on \
                 record, and the same command goes on with it",
            ),
            error => failed("lock", &error),
        })?;
        Ok(Self { dir: dir.to_owned(), _lock: Some(lock) })
    }

    /// Opens it to look.
    pub(super) fn look(dir: &Path) -> Self {
        Self { dir: dir.to_owned(), _lock: None }
    }

    fn path(&self, service: &str) -> PathBuf {
        self.dir.join(format!("{service}.json"))
    }

    /// All of them, by name.
    pub(super) fn all(&self) -> Result<Vec<Record>> {
        let failed = |path: &Path, error: &dyn std::fmt::Display| {
            HostError::new(format!(
                "can't read the record {}: {error}; without it, nobody knows what was made for that service",
                path.display()
            ))
        };
        let entries = match fs::read_dir(&self.dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(failed(&self.dir, &error)),
        };
        let mut records = Vec::new();
        for entry in entries {
            let path = entry.map_err(|error| failed(&self.dir, &error))?.path();
            if path.extension().is_none_or(|extension| extension != "json") {
                continue;
            }
            let text = fs::read_to_string(&path).map_err(|error| failed(&path, &error))?;
            records.push(serde_json::from_str::<Record>(&text).map_err(|error| failed(&path, &error))?);
        }
        records.sort_by(|one: &Record, other| one.service.cmp(&other.service));
        Ok(records)
    }

    /// Writes it, so that it outlives a power cut. Says whether anything was new.
    pub(super) fn save(&self, record: &Record) -> Result<bool> {
        let path = self.path(&record.service);
        let failed = |error: &dyn std::fmt::Display| {
            HostError::new(format!("can't write the record {}: {error}", path.display()))
        };
        let text = serde_json::to_vec_pretty(record).map_err(|error| failed(&error))?;
        if fs::read(&path).is_ok_and(|there| there == text) {
            return Ok(false);
        }
        write_atomic(&path, &text, 0o600, None).map_err(|error| failed(&error))?;
        Ok(true)
    }

    /// All of it is undone.
    pub(super) fn forget(&self, record: &Record) -> Result<()> {
        let path = self.path(&record.service);
        fs::remove_file(&path)
            .map_err(|error| HostError::new(format!("can't remove the record {}: {error}", path.display())))
    }
}
