//! MeshRateLimit: how many requests or connections in which time.

use crate::{
    GoDuration, Path,
    meta::Meta,
    policy::{Match, TargetRef},
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
    policy: Some(PolicyTraits { has_to: true, has_rules: true, is_inbound: true, is_outbound: true }),
    ..Descriptor::of::<MeshRateLimit>(
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
        pub to: Vec<To>,
        pub rules: Vec<Rule>,
    }
    /// For what a gateway sends.
    pub struct To {
        pub target_ref: TargetRef,
        pub default: Conf,
    }
    /// For what comes in.
    pub struct Rule {
        pub matches: Vec<Match>,
        pub default: Conf,
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
        let spec = Path::spec();
        for (i, to) in self.to.iter().enumerate() {
            let path = spec.field("to").index(i);
            let rules = TargetRefRules { kinds: &["Mesh"], is_inbound: false };
            validate::target_ref(&path.field("targetRef"), &to.target_ref, rules, out);
            to.default.validate(&path.field("default.local"), out);
        }
        for (i, rule) in self.rules.iter().enumerate() {
            let path = spec.field("rules").index(i);
            validate::peer_matches(&path.field("matches"), &rule.matches, out);
            let path = path.field("default.local");
            rule.default.validate(&path, out);
            let by_peer = rule.matches.iter().any(|entry| entry.spiffe_id.is_some());
            if by_peer && rule.default.local.as_ref().is_some_and(|local| local.tcp.is_some()) {
                out.add(path.field("tcp"), validate::NOT_BY_PEER);
            }
        }
    }
}

impl Conf {
    fn validate(&self, path: &Path, out: &mut Violations) {
        let Some(local) = &self.local else { return out.add(path, validate::MUST_BE_DEFINED) };
        if local.http.is_none() && local.tcp.is_none() {
            out.add(path, "must have at least one defined: tcp, http");
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
