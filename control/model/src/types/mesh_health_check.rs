//! MeshHealthCheck: how clients ask endpoints whether they are well.

use crate::{
    GoDuration, Path,
    meta::Meta,
    policy::{TargetRef, To},
    registry::{Descriptor, PolicyTraits},
    resource::{NoStatus, ResourceSpec},
    spec_struct, validate,
    violation::Violations,
};

/// All that is known of the type.
pub static DESCRIPTOR: Descriptor = Descriptor {
    acted_on: false,
    ..Descriptor::policy::<MeshHealthCheck>(
        PolicyTraits::TO,
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
        pub to: Vec<To<Conf>>,
    }
    /// When and how.
    pub struct Conf {
        pub interval: Option<GoDuration>,
        pub timeout: Option<GoDuration>,
        pub unhealthy_threshold: Option<i32>,
        pub healthy_threshold: Option<i32>,
        pub initial_jitter: Option<GoDuration>,
        pub interval_jitter: Option<GoDuration>,
        pub interval_jitter_percent: Option<i32>,
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
        validate::each_to(&self.to, TO_KINDS, out, |to, path, out| to.default.validate(path, out));
    }
}

impl Conf {
    fn validate(&self, path: &Path, out: &mut Violations) {
        validate::duration_positive(&path.field("interval"), self.interval, out);
        validate::duration_positive(&path.field("timeout"), self.timeout, out);
        validate::value_positive(&path.field("unhealthyThreshold"), self.unhealthy_threshold, out);
        validate::value_positive(&path.field("healthyThreshold"), self.healthy_threshold, out);
        validate::duration_positive(&path.field("initialJitter"), self.initial_jitter, out);
        validate::duration_positive(&path.field("intervalJitter"), self.interval_jitter, out);
        let jitter = self.interval_jitter_percent.map(i64::from);
        validate::percent(&path.field("intervalJitterPercent"), jitter, out);
        if let Some(threshold) = &self.healthy_panic_threshold {
            validate::percentage(&path.field("healthyPanicThreshold"), threshold, out);
        }
        validate::duration_positive(&path.field("noTrafficInterval"), self.no_traffic_interval, out);
        if self.event_log_path.as_deref().is_some_and(|path| !validate::is_file_path(path)) {
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

#[cfg(test)]
mod tests {
    use crate::table::faults;

    #[rstest::rstest]
    #[case::nothing("", &[": must have at least one defined: http, tcp, grpc"])]
    #[case::thresholds(
        "tcp: {}, unhealthyThreshold: 0, healthyThreshold: -1",
        &[
            ".unhealthyThreshold: must be greater than zero when defined",
            ".healthyThreshold: must be greater than zero when defined",
        ]
    )]
    #[case::shares(
        "tcp: {}, intervalJitterPercent: -1, healthyPanicThreshold: '100.1'",
        &[
            ".intervalJitterPercent: must be in inclusive range [0, 100]",
            ".healthyPanicThreshold: must be in inclusive range [0.0, 100.0]",
        ]
    )]
    #[case::log("grpc: {}, eventLogPath: a.log", &[".eventLogPath: must be a valid path when defined"])]
    #[case::path("http: {path: ''}", &[".http.path: must be defined"])]
    fn checks(#[case] conf: &str, #[case] expected: &[&str]) {
        let spec = format!("to: [{{targetRef: {{kind: Mesh}}, default: {{{conf}}}}}]");
        let expected: Vec<String> =
            expected.iter().map(|fault| format!("spec.to[0].default{fault}")).collect();
        assert_eq!(faults("MeshHealthCheck", &spec), expected);
    }
}
