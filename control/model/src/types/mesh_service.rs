//! MeshService: a service of the mesh, made of proxies.

use crate::{
    Protocol,
    meta::Meta,
    policy::LabelSelector,
    registry::Descriptor,
    resource::ResourceSpec,
    spec_struct, validate,
    violation::{Path, Violations},
};

/// All that is known of the type.
pub static DESCRIPTOR: Descriptor = Descriptor {
    sync: crate::Sync { global_to_zone: false, zone_to_global: true, zone_to_zones: true },
    include_in_federation: false,
    is_destination: true,
    ..Descriptor::of::<MeshService>("MeshService", "meshservices", "msvc", "Mesh Service", "Mesh Services")
};

crate::open_enum! {
    /// Whether any proxy is there to serve it.
    pub enum State { Available = "Available", Unavailable = "Unavailable" }
    /// What an identity is written as.
    pub enum IdentityType { SpiffeId = "SpiffeID", ServiceTag = "ServiceTag" }
    /// Whether every proxy of the service speaks mutual TLS.
    pub enum TlsStatus { Ready = "Ready", NotReady = "NotReady" }
}

spec_struct! {
    /// A service.
    pub struct MeshService {
        pub state: Option<State>,
        pub selector: Selector,
        pub ports: Vec<Port>,
        pub identities: Vec<Identity>,
    }
    /// Which proxies serve it: one of these.
    pub struct Selector {
        pub dataplane_ref: Option<DataplaneRef>,
        pub dataplane_labels: Option<LabelSelector>,
    }
    /// One proxy by its name.
    pub struct DataplaneRef {
        pub name: String,
    }
    /// A port.
    pub struct Port {
        pub name: Option<String>,
        pub port: u32,
        /// Number or name of the inbound; the port's number when absent.
        pub target_port: Option<TargetPort>,
        pub app_protocol: Option<Protocol>,
    }
    /// Who its proxies are.
    pub struct Identity {
        #[serde(rename = "type")]
        pub identity_type: IdentityType,
        pub value: String,
    }
    /// What the control plane found out.
    pub struct MeshServiceStatus {
        pub addresses: Vec<Address>,
        pub vips: Vec<Vip>,
        pub tls: Option<Tls>,
        pub hostname_generators: Vec<HostnameGeneratorStatus>,
        pub dataplane_proxies: Option<DataplaneProxies>,
    }
    /// A name of the service.
    pub struct Address {
        pub hostname: String,
        pub origin: String,
        pub hostname_generator_ref: Option<HostnameGeneratorRef>,
    }
    /// A virtual address.
    pub struct Vip {
        pub ip: String,
    }
    /// Readiness for mutual TLS.
    pub struct Tls {
        pub status: TlsStatus,
    }
    /// A HostnameGenerator that named the service.
    pub struct HostnameGeneratorRef {
        pub core_name: String,
    }
    /// What became of its name.
    pub struct HostnameGeneratorStatus {
        pub hostname_generator_ref: Option<HostnameGeneratorRef>,
        pub conditions: Vec<crate::types::mesh_identity::Condition>,
    }
    /// Counts of proxies.
    pub struct DataplaneProxies {
        pub connected: u32,
        pub healthy: u32,
        pub total: u32,
    }
}

/// Number or name of an inbound.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(untagged)]
pub enum TargetPort {
    /// The inbound's port.
    Number(u32),
    /// The inbound's name.
    Name(String),
}

impl ResourceSpec for MeshService {
    const DESCRIPTOR: &'static Descriptor = &DESCRIPTOR;
    type Status = MeshServiceStatus;

    fn validate(&self, meta: &Meta, out: &mut Violations) {
        validate::display_name(meta, out);
        let spec = Path::spec();
        for (i, port) in self.ports.iter().enumerate() {
            let path = spec.field("ports").index(i);
            validate::port(&path.field("port"), port.port, out);
            validate::app_protocol(&path, port.app_protocol.as_ref(), out);
            if let Some(TargetPort::Number(number)) = &port.target_port {
                validate::port(&path.field("targetPort"), *number, out);
            }
        }
        if self.selector.dataplane_ref.is_some() && self.selector.dataplane_labels.is_some() {
            out.add(spec.field("selector"), "must specify only one of: dataplaneRef or dataplaneLabels");
        }
    }

    fn warnings(&self, _meta: &Meta) -> Vec<String> {
        if self.selector.dataplane_ref.is_none() && self.selector.dataplane_labels.is_none() {
            return vec![
                "MeshService has no selector, so it has no endpoints: set spec.selector.dataplaneLabels"
                    .to_owned(),
            ];
        }
        Vec::new()
    }

    fn apply_defaults(&mut self) {
        for port in &mut self.ports {
            if port.target_port.is_none() {
                port.target_port = Some(TargetPort::Number(port.port));
            }
            if port.app_protocol.is_none() {
                port.app_protocol = Some(Protocol::Tcp);
            }
        }
    }

    fn project_status(status: &serde_json::Value) -> serde_json::Value {
        serde_json::json!({ "vips": status.get("vips"), "tls": status.get("tls"), "addresses": status.get("addresses") })
    }
}
