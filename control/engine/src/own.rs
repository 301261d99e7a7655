//! What is a proxy's own: its inbound ports, the redirect's inbound half, and its identity.

use std::sync::{Arc, OnceLock};

use ursa_model::ResourceKey;

use crate::{
    encoded::{Encoded, TypeUrl},
    engine::Counters,
    envoy::encode,
    graph::Mesh,
    input::{self, Fingerprint, InboundPort, Proxy},
    policies::EFFECTS,
    policy::{
        Policy, Selected,
        merge::{self, Item},
    },
    resources::WorkloadIdentity,
    shared::Shared,
    snapshot::Layer,
    xds::{
        inbound::{Finished, Inbound, Target, Use},
        permission::{self, Peers, Permission},
        transparent::{self, Redirect},
    },
};

/// A proxy's own resources and the hash of what they are made from.
#[derive(Clone, Debug, Default)]
pub(crate) struct Own {
    pub(crate) hash: u128,
    pub(crate) layer: Arc<Layer>,
    ports: Arc<[Port]>,
    /// Keeps it for others.
    _catch_all: Arc<Layer>,
}

/// A port as it was made, for as long as nothing that it is made from changes.
#[derive(Clone, Debug)]
struct Port {
    /// Hash of all that it depends on besides the permission.
    key: u128,
    /// The key of that part of the permission that the listener holds itself.
    held: u128,
    finished: Arc<Finished>,
    /// Keeps it for others: shared values live as long as somebody holds them.
    _permission: Arc<SharedPermission>,
}

/// A permission as all ports of one name under equal policies have it.
#[derive(Debug)]
struct SharedPermission {
    key: u128,
    permission: Permission,
    /// Why it is nobody's.
    failed: Option<String>,
    mesh: OnceLock<Arc<Encoded>>,
    plain: OnceLock<Arc<Encoded>>,
}

impl SharedPermission {
    fn resource(&self, port: &str, peers: Peers) -> &Arc<Encoded> {
        let cell = match peers {
            Peers::Mesh => &self.mesh,
            Peers::Plain => &self.plain,
        };
        cell.get_or_init(|| {
            let name = permission::name(port, peers);
            encode::resource(TypeUrl::Extension, &name, &self.permission.resource(&name, peers))
        })
    }

    /// The key of what a listener holds of it.
    fn held(&self, use_of: Use) -> u128 {
        match use_of {
            Use::Nothing | Use::Discovered => 0,
            Use::DiscoveredButForeignTls => {
                let plain = &self.permission.plain;
                input::hash(&(&plain.name, plain.allow))
            }
            Use::Inline => self.key,
        }
    }
}

/// Derived values that proxies share although they are among each one's own.
#[derive(Debug, Default)]
pub(crate) struct Store {
    catch_alls: Shared<Layer>,
    permissions: Shared<SharedPermission>,
}

/// What making a proxy's own resources needs of the engine.
pub(crate) struct Workshop<'a> {
    pub(crate) zone: &'a str,
    pub(crate) store: &'a mut Store,
    pub(crate) counters: &'a mut Counters,
    pub(crate) warnings: &'a mut Vec<(ResourceKey, String)>,
}

/// Hash of all that a proxy's own resources depend on.
pub(crate) fn hash(mesh: &Mesh, proxy: &Proxy, selected: &Selected, trust_domains: &[String]) -> u128 {
    let mut print = Fingerprint::new();
    print.number(proxy.hash);
    if let Some(identity) = mesh.identity_of(proxy) {
        print.text(&identity.name);
        print.number(identity.hash);
    }
    // Between two lists of texts: no text is that long.
    print.number(u128::MAX);
    for policy in selected.values().flatten().filter(|policy| !policy.rules.is_empty()) {
        print.text(policy.key.kind);
        print.text(&policy.key.name);
        print.number(policy.hash);
    }
    print.number(u128::MAX);
    for domain in trust_domains {
        print.text(domain);
    }
    print.finish()
}

/// Builds them, from `old` where that still holds. A port that can't be built is left out with a warning on the
/// Dataplane.
pub(crate) fn build(
    mesh: &Mesh,
    proxy: &Proxy,
    selected: &Selected,
    trust_domains: &[String],
    (hash, old): (u128, &Own),
    workshop: &mut Workshop<'_>,
) -> Own {
    let catch_all =
        workshop.store.catch_alls.get(proxy.redirect.hash(), || Arc::new(catch_all(proxy.redirect)));
    let mut layer = Layer::clone(&catch_all);
    let mut warn = |reason: String| workshop.warnings.push((input::key_of(&proxy.key), reason));

    let mut secret = None;
    if let Some(identity) = mesh.identity_of(proxy) {
        match identity.spiffe_id(proxy, workshop.zone) {
            Ok(id) => {
                let message = WorkloadIdentity {
                    secret_name: identity.secret.to_string(),
                    spiffe_id: id.to_string(),
                    trust_domain: id.trust_domain().to_string(),
                    generation: format!("{:032x}", identity.hash),
                };
                let resource = encode::resource(TypeUrl::Identity, &identity.secret, &message);
                layer.insert(TypeUrl::Identity, resource);
                secret = Some(identity.secret.as_ref());
            }
            Err(reason) => warn(format!(
                "MeshIdentity {:?} gives it no SPIFFE id, so its ports refuse everybody: {reason}",
                identity.name
            )),
        }
    }
    let identity = secret;
    let mut maker = Maker { proxy, identity, selected, trust_domains, old, workshop };
    let ports: Vec<Port> = proxy.inbounds.iter().map(|inbound| maker.port(inbound, &mut layer)).collect();
    Own { hash, layer: Arc::new(layer), ports: ports.into(), _catch_all: catch_all }
}

/// The redirect's inbound half, which proxies with equal ports share.
fn catch_all(redirect: Redirect) -> Layer {
    let mut layer = Layer::default();
    transparent::inbound(redirect, &mut layer);
    layer
}

/// Whether a proxy has a certificate to call others with, and its SDS name.
pub(crate) fn secret_name(mesh: &Mesh, proxy: &Proxy, zone: &str) -> Option<Arc<str>> {
    let identity = mesh.identity_of(proxy)?;
    identity.spiffe_id(proxy, zone).ok().map(|_| Arc::clone(&identity.secret))
}

/// Makes one proxy's ports.
struct Maker<'a, 'w> {
    proxy: &'a Proxy,
    identity: Option<&'a str>,
    selected: &'a Selected,
    trust_domains: &'a [String],
    old: &'a Own,
    workshop: &'a mut Workshop<'w>,
}

impl<'a> Maker<'a, '_> {
    fn port(&mut self, inbound: &InboundPort, layer: &mut Layer) -> Port {
        let name = format!("self_inbound_dp_{}", inbound.section);
        let permission = self.permission(&name, inbound);
        let key = self.key(inbound);
        let known = self
            .old
            .ports
            .iter()
            .find(|port| port.key == key && port.held == permission.held(port.finished.use_of));
        let finished = match known {
            Some(port) => Arc::clone(&port.finished),
            None => Arc::new(self.make(&name, inbound, &permission.permission)),
        };
        layer.insert(TypeUrl::Cluster, Arc::clone(&finished.cluster));
        layer.insert(TypeUrl::Listener, Arc::clone(&finished.listener));
        for peers in finished.use_of.discovers() {
            layer.insert(TypeUrl::Extension, Arc::clone(permission.resource(&name, *peers)));
        }
        Port { key, held: permission.held(finished.use_of), finished, _permission: permission }
    }

    /// Who may talk to a port, made once for all ports of this name under the same policies.
    fn permission(&mut self, name: &str, inbound: &InboundPort) -> Arc<SharedPermission> {
        let effect = EFFECTS.iter().find_map(|effect| Some((effect.kind(), effect.permission()?)));
        let rules = effect.map_or_else(Vec::new, |(kind, _)| self.rules(kind, inbound));
        let key = input::hash(&(name, versions(&rules)));
        let workshop = &mut *self.workshop;
        let permission = workshop.store.permissions.get(key, || {
            workshop.counters.permissions += 1;
            let read = effect.map_or_else(|| Ok(Permission::nobody()), |(_, read)| read(&rules));
            let (permission, failed) =
                read.map_or_else(|why| (Permission::nobody(), Some(why)), |read| (read, None));
            let (mesh, plain) = Default::default();
            Arc::new(SharedPermission { key, permission, failed, mesh, plain })
        });
        // It is made once, but each one that has it must be told.
        if let Some(reason) = &permission.failed {
            let reason = format!("nobody may talk to inbound {}: {reason}", inbound.section);
            workshop.warnings.push((input::key_of(&self.proxy.key), reason));
        }
        permission
    }

    fn rules(&self, kind: &str, inbound: &InboundPort) -> Vec<Item<'a>> {
        merge::rules(self.selected.get(kind).map_or(&[][..], Vec::as_slice), &inbound.section)
    }

    fn key(&self, inbound: &InboundPort) -> u128 {
        let rules: Vec<Vec<String>> = EFFECTS
            .iter()
            .filter(|effect| effect.permission().is_none())
            .map(|effect| versions(&self.rules(effect.kind(), inbound)))
            .collect();
        let proxy = format!("{:032x}", self.proxy.hash);
        input::hash(&(proxy, &inbound.section, self.identity, self.trust_domains, rules))
    }

    fn make(&mut self, name: &str, inbound: &InboundPort, permission: &Permission) -> Finished {
        self.workshop.counters.inbounds += 1;
        let target = Target {
            name,
            address: inbound.address,
            port: inbound.port,
            service_address: inbound.service_address,
            service_port: inbound.service_port,
            // A client's IPv6 address can't call an IPv4 one.
            client_mark: self
                .proxy
                .redirect
                .tproxy_mark
                .filter(|_| inbound.address.is_ipv4() == inbound.service_address.is_ipv4()),
            protocol: &inbound.protocol,
            labels: &self.proxy.labels,
            identity: self.identity,
            trust_domains: self.trust_domains,
        };
        let mut open = Inbound::new(&target);
        for effect in EFFECTS {
            if let Err(reason) = effect.inbound(&self.rules(effect.kind(), inbound), &mut open) {
                let reason =
                    format!("{} has no effect on inbound {}: {reason}", effect.kind(), inbound.section);
                self.workshop.warnings.push((input::key_of(&self.proxy.key), reason));
            }
        }
        open.finish(&target, permission)
    }
}

/// Which rules these are, in which version: a policy's items are all of its rules, in their order.
fn versions(rules: &[Item<'_>]) -> Vec<String> {
    let version = |policy: &Policy| format!("{}/{:032x}", policy.kri, policy.hash);
    let mut versions: Vec<String> = rules.iter().map(|item| version(item.policy)).collect();
    versions.dedup();
    versions
}
