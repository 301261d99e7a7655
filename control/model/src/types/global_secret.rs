//! GlobalSecret: a secret of the whole deployment.

use base64::Engine as _;

use crate::{
    meta::Meta,
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
    aliases: &["global-secrets"],
    admin_only: true,
    ..Descriptor::of::<GlobalSecret>("GlobalSecret", "globalsecrets", "", "Global Secret", "Global Secrets")
};

spec_struct! {
    /// A secret of the whole deployment.
    pub struct GlobalSecret {
        /// The secret in base64.
        pub data: String,
    }
}

impl ResourceSpec for GlobalSecret {
    const DESCRIPTOR: &'static Descriptor = &DESCRIPTOR;
    type Status = NoStatus;

    fn validate(&self, _meta: &Meta, out: &mut Violations) {
        if base64::engine::general_purpose::STANDARD.decode(&self.data).is_err() {
            out.add("data", "must be base64");
        }
    }
}
