//! The resources that were read from the store, with the ways in that the control plane needs.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use ursa_model::{Resource, ResourceKey, labels};

/// Every resource by key, and Dataplanes by workload.
#[derive(Debug, Default)]
pub struct Index {
    resources: BTreeMap<ResourceKey, Arc<Resource>>,
    workloads: HashMap<(String, String), BTreeSet<String>>,
}

impl Index {
    /// One resource.
    pub fn get(&self, key: &ResourceKey) -> Option<&Arc<Resource>> {
        self.resources.get(key)
    }

    /// All of a kind and mesh, by name. Global ones have an empty mesh.
    pub fn list<'a>(
        &'a self,
        kind: &'static str,
        mesh: &'a str,
    ) -> impl Iterator<Item = &'a Arc<Resource>> + 'a {
        let first = ResourceKey { kind, mesh: mesh.to_owned(), name: String::new() };
        self.resources
            .range(first..)
            .take_while(move |(key, _)| key.kind == kind && key.mesh == mesh)
            .map(|(_, resource)| resource)
    }

    /// All of a kind in every mesh.
    pub fn list_all(&self, kind: &'static str) -> impl Iterator<Item = &Arc<Resource>> {
        let first = ResourceKey { kind, mesh: String::new(), name: String::new() };
        self.resources
            .range(first..)
            .take_while(move |(key, _)| key.kind == kind)
            .map(|(_, resource)| resource)
    }

    /// Every key.
    pub fn keys(&self) -> impl Iterator<Item = &ResourceKey> {
        self.resources.keys()
    }

    /// The Dataplanes of a workload, by name.
    pub fn dataplanes_of<'a>(
        &'a self,
        mesh: &str,
        workload: &str,
    ) -> impl Iterator<Item = &'a Arc<Resource>> + 'a {
        let mesh = mesh.to_owned();
        self.workloads.get(&(mesh.clone(), workload.to_owned())).into_iter().flatten().filter_map(
            move |name| {
                self.resources.get(&ResourceKey { kind: "Dataplane", mesh: mesh.clone(), name: name.clone() })
            },
        )
    }

    pub(super) fn put(&mut self, resource: Arc<Resource>) {
        let key = resource.key();
        self.unlink(&key);
        if let Some(workload) = workload_of(&resource) {
            self.workloads
                .entry((key.mesh.clone(), workload.to_owned()))
                .or_default()
                .insert(key.name.clone());
        }
        self.resources.insert(key, resource);
    }

    pub(super) fn remove(&mut self, key: &ResourceKey) -> bool {
        self.unlink(key);
        self.resources.remove(key).is_some()
    }

    fn unlink(&mut self, key: &ResourceKey) {
        let Some(workload) = self.resources.get(key).and_then(|old| workload_of(old)).map(str::to_owned)
        else {
            return;
        };
        let place = (key.mesh.clone(), workload);
        if let Some(names) = self.workloads.get_mut(&place) {
            names.remove(&key.name);
            if names.is_empty() {
                self.workloads.remove(&place);
            }
        }
    }
}

fn workload_of(resource: &Resource) -> Option<&str> {
    (resource.descriptor.name == "Dataplane").then(|| resource.meta.label(labels::WORKLOAD)).flatten()
}
