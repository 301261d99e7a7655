//! Following the store: hints say that there is something, reading after the cursor says what.

use std::sync::Arc;

use tokio::sync::watch;
use ursa_model::Resource;

use super::{Change, Cursor, Store, StoreError};

/// How many changes one event carries at most.
const BATCH: u64 = 4096;

/// What a watcher learns.
#[derive(Debug, Clone)]
pub enum WatchEvent {
    /// The whole state: what isn't in it doesn't exist any more. The first event, and again when
    /// history was compacted behind the watcher's back.
    Relist(Vec<Arc<Resource>>),
    /// What changed since the event before, one entry per object.
    Changes(Vec<Change>),
}

/// Follows every change of a store.
#[derive(Debug)]
pub struct Watcher {
    store: Store,
    hints: watch::Receiver<Cursor>,
    cursor: Option<Cursor>,
}

impl Watcher {
    pub(super) fn new(store: Store, cursor: Option<Cursor>) -> Self {
        let hints = store.hints();
        Self { store, hints, cursor }
    }

    /// Where this watcher stands; none before its first listing.
    pub fn cursor(&self) -> Option<Cursor> {
        self.cursor
    }

    /// Waits for the next event. Safe to drop: nothing is lost by cancelling.
    pub async fn next(&mut self) -> Result<WatchEvent, StoreError> {
        loop {
            let Some(cursor) = self.cursor else {
                let listing = self.store.list_all().await?;
                self.cursor = Some(listing.cursor);
                return Ok(WatchEvent::Relist(listing.resources));
            };
            // Mark the hint as seen before reading, so that a commit during the read wakes us again.
            let newest = *self.hints.borrow_and_update();
            if newest > cursor {
                match self.store.changes(cursor, BATCH).await {
                    Ok(page) => {
                        self.cursor = Some(page.cursor);
                        if !page.changes.is_empty() {
                            return Ok(WatchEvent::Changes(page.changes));
                        }
                        continue;
                    }
                    Err(StoreError::Compacted) => {
                        self.cursor = None;
                        continue;
                    }
                    Err(error) => return Err(error),
                }
            }
            self.hints.changed().await.map_err(|_| StoreError::Closed)?;
        }
    }
}
