//! MeshCircuitBreaker: how much at once, and which endpoints are left out for a while.

use crate::{
    GoDuration, Path,
    meta::Meta,
    policy::{Rule, TargetRef, To},
    registry::{Descriptor, PolicyTraits},
    resource::{NoStatus, ResourceSpec},
    spec_struct,
    validate::{self, EmptyMatch},
    violation::Violations,
};

/// All that is known of the type.
pub static DESCRIPTOR: Descriptor = Descriptor {
    acted_on: false,
    ..Descriptor::policy::<MeshCircuitBreaker>(
        PolicyTraits::TO_AND_RULES,
        "MeshCircuitBreaker",
        "meshcircuitbreakers",
        "mcb",
        "Mesh Circuit Breaker",
        "Mesh Circuit Breakers",
    )
};

spec_struct! {
    /// Limits and outlier detection of what comes in (`rules`) or goes out (`to`).
    pub struct MeshCircuitBreaker {
        pub target_ref: Option<TargetRef>,
        pub to: Vec<To<Conf>>,
        pub rules: Vec<Rule<Conf>>,
    }
    /// One or both.
    pub struct Conf {
        pub connection_limits: Option<ConnectionLimits>,
        pub outlier_detection: Option<OutlierDetection>,
    }
    /// How much at once.
    pub struct ConnectionLimits {
        pub max_connection_pools: Option<u32>,
        pub max_connections: Option<u32>,
        pub max_pending_requests: Option<u32>,
        pub max_retries: Option<u32>,
        pub max_requests: Option<u32>,
    }
    /// Which endpoints are left out for a while.
    pub struct OutlierDetection {
        pub disabled: Option<bool>,
        pub interval: Option<GoDuration>,
        pub base_ejection_time: Option<GoDuration>,
        pub max_ejection_percent: Option<u32>,
        pub split_external_and_local_errors: Option<bool>,
        pub detectors: Option<Detectors>,
        pub healthy_panic_threshold: Option<serde_json::Value>,
    }
    /// What makes an endpoint an outlier.
    pub struct Detectors {
        pub total_failures: Option<Consecutive>,
        pub gateway_failures: Option<Consecutive>,
        pub local_origin_failures: Option<Consecutive>,
        pub success_rate: Option<SuccessRate>,
        pub failure_percentage: Option<FailurePercentage>,
    }
    /// So many failures one after the other.
    pub struct Consecutive {
        pub consecutive: Option<u32>,
    }
    /// A rate of success far below that of the others.
    pub struct SuccessRate {
        pub minimum_hosts: Option<u32>,
        pub request_volume: Option<u32>,
        pub standard_deviation_factor: Option<serde_json::Value>,
    }
    /// Too many failures in a hundred.
    pub struct FailurePercentage {
        pub minimum_hosts: Option<u32>,
        pub request_volume: Option<u32>,
        pub threshold: Option<u32>,
    }
}

/// Destinations of `to`.
const TO_KINDS: &[&str] = &["Mesh", "MeshService", "MeshExternalService", "MeshMultiZoneService"];

impl ResourceSpec for MeshCircuitBreaker {
    const DESCRIPTOR: &'static Descriptor = &DESCRIPTOR;
    type Status = NoStatus;

    fn validate(&self, _meta: &Meta, out: &mut Violations) {
        validate::top_level(self.target_ref.as_ref(), !self.rules.is_empty(), out);
        if self.to.is_empty() && self.rules.is_empty() {
            out.add(Path::spec(), "at least one of 'to' or 'rules' has to be defined");
        }
        validate::each_to(&self.to, TO_KINDS, out, |to, path, out| to.default.validate(path, out));
        validate::each_rule(&self.rules, EmptyMatch::Everybody, out, |rule, path, out| {
            rule.default.validate(path, out);
        });
    }
}

impl Conf {
    fn validate(&self, path: &Path, out: &mut Violations) {
        if self.connection_limits.is_none() && self.outlier_detection.is_none() {
            out.add(path, "at least one of: 'connectionLimits' or 'outlierDetection' should be configured");
        }
        if let Some(limits) = &self.connection_limits {
            let path = path.field("connectionLimits");
            let limits = [
                ("maxConnections", limits.max_connections),
                ("maxConnectionPools", limits.max_connection_pools),
                ("maxPendingRequests", limits.max_pending_requests),
                ("maxRetries", limits.max_retries),
                ("maxRequests", limits.max_requests),
            ];
            for (field, limit) in limits {
                validate::count_positive(&path.field(field), limit, out);
            }
        }
        if let Some(detection) = &self.outlier_detection {
            detection.validate(&path.field("outlierDetection"), out);
        }
    }
}

impl OutlierDetection {
    fn validate(&self, path: &Path, out: &mut Violations) {
        validate::duration_positive(&path.field("interval"), self.interval, out);
        validate::duration_positive(&path.field("baseEjectionTime"), self.base_ejection_time, out);
        validate::percent(&path.field("maxEjectionPercent"), self.max_ejection_percent.map(i64::from), out);
        if let Some(threshold) = &self.healthy_panic_threshold {
            validate::percentage(&path.field("healthyPanicThreshold"), threshold, out);
        }
        let path = path.field("detectors");
        let Some(detectors) = &self.detectors else { return out.add(path, validate::MUST_BE_DEFINED) };
        let consecutive = [
            ("totalFailures", &detectors.total_failures),
            ("gatewayFailures", &detectors.gateway_failures),
            ("localOriginFailures", &detectors.local_origin_failures),
        ];
        if consecutive.iter().all(|(_, detector)| detector.is_none())
            && detectors.success_rate.is_none()
            && detectors.failure_percentage.is_none()
        {
            return out.add(
                path,
                "must have at least one defined: totalFailures, gatewayFailures, localOriginFailures, successRate, failurePercentage",
            );
        }
        for (field, detector) in consecutive {
            let count = detector.as_ref().and_then(|detector| detector.consecutive);
            validate::count_positive(&path.field(field).field("consecutive"), count, out);
        }
        if let Some(rate) = &detectors.success_rate {
            let path = path.field("successRate");
            validate::count_positive(&path.field("minimumHosts"), rate.minimum_hosts, out);
            validate::count_positive(&path.field("requestVolume"), rate.request_volume, out);
            let path = path.field("standardDeviationFactor");
            match rate.standard_deviation_factor.as_ref().map(validate::number) {
                Some(None) => out.add(path, "invalid number"),
                Some(Some(factor)) if factor <= 0.0 => out.add(path, "must be greater than 0"),
                _ => {}
            }
        }
        if let Some(percentage) = &detectors.failure_percentage {
            let path = path.field("failurePercentage");
            validate::count_positive(&path.field("minimumHosts"), percentage.minimum_hosts, out);
            validate::count_positive(&path.field("requestVolume"), percentage.request_volume, out);
            validate::percent(&path.field("threshold"), percentage.threshold.map(i64::from), out);
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::table::faults;

    #[rstest::rstest]
    #[case::both("{to: [{targetRef: {kind: Mesh}, default: {connectionLimits: {}}}], rules: [{default: {connectionLimits: {}}}]}", &[])]
    #[case::nothing(
        "to: [{targetRef: {kind: Mesh}, default: {}}]",
        &["spec.to[0].default: at least one of: 'connectionLimits' or 'outlierDetection' should be configured"]
    )]
    #[case::no_detector(
        "rules: [{default: {outlierDetection: {detectors: {}}}}]",
        &["spec.rules[0].default.outlierDetection.detectors: must have at least one defined: totalFailures, gatewayFailures, localOriginFailures, successRate, failurePercentage"]
    )]
    #[case::route(
        "to: [{targetRef: {kind: MeshHTTPRoute, labels: {a: b}}, default: {connectionLimits: {}}}]",
        &["spec.to[0].targetRef.kind: value 'MeshHTTPRoute' is not supported"]
    )]
    fn breakers(#[case] spec: &str, #[case] expected: &[&str]) {
        assert_eq!(faults("MeshCircuitBreaker", spec), expected);
    }
}
