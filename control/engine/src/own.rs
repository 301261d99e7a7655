//! What is a proxy's own: its inbound ports, the redirect's inbound half, and its identity.

use std::sync::Arc;

use ursa_model::ResourceKey;

use crate::{
    encoded::TypeUrl,
    envoy::encode,
    graph::{Mesh, spiffe_id},
    input::{self, InboundPort, Proxy},
    policies::EFFECTS,
    policy::{Selected, merge},
    resources::WorkloadIdentity,
    snapshot::Layer,
    xds::{
        inbound::{Inbound, Target},
        transparent::{self, Redirect},
    },
};

/// A proxy's own resources and the hash of what they are made from.
#[derive(Clone, Debug, Default)]
pub(crate) struct Own {
    pub(crate) hash: u128,
    pub(crate) layer: Arc<Layer>,
}

/// Hash of all that a proxy's own resources depend on.
pub(crate) fn hash(mesh: &Mesh, proxy: &Proxy, selected: &Selected, trust_domains: &[String]) -> u128 {
    let policies: Vec<String> = selected
        .values()
        .flatten()
        .filter(|policy| !policy.rules.is_empty())
        .map(|policy| format!("{}/{}/{:032x}", policy.key.kind, policy.key.name, policy.hash))
        .collect();
    let identity =
        mesh.identity_of(proxy).map(|identity| format!("{}/{:032x}", identity.name, identity.hash));
    input::hash(&(format!("{:032x}", proxy.hash), identity, policies, trust_domains))
}

/// Builds them. A port that can't be built is left out with a warning on the Dataplane.
pub(crate) fn build(
    mesh: &Mesh,
    proxy: &Proxy,
    selected: &Selected,
    trust_domains: &[String],
    zone: &str,
    catch_all: &Layer,
    warnings: &mut Vec<(ResourceKey, String)>,
) -> Layer {
    let mut layer = catch_all.clone();
    let mut warn = |reason: String| warnings.push((input::key_of(&proxy.key), reason));

    let mut secret = None;
    if let Some(identity) = mesh.identity_of(proxy) {
        match spiffe_id(identity, proxy, zone) {
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
    for inbound in &proxy.inbounds {
        port(proxy, inbound, secret, selected, trust_domains, &mut layer, &mut warn);
    }
    layer
}

/// The redirect's inbound half, which proxies with equal ports share.
pub(crate) fn catch_all(redirect: Redirect) -> Layer {
    let mut layer = Layer::default();
    transparent::inbound(redirect, &mut layer);
    layer
}

/// Whether a proxy has a certificate to call others with, and its SDS name.
pub(crate) fn secret_name(mesh: &Mesh, proxy: &Proxy, zone: &str) -> Option<Arc<str>> {
    let identity = mesh.identity_of(proxy)?;
    spiffe_id(identity, proxy, zone).ok().map(|_| Arc::clone(&identity.secret))
}

fn port(
    proxy: &Proxy,
    inbound: &InboundPort,
    identity: Option<&str>,
    selected: &Selected,
    trust_domains: &[String],
    layer: &mut Layer,
    warn: &mut impl FnMut(String),
) {
    let name = format!("self_inbound_dp_{}", inbound.section);
    let target = Target {
        name: &name,
        address: inbound.address,
        port: inbound.port,
        service_address: inbound.service_address,
        service_port: inbound.service_port,
        protocol: &inbound.protocol,
        labels: &proxy.labels,
        identity,
        trust_domains,
    };
    let mut open = Inbound::new(&target);
    for effect in EFFECTS {
        let policies = selected.get(effect.kind()).map_or(&[][..], Vec::as_slice);
        let rules = merge::rules(policies, &inbound.section);
        if let Err(reason) = effect.inbound(&rules, &mut open) {
            warn(format!("{} has no effect on inbound {}: {reason}", effect.kind(), inbound.section));
        }
    }
    let (cluster, listener) = open.finish(&target);
    layer.insert(TypeUrl::Cluster, encode::resource(TypeUrl::Cluster, &name, &cluster));
    layer.insert(TypeUrl::Listener, encode::resource(TypeUrl::Listener, &name, &listener));
}
