//! Zone: a part of the deployment with a control plane of its own.

use crate::{
    meta::Meta,
    names,
    registry::Descriptor,
    resource::{NoStatus, ResourceSpec},
    spec_struct,
    violation::Violations,
};

/// All that is known of the type.
pub static DESCRIPTOR: Descriptor = Descriptor {
    sync: crate::Sync { global_to_zone: true, zone_to_global: false, zone_to_zones: false },
    scope: crate::Scope::Global,
    form: crate::Form::Inline,
    include_in_federation: false,
    ..Descriptor::of::<Zone>("Zone", "zones", "z", "Zone", "Zones")
};

spec_struct! {
    /// A zone.
    pub struct Zone {
        /// A zone that isn't is left out; absent = it is.
        pub enabled: Option<bool>,
    }
}

impl ResourceSpec for Zone {
    const DESCRIPTOR: &'static Descriptor = &DESCRIPTOR;
    type Status = NoStatus;

    fn validate(&self, meta: &Meta, out: &mut Violations) {
        for fault in names::dns_1035_label(&meta.name) {
            out.add("name", fault);
        }
    }
}
