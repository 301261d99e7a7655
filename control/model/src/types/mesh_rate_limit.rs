//! MeshRateLimit: how many requests or connections in which time.

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
    ..Descriptor::policy::<MeshRateLimit>(
        PolicyTraits::TO_AND_RULES,
        "MeshRateLimit",
        "meshratelimits",
        "mrl",
        "Mesh Rate Limit",
        "Mesh Rate Limits",
    )
};

spec_struct! {
    /// Limits of what comes in.
    pub struct MeshRateLimit {
        pub target_ref: Option<TargetRef>,
        pub to: Vec<To<Conf>>,
        pub rules: Vec<Rule<Conf>>,
    }
    /// Limits.
    pub struct Conf {
        pub local: Option<Local>,
    }
    /// Counted by each proxy alone.
    pub struct Local {
        pub http: Option<LocalHttp>,
        pub tcp: Option<LocalTcp>,
    }
    /// Of requests.
    pub struct LocalHttp {
        pub disabled: Option<bool>,
        pub request_rate: Option<Rate>,
        pub on_rate_limit: Option<OnRateLimit>,
    }
    /// Of connections.
    pub struct LocalTcp {
        pub disabled: Option<bool>,
        pub connection_rate: Option<Rate>,
    }
    /// So many in an interval.
    pub struct Rate {
        pub num: u32,
        pub interval: GoDuration,
    }
    /// What one too many is answered.
    pub struct OnRateLimit {
        pub status: Option<u32>,
        pub headers: Option<crate::types::mesh_http_route::HeaderModifier>,
    }
}

impl ResourceSpec for MeshRateLimit {
    const DESCRIPTOR: &'static Descriptor = &DESCRIPTOR;
    type Status = NoStatus;

    fn validate(&self, _meta: &Meta, out: &mut Violations) {
        validate::top_level(self.target_ref.as_ref(), !self.rules.is_empty(), out);
        validate::to_or_rules(&self.to, &self.rules, out);
        validate::each_to(&self.to, &["Mesh"], out, |to, path, out| to.default.validate(path, out));
        validate::each_rule(&self.rules, EmptyMatch::Refused, out, |rule, path, out| {
            rule.default.validate(path, out);
            let by_peer = rule.matches.iter().any(|entry| entry.spiffe_id.is_some());
            if by_peer && rule.default.local.as_ref().is_some_and(|local| local.tcp.is_some()) {
                out.add(path.field("local.tcp"), validate::NOT_BY_PEER);
            }
        });
    }
}

impl Conf {
    fn validate(&self, path: &Path, out: &mut Violations) {
        let path = path.field("local");
        let Some(local) = &self.local else { return out.add(path, validate::MUST_BE_DEFINED) };
        if local.http.is_none() && local.tcp.is_none() {
            out.add(&path, "must have at least one defined: tcp, http");
        }
        if let Some(http) = &local.http {
            let path = path.field("http");
            if http.disabled.is_none() && http.request_rate.is_none() && http.on_rate_limit.is_none() {
                out.add(&path, "must have at least one defined: disabled, requestRate, onRateLimit");
            }
            if let Some(rate) = &http.request_rate {
                rate.validate(&path.field("requestRate"), out);
            }
            let status = http.on_rate_limit.as_ref().and_then(|answer| answer.status);
            validate::count_positive(&path.field("onRateLimit.status"), status, out);
        }
        if let Some(tcp) = &local.tcp {
            let path = path.field("tcp");
            if tcp.disabled.is_none() && tcp.connection_rate.is_none() {
                out.add(&path, "must have at least one defined: disabled, connectionRate");
            }
            if let Some(rate) = &tcp.connection_rate {
                rate.validate(&path.field("connectionRate"), out);
            }
        }
    }
}

impl Rate {
    fn validate(&self, path: &Path, out: &mut Violations) {
        validate::count_positive(&path.field("num"), Some(self.num), out);
        if self.interval <= GoDuration::from_millis(50) {
            out.add(path.field("interval"), "must be greater than: 50ms");
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::table::faults;

    #[rstest::rstest]
    #[case::empty_match(
        "rules: [{matches: [{}], default: {local: {tcp: {disabled: true}}}}]",
        &["spec.rules[0].matches[0]: must specify at least one of 'spiffeID' or 'sni'"]
    )]
    #[case::empty_local(
        "rules: [{default: {local: {}}}]",
        &["spec.rules[0].default.local: must have at least one defined: tcp, http"]
    )]
    #[case::status(
        "rules: [{default: {local: {http: {onRateLimit: {status: 0}}}}}]",
        &["spec.rules[0].default.local.http.onRateLimit.status: must be greater than 0"]
    )]
    #[case::to(
        "to: [{targetRef: {kind: MeshService, labels: {a: b}}, default: {local: {tcp: {disabled: true}}}}]",
        &["spec.to[0].targetRef.kind: value 'MeshService' is not supported"]
    )]
    fn limits(#[case] spec: &str, #[case] expected: &[&str]) {
        assert_eq!(faults("MeshRateLimit", spec), expected);
    }
}
