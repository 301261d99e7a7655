//! DataplaneInsight: what is known of a proxy at run time.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::{
    form::Omit,
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
        /// What Envoy runs of what was sent, by type.
        pub sync: Vec<TypeSync>,
        /// The agent has no Envoy at the moment, so everything is pending.
        pub envoy_disconnected: bool,
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
    /// Counts of responses by kind of resource. The total holds all that Envoy consumes, also kinds that have no
    /// count of their own here.
    pub struct SubscriptionStatus {
        pub last_update_time: Option<String>,
        pub total: Option<ResponseCounts>,
        pub cds: Option<ResponseCounts>,
        pub eds: Option<ResponseCounts>,
        pub lds: Option<ResponseCounts>,
        pub rds: Option<ResponseCounts>,
    }
    /// Responses of one kind. What is neither acknowledged nor rejected is under way.
    pub struct ResponseCounts {
        pub responses_sent: Count,
        pub responses_acknowledged: Count,
        pub responses_rejected: Count,
    }
    /// How far Envoy has come with the resources of one type.
    pub struct TypeSync {
        pub type_url: String,
        /// What the proxy is to have.
        pub total: u32,
        /// Those that Envoy has not answered.
        pub pending: u32,
        /// Those that Envoy refused.
        pub refused: u32,
        /// Some of those that are pending.
        pub pending_names: Vec<String>,
        /// Of secrets: name → version that Envoy has acknowledged.
        pub acknowledged: BTreeMap<String, String>,
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

/// A 64-bit counter, which protobuf's JSON writes as text; it is read as text and as a number.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Count(pub u64);

impl Omit for Count {
    fn omit(&self) -> bool {
        self.0 == 0
    }
}

impl Serialize for Count {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for Count {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Form {
            Number(u64),
            Text(String),
        }
        match Form::deserialize(deserializer)? {
            Form::Number(number) => Ok(Self(number)),
            Form::Text(text) => text.parse().map(Self).map_err(serde::de::Error::custom),
        }
    }
}

impl ResourceSpec for DataplaneInsight {
    const DESCRIPTOR: &'static Descriptor = &DESCRIPTOR;
    type Status = NoStatus;

    fn validate(&self, _meta: &Meta, _out: &mut Violations) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_text_as_in_protobufs_json() {
        let counts = ResponseCounts { responses_sent: Count(5), ..ResponseCounts::default() };
        let text = serde_json::to_string(&counts).unwrap();
        assert_eq!(text, r#"{"responsesSent":"5"}"#);
        assert_eq!(serde_json::from_str::<ResponseCounts>(&text).unwrap(), counts);
        assert_eq!(serde_json::from_str::<ResponseCounts>(r#"{"responsesSent":5}"#).unwrap(), counts);
    }
}
