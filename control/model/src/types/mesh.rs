//! Mesh: a world of its own.

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
    ..Descriptor::of::<Mesh>("Mesh", "meshes", "m", "Mesh", "Meshes")
};

spec_struct! {
    /// A mesh.
    pub struct Mesh {
        /// Which of the initial policies are not created; `*` = none is.
        pub skip_creating_initial_policies: Vec<String>,
    }
}

impl ResourceSpec for Mesh {
    const DESCRIPTOR: &'static Descriptor = &DESCRIPTOR;
    type Status = NoStatus;

    fn validate(&self, meta: &Meta, out: &mut Violations) {
        for fault in names::dns_1035_label(&meta.name) {
            out.add("name", fault);
        }
    }
}
