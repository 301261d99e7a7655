//! From selected policies to one configuration per destination or inbound.

use std::{collections::BTreeMap, sync::Arc};

use serde_json::{Map, Value};
use ursa_model::policy::{TargetKind, TargetRef};

use super::{Policy, contains};

/// One item of a policy's `to` or `rules`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Item<'a> {
    pub(crate) policy: &'a Policy,
    pub(crate) body: &'a Value,
}

/// Items of `to` that cover a section of a MeshService, the weakest first.
pub(crate) fn to<'a>(
    policies: &'a [Arc<Policy>],
    service_labels: &BTreeMap<String, String>,
    section: &str,
) -> Vec<Item<'a>> {
    let mut items: Vec<(&TargetRef, Item<'a>)> = policies
        .iter()
        .flat_map(|policy| policy.to.iter().map(move |to| (&to.target, Item { policy, body: &to.body })))
        .filter(|(target, _)| covers(target, service_labels, section))
        .collect();
    // Stable: items of one policy that point at the same keep their order, and the later wins.
    items.sort_by(|(a, x), (b, y)| {
        let by_policy = x.policy.rank.without_name().cmp(&y.policy.rank.without_name());
        by_policy
            .then_with(|| precision(a).cmp(&precision(b)))
            .then_with(|| x.policy.rank.by_name().cmp(y.policy.rank.by_name()))
            .then_with(|| x.policy.key.name.cmp(&y.policy.key.name))
    });
    items.into_iter().map(|(_, item)| item).collect()
}

/// Items of `rules` for an inbound, the weakest first.
pub(crate) fn rules<'a>(policies: &'a [Arc<Policy>], section: &str) -> Vec<Item<'a>> {
    policies
        .iter()
        .filter(|policy| policy.covers_inbound(section))
        .flat_map(|policy| policy.rules.iter().map(move |body| Item { policy, body }))
        .collect()
}

fn covers(target: &TargetRef, labels: &BTreeMap<String, String>, section: &str) -> bool {
    match target.kind {
        TargetKind::Mesh => true,
        TargetKind::MeshService => {
            let wanted_section = target.section_name.as_deref().filter(|name| !name.is_empty());
            !target.labels.is_empty()
                && contains(labels, &target.labels)
                && wanted_section.is_none_or(|wanted| wanted == section)
        }
        _ => false,
    }
}

/// How narrowly an item points.
fn precision(target: &TargetRef) -> u8 {
    match (&target.kind, &target.section_name) {
        (TargetKind::Mesh, _) => 0,
        (_, None) => 1,
        (_, Some(_)) => 2,
    }
}

/// The `default`s of items laid over each other: objects field by field, lists and values whole. Lists whose
/// names begin with `append` are joined. None when there is no item.
pub(crate) fn defaults(items: &[Item<'_>]) -> Option<Value> {
    let mut merged: Option<Value> = None;
    for default in items.iter().filter_map(|item| item.body.get("default")) {
        match &mut merged {
            None => merged = Some(default.clone()),
            Some(base) => overlay(base, default),
        }
    }
    merged
}

fn overlay(base: &mut Value, over: &Value) {
    match (base, over) {
        (Value::Object(base), Value::Object(over)) => overlay_object(base, over),
        (_, Value::Null) => {}
        (base, over) => *base = over.clone(),
    }
}

fn overlay_object(base: &mut Map<String, Value>, over: &Map<String, Value>) {
    for (field, value) in over {
        match base.get_mut(field) {
            Some(Value::Array(list)) if field.starts_with("append") => {
                list.extend(value.as_array().into_iter().flatten().cloned());
            }
            Some(existing) => overlay(existing, value),
            None => {
                base.insert(field.clone(), value.clone());
            }
        }
    }
}
