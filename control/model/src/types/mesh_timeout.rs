//! MeshTimeout: how long things may take.

use crate::{
    GoDuration,
    meta::Meta,
    policy::TargetKind,
    policy::{Match, TargetRef},
    registry::Descriptor,
    resource::{NoStatus, ResourceSpec},
    spec_struct,
    validate::{self, TargetRefRules},
    violation::{Path, Violations},
};

/// All that is known of the type.
pub static DESCRIPTOR: Descriptor = Descriptor {
    sync: crate::Sync { global_to_zone: true, zone_to_global: true, zone_to_zones: true },
    policy: Some(crate::PolicyTraits { has_to: true, has_rules: true, is_inbound: true, is_outbound: true }),
    ..Descriptor::of::<MeshTimeout>("MeshTimeout", "meshtimeouts", "mt", "Mesh Timeout", "Mesh Timeouts")
};

spec_struct! {
    /// Timeouts of what comes in (`rules`) or goes out (`to`).
    pub struct MeshTimeout {
        pub target_ref: Option<TargetRef>,
        pub to: Vec<To>,
        pub rules: Vec<Rule>,
    }
    /// For one destination.
    pub struct To {
        pub target_ref: TargetRef,
        pub default: Conf,
    }
    /// For what comes in.
    pub struct Rule {
        pub matches: Vec<Match>,
        pub default: Conf,
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
        let spec = Path::spec();
        validate::to_or_rules(&self.to, &self.rules, out);
        let top_is_route =
            self.target_ref.as_ref().is_some_and(|target| target.kind == TargetKind::MeshHttpRoute);
        for (i, to) in self.to.iter().enumerate() {
            let path = spec.field("to").index(i);
            let kinds = if top_is_route { &["Mesh"][..] } else { validate::ALL_TO_KINDS };
            let rules = TargetRefRules { kinds, is_inbound: false };
            validate::target_ref(&path.field("targetRef"), &to.target_ref, rules, out);
            let on_route = if top_is_route {
                Some("can't be specified when top-level TargetRef is referencing MeshHTTPRoute")
            } else if to.target_ref.kind == TargetKind::MeshHttpRoute {
                Some("can't be specified when 'to' TargetRef is referencing MeshHTTPRoute")
            } else {
                None
            };
            to.default.validate(&path.field("default"), on_route, out);
        }
        for (i, rule) in self.rules.iter().enumerate() {
            let path = spec.field("rules").index(i);
            validate::peer_matches(&path.field("matches"), &rule.matches, out);
            rule.default.validate(&path.field("default"), None, out);
            let by_peer = rule.matches.iter().any(|entry| entry.spiffe_id.is_some());
            if by_peer {
                rule.default.refuse_what_precedes_the_peer(&path.field("default"), out);
            }
        }
    }
}

impl Conf {
    fn validate(&self, path: &Path, on_route: Option<&str>, out: &mut Violations) {
        if self.connection_timeout.is_none() && self.idle_timeout.is_none() && self.http.is_none() {
            out.add(path, "at least one timeout should be configured");
            return;
        }
        let http = path.field("http");
        if let Some(message) = on_route {
            let mut refuse = |path: Path, set: bool| {
                if set {
                    out.add(path, message);
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
            ("http.maxConnectionDuration", http.max_connection_duration),
            ("http.requestHeadersTimeout", http.request_headers_timeout),
        ];
        for (field, _) in fields.into_iter().filter(|(_, timeout)| timeout.is_some()) {
            out.add(path.field(field), validate::NOT_BY_PEER);
        }
    }
}
