//! The store contract and the embedded store.
//!
//! A [`Store`] holds resources and a small set of private records (CA keys, tickets, nodes). It
//! promises four things: an acknowledged write survives a killed process and a power cut; a write to
//! an object succeeds only against the version its writer read; every change has a place in one
//! global order of revisions; and a reader that asks for the changes after its [`Cursor`] sees each
//! of them, deletions included, or is told to list again. There is no atomicity across objects:
//! what needs two objects is a reconcile.

mod embedded;
mod row;
mod schema;
mod vault;
mod watch;
mod writer;

#[cfg(test)]
mod tests;

use std::{fmt, path::PathBuf, str::FromStr, sync::Arc};

use ursa_model::{Resource, ResourceKey};

pub use embedded::Store;
pub use watch::{WatchEvent, Watcher};

/// Where the embedded store keeps its file and its key.
#[derive(Debug, Clone)]
pub struct StoreOptions {
    /// The database file; its folder is created if it is absent.
    pub path: PathBuf,
    /// The file with the keys that wrap secrets, created with mode 0600 if it is absent.
    pub key_file: PathBuf,
    /// How many tombstones are kept before the oldest are compacted away.
    pub tombstones: u64,
    /// An upper bound of the database's size in pages of 4 KiB; none for the file system's own.
    pub max_pages: Option<u64>,
}

impl StoreOptions {
    /// The store in the folder `dir`: `store.db` and `store.key`.
    pub fn in_dir(dir: impl Into<PathBuf>) -> Self {
        let dir = dir.into();
        Self {
            path: dir.join("store.db"),
            key_file: dir.join("store.key"),
            tombstones: 100_000,
            max_pages: None,
        }
    }
}

/// A place in the store's order of changes. Opaque: only what the store returned may be handed back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Cursor(pub(crate) u64);

impl fmt::Display for Cursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

impl FromStr for Cursor {
    type Err = StoreError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.parse().map(Self).map_err(|_| StoreError::Cursor(text.to_owned()))
    }
}

/// What happened to one object, coalesced: only its latest state is reported.
#[derive(Debug, Clone)]
pub struct Change {
    /// Which object.
    pub key: ResourceKey,
    /// Its state after the change; none when it was deleted.
    pub resource: Option<Arc<Resource>>,
}

/// A page of changes.
#[derive(Debug, Clone, Default)]
pub struct Changes {
    /// In the order of their revisions.
    pub changes: Vec<Change>,
    /// Where to continue.
    pub cursor: Cursor,
    /// Whether more is waiting after `cursor`.
    pub more: bool,
}

/// A whole listing of the store, consistent at `cursor`.
#[derive(Debug, Clone, Default)]
pub struct Listing {
    /// Every resource, by kind, mesh and name.
    pub resources: Vec<Arc<Resource>>,
    /// Where changes after this listing begin.
    pub cursor: Cursor,
}

/// Which resources of one kind to list.
#[derive(Debug, Clone, Default)]
pub struct ListQuery {
    /// Only of this mesh.
    pub mesh: Option<String>,
    /// Only names that contain this.
    pub name_contains: Option<String>,
    /// Skip so many matches.
    pub offset: u64,
    /// At most so many; none for all.
    pub limit: Option<u64>,
}

/// One page of a list.
#[derive(Debug, Clone, Default)]
pub struct Page {
    /// The resources, by mesh and name.
    pub items: Vec<Arc<Resource>>,
    /// How many match in all.
    pub total: u64,
}

/// A private record: not a resource, never in the API, always encrypted at rest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Private {
    /// Name within its bucket.
    pub key: String,
    /// The value in the clear.
    pub value: Vec<u8>,
    /// For optimistic concurrency.
    pub version: u64,
}

/// Why the store refused or failed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StoreError {
    /// Create of something that exists.
    #[error("{0} already exists")]
    Exists(String),
    /// Update or delete of something that doesn't exist.
    #[error("{0} does not exist")]
    NotFound(String),
    /// The object changed since it was read.
    #[error("{0} was changed by somebody else in the meantime; read it again and repeat the change")]
    Conflict(String),
    /// The disk or the quota is full.
    #[error("the store has no space left: {0}; free space on its file system, nothing was written")]
    Full(String),
    /// The cursor lies before what history still holds.
    #[error("history before this cursor was compacted; list again")]
    Compacted,
    /// Not a cursor of this store.
    #[error("{0:?} is not a cursor of this store")]
    Cursor(String),
    /// The key file is absent, broken or readable by others, or lacks a key.
    #[error("{0}")]
    Key(String),
    /// What is stored can't be understood.
    #[error("the store holds {0}, which can't be read: {1}")]
    Corrupt(String, String),
    /// The file can't be opened.
    #[error(
        "can't open the store {path}: {reason}; check that the folder exists, is writable by this user and is used by no other control plane"
    )]
    Open {
        /// The database file.
        path: String,
        /// What the system said.
        reason: String,
    },
    /// Any other error of the database.
    #[error("the store failed: {0}")]
    Failed(String),
    /// The store is being closed.
    #[error("the store is closed")]
    Closed,
}

impl StoreError {
    /// Whether reading again and repeating may succeed.
    pub fn is_conflict(&self) -> bool {
        matches!(self, Self::Conflict(_) | Self::Exists(_))
    }
}

pub(crate) fn describe(key: &ResourceKey) -> String {
    if key.mesh.is_empty() {
        format!("{} {:?}", key.kind, key.name)
    } else {
        format!("{} {:?} in mesh {:?}", key.kind, key.name, key.mesh)
    }
}
