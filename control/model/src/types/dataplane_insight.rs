//! DataplaneInsight: what is known of a proxy at run time.

use crate::{
    meta::Meta,
    registry::Descriptor,
    resource::{NoStatus, ResourceSpec},
    spec_struct,
    violation::Violations,
};

/// All that is known of the type.
pub static DESCRIPTOR: Descriptor = Descriptor {
    sync: crate::Sync { global_to_zone: false, zone_to_global: true, zone_to_zones: false },
    include_in_federation: false,
    form: crate::Form::Inline,
    read_only: true,
    ..Descriptor::of::<DataplaneInsight>(
        "DataplaneInsight",
        "dataplane-insights",
        "",
        "Dataplane Insight",
        "Dataplane Insights",
    )
};

spec_struct! {
    /// Connections of a proxy, its certificate, and what its Envoy refused.
    pub struct DataplaneInsight {
        pub subscriptions: Vec<Subscription>,
        #[serde(rename = "mTLS")]
        pub mtls: Option<Mtls>,
        pub metadata: Option<serde_json::Value>,
        pub open_telemetry: Option<serde_json::Value>,
        /// What Envoy refused, in its words.
        pub rejections: Vec<Rejection>,
    }
    /// One connection of the proxy to a control plane.
    pub struct Subscription {
        pub id: String,
        pub control_plane_instance_id: String,
        pub connect_time: Option<String>,
        pub disconnect_time: Option<String>,
        pub status: Option<SubscriptionStatus>,
        pub version: Option<serde_json::Value>,
        pub generation: u32,
    }
    /// Counts of responses by kind of resource.
    pub struct SubscriptionStatus {
        pub last_update_time: Option<String>,
        pub total: Option<serde_json::Value>,
        pub cds: Option<serde_json::Value>,
        pub eds: Option<serde_json::Value>,
        pub lds: Option<serde_json::Value>,
        pub rds: Option<serde_json::Value>,
    }
    /// The certificate of the proxy.
    pub struct Mtls {
        pub certificate_expiration_time: Option<String>,
        pub last_certificate_regeneration: Option<String>,
        pub certificate_regenerations: u32,
        pub issued_backend: String,
        pub supported_backends: Vec<String>,
    }
    /// A resource that Envoy refused.
    pub struct Rejection {
        pub type_url: String,
        pub name: String,
        pub version: String,
        pub message: String,
        pub time: Option<String>,
    }
}

impl ResourceSpec for DataplaneInsight {
    const DESCRIPTOR: &'static Descriptor = &DESCRIPTOR;
    type Status = NoStatus;

    fn validate(&self, _meta: &Meta, _out: &mut Violations) {}
}
