//! KRI, the identifier of a resource or of one of its sections: `kri_<type>_<mesh>_<zone>_<namespace>_<name>_<section>`.

use std::{fmt, str::FromStr};

use crate::{
    registry::{Descriptor, by_short_name},
    resource::Resource,
};

/// A parsed identifier. Parts that a resource doesn't have are empty.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Kri {
    /// Short name of the type.
    pub short_name: String,
    /// The mesh.
    pub mesh: String,
    /// The zone it comes from.
    pub zone: String,
    /// The Kubernetes namespace it comes from.
    pub namespace: String,
    /// Its display name.
    pub name: String,
    /// Name or number of a port, rule or listener.
    pub section: String,
}

impl Kri {
    /// Identifier of a resource.
    pub fn of(resource: &Resource, section: Option<&str>) -> Self {
        let meta = &resource.meta;
        Self {
            short_name: resource.descriptor.short_name.to_owned(),
            mesh: meta.mesh.clone(),
            zone: meta.zone().to_owned(),
            namespace: meta.namespace().to_owned(),
            name: meta.display_name().to_owned(),
            section: section.unwrap_or_default().to_owned(),
        }
    }

    /// The type it names.
    pub fn descriptor(&self) -> Option<&'static Descriptor> {
        by_short_name(&self.short_name)
    }

    /// The same resource, another section (or with an empty one, the resource itself).
    #[must_use]
    pub fn with_section(mut self, section: impl Into<String>) -> Self {
        self.section = section.into();
        self
    }
}

impl fmt::Display for Kri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Kri { short_name, mesh, zone, namespace, name, section } = self;
        write!(f, "kri_{short_name}_{mesh}_{zone}_{namespace}_{name}_{section}")
    }
}

/// A text that is no KRI.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidKri {
    /// It names something else.
    #[error("identifier must start with 'kri': {0:?}")]
    Prefix(String),
    /// It has too few or too many parts.
    #[error("identifier {0:?} must have 7 parts separated by '_', it has {1}")]
    Parts(String, usize),
    /// It names a type that doesn't exist.
    #[error("identifier {0:?} has the unknown type {1:?}")]
    Type(String, String),
}

impl FromStr for Kri {
    type Err = InvalidKri;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parts: Vec<&str> = text.split('_').collect();
        if parts.first() != Some(&"kri") {
            return Err(InvalidKri::Prefix(text.to_owned()));
        }
        let [_, short_name, mesh, zone, namespace, name, section] = parts.as_slice() else {
            return Err(InvalidKri::Parts(text.to_owned(), parts.len()));
        };
        if by_short_name(short_name).is_none() {
            return Err(InvalidKri::Type(text.to_owned(), (*short_name).to_owned()));
        }
        Ok(Self {
            short_name: (*short_name).to_owned(),
            mesh: (*mesh).to_owned(),
            zone: (*zone).to_owned(),
            namespace: (*namespace).to_owned(),
            name: (*name).to_owned(),
            section: (*section).to_owned(),
        })
    }
}
