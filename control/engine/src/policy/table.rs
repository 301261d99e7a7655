//! Policies of one kind in one mesh, found by the labels of a proxy.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use super::{Policy, Target};

/// Key and value.
type Label = (String, String);

/// Policies by name, with an index from labels to those that select by them.
#[derive(Debug, Default)]
pub(crate) struct Table {
    by_name: BTreeMap<String, Arc<Policy>>,
    mesh_wide: BTreeSet<String>,
    /// A policy stands under one of the labels it wants: a proxy without that label isn't selected.
    by_label: BTreeMap<String, BTreeMap<String, BTreeSet<String>>>,
}

impl Table {
    pub(crate) fn insert(&mut self, policy: Arc<Policy>) {
        let name = policy.key.name.clone();
        self.remove(&name);
        match anchor(&policy.target) {
            Anchor::Everybody => {
                self.mesh_wide.insert(name.clone());
            }
            Anchor::Label((key, value)) => {
                self.by_label.entry(key).or_default().entry(value).or_default().insert(name.clone());
            }
            Anchor::Nobody => {}
        }
        self.by_name.insert(name, policy);
    }

    pub(crate) fn remove(&mut self, name: &str) {
        let Some(policy) = self.by_name.remove(name) else { return };
        self.mesh_wide.remove(name);
        if let Anchor::Label((key, value)) = anchor(&policy.target)
            && let Some(values) = self.by_label.get_mut(&key)
            && let Some(names) = values.get_mut(&value)
        {
            names.remove(name);
            if names.is_empty() {
                values.remove(&value);
            }
            if values.is_empty() {
                self.by_label.remove(&key);
            }
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.by_name.is_empty()
    }

    /// The policies that select a proxy with these labels, the weakest first.
    pub(crate) fn select(&self, labels: &BTreeMap<String, String>) -> Vec<Arc<Policy>> {
        let by_label = labels.iter().filter_map(|(key, value)| self.by_label.get(key)?.get(value)).flatten();
        let mut selected: Vec<_> = self
            .mesh_wide
            .iter()
            .chain(by_label)
            .filter_map(|name| self.by_name.get(name))
            .filter(|policy| policy.selects(labels))
            .cloned()
            .collect();
        selected.sort_by(|a, b| (&a.rank, &a.key.name).cmp(&(&b.rank, &b.key.name)));
        selected
    }
}

enum Anchor {
    Everybody,
    Label(Label),
    Nobody,
}

fn anchor(target: &Target) -> Anchor {
    match target {
        Target::Mesh => Anchor::Everybody,
        Target::Nobody => Anchor::Nobody,
        Target::Dataplane { labels, .. } => {
            // Labels that every proxy has tell nothing apart.
            let common = ["kuma.io/mesh", "kuma.io/zone", "kuma.io/env", "kuma.io/origin"];
            let telling = labels.iter().find(|(key, _)| !common.contains(&key.as_str()));
            match telling.or_else(|| labels.iter().next()) {
                Some((key, value)) => Anchor::Label((key.clone(), value.clone())),
                None => Anchor::Everybody,
            }
        }
    }
}
