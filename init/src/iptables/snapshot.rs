//! Our rules of one kind as they stood, to be put back as they were printed, also by another process.

use serde::{Deserialize, Serialize};

use super::compile::Tables;
use super::{Kernel, Variant, Wanted, found, possible};
use crate::error::Error;
use crate::plan::Family;

/// Our chains, and the jumps that lead to them, as `iptables-save` printed them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    variant: Variant,
    families: Vec<(Family, Tables)>,
}

impl Snapshot {
    /// Whose they are.
    pub const fn variant(&self) -> Variant {
        self.variant
    }
}

/// Reads our rules of a kind in the calling thread's network namespace.
pub fn snapshot(variant: Variant) -> Result<Snapshot, Error> {
    let state = Kernel::open(variant)?.read()?;
    let families = state.iter().map(|(family, saved)| (*family, found(saved)));
    Ok(Snapshot { variant, families: families.collect() })
}

/// Puts our rules back as they stood; returns whether anything changed.
pub fn restore(snapshot: &Snapshot) -> Result<bool, Error> {
    let of =
        |tables: &Tables| tables.iter().map(|(table, rules)| (*table, possible(rules.clone()))).collect();
    let wanted =
        Wanted { families: snapshot.families.iter().map(|(family, tables)| (*family, of(tables))).collect() };
    Kernel::open(snapshot.variant)?.exclusively(|kernel| kernel.reach(&wanted))
}
