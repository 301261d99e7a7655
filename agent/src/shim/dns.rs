//! The shim's name server: mesh names from a table, everything else from the workload's own resolver.
//!
//! It must answer while agent and control plane are away, so it depends on nothing but its table file. A name of
//! our domains that the table doesn't hold does not exist: asking anybody else about it could send a workload's
//! traffic around the mesh.

pub mod packet;
mod server;
pub mod table;
mod upstream;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use arc_swap::ArcSwap;
use tracing::{info, warn};

pub use server::{Sockets, serve};
use table::Table;
use upstream::Upstreams;

use super::protocol::{DnsStatus, DnsTable};

/// The state that the sockets' tasks share.
#[derive(Debug)]
pub struct Dns {
    path: PathBuf,
    table: ArcSwap<Table>,
    error: Mutex<Option<String>>,
    upstreams: Upstreams,
    counters: Counters,
}

#[derive(Debug, Default)]
struct Counters {
    answered: AtomicU64,
    forwarded: AtomicU64,
    refused: AtomicU64,
}

impl Dns {
    /// A server whose table is read from `path` now, if it is there, and which forwards to the name servers of
    /// `resolv_conf`.
    pub fn new(path: &Path, resolv_conf: &Path) -> Arc<Self> {
        let dns = Self {
            path: path.to_owned(),
            table: ArcSwap::from_pointee(Table::unloaded()),
            error: Mutex::new(None),
            upstreams: Upstreams::new(resolv_conf),
            counters: Counters::default(),
        };
        if path.exists() {
            // The error is kept for `status`; names answer SERVFAIL until a good table arrives.
            let _ = dns.reload();
        }
        Arc::new(dns)
    }

    /// Replaces the table by what the file holds now. A table that can't be used changes nothing.
    pub fn reload(&self) -> Result<usize, String> {
        let loaded = std::fs::read(&self.path)
            .map_err(|error| error.to_string())
            .and_then(|text| serde_json::from_slice::<DnsTable>(&text).map_err(|error| error.to_string()))
            .and_then(|table| Table::compile(&table).map_err(|error| error.to_string()));
        let mut kept = self.error.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        match loaded {
            Ok(table) => {
                let names = table.len();
                self.table.store(Arc::new(table));
                *kept = None;
                info!(names, "loaded the DNS table");
                Ok(names)
            }
            Err(reason) => {
                let reason =
                    format!("{} was refused, the table before it stays: {reason}", self.path.display());
                warn!("{reason}");
                *kept = Some(reason.clone());
                Err(reason)
            }
        }
    }

    /// What to tell the agent.
    pub fn status(&self) -> DnsStatus {
        let table = self.table.load();
        DnsStatus {
            loaded: table.loaded(),
            names: table.len(),
            error: self.error.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone(),
            answered: self.counters.answered.load(Ordering::Relaxed),
            forwarded: self.counters.forwarded.load(Ordering::Relaxed),
            refused: self.counters.refused.load(Ordering::Relaxed),
        }
    }
}
