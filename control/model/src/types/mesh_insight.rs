//! MeshInsight: counts that the control plane keeps; nobody else writes them.

use crate::{
    meta::Meta,
    registry::{Descriptor, Form, Scope, Sync},
    resource::{NoStatus, ResourceSpec},
    spec_struct,
    violation::Violations,
};

/// All that is known of the type.
pub static DESCRIPTOR: Descriptor = Descriptor {
    sync: Sync { global_to_zone: false, zone_to_global: false, zone_to_zones: false },
    scope: Scope::Global,
    form: Form::Inline,
    read_only: true,
    include_in_federation: false,
    ..Descriptor::of::<MeshInsight>("MeshInsight", "mesh-insights", "", "Mesh Insight", "Mesh Insights")
};

spec_struct! {
    /// Counts.
    pub struct MeshInsight {
        pub last_sync: Option<String>,
        pub dataplanes: Option<serde_json::Value>,
        pub policies: Option<serde_json::Value>,
        pub services: Option<serde_json::Value>,
        pub resources: Option<serde_json::Value>,
        pub dp_versions: Option<serde_json::Value>,
        #[serde(rename = "mTLS")]
        pub mtls: Option<serde_json::Value>,
        pub dataplanes_by_type: Option<serde_json::Value>,
    }
}

impl ResourceSpec for MeshInsight {
    const DESCRIPTOR: &'static Descriptor = &DESCRIPTOR;
    type Status = NoStatus;

    fn validate(&self, _meta: &Meta, _out: &mut Violations) {}
}
