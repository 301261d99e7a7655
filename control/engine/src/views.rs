//! All views, and who must look when something changes.

use std::collections::{BTreeMap, BTreeSet};

use crate::{
    snapshot::{Names, ProxyKey},
    view::{View, ViewKey},
};

/// Stands for a view's key where keys are too long to compare.
pub(crate) type ViewId = u64;

/// A mesh and the name of one of its services.
pub(crate) type ServiceKey = (String, String);

/// Views by key, by mesh, and by the services they hold.
#[derive(Debug, Default)]
pub(crate) struct Views {
    by_id: BTreeMap<ViewId, View>,
    ids: BTreeMap<ViewKey, ViewId>,
    by_mesh: BTreeMap<String, BTreeSet<ViewId>>,
    watchers: BTreeMap<ServiceKey, BTreeSet<ViewId>>,
    next: ViewId,
}

impl Views {
    pub(crate) fn id(&self, key: &ViewKey) -> Option<ViewId> {
        self.ids.get(key).copied()
    }

    pub(crate) fn get(&self, id: ViewId) -> Option<&View> {
        self.by_id.get(&id)
    }

    pub(crate) fn get_mut(&mut self, id: ViewId) -> Option<&mut View> {
        self.by_id.get_mut(&id)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &View> {
        self.by_id.values()
    }

    /// Whether any proxy of a mesh is connected.
    pub(crate) fn is_watched(&self, mesh: &str) -> bool {
        self.by_mesh.contains_key(mesh)
    }

    /// The views of a mesh.
    pub(crate) fn of_mesh(&self, mesh: &str) -> Vec<ViewId> {
        self.by_mesh.get(mesh).into_iter().flatten().copied().collect()
    }

    /// The views that hold a service.
    pub(crate) fn watching(&self, service: &ServiceKey) -> Vec<ViewId> {
        self.watchers.get(service).into_iter().flatten().copied().collect()
    }

    pub(crate) fn insert(&mut self, view: View) -> ViewId {
        let id = self.next;
        self.next += 1;
        for service in view.services() {
            self.watchers.entry((view.key.mesh.clone(), service.clone())).or_default().insert(id);
        }
        self.by_mesh.entry(view.key.mesh.clone()).or_default().insert(id);
        self.ids.insert(view.key.clone(), id);
        self.by_id.insert(id, view);
        id
    }

    /// Notes whether a view holds a service, after it was refreshed.
    pub(crate) fn note(&mut self, id: ViewId, service: &ServiceKey) {
        let holds = self.by_id.get(&id).is_some_and(|view| view.holds(&service.1));
        if holds {
            self.watchers.entry(service.clone()).or_default().insert(id);
        } else {
            self.unwatch(id, service);
        }
    }

    fn unwatch(&mut self, id: ViewId, service: &ServiceKey) {
        if let Some(watchers) = self.watchers.get_mut(service) {
            watchers.remove(&id);
            if watchers.is_empty() {
                self.watchers.remove(service);
            }
        }
    }

    /// Drops a view that has no members.
    pub(crate) fn drop_if_empty(&mut self, id: ViewId) {
        if self.by_id.get(&id).is_none_or(|view| !view.members.is_empty()) {
            return;
        }
        let Some(view) = self.by_id.remove(&id) else { return };
        for service in view.services() {
            self.unwatch(id, &(view.key.mesh.clone(), service.clone()));
        }
        if let Some(ids) = self.by_mesh.get_mut(&view.key.mesh) {
            ids.remove(&id);
            if ids.is_empty() {
                self.by_mesh.remove(&view.key.mesh);
            }
        }
        self.ids.remove(&view.key);
    }

    /// What changed in a view during this batch, and for whom.
    pub(crate) fn changes(&self, id: ViewId) -> Option<(Names, &BTreeSet<ProxyKey>)> {
        let view = self.by_id.get(&id)?;
        let changed = view.before.as_ref()?.diff(&view.layer);
        (!changed.is_empty()).then_some((changed, &view.members))
    }
}
