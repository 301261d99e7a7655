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
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arc_swap::ArcSwap;
use tracing::{info, warn};

pub use server::{NameServer, Sockets};
use table::Table;
use upstream::Upstreams;

use super::protocol::{DnsStatus, DnsTable};

/// The state that the sockets' tasks share.
#[derive(Debug)]
pub struct Dns {
    source: Mutex<Source>,
    table: ArcSwap<Table>,
    upstreams: ArcSwap<Upstreams>,
    counters: Counters,
}

/// Where the table comes from.
#[derive(Debug, Default)]
struct Source {
    path: PathBuf,
    resolv_conf: PathBuf,
    /// Why the last table was refused.
    error: Option<String>,
}

#[derive(Debug, Default)]
struct Counters {
    answered: AtomicU64,
    forwarded: AtomicU64,
    refused: AtomicU64,
}

impl Dns {
    /// A server without a table, which knows nobody to ask.
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            source: Mutex::default(),
            table: ArcSwap::from_pointee(Table::unloaded()),
            upstreams: ArcSwap::from_pointee(Upstreams::new(Path::new("/dev/null"))),
            counters: Counters::default(),
        })
    }

    /// From now on the table is that of `path`, read now if it is there, and other names are asked of the name servers
    /// of `resolv_conf`.
    pub fn configure(&self, path: &Path, resolv_conf: &Path) {
        {
            let mut source = self.source();
            if source.resolv_conf != resolv_conf {
                self.upstreams.store(Arc::new(Upstreams::new(resolv_conf)));
                resolv_conf.clone_into(&mut source.resolv_conf);
            }
            path.clone_into(&mut source.path);
        }
        if path.exists() {
            // The error is kept for `status`; names answer SERVFAIL until a good table arrives.
            let _ = self.reload();
        }
    }

    fn source(&self) -> MutexGuard<'_, Source> {
        self.source.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Replaces the table by what the file holds now. A table that can't be used changes nothing.
    pub fn reload(&self) -> Result<usize, String> {
        let mut source = self.source();
        let loaded = std::fs::read(&source.path)
            .map_err(|error| error.to_string())
            .and_then(|text| serde_json::from_slice::<DnsTable>(&text).map_err(|error| error.to_string()))
            .and_then(|table| Table::compile(&table).map_err(|error| error.to_string()));
        match loaded {
            Ok(table) => {
                let names = table.len();
                self.table.store(Arc::new(table));
                source.error = None;
                info!(names, "loaded the DNS table");
                Ok(names)
            }
            Err(reason) => {
                let reason =
                    format!("{} was refused, the table before it stays: {reason}", source.path.display());
                warn!("{reason}");
                source.error = Some(reason.clone());
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
            error: self.source().error.clone(),
            answered: self.counters.answered.load(Ordering::Relaxed),
            forwarded: self.counters.forwarded.load(Ordering::Relaxed),
            refused: self.counters.refused.load(Ordering::Relaxed),
        }
    }
}
