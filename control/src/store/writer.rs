//! The one writer: a thread that owns the writing connection and commits writes in groups.
//!
//! Everything that waits when a commit ends goes into the next one, so that under load one fsync is
//! shared by many writers and alone a write waits for nobody.

use rusqlite::{Connection, ErrorCode, OptionalExtension, params};
use time::OffsetDateTime;
use tokio::sync::{mpsc, oneshot, watch};
use ursa_model::{Resource, ResourceKey};

use super::{
    Cursor, StoreError, describe,
    row::{COLUMNS, Content, Raw, place, to_nanos},
    vault::Vault,
};

/// At most so many writes share a commit, which bounds how long the first one waits.
const GROUP: usize = 512;

/// How the times of a write are decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Times {
    /// By the store's clock.
    Now,
    /// As they stand in the resource.
    Kept,
}

/// What to write.
pub(super) enum Op {
    Create(Box<Resource>, Times),
    /// The resource's version is the one its writer read.
    Update(Box<Resource>),
    Delete {
        key: ResourceKey,
        version: Option<u64>,
    },
    PutPrivate {
        bucket: &'static str,
        key: String,
        value: Vec<u8>,
        /// None: whatever is there; `Some(0)`: nothing may be there.
        version: Option<u64>,
    },
    DeletePrivate {
        bucket: &'static str,
        key: String,
    },
}

/// What a write left behind.
pub(super) enum Done {
    Resource(Box<Resource>),
    Version(u64),
    Nothing,
}

type Reply = oneshot::Sender<Result<Done, StoreError>>;
pub(super) type Request = (Op, Reply);

pub(super) struct Writer {
    pub(super) db: Connection,
    pub(super) vault: std::sync::Arc<Vault>,
    pub(super) revision: u64,
    pub(super) hint: watch::Sender<Cursor>,
    pub(super) tombstones: u64,
    /// Held as long as this thread may write.
    pub(super) _lock: nix::fcntl::Flock<std::fs::File>,
}

impl Writer {
    /// Serves until every handle of the store is gone.
    pub(super) fn run(mut self, mut requests: mpsc::Receiver<Request>) {
        let mut group = Vec::new();
        while requests.blocking_recv_many(&mut group, GROUP) > 0 {
            self.commit(std::mem::take(&mut group));
        }
    }

    fn commit(&mut self, group: Vec<Request>) {
        let before = self.revision;
        let mut answers = Vec::with_capacity(group.len());
        let outcome = self.apply(group, &mut answers);
        match outcome {
            Ok(()) => {
                if self.revision != before {
                    self.hint.send_replace(Cursor(self.revision));
                }
                for (reply, result) in answers {
                    // A caller that has gone away needs no answer; its write stands.
                    let _ = reply.send(result);
                }
            }
            Err(error) => {
                // Nothing of this group is written, so nobody of it may hear that it was.
                if !self.db.is_autocommit()
                    && let Err(error) = self.db.execute_batch("ROLLBACK")
                {
                    tracing::error!(%error, "the store can't roll back");
                }
                self.revision = before;
                tracing::error!(%error, "the store could not commit");
                for (reply, _) in answers {
                    let _ = reply.send(Err(error.clone()));
                }
            }
        }
    }

    fn apply(
        &mut self,
        group: Vec<Request>,
        answers: &mut Vec<(Reply, Result<Done, StoreError>)>,
    ) -> Result<(), StoreError> {
        let started = self.db.execute_batch("BEGIN IMMEDIATE").map_err(failed);
        let mut broken = started.err();
        for (op, reply) in group {
            if let Some(error) = &broken {
                answers.push((reply, Err(error.clone())));
                continue;
            }
            let result = self.one(op);
            if let Err(error) = &result
                && matches!(error, StoreError::Full(_) | StoreError::Failed(_))
            {
                broken = Some(error.clone());
            }
            answers.push((reply, result));
        }
        if let Some(error) = broken {
            return Err(error);
        }
        self.compact()?;
        self.db
            .prepare_cached("INSERT INTO facts VALUES ('revision', ?1) ON CONFLICT DO UPDATE SET value = ?1")
            .and_then(|mut statement| statement.execute(params![self.revision.to_string()]))
            .map_err(failed)?;
        self.db.execute_batch("COMMIT").map_err(failed)
    }

    fn one(&mut self, op: Op) -> Result<Done, StoreError> {
        match op {
            Op::Create(resource, times) => self.create(*resource, times),
            Op::Update(resource) => self.update(*resource),
            Op::Delete { key, version } => self.delete(&key, version),
            Op::PutPrivate { bucket, key, value, version } => self.put_private(bucket, &key, &value, version),
            Op::DeletePrivate { bucket, key } => {
                self.db
                    .prepare_cached("DELETE FROM private WHERE bucket = ?1 AND key = ?2")
                    .and_then(|mut statement| statement.execute(params![bucket, key]))
                    .map_err(failed)?;
                Ok(Done::Nothing)
            }
        }
    }

    fn current(&self, key: &ResourceKey) -> Result<Option<Resource>, StoreError> {
        let sql = format!("SELECT {COLUMNS} FROM resources WHERE kind = ?1 AND mesh = ?2 AND name = ?3");
        let raw = self
            .db
            .prepare_cached(&sql)
            .and_then(|mut statement| {
                statement.query_row(params![key.kind, key.mesh, key.name], Raw::read).optional()
            })
            .map_err(failed)?;
        raw.map(|raw| raw.into_resource(&self.vault)).transpose()
    }

    fn create(&mut self, mut resource: Resource, times: Times) -> Result<Done, StoreError> {
        let key = resource.key();
        let exists = self
            .db
            .prepare_cached("SELECT 1 FROM resources WHERE kind = ?1 AND mesh = ?2 AND name = ?3")
            .and_then(|mut statement| statement.exists(params![key.kind, key.mesh, key.name]))
            .map_err(failed)?;
        if exists {
            return Err(StoreError::Exists(describe(&key)));
        }
        if times == Times::Now {
            let now = OffsetDateTime::now_utc();
            resource.meta.creation_time = Some(now);
            resource.meta.modification_time = Some(now);
        }
        resource.meta.version = 1;
        let content = Content::of(&resource, &self.vault)?;
        let revision = self.next_revision();
        self.db
            .prepare_cached(
                "INSERT INTO resources (kind, mesh, name, version, revision, created, modified, labels, spec, status, sealed)
                 VALUES (?1, ?2, ?3, 1, ?4, ?5, ?6, ?7, ?8, ?9, ?10)",
            )
            .and_then(|mut statement| {
                statement.execute(params![
                    key.kind,
                    key.mesh,
                    key.name,
                    revision,
                    to_nanos(resource.meta.creation_time),
                    to_nanos(resource.meta.modification_time),
                    content.labels,
                    content.spec,
                    content.status,
                    content.sealed,
                ])
            })
            .map_err(failed)?;
        Ok(Done::Resource(Box::new(resource)))
    }

    fn update(&mut self, mut resource: Resource) -> Result<Done, StoreError> {
        let key = resource.key();
        let Some(current) = self.current(&key)? else {
            return Err(StoreError::NotFound(describe(&key)));
        };
        if current.meta.version != resource.meta.version {
            return Err(StoreError::Conflict(describe(&key)));
        }
        if current.meta.labels == resource.meta.labels
            && current.spec == resource.spec
            && current.status == resource.status
        {
            // Equal content wakes nobody and costs no write.
            return Ok(Done::Resource(Box::new(current)));
        }
        resource.meta.version += 1;
        resource.meta.creation_time = current.meta.creation_time;
        resource.meta.modification_time = Some(OffsetDateTime::now_utc());
        let content = Content::of(&resource, &self.vault)?;
        let revision = self.next_revision();
        self.db
            .prepare_cached(
                "UPDATE resources SET version = ?4, revision = ?5, modified = ?6, labels = ?7, spec = ?8, status = ?9, sealed = ?10
                 WHERE kind = ?1 AND mesh = ?2 AND name = ?3",
            )
            .and_then(|mut statement| {
                statement.execute(params![
                    key.kind,
                    key.mesh,
                    key.name,
                    i64::try_from(resource.meta.version).unwrap_or(i64::MAX),
                    revision,
                    to_nanos(resource.meta.modification_time),
                    content.labels,
                    content.spec,
                    content.status,
                    content.sealed,
                ])
            })
            .map_err(failed)?;
        Ok(Done::Resource(Box::new(resource)))
    }

    fn delete(&mut self, key: &ResourceKey, version: Option<u64>) -> Result<Done, StoreError> {
        let found: Option<i64> = self
            .db
            .prepare_cached("SELECT version FROM resources WHERE kind = ?1 AND mesh = ?2 AND name = ?3")
            .and_then(|mut statement| {
                statement.query_row(params![key.kind, key.mesh, key.name], |row| row.get(0)).optional()
            })
            .map_err(failed)?;
        let Some(found) = found else {
            return Err(StoreError::NotFound(describe(key)));
        };
        if version.is_some_and(|version| version != found.unsigned_abs()) {
            return Err(StoreError::Conflict(describe(key)));
        }
        let revision = self.next_revision();
        self.db
            .prepare_cached("DELETE FROM resources WHERE kind = ?1 AND mesh = ?2 AND name = ?3")
            .and_then(|mut statement| statement.execute(params![key.kind, key.mesh, key.name]))
            .map_err(failed)?;
        self.db
            .prepare_cached("INSERT INTO tombstones (revision, kind, mesh, name) VALUES (?1, ?2, ?3, ?4)")
            .and_then(|mut statement| statement.execute(params![revision, key.kind, key.mesh, key.name]))
            .map_err(failed)?;
        Ok(Done::Nothing)
    }

    fn put_private(
        &mut self,
        bucket: &str,
        key: &str,
        value: &[u8],
        version: Option<u64>,
    ) -> Result<Done, StoreError> {
        let found: Option<i64> = self
            .db
            .prepare_cached("SELECT version FROM private WHERE bucket = ?1 AND key = ?2")
            .and_then(|mut statement| statement.query_row(params![bucket, key], |row| row.get(0)).optional())
            .map_err(failed)?;
        let found = found.unwrap_or(0);
        if version.is_some_and(|version| version != found.unsigned_abs()) {
            return Err(StoreError::Conflict(format!("{bucket} {key:?}")));
        }
        let sealed = self.vault.seal(&place(bucket, "", key), value)?;
        self.db
            .prepare_cached(
                "INSERT INTO private (bucket, key, version, value) VALUES (?1, ?2, ?3, ?4)
                 ON CONFLICT (bucket, key) DO UPDATE SET version = ?3, value = ?4",
            )
            .and_then(|mut statement| statement.execute(params![bucket, key, found + 1, sealed]))
            .map_err(failed)?;
        Ok(Done::Version(found.unsigned_abs() + 1))
    }

    fn next_revision(&mut self) -> i64 {
        self.revision += 1;
        i64::try_from(self.revision).unwrap_or(i64::MAX)
    }

    /// Forgets the oldest tombstones once there are half as many too many again; who watches from
    /// before them is told to list again.
    fn compact(&self) -> Result<(), StoreError> {
        let keep = self.tombstones;
        let count: i64 = self
            .db
            .prepare_cached("SELECT count(*) FROM tombstones")
            .and_then(|mut statement| statement.query_row([], |row| row.get(0)))
            .map_err(failed)?;
        if count.unsigned_abs() <= keep + keep / 2 {
            return Ok(());
        }
        let excess = count - i64::try_from(keep).unwrap_or(i64::MAX);
        let edge: i64 = self
            .db
            .query_row(
                "SELECT max(revision) FROM (SELECT revision FROM tombstones ORDER BY revision LIMIT ?1)",
                params![excess],
                |row| row.get(0),
            )
            .map_err(failed)?;
        self.db.execute("DELETE FROM tombstones WHERE revision <= ?1", params![edge]).map_err(failed)?;
        self.db
            .execute(
                "INSERT INTO facts VALUES ('compacted', ?1) ON CONFLICT DO UPDATE SET value = ?1",
                params![edge.to_string()],
            )
            .map_err(failed)?;
        Ok(())
    }
}

/// The error of a statement in the store's words.
#[allow(clippy::needless_pass_by_value, reason = "used as a function in map_err")]
pub(super) fn failed(error: rusqlite::Error) -> StoreError {
    match error.sqlite_error_code() {
        Some(ErrorCode::DiskFull) => StoreError::Full(error.to_string()),
        _ => StoreError::Failed(error.to_string()),
    }
}
