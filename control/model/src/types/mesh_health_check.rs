//! MeshHealthCheck: how clients ask endpoints whether they are well.

use crate::{
    GoDuration, Path,
    meta::Meta,
    policy::TargetRef,
    registry::{Descriptor, PolicyTraits, Sync},
    resource::{NoStatus, ResourceSpec},
    spec_struct,
    validate::{self, TargetRefRules},
    violation::Violations,
};

/// All that is known of the type.
pub static DESCRIPTOR: Descriptor = Descriptor {
    sync: Sync { global_to_zone: true, zone_to_global: true, zone_to_zones: true },
    acted_on: false,
    policy: Some(PolicyTraits { has_to: true, has_rules: false, is_inbound: false, is_outbound: true }),
    ..Descriptor::of::<MeshHealthCheck>(
        "MeshHealthCheck",
        "meshhealthchecks",
        "mhc",
        "Mesh Health Check",
        "Mesh Health Checks",
    )
};

spec_struct! {
    /// Health checks of destinations.
    pub struct MeshHealthCheck {
        pub target_ref: Option<TargetRef>,
        pub to: Vec<To>,
    }
    /// For one destination.
    pub struct To {
        pub target_ref: TargetRef,
        pub default: Conf,
    }
    /// When and how.
    pub struct Conf {
        pub interval: Option<GoDuration>,
        pub timeout: Option<GoDuration>,
        pub unhealthy_threshold: Option<u32>,
        pub healthy_threshold: Option<u32>,
        pub initial_jitter: Option<GoDuration>,
        pub interval_jitter: Option<GoDuration>,
        pub interval_jitter_percent: Option<u32>,
        pub healthy_panic_threshold: Option<serde_json::Value>,
        pub fail_traffic_on_panic: Option<bool>,
        pub event_log_path: Option<String>,
        pub always_log_health_check_failures: Option<bool>,
        pub no_traffic_interval: Option<GoDuration>,
        pub http: Option<Http>,
        pub tcp: Option<Tcp>,
        pub grpc: Option<Grpc>,
        pub reuse_connection: Option<bool>,
    }
    /// By a request.
    pub struct Http {
        pub disabled: Option<bool>,
        pub path: Option<String>,
        pub request_headers_to_add: Option<crate::types::mesh_http_route::HeaderModifier>,
        pub expected_statuses: Vec<i32>,
    }
    /// By bytes.
    pub struct Tcp {
        pub disabled: Option<bool>,
        pub send: Option<String>,
        pub receive: Vec<String>,
    }
    /// By gRPC's health service.
    pub struct Grpc {
        pub disabled: Option<bool>,
        pub service_name: Option<String>,
        pub authority: Option<String>,
    }
}

/// Destinations of `to`.
const TO_KINDS: &[&str] = &["Mesh", "MeshService", "MeshExternalService", "MeshMultiZoneService"];

impl ResourceSpec for MeshHealthCheck {
    const DESCRIPTOR: &'static Descriptor = &DESCRIPTOR;
    type Status = NoStatus;

    fn validate(&self, _meta: &Meta, out: &mut Violations) {
        validate::top_level(self.target_ref.as_ref(), false, out);
        for (i, to) in self.to.iter().enumerate() {
            let path = Path::spec().field("to").index(i);
            let rules = TargetRefRules { kinds: TO_KINDS, is_inbound: false };
            validate::target_ref(&path.field("targetRef"), &to.target_ref, rules, out);
            to.default.validate(&path.field("default"), out);
        }
    }
}

impl Conf {
    fn validate(&self, path: &Path, out: &mut Violations) {
        validate::duration_positive(&path.field("interval"), self.interval, out);
        validate::duration_positive(&path.field("timeout"), self.timeout, out);
        validate::count_positive(&path.field("unhealthyThreshold"), self.unhealthy_threshold, out);
        validate::count_positive(&path.field("healthyThreshold"), self.healthy_threshold, out);
        validate::duration_positive(&path.field("initialJitter"), self.initial_jitter, out);
        validate::duration_positive(&path.field("intervalJitter"), self.interval_jitter, out);
        validate::percent(&path.field("intervalJitterPercent"), self.interval_jitter_percent, out);
        if let Some(threshold) = &self.healthy_panic_threshold {
            validate::percentage(&path.field("healthyPanicThreshold"), threshold, out);
        }
        validate::duration_positive(&path.field("noTrafficInterval"), self.no_traffic_interval, out);
        if self.event_log_path.as_ref().is_some_and(|path| path.is_empty() || path.contains('\0')) {
            out.add(path.field("eventLogPath"), "must be a valid path when defined");
        }
        if let Some(http) = &self.http {
            let path = path.field("http");
            if http.path.as_deref() == Some("") {
                out.add(path.field("path"), validate::MUST_BE_DEFINED);
            }
            for (i, status) in http.expected_statuses.iter().enumerate() {
                let status = u32::try_from(*status).unwrap_or_default();
                validate::status_code(&path.field("expectedStatuses").index(i), status, out);
            }
        }
        if self.http.is_none() && self.tcp.is_none() && self.grpc.is_none() {
            out.add(path, "must have at least one defined: http, tcp, grpc");
        }
    }
}
