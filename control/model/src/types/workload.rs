//! Workload: proxies that run the same program.

use crate::{meta::Meta, registry::Descriptor, resource::ResourceSpec, spec_struct, violation::Violations};

/// All that is known of the type.
pub static DESCRIPTOR: Descriptor = Descriptor {
    sync: crate::Sync { global_to_zone: false, zone_to_global: true, zone_to_zones: false },
    include_in_federation: false,
    ..Descriptor::of::<Workload>("Workload", "workloads", "wl", "Workload", "Workloads")
};

spec_struct! {
    /// A workload has no fields; it exists.
    pub struct Workload {}
    /// What the control plane found out.
    pub struct WorkloadStatus {
        pub dataplane_proxies: Option<crate::types::mesh_service::DataplaneProxies>,
    }
}

impl ResourceSpec for Workload {
    const DESCRIPTOR: &'static Descriptor = &DESCRIPTOR;
    type Status = WorkloadStatus;

    // The name's length is judged with every resource's.
    fn validate(&self, _meta: &Meta, _out: &mut Violations) {}
}
