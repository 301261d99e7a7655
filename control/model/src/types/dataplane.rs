//! Dataplane: one proxy and what it stands in front of.

use std::collections::BTreeMap;

use crate::{
    GoDuration, Protocol, labels,
    meta::Meta,
    names,
    registry::Descriptor,
    resource::{NoStatus, ResourceSpec},
    spec_struct, validate,
    violation::{Path, Violations},
};

/// All that is known of the type.
pub static DESCRIPTOR: Descriptor = Descriptor {
    sync: crate::Sync { global_to_zone: false, zone_to_global: true, zone_to_zones: false },
    include_in_federation: false,
    form: crate::Form::Inline,
    ..Descriptor::of::<Dataplane>("Dataplane", "dataplanes", "dp", "Dataplane", "Dataplanes")
};

crate::open_enum! {
    /// Whether an inbound or listener takes traffic.
    pub enum State { Ready = "Ready", NotReady = "NotReady", Ignored = "Ignored" }
    /// What a zone listener is for.
    pub enum ListenerType { ZoneIngress = "ZoneIngress", ZoneEgress = "ZoneEgress" }
    /// Which families the proxy serves.
    pub enum IpFamilyMode { Unspecified = "UnSpecified", DualStack = "DualStack", Ipv4 = "IPv4", Ipv6 = "IPv6" }
    /// Kinds of gateways that are no mesh types of their own.
    pub enum GatewayType { Delegated = "DELEGATED", Builtin = "BUILTIN" }
}

spec_struct! {
    /// One proxy.
    pub struct Dataplane {
        pub networking: Option<Networking>,
        pub probes: Option<serde_json::Value>,
    }
    /// Its addresses, what it serves, and what it reaches.
    pub struct Networking {
        pub address: String,
        pub inbound: Vec<Inbound>,
        pub outbound: Vec<Outbound>,
        pub gateway: Option<Gateway>,
        pub transparent_proxying: Option<TransparentProxying>,
        pub admin: Option<Admin>,
        pub listeners: Vec<Listener>,
    }
    /// A port that the workload serves.
    pub struct Inbound {
        pub name: String,
        pub port: u32,
        pub address: String,
        pub service_port: u32,
        pub service_address: String,
        pub protocol: String,
        pub tags: BTreeMap<String, String>,
        pub state: Option<State>,
        pub service_probe: Option<ServiceProbe>,
    }
    /// How the control plane asks whether the workload is healthy.
    pub struct ServiceProbe {
        pub interval: Option<GoDuration>,
        pub timeout: Option<GoDuration>,
        pub unhealthy_threshold: Option<u32>,
        pub healthy_threshold: Option<u32>,
        pub tcp: Option<Empty>,
    }
    /// A message without fields.
    pub struct Empty {}
    /// A port of the proxy that leads to one destination, without redirection.
    pub struct Outbound {
        pub address: String,
        pub port: u32,
        pub backend_ref: Option<OutboundBackendRef>,
        pub tags: BTreeMap<String, String>,
    }
    /// The destination of an outbound.
    pub struct OutboundBackendRef {
        pub kind: String,
        pub name: String,
        pub port: u32,
        pub labels: BTreeMap<String, String>,
    }
    /// A gateway of somebody else's that the proxy stands in front of.
    pub struct Gateway {
        #[serde(rename = "type")]
        pub gateway_type: Option<GatewayType>,
        pub tags: Tags,
    }
    /// How traffic reaches the proxy by redirection.
    pub struct TransparentProxying {
        pub redirect_port_inbound: u32,
        pub redirect_port_outbound: u32,
        /// Not the peer's: what arrives comes by TPROXY, and the proxy's deliveries carry the client's address and this
        /// mark. Zero where the redirect rewrites.
        pub tproxy_mark: u32,
        pub direct_access_services: Vec<String>,
        pub ip_family_mode: Option<IpFamilyMode>,
        pub reachable_backends: Option<ReachableBackends>,
    }
    /// The only destinations that the proxy is told of.
    pub struct ReachableBackends {
        pub refs: Vec<ReachableBackendRef>,
    }
    /// One of them.
    pub struct ReachableBackendRef {
        pub kind: String,
        pub name: String,
        pub namespace: String,
        pub port: Option<u32>,
        pub labels: BTreeMap<String, String>,
    }
    /// Envoy's admin interface.
    pub struct Admin {
        pub port: u32,
    }
    /// A listener of a zone proxy.
    pub struct Listener {
        #[serde(rename = "type")]
        pub listener_type: ListenerType,
        pub address: String,
        pub port: u32,
        pub name: String,
        pub state: Option<State>,
    }
}

impl ResourceSpec for Dataplane {
    const DESCRIPTOR: &'static Descriptor = &DESCRIPTOR;
    type Status = NoStatus;

    fn validate(&self, _meta: &Meta, out: &mut Violations) {
        let path = Path::root().field("networking");
        match &self.networking {
            None => out.add(path, validate::MUST_BE_DEFINED),
            Some(networking) => networking.validate(&path, out),
        }
    }
}

/// Tags of a gateway. A tag that was written without a value is there with an empty one, so that it can be named.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
#[serde(transparent)]
pub struct Tags(pub BTreeMap<String, String>);

impl<'de> serde::Deserialize<'de> for Tags {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let tags = BTreeMap::<String, Option<String>>::deserialize(deserializer)?;
        Ok(Self(tags.into_iter().map(|(key, value)| (key, value.unwrap_or_default())).collect()))
    }
}

impl crate::form::Omit for Tags {
    fn omit(&self) -> bool {
        self.0.is_empty()
    }
}

const BACKEND_KINDS: [&str; 3] = ["MeshExternalService", "MeshMultiZoneService", "MeshService"];

impl Networking {
    /// Whether the proxy stands in front of somebody else's gateway.
    pub fn is_delegated_gateway(&self) -> bool {
        self.gateway.as_ref().is_some_and(|gateway| {
            gateway.gateway_type.as_ref().is_none_or(|kind| *kind == GatewayType::Delegated)
        })
    }

    fn validate(&self, path: &Path, out: &mut Violations) {
        self.validate_admin(path, out);
        if let Some(gateway) = &self.gateway {
            if gateway.gateway_type.as_ref().is_some_and(|kind| *kind != GatewayType::Delegated) {
                out.add(
                    path.field("gateway.type"),
                    "must be DELEGATED: builtin gateways don't exist any more",
                );
            }
            if !self.inbound.is_empty() {
                out.add(path.field("inbound"), "inbound cannot be defined for delegated gateways");
            }
            if !self.listeners.is_empty() {
                out.add(path.field("listeners"), "listeners cannot be defined for delegated gateways");
            }
            gateway.validate(&path.field("gateway"), out);
        }
        validate::address(&path.field("address"), &self.address, out);
        for (i, inbound) in self.inbound.iter().enumerate() {
            inbound.validate(&path.field("inbound").index(i), &self.address, out);
        }
        for (i, outbound) in self.outbound.iter().enumerate() {
            outbound.validate(&path.field("outbound").index(i), out);
        }
        self.validate_names(path, out);
        self.validate_listeners(path, out);
        let backends =
            self.transparent_proxying.as_ref().and_then(|proxying| proxying.reachable_backends.as_ref());
        for (i, backend) in backends.iter().flat_map(|backends| &backends.refs).enumerate() {
            // The peer misspells the field in this one path; clients know it so.
            backend.validate(&path.field("transparentProxing.reachableBackends.refs").index(i), out);
        }
    }

    fn validate_admin(&self, path: &Path, out: &mut Violations) {
        let Some(admin) = &self.admin else { return };
        let on_loopback = |address: &str| matches!(address, "127.0.0.1" | "0.0.0.0" | "::1" | "::");
        let admin_port = path.field("admin.port");
        let takes = |inbound: &Inbound| {
            let listens = if inbound.address.is_empty() { &self.address } else { &inbound.address };
            let service_port = if inbound.service_port == 0 { inbound.port } else { inbound.service_port };
            let serves =
                if inbound.service_address.is_empty() { &self.address } else { &inbound.service_address };
            (inbound.port == admin.port && on_loopback(listens))
                || (service_port == admin.port && on_loopback(serves))
        };
        if self.inbound.iter().any(takes) {
            out.add(&admin_port, "must differ from inbound");
        }
        // An outbound without an address listens on loopback.
        let used = |outbound: &Outbound| {
            outbound.port == admin.port && (outbound.address.is_empty() || on_loopback(&outbound.address))
        };
        if self.outbound.iter().any(used) {
            out.add(&admin_port, "must differ from outbound");
        }
    }

    fn validate_names(&self, path: &Path, out: &mut Violations) {
        let mut seen = std::collections::BTreeSet::new();
        let inbounds = self.inbound.iter().map(|inbound| &inbound.name).enumerate();
        let listeners = self.listeners.iter().map(|listener| &listener.name).enumerate();
        let all = inbounds.map(|named| ("inbound", named)).chain(listeners.map(|named| ("listeners", named)));
        for (field, (i, name)) in all {
            if !name.is_empty() && !seen.insert(name) {
                out.add(
                    path.field(field).index(i).field("name"),
                    format!("name {name:?} must be unique across inbounds and listeners"),
                );
            }
        }
    }

    fn validate_listeners(&self, path: &Path, out: &mut Violations) {
        let mut taken: BTreeMap<(&str, u32), &ListenerType> = BTreeMap::new();
        for (i, listener) in self.listeners.iter().enumerate() {
            let path = path.field("listeners").index(i);
            if !listener.listener_type.is_known() {
                out.add(path.field("type"), validate::must_be_one_of("type", ListenerType::KNOWN));
            }
            let before = out.0.len();
            validate::address(&path.field("address"), &listener.address, out);
            validate::port(&path.field("port"), listener.port, out);
            if out.0.len() > before {
                continue;
            }
            let place = (listener.address.as_str(), listener.port);
            let shown = if listener.address.contains(':') {
                format!("[{}]:{}", place.0, place.1)
            } else {
                format!("{}:{}", place.0, place.1)
            };
            let collides = |inbound: &Inbound| {
                let address = if inbound.address.is_empty() { &self.address } else { &inbound.address };
                (address.as_str(), inbound.port) == place
            };
            if self.inbound.iter().any(collides) {
                out.add(&path, format!("address:port {shown} collides with an inbound listener"));
            }
            match taken.get(&place) {
                Some(kind) if **kind == listener.listener_type => {
                    out.add(&path, format!("address:port {shown} is already used by another listener"));
                }
                Some(_) => {
                    out.add(&path, format!("address:port {shown} is used by listeners of different types"));
                }
                None => {
                    taken.insert(place, &listener.listener_type);
                }
            }
        }
    }
}

impl Inbound {
    fn validate(&self, path: &Path, dataplane_address: &str, out: &mut Violations) {
        validate::port(&path.field("port"), self.port, out);
        if self.service_port != 0 {
            validate::port(&path.field("servicePort"), self.service_port, out);
        }
        let same_port = self.service_port == 0 || self.service_port == self.port;
        let overlap = "serviceAddress and servicePort has to differ from address and port";
        if !self.service_address.is_empty() {
            if !names::is_ip(&self.service_address) {
                out.add(path.field("serviceAddress"), "serviceAddress has to be valid IP address");
            }
            if self.service_address == dataplane_address && same_port {
                out.add(path.field("serviceAddress"), overlap);
            }
        }
        if !self.address.is_empty() {
            if !names::is_ip(&self.address) {
                out.add(path.field("address"), "address has to be valid IP address");
            }
            if self.address == self.service_address && same_port {
                out.add(path.field("serviceAddress"), overlap);
            }
        }
        if !self.protocol.is_empty() && !Protocol::from(self.protocol.as_str()).is_known() {
            out.add(
                path.field("protocol"),
                format!("invalid value {:?}. Allowed values: {}", self.protocol, Protocol::KNOWN.join(", ")),
            );
        }
        if let Some(probe) = &self.service_probe {
            let path = path.field("serviceProbe");
            for (field, duration) in [("interval", probe.interval), ("timeout", probe.timeout)] {
                if duration.is_some_and(|duration| duration.nanos() <= 0) {
                    out.add(path.field(field), "must have a positive value");
                }
            }
            for (field, threshold) in [
                ("unhealthyThreshold", probe.unhealthy_threshold),
                ("healthyThreshold", probe.healthy_threshold),
            ] {
                if threshold == Some(0) {
                    out.add(path.field(field), "must have a positive value");
                }
            }
        }
    }
}

impl Outbound {
    fn validate(&self, path: &Path, out: &mut Violations) {
        validate::port(&path.field("port"), self.port, out);
        if !self.address.is_empty() && !names::is_ip(&self.address) {
            out.add(path.field("address"), "address has to be valid IP address");
        }
        let path = path.field("backendRef");
        let Some(backend) = &self.backend_ref else {
            out.add(path, validate::MUST_BE_DEFINED);
            return;
        };
        if !BACKEND_KINDS.contains(&backend.kind.as_str()) {
            out.add(
                path.field("kind"),
                format!("invalid value. Available values are: {}", BACKEND_KINDS.join(",")),
            );
        }
        if backend.name.is_empty() && backend.labels.is_empty() {
            out.add(&path, "either 'name' or 'labels' should be specified");
        }
        // A MeshExternalService has the ports of its endpoints.
        if backend.kind != "MeshExternalService" {
            validate::port(&path.field("port"), backend.port, out);
        }
    }
}

impl Gateway {
    fn validate(&self, path: &Path, out: &mut Violations) {
        let path = path.field("tags");
        if self.tags.0.is_empty() {
            return;
        }
        if let Some(protocol) = self.tags.0.get("kuma.io/protocol")
            && protocol != "tcp"
        {
            out.add(
                path.key("kuma.io/protocol"),
                format!("other values than tcp are not allowed, provided value {protocol:?}"),
            );
        }
        let is_plain = |text: &str, also: &[u8]| {
            text.bytes().all(|b| b.is_ascii_alphanumeric() || b".-_:".contains(&b) || also.contains(&b))
        };
        for (key, value) in &self.tags.0 {
            if key.is_empty() {
                out.add(&path, "tag name must be non-empty");
            }
            if !is_plain(key, b"/") {
                out.add(
                    path.key(key),
                    "tag name must consist of alphanumeric characters, dots, dashes, slashes and underscores",
                );
            }
            if value.is_empty() {
                out.add(path.key(key), "tag value must be non-empty");
            }
            if !is_plain(value, b"") {
                out.add(
                    path.key(key),
                    "tag value must consist of alphanumeric characters, dots, dashes and underscores",
                );
            }
        }
        if !self.tags.0.contains_key("kuma.io/service") {
            out.add(path, "mandatory tag \"kuma.io/service\" is missing");
        }
    }
}

impl ReachableBackendRef {
    fn validate(&self, path: &Path, out: &mut Violations) {
        if !BACKEND_KINDS.contains(&self.kind.as_str()) {
            out.add(
                path.field("kind"),
                format!("invalid value. Available values are: {}", BACKEND_KINDS.join(",")),
            );
        }
        let name = path.field("name");
        if self.name.is_empty() {
            if !self.namespace.is_empty() {
                out.add(name, "name is required, when namespace is defined");
            } else if self.labels.is_empty() {
                out.add(name, "name or labels are required");
            }
        } else if let Some(fault) = labels::fault_of_name(&self.name) {
            out.add(name, fault);
        }
        if (!self.name.is_empty() || !self.namespace.is_empty()) && !self.labels.is_empty() {
            out.add(path.field("labels"), "labels cannot be defined when name is specified");
        }
    }
}

#[cfg(test)]
mod tests;
