//! The embedded store: one SQLite file, one writing thread, any number of readers.

use std::{
    fmt, fs,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
};

use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
};
use rusqlite::{Connection, OptionalExtension, params};
use tokio::sync::{mpsc, oneshot, watch};
use ursa_model::{Resource, ResourceKey};

use super::{
    Change, Changes, Cursor, ListQuery, Listing, Page, Private, StoreError, StoreOptions, Watcher,
    row::{COLUMNS, Raw, key, place},
    schema,
    vault::Vault,
    writer::{Done, Op, Request, Times, Writer, failed},
};

/// So many idle reading connections are kept.
const IDLE_READERS: usize = 8;
/// So many writes may wait; then writers wait for a place.
const WAITING_WRITES: usize = 4096;

struct Inner {
    path: PathBuf,
    vault: Arc<Vault>,
    writes: mpsc::Sender<Request>,
    hints: watch::Receiver<Cursor>,
    readers: Mutex<Vec<Connection>>,
    cluster_id: String,
}

/// A handle of the store; cheap to clone.
#[derive(Clone)]
pub struct Store {
    inner: Arc<Inner>,
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Store").field("path", &self.inner.path).finish_non_exhaustive()
    }
}

impl Store {
    /// Opens the store, creating its folder, file and key if they are absent.
    pub fn open(options: &StoreOptions) -> Result<Self, StoreError> {
        let folders = [options.path.parent(), options.key_file.parent()];
        for dir in folders.into_iter().flatten().filter(|dir| !dir.as_os_str().is_empty()) {
            fs::create_dir_all(dir).map_err(|error| StoreError::Open {
                path: options.path.display().to_string(),
                reason: format!("can't create {}: {error}", dir.display()),
            })?;
        }
        let lock = lock(options)?;
        let db = schema::open_writer(&options.path, options.max_pages)?;
        let vault = Arc::new(Vault::open(&options.key_file)?);
        let revision = fact(&db, "revision")?.and_then(|text| text.parse().ok()).unwrap_or(0);
        let cluster_id = if let Some(id) = fact(&db, "cluster-id")? {
            id
        } else {
            let id = uuid::Uuid::new_v4().to_string();
            db.execute("INSERT INTO facts VALUES ('cluster-id', ?1)", params![id]).map_err(failed)?;
            id
        };
        let (writes, requests) = mpsc::channel(WAITING_WRITES);
        let (hint, hints) = watch::channel(Cursor(revision));
        let tombstones = options.tombstones;
        let writer = Writer { db, vault: vault.clone(), revision, hint, tombstones, _lock: lock };
        std::thread::Builder::new()
            .name("store-writer".into())
            .spawn(move || writer.run(requests))
            .map_err(|error| StoreError::Failed(format!("can't start the writer's thread: {error}")))?;
        let readers = Mutex::new(Vec::new());
        let path = options.path.clone();
        Ok(Self { inner: Arc::new(Inner { path, vault, writes, hints, readers, cluster_id }) })
    }

    /// An id that this store was given when it was made.
    pub fn cluster_id(&self) -> &str {
        &self.inner.cluster_id
    }

    /// The newest revision, updated after each commit: a hint that there is something to read.
    pub fn hints(&self) -> watch::Receiver<Cursor> {
        self.inner.hints.clone()
    }

    /// Follows every change; from a full listing when `after` is none.
    pub fn watch(&self, after: Option<Cursor>) -> Watcher {
        Watcher::new(self.clone(), after)
    }

    /// One resource.
    pub async fn get(&self, key: &ResourceKey) -> Result<Option<Arc<Resource>>, StoreError> {
        let key = key.clone();
        self.read(move |db, vault| {
            let sql = format!("SELECT {COLUMNS} FROM resources WHERE kind = ?1 AND mesh = ?2 AND name = ?3");
            let raw = db
                .prepare_cached(&sql)
                .and_then(|mut statement| {
                    statement.query_row(params![key.kind, key.mesh, key.name], Raw::read).optional()
                })
                .map_err(failed)?;
            raw.map(|raw| raw.into_resource(vault).map(Arc::new)).transpose()
        })
        .await
    }

    /// Every resource of a kind, of one mesh if that is given, by mesh and name.
    pub async fn list(
        &self,
        kind: &'static str,
        mesh: Option<&str>,
    ) -> Result<Vec<Arc<Resource>>, StoreError> {
        let query = ListQuery { mesh: mesh.map(str::to_owned), ..ListQuery::default() };
        Ok(self.page(kind, query).await?.items)
    }

    /// A page of the resources of a kind, by mesh and name.
    pub async fn page(&self, kind: &'static str, query: ListQuery) -> Result<Page, StoreError> {
        self.read(move |db, vault| {
            let filter =
                "WHERE kind = ?1 AND (?2 IS NULL OR mesh = ?2) AND (?3 IS NULL OR instr(name, ?3) > 0)";
            let total: i64 = db
                .prepare_cached(&format!("SELECT count(*) FROM resources {filter}"))
                .and_then(|mut statement| {
                    statement.query_row(params![kind, query.mesh, query.name_contains], |row| row.get(0))
                })
                .map_err(failed)?;
            let limit = query.limit.map_or(-1, |limit| i64::try_from(limit).unwrap_or(i64::MAX));
            let offset = i64::try_from(query.offset).unwrap_or(i64::MAX);
            let sql =
                format!("SELECT {COLUMNS} FROM resources {filter} ORDER BY mesh, name LIMIT ?4 OFFSET ?5");
            let mut statement = db.prepare_cached(&sql).map_err(failed)?;
            let rows = statement
                .query_map(params![kind, query.mesh, query.name_contains, limit, offset], Raw::read)
                .map_err(failed)?;
            Ok(Page { items: readable(rows, vault)?, total: total.unsigned_abs() })
        })
        .await
    }

    /// How many resources of a kind there are, in one mesh if that is given.
    pub async fn count(&self, kind: &'static str, mesh: Option<&str>) -> Result<u64, StoreError> {
        let query = ListQuery { mesh: mesh.map(str::to_owned), limit: Some(0), ..ListQuery::default() };
        Ok(self.page(kind, query).await?.total)
    }

    /// The whole store, consistent at one cursor.
    pub async fn list_all(&self) -> Result<Listing, StoreError> {
        self.read(|db, vault| {
            let snapshot = db.unchecked_transaction().map_err(failed)?;
            let revision = fact(&snapshot, "revision")?.and_then(|text| text.parse().ok()).unwrap_or(0);
            let sql = format!("SELECT {COLUMNS} FROM resources ORDER BY kind, mesh, name");
            let mut statement = snapshot.prepare_cached(&sql).map_err(failed)?;
            let rows = statement.query_map([], Raw::read).map_err(failed)?;
            Ok(Listing { resources: readable(rows, vault)?, cursor: Cursor(revision) })
        })
        .await
    }

    /// What changed after `cursor`, at most `limit` entries; [`StoreError::Compacted`] when history
    /// doesn't reach back so far.
    pub async fn changes(&self, cursor: Cursor, limit: u64) -> Result<Changes, StoreError> {
        self.read(move |db, vault| changes(db, vault, cursor, limit)).await
    }

    /// Writes a new resource; its times and version are set here.
    pub async fn create(&self, resource: Resource) -> Result<Arc<Resource>, StoreError> {
        self.write_resource(Op::Create(Box::new(resource), Times::Now)).await
    }

    /// Writes a new resource with the times that it carries: for imports.
    pub async fn import(&self, resource: Resource) -> Result<Arc<Resource>, StoreError> {
        self.write_resource(Op::Create(Box::new(resource), Times::Kept)).await
    }

    /// Replaces a resource if its version is still `resource.meta.version`. Equal content is no
    /// write: the version stays and nobody is woken.
    pub async fn update(&self, resource: Resource) -> Result<Arc<Resource>, StoreError> {
        self.write_resource(Op::Update(Box::new(resource))).await
    }

    /// Reads a resource, lets `change` edit it and writes it back, again if somebody else was faster.
    /// None if there is no such resource.
    pub async fn modify<F>(
        &self,
        key: &ResourceKey,
        mut change: F,
    ) -> Result<Option<Arc<Resource>>, StoreError>
    where
        F: FnMut(&mut Resource),
    {
        loop {
            let Some(current) = self.get(key).await? else { return Ok(None) };
            let mut next = Resource::clone(&current);
            change(&mut next);
            match self.update(next).await {
                Ok(written) => return Ok(Some(written)),
                Err(StoreError::Conflict(_)) => {}
                Err(StoreError::NotFound(_)) => return Ok(None),
                Err(error) => return Err(error),
            }
        }
    }

    /// Removes a resource, if `version` is given only in that version.
    pub async fn delete(&self, key: &ResourceKey, version: Option<u64>) -> Result<(), StoreError> {
        self.write(Op::Delete { key: key.clone(), version }).await.map(|_| ())
    }

    /// One private record.
    pub async fn private(&self, bucket: &'static str, key: &str) -> Result<Option<Private>, StoreError> {
        let key = key.to_owned();
        self.read(move |db, vault| {
            let found = db
                .prepare_cached("SELECT key, version, value FROM private WHERE bucket = ?1 AND key = ?2")
                .and_then(|mut statement| {
                    statement.query_row(params![bucket, key], sealed_private).optional()
                })
                .map_err(failed)?;
            found.map(|found| unseal_private(bucket, found, vault)).transpose()
        })
        .await
    }

    /// Every private record of a bucket, by key.
    pub async fn privates(&self, bucket: &'static str) -> Result<Vec<Private>, StoreError> {
        self.read(move |db, vault| {
            let mut statement = db
                .prepare_cached("SELECT key, version, value FROM private WHERE bucket = ?1 ORDER BY key")
                .map_err(failed)?;
            let rows = statement.query_map(params![bucket], sealed_private).map_err(failed)?;
            rows.map(|found| unseal_private(bucket, found.map_err(failed)?, vault)).collect()
        })
        .await
    }

    /// Writes a private record and returns its new version. `version`: the one that was read, 0 if
    /// there must be none yet, none to write in any case.
    pub async fn put_private(
        &self,
        bucket: &'static str,
        key: &str,
        value: Vec<u8>,
        version: Option<u64>,
    ) -> Result<u64, StoreError> {
        let key = key.to_owned();
        match self.write(Op::PutPrivate { bucket, key, value, version }).await? {
            Done::Version(version) => Ok(version),
            Done::Resource(_) | Done::Nothing => Err(StoreError::Failed("a write had no version".into())),
        }
    }

    /// Removes a private record; nothing happens if there is none.
    pub async fn delete_private(&self, bucket: &'static str, key: &str) -> Result<(), StoreError> {
        self.write(Op::DeletePrivate { bucket, key: key.to_owned() }).await.map(|_| ())
    }

    async fn write_resource(&self, op: Op) -> Result<Arc<Resource>, StoreError> {
        match self.write(op).await? {
            Done::Resource(resource) => Ok(Arc::new(*resource)),
            Done::Version(_) | Done::Nothing => Err(StoreError::Failed("a write had no resource".into())),
        }
    }

    async fn write(&self, op: Op) -> Result<Done, StoreError> {
        let (reply, answer) = oneshot::channel();
        self.inner.writes.send((op, reply)).await.map_err(|_| StoreError::Closed)?;
        answer.await.map_err(|_| StoreError::Closed)?
    }

    /// Runs a query on a reading connection, off the async threads.
    async fn read<T, F>(&self, query: F) -> Result<T, StoreError>
    where
        T: Send + 'static,
        F: FnOnce(&Connection, &Vault) -> Result<T, StoreError> + Send + 'static,
    {
        let inner = self.inner.clone();
        tokio::task::spawn_blocking(move || {
            let idle = inner.readers.lock().unwrap_or_else(PoisonError::into_inner).pop();
            let db = match idle {
                Some(db) => db,
                None => schema::open_reader(&inner.path)?,
            };
            let result = query(&db, &inner.vault);
            let mut idle = inner.readers.lock().unwrap_or_else(PoisonError::into_inner);
            if idle.len() < IDLE_READERS {
                idle.push(db);
            }
            result
        })
        .await
        .map_err(|error| StoreError::Failed(error.to_string()))?
    }
}

/// Makes sure that no other process writes: each would keep its own count of revisions.
fn lock(options: &StoreOptions) -> Result<Flock<fs::File>, StoreError> {
    let path = options.path.with_extension("lock");
    let fail = |reason: String| StoreError::Open { path: options.path.display().to_string(), reason };
    let mut open = fs::OpenOptions::new();
    let file = open
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .map_err(|error| fail(format!("can't open {}: {error}", path.display())))?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, error)| match error {
        Errno::EWOULDBLOCK => fail("another control plane is using it; stop that one first".into()),
        error => fail(format!("can't lock {}: {error}", path.display())),
    })
}

fn fact(db: &Connection, name: &str) -> Result<Option<String>, StoreError> {
    db.query_row("SELECT value FROM facts WHERE name = ?1", params![name], |row| row.get(0))
        .optional()
        .map_err(failed)
}

/// The resources of these rows. A row that can't be read is left out with an error in the log: one
/// bad object must not hide the others.
fn readable(
    rows: impl Iterator<Item = rusqlite::Result<Raw>>,
    vault: &Vault,
) -> Result<Vec<Arc<Resource>>, StoreError> {
    let mut resources = Vec::new();
    for raw in rows {
        match raw.map_err(failed)?.into_resource(vault) {
            Ok(resource) => resources.push(Arc::new(resource)),
            Err(error @ StoreError::Corrupt(..)) => tracing::error!(%error, "left out of a listing"),
            Err(error) => return Err(error),
        }
    }
    Ok(resources)
}

fn changes(db: &Connection, vault: &Vault, cursor: Cursor, limit: u64) -> Result<Changes, StoreError> {
    let snapshot = db.unchecked_transaction().map_err(failed)?;
    let number = |name| -> Result<u64, StoreError> {
        Ok(fact(&snapshot, name)?.and_then(|text| text.parse().ok()).unwrap_or(0))
    };
    let (newest, compacted) = (number("revision")?, number("compacted")?);
    if cursor.0 < compacted || cursor.0 > newest {
        return Err(StoreError::Compacted);
    }
    let after = i64::try_from(cursor.0).unwrap_or(i64::MAX);
    let take = i64::try_from(limit).unwrap_or(i64::MAX);
    let mut found: Vec<(i64, Option<Change>)> = Vec::new();
    let sql = format!("SELECT {COLUMNS} FROM resources WHERE revision > ?1 ORDER BY revision LIMIT ?2");
    let mut statement = snapshot.prepare_cached(&sql).map_err(failed)?;
    for raw in statement.query_map(params![after, take], Raw::read).map_err(failed)? {
        let raw = raw.map_err(failed)?;
        let revision = raw.revision;
        match raw.into_resource(vault) {
            Ok(resource) => {
                let key = resource.key();
                found.push((revision, Some(Change { key, resource: Some(Arc::new(resource)) })));
            }
            Err(error @ StoreError::Corrupt(..)) => {
                tracing::error!(%error, "left out of the changes");
                found.push((revision, None));
            }
            Err(error) => return Err(error),
        }
    }
    let mut statement = snapshot
        .prepare_cached(
            "SELECT revision, kind, mesh, name FROM tombstones WHERE revision > ?1 ORDER BY revision LIMIT ?2",
        )
        .map_err(failed)?;
    let rows = statement
        .query_map(params![after, take], |row| {
            Ok((row.get::<_, i64>(0)?, row.get::<_, String>(1)?, row.get(2)?, row.get(3)?))
        })
        .map_err(failed)?;
    for row in rows {
        let (revision, kind, mesh, name) = row.map_err(failed)?;
        found.push((revision, key(&kind, mesh, name).map(|key| Change { key, resource: None })));
    }
    found.sort_by_key(|(revision, _)| *revision);
    let most = usize::try_from(limit).unwrap_or(usize::MAX);
    let more = found.len() > most;
    found.truncate(most);
    // Both queries are cut off at the limit: up to the last entry kept, nothing is missing.
    let full = found.len() == most;
    let end = match found.last() {
        Some((revision, _)) if more || full => revision.unsigned_abs(),
        _ => newest,
    };
    let changes = found.into_iter().filter_map(|(_, change)| change).collect();
    Ok(Changes { changes, cursor: Cursor(end), more: end < newest })
}

type SealedPrivate = (String, i64, Vec<u8>);

fn sealed_private(row: &rusqlite::Row<'_>) -> rusqlite::Result<SealedPrivate> {
    Ok((row.get(0)?, row.get(1)?, row.get(2)?))
}

fn unseal_private(
    bucket: &str,
    (key, version, value): SealedPrivate,
    vault: &Vault,
) -> Result<Private, StoreError> {
    let value = vault.unseal(&place(bucket, "", &key), &value)?;
    Ok(Private { key, value, version: version.unsigned_abs() })
}
