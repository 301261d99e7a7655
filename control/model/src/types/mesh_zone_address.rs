//! MeshZoneAddress: where other zones reach the ingress of a zone.

use crate::{
    Path,
    meta::Meta,
    names,
    registry::{Descriptor, Sync},
    resource::{NoStatus, ResourceSpec},
    spec_struct, validate,
    violation::Violations,
};

/// All that is known of the type.
pub static DESCRIPTOR: Descriptor = Descriptor {
    sync: Sync { global_to_zone: false, zone_to_global: true, zone_to_zones: true },
    acted_on: false,
    include_in_federation: false,
    ..Descriptor::of::<MeshZoneAddress>(
        "MeshZoneAddress",
        "meshzoneaddresses",
        "mza",
        "Mesh Zone Address",
        "Mesh Zone Addresses",
    )
};

spec_struct! {
    /// Where other zones reach the ingress of a zone.
    pub struct MeshZoneAddress {
        pub address: String,
        pub port: u32,
    }
}

impl ResourceSpec for MeshZoneAddress {
    const DESCRIPTOR: &'static Descriptor = &DESCRIPTOR;
    type Status = NoStatus;

    fn validate(&self, _meta: &Meta, out: &mut Violations) {
        let spec = Path::spec();
        let path = spec.field("address");
        match self.address.as_str() {
            "" => out.add(path, validate::MUST_NOT_BE_EMPTY),
            "0.0.0.0" | "::" => out.add(path, "must not be 0.0.0.0 or ::"),
            address if !names::is_ip_or_dns_name(address) => {
                out.add(path, "must be a valid IP address or domain name");
            }
            _ => {}
        }
        validate::valid_port(&spec.field("port"), self.port, out);
    }
}

#[cfg(test)]
mod tests {
    use crate::table::faults;

    #[rstest::rstest]
    #[case("{}", &["spec.address: must not be empty", "spec.port: port must be a valid (1-65535)"])]
    #[case("{address: '::', port: 70000}", &["spec.address: must not be 0.0.0.0 or ::", "spec.port: port must be a valid (1-65535)"])]
    #[case("{address: 'a b', port: 1}", &["spec.address: must be a valid IP address or domain name"])]
    #[case("{address: a.example, port: 1}", &[])]
    fn addresses(#[case] spec: &str, #[case] expected: &[&str]) {
        assert_eq!(faults("MeshZoneAddress", spec), expected);
    }
}
