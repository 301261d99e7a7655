//! Who depends on an object: the way from a change to what must be looked at again.

use std::collections::{BTreeMap, BTreeSet};

use crate::{graph::Mesh, input::Object, policy::Target, snapshot::ProxyKey, views::ServiceKey};

/// What a batch of changes touched, before anything is recomputed.
#[derive(Debug, Default)]
pub(crate) struct Touched {
    /// Services whose instances may differ.
    pub(crate) endpoints: BTreeSet<ServiceKey>,
    /// Services that look different to callers.
    pub(crate) services: BTreeSet<ServiceKey>,
    /// Meshes in which routes may lead elsewhere, so that every service is looked at.
    pub(crate) routes: BTreeSet<String>,
    /// Meshes whose trust changed.
    pub(crate) trust: BTreeSet<String>,
    /// Proxies that may see other policies, another identity, or are different themselves.
    pub(crate) proxies: BTreeSet<ProxyKey>,
}

impl Touched {
    /// Notes who depends on an object, as the graph stands.
    pub(crate) fn depends_on(&mut self, mesh: &Mesh, mesh_name: &str, object: &Object) {
        let key = |name: String| ProxyKey { mesh: mesh_name.to_owned(), name };
        match object {
            Object::Proxy(proxy) => {
                self.endpoints
                    .extend(mesh.services_of(proxy).into_iter().map(|name| (mesh_name.to_owned(), name)));
                self.proxies.insert(proxy.key.clone());
            }
            Object::Service(service) => {
                let rivals = mesh.rivals_of(service).into_iter().chain([service.name.clone()]);
                self.services.extend(rivals.map(|name| (mesh_name.to_owned(), name)));
                if mesh.has_routes() {
                    self.routes.insert(mesh_name.to_owned());
                }
            }
            Object::Identity(identity) => {
                if let Some(wanted) = &identity.labels {
                    self.proxies.extend(mesh.names_with(wanted).into_iter().map(key));
                }
            }
            Object::Trust(_) => {
                self.trust.insert(mesh_name.to_owned());
                self.proxies.extend(mesh.names_with(&BTreeMap::new()).into_iter().map(key));
            }
            Object::Policy(policy) => match &policy.target {
                Target::Mesh => self.proxies.extend(mesh.names_with(&BTreeMap::new()).into_iter().map(key)),
                Target::Dataplane { labels, .. } => {
                    self.proxies.extend(mesh.names_with(labels).into_iter().map(key));
                }
                Target::Nobody => {}
            },
        }
    }
}
