//! MeshMultiZoneService: services of several zones under one name.

use crate::{
    Path, Protocol,
    meta::Meta,
    policy::LabelSelector,
    registry::{Descriptor, Sync},
    resource::ResourceSpec,
    spec_struct, validate,
    violation::Violations,
};

/// All that is known of the type.
pub static DESCRIPTOR: Descriptor = Descriptor {
    sync: Sync { global_to_zone: true, zone_to_global: false, zone_to_zones: false },
    acted_on: false,
    is_destination: true,
    ..Descriptor::of::<MeshMultiZoneService>(
        "MeshMultiZoneService",
        "meshmultizoneservices",
        "mzsvc",
        "Mesh Multi Zone Service",
        "Mesh Multi Zone Services",
    )
};

spec_struct! {
    /// Services of several zones under one name.
    pub struct MeshMultiZoneService {
        pub selector: Selector,
        pub ports: Vec<Port>,
    }
    /// Which services.
    pub struct Selector {
        pub mesh_service: LabelSelector,
    }
    /// A port.
    pub struct Port {
        pub name: Option<String>,
        pub port: u32,
        pub app_protocol: Option<Protocol>,
    }
    /// What the control plane found out.
    pub struct MeshMultiZoneServiceStatus {
        pub addresses: Vec<crate::types::mesh_service::Address>,
        pub vips: Vec<crate::types::mesh_service::Vip>,
        pub mesh_services: Vec<MatchedMeshService>,
        pub hostname_generators: Vec<crate::types::mesh_service::HostnameGeneratorStatus>,
    }
    /// A service that it holds.
    pub struct MatchedMeshService {
        pub name: String,
        pub namespace: String,
        pub zone: String,
        pub mesh: String,
    }
}

impl ResourceSpec for MeshMultiZoneService {
    const DESCRIPTOR: &'static Descriptor = &DESCRIPTOR;
    type Status = MeshMultiZoneServiceStatus;

    fn apply_defaults(&mut self) {
        for port in &mut self.ports {
            port.app_protocol.get_or_insert(Protocol::Tcp);
        }
    }

    fn validate(&self, meta: &Meta, out: &mut Violations) {
        validate::display_name(meta, out);
        let spec = Path::spec();
        if self.selector.mesh_service.match_labels.is_empty() {
            out.add(spec.field("selector.meshService.matchLabels"), "cannot be empty");
        }
        if self.ports.is_empty() {
            out.add(spec.field("ports"), "cannot be empty");
        }
        for (i, port) in self.ports.iter().enumerate() {
            let path = spec.field("ports").index(i);
            validate::port(&path.field("port"), port.port, out);
            if port.name.as_deref() == Some("") {
                out.add(path.field("name"), validate::MUST_NOT_BE_EMPTY);
            }
            validate::app_protocol(&path, port.app_protocol.as_ref(), out);
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::table::{faults, faults_named};

    #[rstest::rstest]
    #[case::nothing(
        "{}",
        &["spec.selector.meshService.matchLabels: cannot be empty", "spec.ports: cannot be empty"]
    )]
    #[case::name_of_a_port(
        "{selector: {meshService: {matchLabels: {a: b}}}, ports: [{port: 80, name: ''}]}",
        &["spec.ports[0].name: must not be empty"]
    )]
    fn services(#[case] spec: &str, #[case] expected: &[&str]) {
        assert_eq!(faults("MeshMultiZoneService", spec), expected);
    }

    #[test]
    fn its_name_is_part_of_a_dns_name() {
        let spec = "{selector: {meshService: {matchLabels: {a: b}}}, ports: [{port: 80}]}";
        let faults = faults_named("MeshMultiZoneService", &"a".repeat(64), spec);
        assert_eq!(faults, ["name: must be no more than 63 characters"]);
    }
}
