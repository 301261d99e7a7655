//! ZoneInsight: what is known of a zone at run time.

use crate::{
    meta::Meta,
    registry::Descriptor,
    resource::{NoStatus, ResourceSpec},
    spec_struct,
    violation::Violations,
};

/// All that is known of the type.
pub static DESCRIPTOR: Descriptor = Descriptor {
    sync: crate::Sync { global_to_zone: false, zone_to_global: false, zone_to_zones: false },
    include_in_federation: false,
    scope: crate::Scope::Global,
    form: crate::Form::Inline,
    read_only: true,
    ..Descriptor::of::<ZoneInsight>("ZoneInsight", "zone-insights", "", "Zone Insight", "Zone Insights")
};

spec_struct! {
    /// Connections of a zone.
    pub struct ZoneInsight {
        pub subscriptions: Vec<serde_json::Value>,
        pub envoy_admin_streams: Option<serde_json::Value>,
        pub kds_streams: Option<serde_json::Value>,
        pub health_check: Option<serde_json::Value>,
    }
}

impl ResourceSpec for ZoneInsight {
    const DESCRIPTOR: &'static Descriptor = &DESCRIPTOR;
    type Status = NoStatus;

    fn validate(&self, _meta: &Meta, _out: &mut Violations) {}
}
