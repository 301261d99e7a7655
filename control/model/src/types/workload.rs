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

    fn validate(&self, meta: &Meta, out: &mut Violations) {
        if meta.display_name().len() > 253 {
            out.add("name", "must not be longer than 253 characters");
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::table::faults_named;

    #[test]
    fn its_name_has_the_length_of_any_name() {
        assert!(faults_named("Workload", &"a".repeat(253), "{}").is_empty());
        let expected =
            ["name: value length must less or equal 253", "name: must not be longer than 253 characters"];
        assert_eq!(faults_named("Workload", &"a".repeat(254), "{}"), expected);
    }
}
