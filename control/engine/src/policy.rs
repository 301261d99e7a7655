//! Policies, before anybody looks at what they configure: whom they select, in which order, merged how.

pub(crate) mod merge;
pub(crate) mod rank;
pub(crate) mod table;

use std::{collections::BTreeMap, sync::Arc};

use serde_json::Value;
pub(crate) use ursa_model::policy::Attachment as Target;
use ursa_model::{Kri, ResourceKey, policy::TargetRef};

use self::rank::Rank;

/// A policy of any kind.
#[derive(Debug)]
pub(crate) struct Policy {
    pub(crate) key: ResourceKey,
    pub(crate) kri: Kri,
    pub(crate) hash: u128,
    pub(crate) rank: Rank,
    pub(crate) target: Target,
    pub(crate) to: Vec<To>,
    /// Items of `rules`, as written.
    pub(crate) rules: Vec<Value>,
}

/// One item of `to`.
#[derive(Debug)]
pub(crate) struct To {
    pub(crate) target: TargetRef,
    /// The item as written.
    pub(crate) body: Value,
}

impl Policy {
    pub(crate) fn new(
        key: ResourceKey,
        kri: Kri,
        hash: u128,
        rank: Rank,
        target: Target,
        to: Vec<Value>,
        rules: Vec<Value>,
    ) -> Result<Self, String> {
        let to = to
            .into_iter()
            .enumerate()
            .map(|(index, body)| {
                let target = body.get("targetRef").cloned().unwrap_or_default();
                match serde_json::from_value(target) {
                    Ok(target) => Ok(To { target, body }),
                    Err(e) => Err(format!("spec.to[{index}].targetRef: {e}")),
                }
            })
            .collect::<Result<_, String>>()?;
        Ok(Self { key, kri, hash, rank, target, to, rules })
    }

    /// Whether it selects a proxy with these labels.
    pub(crate) fn selects(&self, labels: &BTreeMap<String, String>) -> bool {
        self.target.selects(labels)
    }

    /// Whether its rules are for this inbound of a proxy that it selects.
    pub(crate) fn covers_inbound(&self, section: &str) -> bool {
        self.target.covers(section)
    }
}

/// Whether labels have all that is wanted.
pub(crate) fn contains(labels: &BTreeMap<String, String>, wanted: &BTreeMap<String, String>) -> bool {
    wanted.iter().all(|(key, value)| labels.get(key) == Some(value))
}

/// The policies that select one proxy: by kind, the weakest first.
pub(crate) type Selected = BTreeMap<&'static str, Vec<Arc<Policy>>>;
