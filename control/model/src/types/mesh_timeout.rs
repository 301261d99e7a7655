//! MeshTimeout: how long things may take.

use crate::{
    GoDuration,
    meta::Meta,
    policy::{Rule, TargetRef, To},
    registry::{Descriptor, PolicyTraits},
    resource::{NoStatus, ResourceSpec},
    spec_struct,
    validate::{self, EmptyMatch},
    violation::{Path, Violations},
};

/// All that is known of the type.
pub static DESCRIPTOR: Descriptor = Descriptor::policy::<MeshTimeout>(
    PolicyTraits::TO_AND_RULES,
    "MeshTimeout",
    "meshtimeouts",
    "mt",
    "Mesh Timeout",
    "Mesh Timeouts",
);

spec_struct! {
    /// Timeouts of what comes in (`rules`) or goes out (`to`).
    pub struct MeshTimeout {
        pub target_ref: Option<TargetRef>,
        pub to: Vec<To<Conf>>,
        pub rules: Vec<Rule<Conf>>,
    }
    /// The timeouts.
    pub struct Conf {
        pub connection_timeout: Option<GoDuration>,
        pub idle_timeout: Option<GoDuration>,
        pub http: Option<Http>,
    }
    /// Those of HTTP.
    pub struct Http {
        pub request_timeout: Option<GoDuration>,
        pub stream_idle_timeout: Option<GoDuration>,
        pub max_stream_duration: Option<GoDuration>,
        pub max_connection_duration: Option<GoDuration>,
        pub request_headers_timeout: Option<GoDuration>,
    }
}

impl ResourceSpec for MeshTimeout {
    const DESCRIPTOR: &'static Descriptor = &DESCRIPTOR;
    type Status = NoStatus;

    fn validate(&self, _meta: &Meta, out: &mut Violations) {
        validate::top_level(self.target_ref.as_ref(), !self.rules.is_empty(), out);
        validate::to_or_rules(&self.to, &self.rules, out);
        let on_route = validate::is_on_route(self.target_ref.as_ref());
        let kinds = if on_route { validate::TO_KINDS_OF_A_ROUTE } else { validate::ALL_TO_KINDS };
        validate::each_to(&self.to, kinds, out, |to, path, out| to.default.validate(path, on_route, out));
        validate::each_rule(&self.rules, EmptyMatch::Refused, out, |rule, path, out| {
            if rule.matches.iter().any(|entry| entry.spiffe_id.is_some()) {
                rule.default.refuse_what_precedes_the_peer(path, out);
            }
            rule.default.validate(path, on_route, out);
        });
    }
}

impl Conf {
    fn validate(&self, path: &Path, on_route: bool, out: &mut Violations) {
        if self.connection_timeout.is_none() && self.idle_timeout.is_none() && self.http.is_none() {
            out.add(path, "at least one timeout should be configured");
            return;
        }
        let http = path.field("http");
        if on_route {
            let mut refuse = |path: Path, set: bool| {
                if set {
                    out.add(path, "can't be specified when top-level TargetRef is referencing MeshHTTPRoute");
                }
            };
            refuse(path.field("connectionTimeout"), self.connection_timeout.is_some());
            refuse(path.field("idleTimeout"), self.idle_timeout.is_some());
            if let Some(conf) = &self.http {
                refuse(http.field("maxStreamDuration"), conf.max_stream_duration.is_some());
                refuse(http.field("maxConnectionDuration"), conf.max_connection_duration.is_some());
            }
        }
        validate::duration_positive(&path.field("connectionTimeout"), self.connection_timeout, out);
        validate::duration_not_negative(&path.field("idleTimeout"), self.idle_timeout, out);
        let Some(conf) = &self.http else { return };
        let timeouts = [
            ("requestTimeout", conf.request_timeout),
            ("streamIdleTimeout", conf.stream_idle_timeout),
            ("maxStreamDuration", conf.max_stream_duration),
            ("maxConnectionDuration", conf.max_connection_duration),
            ("requestHeadersTimeout", conf.request_headers_timeout),
        ];
        if timeouts.iter().all(|(_, timeout)| timeout.is_none()) {
            out.add(&http, "at least one timeout in this section should be configured");
        }
        for (field, timeout) in timeouts {
            validate::duration_not_negative(&http.field(field), timeout, out);
        }
    }

    /// Timeouts that run before or beyond a request can't depend on who sent it.
    fn refuse_what_precedes_the_peer(&self, path: &Path, out: &mut Violations) {
        let http = self.http.clone().unwrap_or_default();
        let fields = [
            ("connectionTimeout", self.connection_timeout),
            ("idleTimeout", self.idle_timeout),
            ("http.requestHeadersTimeout", http.request_headers_timeout),
            ("http.maxStreamDuration", http.max_stream_duration),
            ("http.maxConnectionDuration", http.max_connection_duration),
        ];
        for (field, _) in fields.into_iter().filter(|(_, timeout)| timeout.is_some()) {
            out.add(path.field(field), validate::NOT_BY_PEER);
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::table::faults;

    const BY_PEER: &str = super::validate::NOT_BY_PEER;

    #[rstest::rstest]
    #[case::a_timeout_of_headers_alone(
        "to: [{targetRef: {kind: Mesh}, default: {http: {requestHeadersTimeout: 1s}}}]",
        &[]
    )]
    #[case::everything_for_a_route(
        "to: [{targetRef: {kind: MeshHTTPRoute, labels: {a: b}}, default: {connectionTimeout: 1s, idleTimeout: 1s}}]",
        &[]
    )]
    #[case::on_a_route(
        "{targetRef: {kind: MeshHTTPRoute}, to: [{targetRef: {kind: MeshExternalService, labels: {a: b}}, default: {idleTimeout: 1s}}]}",
        &[
            "spec.targetRef.kind: value 'MeshHTTPRoute' is not supported",
            "spec.to[0].default.idleTimeout: can't be specified when top-level TargetRef is referencing MeshHTTPRoute",
        ]
    )]
    #[case::nothing(
        "to: [{targetRef: {kind: Mesh}, default: {}}]",
        &["spec.to[0].default: at least one timeout should be configured"]
    )]
    #[case::negative(
        "rules: [{default: {connectionTimeout: 0s, idleTimeout: -1s, http: {streamIdleTimeout: -1s}}}]",
        &[
            "spec.rules[0].default.connectionTimeout: must be greater than zero when defined",
            "spec.rules[0].default.idleTimeout: must not be negative when defined",
            "spec.rules[0].default.http.streamIdleTimeout: must not be negative when defined",
        ]
    )]
    fn timeouts(#[case] spec: &str, #[case] expected: &[&str]) {
        assert_eq!(faults("MeshTimeout", spec), expected);
    }

    #[test]
    fn what_precedes_the_peer_cannot_depend_on_it() {
        let spec = "rules: [{matches: [{spiffeID: {type: Exact, value: spiffe://a/b}}], default: {connectionTimeout: 1s,
            idleTimeout: 1s, http: {requestTimeout: 1s, streamIdleTimeout: 1s, requestHeadersTimeout: 1s,
            maxStreamDuration: 1s, maxConnectionDuration: 1s}}}]";
        let fields = [
            "connectionTimeout",
            "idleTimeout",
            "http.requestHeadersTimeout",
            "http.maxStreamDuration",
            "http.maxConnectionDuration",
        ];
        let expected = fields.map(|field| format!("spec.rules[0].default.{field}: {BY_PEER}"));
        assert_eq!(faults("MeshTimeout", spec), expected);
    }
}
