//! What is in place, by whichever backend, read back as a plan.

use std::collections::BTreeMap;

use crate::backend;
use crate::error::Error;
use crate::explain::Explanation;
use crate::iptables::{self, Variant};
use crate::nft;
use crate::plan::{Chain, ChainName, Family, Plan};
use crate::routes;

/// A rule as its backend has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Line {
    /// Its chain, with the table where there are several.
    pub(crate) chain: String,
    /// Its text.
    pub(crate) rule: String,
    /// How many packets it has counted.
    pub(crate) packets: u64,
}

/// What a backend holds for packets of one family.
#[derive(Debug, Clone, Default)]
pub(crate) struct Held {
    /// As a plan has them; every rule is one rule of the backend's.
    pub(crate) chains: Vec<Chain>,
    /// The same by chain and position.
    pub(crate) lines: BTreeMap<(ChainName, usize), Line>,
}

/// The rules and routes that are in place, each family on its own: a backend may have other rules for each.
#[derive(Debug, Clone)]
pub struct InPlace {
    v4: Side,
    v6: Side,
    /// What keeps the rules, for the operator.
    pub backend: &'static str,
}

#[derive(Debug, Clone)]
struct Side {
    plan: Plan,
    lines: BTreeMap<(ChainName, usize), Line>,
}

impl InPlace {
    /// Reads it in the calling thread's namespace; `None` when there are no rules of ours. The error names the first
    /// rule that Ursa can't have written.
    pub fn read() -> Result<Option<Self>, Error> {
        if nft::works()?
            && let Some(rules) = nft::read_back()?
        {
            let held = |family| rules.held(family).map_err(Error::ForeignRule);
            return Self::of(held(Family::V4)?, held(Family::V6)?, "nftables").map(Some);
        }
        for variant in Variant::ALL {
            if backend::left_over(variant)? {
                let backend = match variant {
                    Variant::Nft => "iptables-nft",
                    Variant::Legacy => "iptables-legacy",
                };
                let [v4, v6] = iptables::held(variant)?;
                return Self::of(v4, v6, backend).map(Some);
            }
        }
        Ok(None)
    }

    fn of(v4: Held, v6: Held, backend: &'static str) -> Result<Self, Error> {
        let routes = routes::read_back()?.plan();
        let side =
            |held: Held| Side { plan: Plan { chains: held.chains, ..routes.clone() }, lines: held.lines };
        Ok(Self { v4: side(v4), v6: side(v6), backend })
    }

    const fn side(&self, family: Family) -> &Side {
        match family {
            Family::V4 => &self.v4,
            Family::V6 => &self.v6,
        }
    }

    /// What decides about packets of a family.
    pub const fn plan(&self, family: Family) -> &Plan {
        &self.side(family).plan
    }

    /// How many packets a rule of such a plan has counted.
    pub(crate) fn packets(&self, family: Family, chain: &ChainName, position: usize) -> u64 {
        self.side(family).lines.get(&(chain.clone(), position)).map_or(0, |line| line.packets)
    }

    /// Says an explanation of such a plan in the words of the backend, where the operator will look for it.
    pub(crate) fn in_its_words(&self, family: Family, explanation: &mut Explanation) {
        for step in &mut explanation.rules {
            let place = (ChainName::from(step.chain.clone()), step.position - 1);
            if let Some(line) = self.side(family).lines.get(&place) {
                (step.chain, step.rule) = (line.chain.clone(), line.rule.clone());
            }
        }
    }
}
