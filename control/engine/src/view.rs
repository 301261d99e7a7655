//! What proxies share: everything outbound, for all that see the same policies under the same identity.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use serde_json::Value;
use ursa_model::ResourceKey;

use crate::{
    encoded::{Encoded, TypeUrl},
    engine::Counters,
    envoy::encode,
    graph::{Mesh, texts},
    input::{self, Backends, Fingerprint, Service, ServicePort},
    policies::EFFECTS,
    policy::{Selected, merge},
    resources::Name,
    shared::Shared,
    snapshot::{Layer, ProxyKey},
    xds::{
        outbound::{Finished, Outbound, Target},
        tls::TRUST_BUNDLE,
        transparent::{self, Redirect},
    },
};

/// What decides about a view's content, besides the mesh itself.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct ViewKey {
    pub(crate) mesh: String,
    /// The SDS name of the certificate.
    pub(crate) identity: Option<Arc<str>>,
    /// Hash over the policies that have `to`, in order.
    pub(crate) policies: u128,
    pub(crate) redirect: Redirect,
    pub(crate) reachable: Option<Backends>,
}

/// A view and who has it.
#[derive(Debug)]
pub(crate) struct View {
    pub(crate) key: ViewKey,
    pub(crate) members: BTreeSet<ProxyKey>,
    pub(crate) layer: Arc<Layer>,
    /// The layer before the changes that are being applied, once it was touched.
    pub(crate) before: Option<Arc<Layer>>,
    policies: Selected,
    /// What is in the layer for each service.
    held: BTreeMap<String, Held>,
    /// Keeps it for others.
    _catch_all: Arc<Layer>,
}

/// What a view holds of a service.
#[derive(Debug, Default)]
struct Held {
    ports: Vec<(Arc<str>, Arc<Finished>)>,
    hostnames: Vec<String>,
}

impl PartialEq for Held {
    /// Pairs are shared: equal ones are the same.
    fn eq(&self, other: &Self) -> bool {
        self.hostnames == other.hostnames
            && self.ports.len() == other.ports.len()
            && self.ports.iter().zip(&other.ports).all(|(a, b)| a.0 == b.0 && Arc::ptr_eq(&a.1, &b.1))
    }
}

/// Derived values that all views share.
#[derive(Debug, Default)]
pub(crate) struct Store {
    outbounds: Shared<Finished>,
    names: Shared<Encoded>,
    catch_alls: Shared<Layer>,
}

/// What a view needs of the engine while it is refreshed.
pub(crate) struct Workshop<'a> {
    pub(crate) mesh: &'a Mesh,
    pub(crate) store: &'a mut Store,
    pub(crate) counters: &'a mut Counters,
    pub(crate) warnings: &'a mut Vec<(ResourceKey, String)>,
}

/// The policies of a selection that are about outbound traffic, hashed.
pub(crate) fn outbound_hash(selected: &Selected) -> u128 {
    let mut print = Fingerprint::new();
    for (kind, policies) in selected {
        for policy in policies.iter().filter(|policy| !policy.to.is_empty()) {
            print.text(kind);
            print.text(&policy.key.name);
            print.number(policy.hash);
        }
    }
    print.finish()
}

impl View {
    pub(crate) fn new(key: ViewKey, policies: Selected, store: &mut Store) -> Self {
        let catch_all = store.catch_alls.get(key.redirect.hash(), || {
            let mut layer = Layer::default();
            transparent::outbound(key.redirect, &mut layer);
            Arc::new(layer)
        });
        Self {
            layer: Arc::clone(&catch_all),
            _catch_all: catch_all,
            key,
            members: BTreeSet::new(),
            before: None,
            policies,
            held: BTreeMap::new(),
        }
    }

    /// The layer for changing; remembers what it was.
    pub(crate) fn layer_mut(&mut self) -> &mut Layer {
        if self.before.is_none() {
            self.before = Some(Arc::clone(&self.layer));
        }
        Arc::make_mut(&mut self.layer)
    }

    /// Names of the services that it holds.
    pub(crate) fn services(&self) -> impl Iterator<Item = &String> {
        self.held.keys()
    }

    /// Whether it holds a service.
    pub(crate) fn holds(&self, service: &str) -> bool {
        self.held.contains_key(service)
    }

    /// Names of the clusters that ask for endpoints, of one service.
    pub(crate) fn endpoint_clusters<'a>(
        &'a self,
        service: &str,
    ) -> impl Iterator<Item = &'a Arc<str>> + use<'a> {
        self.held
            .get(service)
            .into_iter()
            .flat_map(|held| &held.ports)
            .filter(|(_, finished)| finished.has_endpoints)
            .map(|(name, _)| name)
    }

    /// Derives what services look like from here, or removes them. What one of them gives up another may take
    /// over, so all removals come first.
    pub(crate) fn refresh<'a>(&mut self, names: impl Iterator<Item = &'a str>, workshop: &mut Workshop<'_>) {
        let mut changed = Vec::new();
        for name in names {
            let old = self.held.get(name);
            let new = match workshop.mesh.service(name).cloned() {
                Some(service) => self.derive(&service, workshop),
                None => Held::default(),
            };
            // Names carry addresses, which the ports' pairs are made from too.
            if old.unwrap_or(&Held::default()) != &new {
                changed.push((name, new));
            }
        }
        for (name, _) in &changed {
            if let Some(old) = self.held.remove(*name) {
                self.withdraw(&old);
            }
        }
        for (name, new) in changed {
            if !new.ports.is_empty()
                && let Some(service) = workshop.mesh.service(name)
            {
                self.place(&new, service, &mut workshop.store.names);
                self.held.insert(name.to_owned(), new);
            }
        }
    }

    fn derive(&self, service: &Service, workshop: &mut Workshop<'_>) -> Held {
        let mut held = Held::default();
        let mesh = workshop.mesh;
        if !mesh.owns(service, &service.kri) {
            let reason =
                format!("left out of all configuration: another MeshService already is {}", service.kri);
            workshop.warnings.push((self.owner(service), reason));
            return held;
        }
        for port in &service.ports {
            if let Some(reachable) = &self.key.reachable
                && !Mesh::is_reachable(reachable.refs(), service, port)
            {
                continue;
            }
            held.ports.push((Arc::clone(&port.resource), self.outbound(service, port, workshop)));
        }
        if !held.ports.is_empty() && !service.addresses.is_empty() {
            held.hostnames =
                service.hostnames.iter().filter(|name| mesh.owns(service, name)).cloned().collect();
        }
        held
    }

    fn outbound(&self, service: &Service, port: &ServicePort, workshop: &mut Workshop<'_>) -> Arc<Finished> {
        let confs: Vec<Option<Value>> = EFFECTS
            .iter()
            .map(|effect| {
                let items = merge::to(self.policies.get(effect.kind())?, &service.labels, &port.section);
                if items.is_empty() { None } else { effect.merge(&items, workshop.mesh) }
            })
            .collect();
        let target = Target {
            name: &port.resource,
            addresses: &service.addresses,
            port: port.port,
            protocol: &port.protocol,
            sni: &port.sni,
            peers: &service.identities,
            identity: self.key.identity.as_deref(),
        };
        let key = input::hash(&(
            target.name,
            target.addresses,
            target.port,
            target.protocol,
            target.sni,
            target.peers,
            target.identity,
            &confs,
        ));
        workshop.store.outbounds.get(key, || {
            workshop.counters.outbounds += 1;
            let mut outbound = Outbound::new(&target);
            for (effect, conf) in EFFECTS.iter().zip(&confs) {
                if let Err(reason) = effect.outbound(conf.as_ref(), &mut outbound) {
                    let left_out =
                        format!("{} has no effect on port {}: {reason}", effect.kind(), port.section);
                    workshop.warnings.push((self.owner(service), left_out));
                }
            }
            Arc::new(outbound.finish(&target))
        })
    }

    fn owner(&self, service: &Service) -> ResourceKey {
        ResourceKey { kind: "MeshService", mesh: self.key.mesh.clone(), name: service.name.clone() }
    }

    fn withdraw(&mut self, old: &Held) {
        let layer = self.layer_mut();
        for (name, _) in &old.ports {
            layer.remove(TypeUrl::Cluster, name);
            layer.remove(TypeUrl::Listener, name);
            layer.remove(TypeUrl::Endpoint, name);
        }
        for hostname in &old.hostnames {
            layer.remove(TypeUrl::Name, hostname);
        }
    }

    fn place(&mut self, new: &Held, service: &Service, names: &mut Shared<Encoded>) {
        let layer = self.layer_mut();
        for (_, finished) in &new.ports {
            layer.insert(TypeUrl::Cluster, Arc::clone(&finished.cluster));
            if let Some(listener) = &finished.listener {
                layer.insert(TypeUrl::Listener, Arc::clone(listener));
            }
        }
        let Some((listener, _)) = new.ports.first() else { return };
        for hostname in &new.hostnames {
            let name = Name {
                hostname: hostname.clone(),
                addresses: texts(&service.addresses),
                listener: listener.to_string(),
            };
            let hash = input::hash(&(&name.hostname, &name.addresses, &name.listener));
            let encoded = names.get(hash, || encode::resource(TypeUrl::Name, hostname, &name));
            layer.insert(TypeUrl::Name, encoded);
        }
    }

    /// Puts the load assignments of a service's clusters in place.
    pub(crate) fn put_endpoints(&mut self, service: &str, assignments: &BTreeMap<Arc<str>, Arc<Encoded>>) {
        let names: Vec<Arc<str>> = self.endpoint_clusters(service).cloned().collect();
        for name in names {
            let Some(assignment) = assignments.get(&name) else { continue };
            let held = self.layer.of(TypeUrl::Endpoint).get(&name);
            if held.is_none_or(|held| held.version != assignment.version) {
                self.layer_mut().insert(TypeUrl::Endpoint, Arc::clone(assignment));
            }
        }
    }

    /// Puts the trust bundle in place, or takes it away.
    pub(crate) fn put_secret(&mut self, secret: Option<&Arc<Encoded>>) {
        let held = self.layer.of(TypeUrl::Secret).get(TRUST_BUNDLE);
        if held.map(|held| &held.version) == secret.map(|secret| &secret.version) {
            return;
        }
        match secret {
            Some(secret) => self.layer_mut().insert(TypeUrl::Secret, Arc::clone(secret)),
            None => self.layer_mut().remove(TypeUrl::Secret, TRUST_BUNDLE),
        }
    }
}
