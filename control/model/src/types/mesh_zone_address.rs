//! MeshZoneAddress: where other zones reach the ingress of a zone.

use crate::{
    Path,
    meta::Meta,
    registry::{Descriptor, Sync},
    resource::{NoStatus, ResourceSpec},
    spec_struct,
    validate::{self},
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
        validate::address(&spec.field("address"), &self.address, out);
        validate::port(&spec.field("port"), self.port, out);
    }
}
