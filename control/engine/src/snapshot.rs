//! What one proxy has: two layers of shared maps from names to encoded resources.

use std::{collections::BTreeMap, sync::Arc};

use crate::encoded::{Encoded, TypeUrl};

/// One proxy: its mesh and the name of its Dataplane.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ProxyKey {
    /// The mesh.
    pub mesh: String,
    /// The name of the Dataplane.
    pub name: String,
}

/// Kinds and names of resources.
pub type Names = Vec<(TypeUrl, Arc<str>)>;

/// Resources of one kind by name.
pub(crate) type Resources = BTreeMap<Arc<str>, Arc<Encoded>>;

/// Resources of every kind. Copies share each kind's map until one of them changes it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Layer {
    kinds: [Arc<Resources>; TypeUrl::ALL.len()],
}

impl Layer {
    pub(crate) fn of(&self, kind: TypeUrl) -> &Resources {
        &self.kinds[kind as usize]
    }

    pub(crate) fn insert(&mut self, kind: TypeUrl, resource: Arc<Encoded>) {
        Arc::make_mut(&mut self.kinds[kind as usize]).insert(Arc::clone(&resource.name), resource);
    }

    pub(crate) fn remove(&mut self, kind: TypeUrl, name: &str) {
        if self.kinds[kind as usize].contains_key(name) {
            Arc::make_mut(&mut self.kinds[kind as usize]).remove(name);
        }
    }

    /// Names that differ between two layers, by version.
    pub(crate) fn diff(&self, other: &Self) -> Names {
        let mut changed = Vec::new();
        for kind in TypeUrl::ALL {
            let (old, new) = (&self.kinds[kind as usize], &other.kinds[kind as usize]);
            if Arc::ptr_eq(old, new) {
                continue;
            }
            for (name, resource) in new.iter() {
                let same = old
                    .get(name)
                    .is_some_and(|was| Arc::ptr_eq(was, resource) || was.version == resource.version);
                if !same {
                    changed.push((kind, Arc::clone(name)));
                }
            }
            changed.extend(
                old.keys().filter(|name| !new.contains_key(*name)).map(|name| (kind, Arc::clone(name))),
            );
        }
        changed
    }
}

/// Everything that one proxy has, at one moment. Cheap to make and to keep: it shares all maps and resources.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// What the proxy shares with all proxies that see the same.
    pub(crate) view: Arc<Layer>,
    /// What is the proxy's own.
    pub(crate) own: Arc<Layer>,
}

impl Snapshot {
    /// One resource.
    pub fn get(&self, kind: TypeUrl, name: &str) -> Option<&Arc<Encoded>> {
        self.own.of(kind).get(name).or_else(|| self.view.of(kind).get(name))
    }

    /// All resources of a kind; first the proxy's own, then the shared ones, each by name. No name occurs twice.
    pub fn iter(&self, kind: TypeUrl) -> impl Iterator<Item = &Arc<Encoded>> {
        let own = self.own.of(kind);
        own.values().chain(self.view.of(kind).values().filter(|shared| !own.contains_key(&shared.name)))
    }

    /// How many resources of a kind there are.
    pub fn len(&self, kind: TypeUrl) -> usize {
        self.iter(kind).count()
    }

    /// Whether there is no resource of a kind.
    pub fn is_empty(&self, kind: TypeUrl) -> bool {
        self.own.of(kind).is_empty() && self.view.of(kind).is_empty()
    }

    /// All resources of a kind as one map.
    pub fn resources(&self, kind: TypeUrl) -> BTreeMap<Arc<str>, Arc<Encoded>> {
        self.iter(kind).map(|resource| (Arc::clone(&resource.name), Arc::clone(resource))).collect()
    }
}
