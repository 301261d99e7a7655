//! What every resource has besides its spec.

use std::collections::BTreeMap;

use time::OffsetDateTime;

use crate::labels;

/// Name, scope, labels and history of a resource.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Meta {
    /// Name, unique for its type and mesh.
    pub name: String,
    /// The mesh, empty for types of global scope.
    pub mesh: String,
    /// Labels, those that were computed included.
    pub labels: BTreeMap<String, String>,
    /// When the store first saw it.
    pub creation_time: Option<OffsetDateTime>,
    /// When the store last changed it.
    pub modification_time: Option<OffsetDateTime>,
    /// Version for optimistic concurrency; 0 = never stored.
    pub version: u64,
}

impl Meta {
    /// Meta of a new resource in a mesh (or with an empty mesh, of global scope).
    pub fn new(mesh: impl Into<String>, name: impl Into<String>) -> Self {
        Self { name: name.into(), mesh: mesh.into(), ..Self::default() }
    }

    /// A label's value.
    pub fn label(&self, name: &str) -> Option<&str> {
        self.labels.get(name).map(String::as_str)
    }

    /// The name people gave it: `kuma.io/display-name`, or else the name.
    pub fn display_name(&self) -> &str {
        self.label(labels::DISPLAY_NAME).unwrap_or(&self.name)
    }

    /// The zone it comes from, empty when it has none.
    pub fn zone(&self) -> &str {
        self.label(labels::ZONE).unwrap_or_default()
    }

    /// The Kubernetes namespace it comes from, empty when it has none.
    pub fn namespace(&self) -> &str {
        self.label(labels::NAMESPACE).unwrap_or_default()
    }
}
