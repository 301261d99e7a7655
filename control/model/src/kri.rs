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

/// A text that is no KRI, in the words that clients know.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidKri {
    /// It has too few parts.
    #[error("invalid identifier string: {0:?}")]
    Parts(String),
    /// It names something else.
    #[error("identifier must start with 'kri': {0:?}")]
    Prefix(String),
    /// It names a type that doesn't exist.
    #[error("unknown short name of resource type: {0:?}")]
    Type(String),
}

impl FromStr for Kri {
    type Err = InvalidKri;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        // Only the section may itself have a `_`.
        let parts: Vec<&str> = text.splitn(7, '_').collect();
        let [kri, short_name, mesh, zone, namespace, name, section] = parts[..] else {
            return Err(InvalidKri::Parts(text.to_owned()));
        };
        if kri != "kri" {
            return Err(InvalidKri::Prefix(text.to_owned()));
        }
        if by_short_name(short_name).is_none() {
            return Err(InvalidKri::Type(short_name.to_owned()));
        }
        Ok(Self {
            short_name: short_name.to_owned(),
            mesh: mesh.to_owned(),
            zone: zone.to_owned(),
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            section: section.to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[rstest::rstest]
    #[case("kri_mt_default_east__a_")]
    #[case("kri_msvc_default_east_ns_a_http_1")]
    fn what_is_written_is_read(#[case] text: &str) {
        assert_eq!(text.parse::<Kri>().expect("KRI").to_string(), text);
    }

    #[rstest::rstest]
    #[case("kri_mt_default", "invalid identifier string: \"kri_mt_default\"")]
    #[case("other", "invalid identifier string: \"other\"")]
    #[case("id_mt_default_east__a_", "identifier must start with 'kri': \"id_mt_default_east__a_\"")]
    #[case("kri_nope_default_east__a_", "unknown short name of resource type: \"nope\"")]
    #[case("kri__default_east__a_", "unknown short name of resource type: \"\"")]
    fn what_is_none_is_told(#[case] text: &str, #[case] reason: &str) {
        assert_eq!(text.parse::<Kri>().expect_err("no KRI").to_string(), reason);
    }
}
