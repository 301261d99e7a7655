//! What can die, and in which combinations.

use std::fmt;

/// A workload's side of the mesh.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Side {
    /// The one that calls.
    Web,
    /// The one that is called.
    Backend,
}

/// A part that can die. In this order they are killed: an Envoy that died before its shim would be started again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// The control plane.
    Control,
    /// A node's agent.
    Agent(Side),
    /// A workload's shim.
    Shim(Side),
    /// A workload's Envoy.
    Envoy(Side),
}

use Part::{Agent, Control, Envoy, Shim};
use Side::{Backend, Web};

/// Every part.
pub const PARTS: [Part; 7] =
    [Control, Agent(Web), Agent(Backend), Shim(Web), Shim(Backend), Envoy(Web), Envoy(Backend)];

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (what, side) = match self {
            Control => return f.write_str("control"),
            Agent(side) => ("agent", side),
            Shim(side) => ("shim", side),
            Envoy(side) => ("envoy", side),
        };
        let side = match side {
            Web => "web",
            Backend => "backend",
        };
        write!(f, "{side}'s {what}")
    }
}

/// In one line.
pub fn names(parts: &[Part]) -> String {
    let names: Vec<String> = parts.iter().map(ToString::to_string).collect();
    names.join(" + ")
}

/// Each part alone, then any two.
pub fn combinations() -> Vec<Vec<Part>> {
    let mut all: Vec<Vec<Part>> = PARTS.iter().map(|part| vec![*part]).collect();
    for (at, one) in PARTS.iter().enumerate() {
        all.extend(PARTS[at + 1..].iter().map(|other| vec![*one, *other]));
    }
    all
}

/// A few rounds in which each part dies at least once, alone or with what it needs most.
pub fn few() -> Vec<Vec<Part>> {
    vec![
        vec![Agent(Web), Shim(Web)],
        vec![Envoy(Web), Envoy(Backend)],
        vec![Control, Agent(Backend)],
        vec![Shim(Backend)],
    ]
}

/// So many rounds: all combinations in an order drawn from the seed, then again in another.
pub fn drawn(rounds: usize, seed: u64) -> Vec<Vec<Part>> {
    let mut state = seed;
    // SplitMix64, by Sebastiano Vigna: in the public domain, and the same everywhere.
    let mut next = move || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    };
    let mut order = Vec::new();
    while order.len() < rounds {
        let mut turn = combinations();
        for at in (1..turn.len()).rev() {
            let other = next() % (at as u64 + 1);
            turn.swap(at, usize::try_from(other).unwrap_or(0));
        }
        order.extend(turn);
    }
    order.truncate(rounds);
    order
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn fifty_rounds_hold_every_combination() {
        assert_eq!(combinations().len(), 28);
        for seed in 0..20 {
            let drawn = drawn(50, seed);
            let seen: BTreeSet<_> = drawn.iter().cloned().collect();
            assert_eq!((drawn.len(), seen.len()), (50, 28), "seed {seed}");
        }
        assert_ne!(drawn(28, 1), drawn(28, 2));
        assert_eq!(drawn(28, 1), drawn(28, 1));
    }

    #[test]
    fn a_few_rounds_hold_every_part() {
        let seen: BTreeSet<_> = few().concat().into_iter().collect();
        assert_eq!(seen, PARTS.into_iter().collect());
    }
}
