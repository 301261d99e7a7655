//! One mesh: its objects and the indexes that say who depends on whom.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use ursa_model::{labels, policy::BackendRef, policy::TargetKind, types::mesh_service::TargetPort};

use crate::{
    input::{Identity, InboundPort, Proxy, Reachable, Selector, Service, ServicePort, Trust},
    policies::{Destinations, EFFECTS},
    policy::{Policy, Selected, contains, table::Table},
    xds::endpoint::Instance,
};

type Label = (String, String);

/// A mesh.
#[derive(Debug, Default)]
pub(crate) struct Mesh {
    proxies: BTreeMap<String, Arc<Proxy>>,
    /// Names of proxies by each of their labels.
    proxies_by_label: BTreeMap<Label, BTreeSet<String>>,
    services: BTreeMap<String, Arc<Service>>,
    /// Names of services by each label of their own.
    services_labelled: BTreeMap<Label, BTreeSet<String>>,
    /// Names of services under one label that they select by.
    services_by_label: BTreeMap<Label, BTreeSet<String>>,
    services_by_proxy: BTreeMap<String, BTreeSet<String>>,
    /// Names of services by each KRI and hostname that they claim; the first has it.
    claims: BTreeMap<String, BTreeSet<String>>,
    identities: BTreeMap<String, Arc<Identity>>,
    trusts: BTreeMap<String, Arc<Trust>>,
    policies: BTreeMap<&'static str, Table>,
}

impl Mesh {
    pub(crate) fn is_empty(&self) -> bool {
        self.proxies.is_empty()
            && self.services.is_empty()
            && self.identities.is_empty()
            && self.trusts.is_empty()
            && self.policies.values().all(Table::is_empty)
    }

    // Proxies.

    pub(crate) fn proxy(&self, name: &str) -> Option<&Arc<Proxy>> {
        self.proxies.get(name)
    }

    pub(crate) fn put_proxy(&mut self, proxy: Arc<Proxy>) {
        let name = proxy.key.name.clone();
        self.remove_proxy(&name);
        for label in &proxy.labels {
            index(&mut self.proxies_by_label, label).insert(name.clone());
        }
        self.proxies.insert(name, proxy);
    }

    pub(crate) fn remove_proxy(&mut self, name: &str) {
        let Some(proxy) = self.proxies.remove(name) else { return };
        for label in &proxy.labels {
            unindex(&mut self.proxies_by_label, label, name);
        }
    }

    /// Names of the proxies that have all of these labels.
    fn proxies_with(&self, wanted: &BTreeMap<String, String>) -> Vec<&Arc<Proxy>> {
        // Start from the rarest label, so that the search costs what it finds.
        let rarest = wanted
            .iter()
            .map(|(key, value)| self.proxies_by_label.get(&(key.clone(), value.clone())))
            .min_by_key(|names| names.map_or(0, BTreeSet::len));
        match rarest {
            None => self.proxies.values().collect(),
            Some(None) => Vec::new(),
            Some(Some(names)) => names
                .iter()
                .filter_map(|name| self.proxies.get(name))
                .filter(|p| contains(&p.labels, wanted))
                .collect(),
        }
    }

    /// Names of the proxies that an identity or policy selects by these labels.
    pub(crate) fn names_with(&self, wanted: &BTreeMap<String, String>) -> Vec<String> {
        self.proxies_with(wanted).into_iter().map(|proxy| proxy.key.name.clone()).collect()
    }

    // Services.

    pub(crate) fn service(&self, name: &str) -> Option<&Arc<Service>> {
        self.services.get(name)
    }

    /// Whether a service has a KRI or hostname, and no other service of the same.
    pub(crate) fn owns(&self, service: &Service, claim: &str) -> bool {
        self.claims.get(claim).and_then(BTreeSet::first).is_some_and(|first| *first == service.name)
    }

    /// Names of other services that claim the same KRI or hostname.
    pub(crate) fn rivals_of(&self, service: &Service) -> BTreeSet<String> {
        let all = service.claims().filter_map(|claim| self.claims.get(claim)).flatten();
        all.filter(|name| **name != service.name).cloned().collect()
    }

    pub(crate) fn services(&self) -> impl Iterator<Item = &Arc<Service>> {
        self.services.values()
    }

    pub(crate) fn put_service(&mut self, service: Arc<Service>) {
        let name = service.name.clone();
        self.remove_service(&name);
        for label in &service.labels {
            index(&mut self.services_labelled, label).insert(name.clone());
        }
        for claim in service.claims() {
            self.claims.entry(claim.to_owned()).or_default().insert(name.clone());
        }
        match &service.selector {
            Selector::Labels(wanted) => {
                if let Some(label) = anchor(wanted) {
                    index(&mut self.services_by_label, label).insert(name.clone());
                }
            }
            Selector::Name(proxy) => {
                self.services_by_proxy.entry(proxy.clone()).or_default().insert(name.clone());
            }
            Selector::Nobody => {}
        }
        self.services.insert(name, service);
    }

    pub(crate) fn remove_service(&mut self, name: &str) {
        let Some(service) = self.services.remove(name) else { return };
        for label in &service.labels {
            unindex(&mut self.services_labelled, label, name);
        }
        for claim in service.claims() {
            if let Some(names) = self.claims.get_mut(claim) {
                names.remove(name);
                if names.is_empty() {
                    self.claims.remove(claim);
                }
            }
        }
        match &service.selector {
            Selector::Labels(wanted) => {
                if let Some(label) = anchor(wanted) {
                    unindex(&mut self.services_by_label, label, name);
                }
            }
            Selector::Name(proxy) => {
                if let Some(names) = self.services_by_proxy.get_mut(proxy) {
                    names.remove(name);
                    if names.is_empty() {
                        self.services_by_proxy.remove(proxy);
                    }
                }
            }
            Selector::Nobody => {}
        }
    }

    /// Names of the services that a proxy serves.
    pub(crate) fn services_of(&self, proxy: &Proxy) -> BTreeSet<String> {
        let by_label = proxy
            .labels
            .iter()
            .filter_map(|(key, value)| self.services_by_label.get(&(key.clone(), value.clone())))
            .flatten()
            .filter(|name| {
                let selector = self.services.get(*name).map(|service| &service.selector);
                matches!(selector, Some(Selector::Labels(wanted)) if contains(&proxy.labels, wanted))
            });
        let by_name = self.services_by_proxy.get(&proxy.key.name).into_iter().flatten();
        by_label.chain(by_name).cloned().collect()
    }

    /// Where a port of a service is served, among proxies that `is_online` says are there.
    pub(crate) fn instances(
        &self,
        service: &Service,
        port: &ServicePort,
        is_online: impl Fn(&Proxy) -> bool,
    ) -> Vec<Instance> {
        let proxies = match &service.selector {
            Selector::Labels(wanted) => self.proxies_with(wanted),
            Selector::Name(name) => self.proxies.get(name).into_iter().collect(),
            Selector::Nobody => Vec::new(),
        };
        proxies
            .into_iter()
            .filter(|proxy| is_online(proxy))
            .flat_map(|proxy| {
                proxy.inbounds.iter().filter(|inbound| inbound.ready && serves(inbound, &port.target)).map(
                    |inbound| Instance {
                        address: inbound.address,
                        port: inbound.port,
                        labels: proxy.labels.clone(),
                    },
                )
            })
            .collect()
    }

    /// The services that have all of these labels, by name.
    fn services_with<'a>(
        &'a self,
        wanted: &'a BTreeMap<String, String>,
    ) -> impl Iterator<Item = &'a Arc<Service>> {
        let rarest = wanted
            .iter()
            .map(|(key, value)| self.services_labelled.get(&(key.clone(), value.clone())))
            .min_by_key(|names| names.map_or(0, BTreeSet::len));
        let names = rarest.flatten().into_iter().flatten();
        names.filter_map(|name| self.services.get(name)).filter(|service| contains(&service.labels, wanted))
    }

    /// The services that people mean by a name: its own, or the one they gave it.
    fn services_called(&self, name: &str) -> impl Iterator<Item = &Arc<Service>> {
        let label = (labels::DISPLAY_NAME.to_owned(), name.to_owned());
        let by_display = self.services_labelled.get(&label).into_iter().flatten();
        self.services.get(name).into_iter().chain(by_display.filter_map(|name| self.services.get(name)))
    }

    fn services_meant<'a>(
        &'a self,
        wanted: &'a Reachable,
    ) -> Box<dyn Iterator<Item = &'a Arc<Service>> + 'a> {
        if wanted.kind != "MeshService" {
            Box::new(std::iter::empty())
        } else if wanted.name.is_empty() {
            Box::new(self.services_with(&wanted.labels))
        } else {
            Box::new(self.services_called(&wanted.name))
        }
    }

    /// Names of the services that a proxy wants to know.
    pub(crate) fn reachable(&self, wanted: Option<&[Reachable]>) -> BTreeSet<String> {
        match wanted {
            None => self.services.keys().cloned().collect(),
            Some(wanted) => {
                let services = wanted.iter().flat_map(|wanted| self.services_meant(wanted));
                services.map(|service| service.name.clone()).collect()
            }
        }
    }

    /// Whether a proxy wants to know a port.
    pub(crate) fn is_reachable(wanted: &[Reachable], service: &Service, port: &ServicePort) -> bool {
        wanted.iter().any(|wanted| {
            let meant = if wanted.name.is_empty() {
                !wanted.labels.is_empty() && contains(&service.labels, &wanted.labels)
            } else {
                is_called(service, &wanted.name)
            };
            wanted.kind == "MeshService"
                && meant
                && wanted.port.is_none_or(|number| number == u32::from(port.port))
        })
    }

    // Identities and trust.

    pub(crate) fn put_identity(&mut self, identity: Arc<Identity>) {
        self.identities.insert(identity.name.clone(), identity);
    }

    pub(crate) fn remove_identity(&mut self, name: &str) {
        self.identities.remove(name);
    }

    /// The identity of a proxy: the most labels win, then the first name.
    pub(crate) fn identity_of(&self, proxy: &Proxy) -> Option<&Arc<Identity>> {
        self.identities
            .values()
            .filter_map(|identity| Some((identity.labels.as_ref()?, identity)))
            .filter(|(wanted, _)| contains(&proxy.labels, wanted))
            .rev()
            .max_by_key(|(wanted, _)| wanted.len())
            .map(|(_, identity)| identity)
    }

    pub(crate) fn put_trust(&mut self, trust: Arc<Trust>) {
        self.trusts.insert(trust.name.clone(), trust);
    }

    pub(crate) fn remove_trust(&mut self, name: &str) {
        self.trusts.remove(name);
    }

    /// The trust domains that have authorities.
    pub(crate) fn trust_domains(&self) -> Vec<String> {
        let with_bundles = self.trusts.values().filter(|trust| !trust.pem.is_empty());
        with_bundles.map(|trust| trust.domain.clone()).collect::<BTreeSet<_>>().into_iter().collect()
    }

    /// Certificates of authorities by trust domain.
    pub(crate) fn bundles(&self) -> BTreeMap<String, String> {
        let mut bundles: BTreeMap<String, BTreeSet<&str>> = BTreeMap::new();
        for trust in self.trusts.values().filter(|trust| !trust.pem.is_empty()) {
            bundles.entry(trust.domain.clone()).or_default().insert(&trust.pem);
        }
        let join = |pems: BTreeSet<&str>| pems.into_iter().flat_map(|pem| [pem, "\n"]).collect();
        bundles.into_iter().map(|(domain, pems)| (domain, join(pems))).collect()
    }

    // Policies.

    pub(crate) fn put_policy(&mut self, policy: Arc<Policy>) {
        self.policies.entry(policy.key.kind).or_default().insert(policy);
    }

    pub(crate) fn remove_policy(&mut self, kind: &str, name: &str) {
        if let Some(table) = self.policies.get_mut(kind) {
            table.remove(name);
        }
    }

    /// The policies that select a proxy, by kind, the weakest first.
    pub(crate) fn select(&self, proxy: &Proxy) -> Selected {
        EFFECTS
            .iter()
            .filter_map(|effect| {
                let selected = self.policies.get(effect.kind())?.select(&proxy.labels);
                (!selected.is_empty()).then_some((effect.kind(), selected))
            })
            .collect()
    }

    /// Whether anything refers from one service to another.
    pub(crate) fn has_routes(&self) -> bool {
        ["MeshHTTPRoute", "MeshTCPRoute"]
            .iter()
            .any(|kind| self.policies.get(kind).is_some_and(|table| !table.is_empty()))
    }
}

impl Service {
    /// What no other service can have at the same time.
    fn claims(&self) -> impl Iterator<Item = &str> {
        std::iter::once(self.kri.as_str()).chain(self.hostnames.iter().map(String::as_str))
    }
}

impl Destinations for Mesh {
    fn cluster(&self, backend: &BackendRef) -> Option<String> {
        if backend.kind != TargetKind::MeshService {
            return None;
        }
        let named = backend.name.as_deref().filter(|name| !name.is_empty());
        let service = match named {
            Some(name) => self.services_called(name).next(),
            None => self.services_with(&backend.labels).next(),
        }?;
        let section = backend.section_name.as_deref().filter(|name| !name.is_empty());
        let port = match (section, backend.port) {
            (Some(section), _) => service.ports.iter().find(|port| port.section == section),
            (None, Some(number)) => service.ports.iter().find(|port| u32::from(port.port) == number),
            // Without a port the service must leave no doubt.
            (None, None) => service.ports.first().filter(|_| service.ports.len() == 1),
        };
        port.map(|port| port.resource.to_string())
    }
}

/// Addresses of the mesh for the engine's own use in names.
pub(crate) fn texts(addresses: &[IpAddr]) -> Vec<String> {
    addresses.iter().map(IpAddr::to_string).collect()
}

fn is_called(service: &Service, name: &str) -> bool {
    service.name == name || service.labels.get(labels::DISPLAY_NAME).is_some_and(|display| display == name)
}

fn serves(inbound: &InboundPort, target: &TargetPort) -> bool {
    match target {
        TargetPort::Number(number) => u32::from(inbound.port) == *number,
        TargetPort::Name(name) => inbound.name == *name,
    }
}

/// The label under which a selector is found.
fn anchor(wanted: &BTreeMap<String, String>) -> Option<(&String, &String)> {
    wanted.iter().find(|(key, _)| key.as_str() == labels::WORKLOAD).or_else(|| wanted.iter().next())
}

fn index<'a>(
    map: &'a mut BTreeMap<Label, BTreeSet<String>>,
    (key, value): (&String, &String),
) -> &'a mut BTreeSet<String> {
    map.entry((key.clone(), value.clone())).or_default()
}

fn unindex(map: &mut BTreeMap<Label, BTreeSet<String>>, (key, value): (&String, &String), name: &str) {
    let label = (key.clone(), value.clone());
    if let Some(names) = map.get_mut(&label) {
        names.remove(name);
        if names.is_empty() {
            map.remove(&label);
        }
    }
}
