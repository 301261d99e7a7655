//! The database's layout and its settings.

use std::path::Path;

use rusqlite::{Connection, ErrorCode, OpenFlags};

use super::StoreError;

/// Raised when the layout changes; an older program must not write a newer file.
const LAYOUT: i64 = 1;

const TABLES: &str = "
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS resources (
    kind TEXT NOT NULL, mesh TEXT NOT NULL, name TEXT NOT NULL,
    version INTEGER NOT NULL, revision INTEGER NOT NULL,
    created INTEGER, modified INTEGER,
    labels TEXT NOT NULL, spec BLOB NOT NULL, status TEXT, sealed INTEGER NOT NULL,
    UNIQUE (kind, mesh, name)
);
CREATE UNIQUE INDEX IF NOT EXISTS resources_by_revision ON resources (revision);
CREATE TABLE IF NOT EXISTS tombstones (
    revision INTEGER PRIMARY KEY, kind TEXT NOT NULL, mesh TEXT NOT NULL, name TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS private (
    bucket TEXT NOT NULL, key TEXT NOT NULL, version INTEGER NOT NULL, value BLOB NOT NULL,
    PRIMARY KEY (bucket, key)
) WITHOUT ROWID;
";

fn open_error(path: &Path, error: impl std::fmt::Display) -> StoreError {
    StoreError::Open { path: path.display().to_string(), reason: error.to_string() }
}

/// Opens the file for the one writer and brings its layout up to date.
pub(super) fn open_writer(path: &Path, max_pages: Option<u64>) -> Result<Connection, StoreError> {
    let fail = |error: rusqlite::Error| match error.sqlite_error_code() {
        // What a killed process left in the log is taken over while opening, and that takes space.
        Some(ErrorCode::DiskFull) => StoreError::Full(format!("{} can't be opened: {error}", path.display())),
        _ => open_error(path, error),
    };
    let db = Connection::open(path).map_err(fail)?;
    // One writer in one process: whoever opens the file second must hear it at once, not corrupt it.
    db.pragma_update(None, "locking_mode", "NORMAL").map_err(fail)?;
    db.pragma_update(None, "journal_mode", "WAL").map_err(fail)?;
    // A power cut loses nothing acknowledged.
    db.pragma_update(None, "synchronous", "FULL").map_err(fail)?;
    db.pragma_update(None, "foreign_keys", true).map_err(fail)?;
    db.busy_timeout(std::time::Duration::from_secs(5)).map_err(fail)?;
    let found: i64 = db.pragma_query_value(None, "user_version", |row| row.get(0)).map_err(fail)?;
    if found > LAYOUT {
        return Err(open_error(
            path,
            format!(
                "it was written by a newer version (layout {found}, this one knows {LAYOUT}); upgrade ursa-control"
            ),
        ));
    }
    db.execute_batch(TABLES).map_err(fail)?;
    db.pragma_update(None, "user_version", LAYOUT).map_err(fail)?;
    if let Some(pages) = max_pages {
        let pages = i64::try_from(pages).unwrap_or(i64::MAX);
        db.pragma_update_and_check(None, "max_page_count", pages, |_| Ok(())).map_err(fail)?;
    }
    Ok(db)
}

/// Opens the file for reading beside the writer.
pub(super) fn open_reader(path: &Path) -> Result<Connection, StoreError> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let db = Connection::open_with_flags(path, flags).map_err(|error| open_error(path, error))?;
    db.pragma_update(None, "query_only", true).map_err(|error| open_error(path, error))?;
    db.busy_timeout(std::time::Duration::from_secs(5)).map_err(|error| open_error(path, error))?;
    Ok(db)
}
