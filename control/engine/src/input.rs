//! Objects as the engine sees them: only what configuration depends on, already understood.
//!
//! An object that can't be understood is left out, with the reason as a warning on it; nothing else suffers.

use std::{cmp::Ordering, collections::BTreeMap, net::IpAddr, num::NonZeroU32, sync::Arc};

use serde::Serialize;
use serde_json::Value;
use twox_hash::XxHash3_128;
use ursa_model::{
    Protocol, Resource, ResourceKey,
    identity::{self, IdentityError},
    labels,
    policy::{Attachment, TargetRef},
    sni,
    spiffe::SpiffeId,
    types,
    types::dataplane::{IpFamilyMode, State},
    types::mesh_service::{IdentityType, TargetPort},
    vip,
};

use crate::{
    policy::{Policy, rank::Rank},
    snapshot::ProxyKey,
    xds::transparent::Redirect,
};

/// Hash of a value's canonical JSON.
pub(crate) fn hash<T: Serialize>(value: &T) -> u128 {
    // Values with string keys always have a JSON form; serde_json's maps are sorted.
    XxHash3_128::oneshot(&serde_json::to_vec(value).unwrap_or_default())
}

/// A hash over parts, in order, without an intermediate form.
pub(crate) struct Fingerprint(XxHash3_128);

impl Fingerprint {
    pub(crate) fn new() -> Self {
        Self(XxHash3_128::new())
    }

    /// A text, told apart from its neighbours by its length.
    pub(crate) fn text(&mut self, text: &str) {
        self.0.write(&text.len().to_le_bytes());
        self.0.write(text.as_bytes());
    }

    pub(crate) fn number(&mut self, number: u128) {
        self.0.write(&number.to_le_bytes());
    }

    pub(crate) fn finish(&self) -> u128 {
        self.0.finish_128()
    }
}

/// What configuration is made from.
#[derive(Clone, Debug)]
pub(crate) enum Object {
    Proxy(Arc<Proxy>),
    Service(Arc<Service>),
    Identity(Arc<Identity>),
    Trust(Arc<Trust>),
    Policy(Arc<Policy>),
}

/// A Dataplane.
#[derive(Debug)]
pub(crate) struct Proxy {
    pub(crate) key: ProxyKey,
    pub(crate) hash: u128,
    pub(crate) labels: BTreeMap<String, String>,
    pub(crate) inbounds: Vec<InboundPort>,
    pub(crate) redirect: Redirect,
    /// The only destinations it wants to know; all of them when absent.
    pub(crate) reachable: Option<Backends>,
}

/// A port of a workload.
#[derive(Debug)]
pub(crate) struct InboundPort {
    /// Its name, or else its number.
    pub(crate) section: String,
    pub(crate) name: String,
    pub(crate) address: IpAddr,
    pub(crate) port: u16,
    pub(crate) service_address: IpAddr,
    pub(crate) service_port: u16,
    pub(crate) protocol: Protocol,
    /// Whether it takes traffic.
    pub(crate) ready: bool,
}

/// The destinations that a proxy wants to know. Shared, and compared by their hash: every proxy of a view is
/// looked up by it with each change of a policy.
#[derive(Clone, Debug)]
pub(crate) struct Backends {
    hash: u128,
    refs: Arc<[Reachable]>,
}

impl Backends {
    pub(crate) fn new(refs: Vec<Reachable>) -> Self {
        Self { hash: hash(&refs), refs: refs.into() }
    }

    pub(crate) fn refs(&self) -> &[Reachable] {
        &self.refs
    }
}

impl PartialEq for Backends {
    fn eq(&self, other: &Self) -> bool {
        self.hash == other.hash
    }
}

impl Eq for Backends {}

impl PartialOrd for Backends {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Backends {
    fn cmp(&self, other: &Self) -> Ordering {
        self.hash.cmp(&other.hash)
    }
}

/// A destination that a proxy wants to know.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Reachable {
    pub(crate) kind: String,
    pub(crate) name: String,
    pub(crate) labels: BTreeMap<String, String>,
    pub(crate) port: Option<u32>,
}

/// A MeshService.
#[derive(Debug)]
pub(crate) struct Service {
    pub(crate) name: String,
    /// The KRI: what the names of its ports' resources begin with.
    pub(crate) kri: String,
    pub(crate) labels: BTreeMap<String, String>,
    pub(crate) selector: Selector,
    pub(crate) ports: Vec<ServicePort>,
    pub(crate) addresses: Vec<IpAddr>,
    pub(crate) hostnames: Vec<String>,
    pub(crate) identities: Vec<String>,
}

/// Which proxies serve a service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Selector {
    Labels(BTreeMap<String, String>),
    Name(String),
    Nobody,
}

/// A port of a service.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct ServicePort {
    /// Its name, or else its number.
    pub(crate) section: String,
    pub(crate) port: u16,
    pub(crate) target: TargetPort,
    pub(crate) protocol: Protocol,
    /// The KRI: name of its resources.
    pub(crate) resource: Arc<str>,
    pub(crate) sni: String,
}

/// A MeshIdentity.
#[derive(Debug)]
pub(crate) struct Identity {
    pub(crate) resource: Arc<Resource>,
    pub(crate) spec: types::mesh_identity::MeshIdentity,
    pub(crate) name: String,
    /// None selects nobody.
    pub(crate) labels: Option<BTreeMap<String, String>>,
    /// The KRI: the SDS name of its certificates.
    pub(crate) secret: Arc<str>,
    pub(crate) hash: u128,
}

impl Identity {
    /// The SPIFFE id that it gives to a proxy, or why it gives none.
    pub(crate) fn spiffe_id(&self, proxy: &Proxy, zone: &str) -> Result<SpiffeId, IdentityError> {
        identity::spiffe_id(&self.spec, &self.resource.meta.mesh, &proxy.labels, zone)
    }
}

/// A MeshTrust.
#[derive(Debug)]
pub(crate) struct Trust {
    pub(crate) name: String,
    pub(crate) domain: String,
    pub(crate) pem: String,
}

/// Kinds that configuration doesn't depend on.
pub(crate) fn is_relevant(kind: &str) -> bool {
    matches!(kind, "Dataplane" | "MeshService" | "MeshIdentity" | "MeshTrust")
        || crate::policies::EFFECTS.iter().any(|effect| effect.kind() == kind)
}

/// Understands an object. `Ok(None)` for one that has no effect (such as a shadow policy).
pub(crate) fn read(resource: &Arc<Resource>, hash: u128) -> Result<Option<Object>, String> {
    let object = match resource.descriptor.name {
        "Dataplane" => Object::Proxy(Arc::new(proxy(resource, hash)?)),
        "MeshService" => Object::Service(Arc::new(service(resource)?)),
        "MeshIdentity" => Object::Identity(Arc::new(identity(resource, hash)?)),
        "MeshTrust" => Object::Trust(Arc::new(trust(resource)?)),
        _ => match policy(resource, hash)? {
            Some(policy) => Object::Policy(Arc::new(policy)),
            None => return Ok(None),
        },
    };
    Ok(Some(object))
}

fn ip(text: &str, field: &str) -> Result<IpAddr, String> {
    text.parse().map_err(|_| {
        format!("{field}: {text:?} is no IP address; write the address itself, names are not resolved")
    })
}

fn port(number: u32, field: &str) -> Result<u16, String> {
    match u16::try_from(number) {
        Ok(port) if port > 0 => Ok(port),
        _ => Err(format!("{field}: {number} is no port; it must be between 1 and 65535")),
    }
}

fn proxy(resource: &Arc<Resource>, hash: u128) -> Result<Proxy, String> {
    let spec: types::dataplane::Dataplane = resource.spec_as().map_err(|e| e.to_string())?;
    let networking = spec.networking.unwrap_or_default();
    let address = ip(&networking.address, "networking.address")?;
    let mut inbounds = Vec::new();
    for (index, inbound) in networking.inbound.iter().enumerate() {
        let field = format!("networking.inbound[{index}]");
        if inbound.state == Some(State::Ignored) {
            continue;
        }
        let number = port(inbound.port, &format!("{field}.port"))?;
        let own = if inbound.address.is_empty() {
            address
        } else {
            ip(&inbound.address, &format!("{field}.address"))?
        };
        inbounds.push(InboundPort {
            section: if inbound.name.is_empty() { number.to_string() } else { inbound.name.clone() },
            name: inbound.name.clone(),
            address: own,
            port: number,
            service_address: match inbound.service_address.as_str() {
                "" => own,
                text => ip(text, &format!("{field}.serviceAddress"))?,
            },
            service_port: match inbound.service_port {
                0 => number,
                other => port(other, &format!("{field}.servicePort"))?,
            },
            protocol: protocol(&inbound.protocol),
            ready: inbound.state != Some(State::NotReady),
        });
    }
    let transparent = networking.transparent_proxying.unwrap_or_default();
    let family = transparent.ip_family_mode.unwrap_or(IpFamilyMode::DualStack);
    let or_default =
        |number: u32, default: u16| u16::try_from(number).ok().filter(|n| *n > 0).unwrap_or(default);
    Ok(Proxy {
        key: ProxyKey { mesh: resource.meta.mesh.clone(), name: resource.meta.name.clone() },
        hash,
        labels: resource.meta.labels.clone(),
        inbounds,
        redirect: Redirect {
            inbound: or_default(transparent.redirect_port_inbound, 15006),
            outbound: or_default(transparent.redirect_port_outbound, 15001),
            ipv4: family != IpFamilyMode::Ipv6,
            ipv6: family != IpFamilyMode::Ipv4,
            tproxy_mark: NonZeroU32::new(transparent.tproxy_mark),
        },
        reachable: transparent.reachable_backends.map(|backends| {
            let refs = backends.refs.into_iter();
            let wanted =
                refs.map(|r| Reachable { kind: r.kind, name: r.name, labels: r.labels, port: r.port });
            Backends::new(wanted.collect())
        }),
    })
}

/// A missing protocol, or one that nobody knows, is bytes.
fn protocol(text: &str) -> Protocol {
    match Protocol::from(text) {
        Protocol::Unknown(_) => Protocol::Tcp,
        known => known,
    }
}

fn service(resource: &Arc<Resource>) -> Result<Service, String> {
    use types::mesh_service::MeshService;
    let spec: MeshService = resource.spec_as().map_err(|e| e.to_string())?;
    let status = resource.status_as::<MeshService>().map_err(|e| e.to_string())?;
    let mut ports = Vec::new();
    for (index, declared) in spec.ports.iter().enumerate() {
        let number = port(declared.port, &format!("spec.ports[{index}].port"))?;
        let section =
            declared.name.clone().filter(|name| !name.is_empty()).unwrap_or_else(|| number.to_string());
        let kri = resource.kri(Some(&section));
        ports.push(ServicePort {
            port: number,
            target: declared.target_port.clone().unwrap_or(TargetPort::Number(declared.port)),
            protocol: declared.app_protocol.as_ref().map_or(Protocol::Tcp, |known| protocol(known.as_str())),
            sni: sni::encode(&kri).map_err(|e| format!("spec.ports[{index}]: {e}"))?,
            resource: kri.to_string().into(),
            section,
        });
    }
    let selector = match (spec.selector.dataplane_labels, spec.selector.dataplane_ref) {
        (Some(selector), _) if !selector.match_labels.is_empty() => Selector::Labels(selector.match_labels),
        (_, Some(reference)) => Selector::Name(reference.name),
        _ => Selector::Nobody,
    };
    let mut hostnames: Vec<String> = status.addresses.into_iter().map(|address| address.hostname).collect();
    hostnames.sort_unstable();
    hostnames.dedup();
    let identities = spec.identities.into_iter().filter(|i| i.identity_type == IdentityType::SpiffeId);
    Ok(Service {
        name: resource.meta.name.clone(),
        kri: resource.kri(None).to_string(),
        labels: resource.meta.labels.clone(),
        selector,
        ports,
        addresses: both_families(status.vips.iter().map(|vip| vip.ip.as_str()))?,
        hostnames,
        identities: identities.map(|identity| identity.value).collect(),
    })
}

/// The addresses, and the IPv6 twin of each IPv4 address of the mesh.
fn both_families<'a>(texts: impl Iterator<Item = &'a str>) -> Result<Vec<IpAddr>, String> {
    let mut addresses = Vec::new();
    for text in texts {
        let address = ip(text, "status.vips")?;
        addresses.push(address);
        if let IpAddr::V4(v4) = address
            && vip::is_vip(address)
        {
            addresses.push(IpAddr::V6(vip::v6_of(v4)));
        }
    }
    addresses.sort_unstable();
    addresses.dedup();
    Ok(addresses)
}

fn identity(resource: &Arc<Resource>, hash: u128) -> Result<Identity, String> {
    let spec: types::mesh_identity::MeshIdentity = resource.spec_as().map_err(|e| e.to_string())?;
    Ok(Identity {
        resource: Arc::clone(resource),
        name: resource.meta.name.clone(),
        // Without a provider there are ids but no certificates, and so nothing to serve with.
        labels: spec
            .provider
            .as_ref()
            .and(spec.selector.as_ref())
            .and_then(|selector| selector.dataplane.as_ref())
            .map(|selector| selector.match_labels.clone()),
        secret: resource.kri(None).to_string().into(),
        spec,
        hash,
    })
}

fn trust(resource: &Arc<Resource>) -> Result<Trust, String> {
    let spec: types::mesh_trust::MeshTrust = resource.spec_as().map_err(|e| e.to_string())?;
    if spec.trust_domain.is_empty() {
        return Err(
            "spec.trustDomain: it is empty; name the trust domain that the bundles vouch for".to_owned()
        );
    }
    let pem: Vec<String> = spec
        .ca_bundles
        .into_iter()
        .filter_map(|bundle| bundle.pem)
        .map(|pem| pem.value.trim().to_owned())
        .filter(|text| !text.is_empty())
        .collect();
    if let Some(index) = pem.iter().position(|text| !types::mesh_trust::is_certificates(text)) {
        // Envoy would refuse the whole bundle, and with it all that the mesh trusts.
        return Err(format!("spec.caBundles[{index}]: it is no list of certificates in PEM form"));
    }
    Ok(Trust { name: resource.meta.name.clone(), domain: spec.trust_domain, pem: pem.join("\n") })
}

fn policy(resource: &Arc<Resource>, hash: u128) -> Result<Option<Policy>, String> {
    if resource.meta.label(labels::EFFECT) == Some("shadow") {
        return Ok(None);
    }
    let effect =
        crate::policies::EFFECTS.into_iter().find(|effect| effect.kind() == resource.descriptor.name);
    let Some(effect) = effect else { return Ok(None) };
    effect.check(resource)?;
    let target: Option<TargetRef> = match resource.spec.get("targetRef") {
        None | Some(Value::Null) => None,
        Some(value) => {
            Some(serde_json::from_value(value.clone()).map_err(|e| format!("spec.targetRef: {e}"))?)
        }
    };
    let list = |field: &str| resource.spec.get(field).and_then(Value::as_array).cloned().unwrap_or_default();
    Policy::new(
        resource.key(),
        resource.kri(None),
        hash,
        Rank::of(&resource.meta, target.as_ref()),
        Attachment::of(&resource.meta, target.as_ref()),
        list("to"),
        list("rules"),
    )
    .map(Some)
}

/// The key under which an object stands.
pub(crate) fn key_of(proxy: &ProxyKey) -> ResourceKey {
    ResourceKey { kind: "Dataplane", mesh: proxy.mesh.clone(), name: proxy.name.clone() }
}
