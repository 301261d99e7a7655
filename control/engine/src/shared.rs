//! Derived values by the hash of what they are made from, for as long as somebody holds them.

use std::{
    collections::HashMap,
    sync::{Arc, Weak},
};

/// Gives equal values one place in memory, and makes each once.
#[derive(Debug)]
pub(crate) struct Shared<T> {
    known: HashMap<u128, Weak<T>>,
    sweep_at: usize,
}

impl<T> Default for Shared<T> {
    fn default() -> Self {
        Self { known: HashMap::new(), sweep_at: 64 }
    }
}

impl<T> Shared<T> {
    /// The value for a hash, made when nobody holds it.
    pub(crate) fn get(&mut self, hash: u128, make: impl FnOnce() -> Arc<T>) -> Arc<T> {
        if let Some(known) = self.known.get(&hash).and_then(Weak::upgrade) {
            return known;
        }
        let made = make();
        self.known.insert(hash, Arc::downgrade(&made));
        if self.known.len() >= self.sweep_at {
            self.known.retain(|_, held| held.strong_count() > 0);
            self.sweep_at = self.known.len() * 2 + 64;
        }
        made
    }
}
