//! Who may talk to a port of a workload.
//!
//! For bytes the listener says it: a change replaces the filter chain, and Envoy drains the connections of the old
//! one. For requests it is a resource of its own under a name that stays (extension config discovery): a change
//! replaces its content, and the next request on any open connection is judged by it.

use super::{part, rbac};
use crate::envoy::types::{
    core::{ExtensionConfigSource, TypedExtensionConfig},
    hcm::{HttpFilter, http_filter::ConfigType},
    listener::Filter,
    xds_matching::Matcher,
};

/// Whom some rule allows, whatever is denied.
#[derive(Debug)]
pub(crate) enum Admitted {
    /// Nobody.
    Nobody,
    /// Peers with these SPIFFE ids.
    Ids(Vec<rbac::Text>),
    /// Rules that ids alone can't express: every peer of a trust domain is looked at.
    Trusted,
}

/// Which peers a part of the permission is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Peers {
    /// Those with a certificate of the mesh.
    Mesh,
    /// Those without.
    Plain,
}

/// Who passes.
#[derive(Debug)]
pub(crate) struct Permission {
    /// What the handshake already decides for bytes.
    pub(crate) admitted: Admitted,
    /// Among peers with a certificate of the mesh.
    pub(crate) mesh: Matcher,
    /// What would be refused if shadow rules counted.
    pub(crate) shadow: Option<Matcher>,
    /// Those without, all alike.
    pub(crate) plain: Verdict,
}

/// One answer for everybody, and the policy that gives it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Verdict {
    pub(crate) name: String,
    pub(crate) allow: bool,
}

impl Verdict {
    /// What holds where no policy says anything.
    pub(crate) fn refuse() -> Self {
        Self { name: "default".to_owned(), allow: false }
    }

    fn matcher(&self) -> Matcher {
        rbac::constant(&self.name, self.allow)
    }
}

impl Permission {
    /// Nobody passes.
    pub(crate) fn nobody() -> Self {
        Self { admitted: Admitted::Nobody, mesh: rbac::matcher(&[]), shadow: None, plain: Verdict::refuse() }
    }

    /// The resource under which a port's HTTP filter finds it.
    pub(crate) fn resource(&self, name: &str, peers: Peers) -> TypedExtensionConfig {
        let (matcher, shadow) = self.matchers(peers);
        TypedExtensionConfig { name: name.to_owned(), typed_config: Some(rbac::http(matcher, shadow)) }
    }

    /// The network filter that holds it.
    pub(crate) fn network_filter(&self, stat_prefix: &str, peers: Peers) -> Filter {
        let (matcher, shadow) = self.matchers(peers);
        super::filter::network("envoy.filters.network.rbac", rbac::network(stat_prefix, matcher, shadow))
    }

    fn matchers(&self, peers: Peers) -> (Matcher, Option<Matcher>) {
        match peers {
            Peers::Mesh => (self.mesh.clone(), self.shadow.clone()),
            Peers::Plain => (self.plain.matcher(), None),
        }
    }
}

/// The name of the resource for a port.
pub(crate) fn name(port: &str, peers: Peers) -> String {
    match peers {
        Peers::Mesh => format!("{port}_rbac"),
        Peers::Plain => format!("{port}_rbac_plaintext"),
    }
}

/// The HTTP filter that asks for the resource. The listener isn't served before the answer is there; where it stays
/// away for Envoy's 15 s, or is withdrawn, nobody passes.
pub(crate) fn http_filter(name: &str) -> HttpFilter {
    HttpFilter {
        name: name.to_owned(),
        config_type: Some(ConfigType::ConfigDiscovery(ExtensionConfigSource {
            config_source: part::ads(),
            default_config: Some(rbac::http(Verdict::refuse().matcher(), None)),
            apply_default_config_without_warming: false,
            type_urls: vec![rbac::http_type()],
        })),
        ..HttpFilter::default()
    }
}
