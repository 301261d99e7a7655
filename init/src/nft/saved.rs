//! Our table as it stood, to be put back byte for byte, also by another process.

use serde::{Deserialize, Serialize};

use super::ruleset::{ChainDef, HookDef, RuleDef, Ruleset, TableFamily};
use super::{Kernel, TABLE, apply_ruleset, read_back};
use crate::error::Error;

/// Chains and rules as the kernel dumped them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saved {
    tables: Vec<u8>,
    chains: Vec<SavedChain>,
    rules: Vec<SavedRule>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct SavedChain {
    family: u8,
    name: String,
    /// Kind, number, priority, policy.
    hook: Option<(String, u32, i32, u32)>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct SavedRule {
    family: u8,
    chain: String,
    instructions: Vec<u8>,
    user_data: Vec<u8>,
}

/// Reads our table of the calling thread's network namespace; `None` when there is none.
pub fn save() -> Result<Option<Saved>, Error> {
    let Some(found) = read_back()? else { return Ok(None) };
    let chain = |chain: ChainDef| SavedChain {
        family: chain.family as u8,
        name: chain.name,
        hook: chain.hook.map(|h| (h.kind, h.number, h.priority, h.policy)),
    };
    let rule = |rule: RuleDef| {
        // What was read has its bytes.
        let (instructions, user_data) = rule.raw.unwrap_or_default();
        SavedRule { family: rule.family as u8, chain: rule.chain, instructions, user_data }
    };
    Ok(Some(Saved {
        tables: found.tables.iter().map(|family| *family as u8).collect(),
        chains: found.chains.into_iter().map(chain).collect(),
        rules: found.rules.into_iter().map(rule).collect(),
    }))
}

/// Puts our table back as it was saved; returns whether anything changed.
pub fn restore(saved: &Saved) -> Result<bool, Error> {
    let set = saved.ruleset().ok_or_else(|| Error::Answer {
        what: "read the saved rules".to_owned(),
        detail: "they were saved by another version of Ursa".to_owned(),
    })?;
    apply_ruleset(&mut Kernel::open(TABLE)?, &set)
}

impl Saved {
    fn ruleset(&self) -> Option<Ruleset> {
        let chain = |chain: &SavedChain| {
            let hook = chain.hook.clone();
            Some(ChainDef {
                family: TableFamily::from_number(chain.family)?,
                name: chain.name.clone(),
                hook: hook.map(|(kind, number, priority, policy)| HookDef { kind, number, priority, policy }),
            })
        };
        let rule = |rule: &SavedRule| {
            let family = TableFamily::from_number(rule.family)?;
            RuleDef::dumped(family, rule.chain.clone(), &rule.instructions, &rule.user_data)
        };
        Some(Ruleset {
            tables: self.tables.iter().map(|n| TableFamily::from_number(*n)).collect::<Option<_>>()?,
            chains: self.chains.iter().map(chain).collect::<Option<_>>()?,
            rules: self.rules.iter().map(rule).collect::<Option<_>>()?,
        })
    }
}
