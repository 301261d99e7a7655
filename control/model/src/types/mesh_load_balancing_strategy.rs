//! MeshLoadBalancingStrategy: which endpoint a request goes to.

use crate::{
    GoDuration, Path,
    meta::Meta,
    open_enum,
    policy::{TargetKind, TargetRef, To},
    registry::{Descriptor, PolicyTraits},
    resource::{NoStatus, ResourceSpec},
    spec_struct,
    validate::{self, must_be_one_of},
    violation::Violations,
};

/// All that is known of the type.
pub static DESCRIPTOR: Descriptor = Descriptor {
    acted_on: false,
    ..Descriptor::policy::<MeshLoadBalancingStrategy>(
        PolicyTraits::TO,
        "MeshLoadBalancingStrategy",
        "meshloadbalancingstrategies",
        "mlbs",
        "Mesh Load Balancing Strategy",
        "Mesh Load Balancing Strategies",
    )
};

open_enum! {
    /// How an endpoint is chosen.
    pub enum LoadBalancerType {
        RoundRobin = "RoundRobin", LeastRequest = "LeastRequest", RingHash = "RingHash", Random = "Random", Maglev = "Maglev",
    }
    /// What a hash is made of.
    pub enum HashPolicyType {
        Header = "Header", Cookie = "Cookie", Connection = "Connection", QueryParameter = "QueryParameter",
        FilterState = "FilterState",
    }
    /// To which zones traffic fails over.
    pub enum ToZoneType { None = "None", Only = "Only", Any = "Any", AnyExcept = "AnyExcept" }
}

spec_struct! {
    /// Load balancing towards destinations.
    pub struct MeshLoadBalancingStrategy {
        pub target_ref: Option<TargetRef>,
        pub to: Vec<To<Conf>>,
    }
    /// What is near, how it is chosen, what is hashed.
    pub struct Conf {
        pub locality_awareness: Option<LocalityAwareness>,
        pub load_balancer: Option<LoadBalancer>,
        pub hash_policies: Option<Vec<HashPolicy>>,
    }
    /// What is near is preferred.
    pub struct LocalityAwareness {
        pub disabled: Option<bool>,
        pub local_zone: Option<LocalZone>,
        pub cross_zone: Option<CrossZone>,
    }
    /// Inside the zone.
    pub struct LocalZone {
        pub affinity_tags: Vec<AffinityTag>,
    }
    /// Endpoints with the same value are near.
    pub struct AffinityTag {
        pub key: String,
        pub weight: Option<u32>,
    }
    /// Between zones.
    pub struct CrossZone {
        pub failover: Vec<Failover>,
        pub failover_threshold: Option<FailoverThreshold>,
    }
    /// Where traffic goes from which zones.
    pub struct Failover {
        pub from: Option<FromZones>,
        pub to: ToZones,
    }
    /// From these.
    pub struct FromZones {
        pub zones: Vec<String>,
    }
    /// To these.
    pub struct ToZones {
        #[serde(rename = "type")]
        pub zone_type: ToZoneType,
        pub zones: Vec<String>,
    }
    /// Below which share of healthy endpoints.
    pub struct FailoverThreshold {
        pub percentage: Option<serde_json::Value>,
    }
    /// How an endpoint is chosen.
    pub struct LoadBalancer {
        #[serde(rename = "type")]
        pub balancer_type: LoadBalancerType,
        pub round_robin: Option<serde_json::Value>,
        pub least_request: Option<LeastRequest>,
        pub ring_hash: Option<RingHash>,
        pub random: Option<serde_json::Value>,
        pub maglev: Option<Maglev>,
    }
    /// The one with fewest requests of some.
    pub struct LeastRequest {
        pub choice_count: Option<u32>,
        pub active_request_bias: Option<serde_json::Value>,
    }
    /// By a ring of hashes.
    pub struct RingHash {
        pub hash_function: Option<String>,
        pub min_ring_size: Option<u32>,
        pub max_ring_size: Option<u32>,
    }
    /// By a table of hashes.
    pub struct Maglev {
        pub table_size: Option<u32>,
    }
    /// What a hash is made of.
    pub struct HashPolicy {
        #[serde(rename = "type")]
        pub policy_type: HashPolicyType,
        pub terminal: Option<bool>,
        pub header: Option<Named>,
        pub cookie: Option<Cookie>,
        pub connection: Option<Connection>,
        pub query_parameter: Option<Named>,
        pub filter_state: Option<FilterState>,
    }
    /// Of a name.
    pub struct Named {
        pub name: String,
    }
    /// A cookie, made when it isn't there.
    pub struct Cookie {
        pub name: String,
        pub ttl: Option<GoDuration>,
        pub path: Option<String>,
    }
    /// The connection.
    pub struct Connection {
        #[serde(rename = "sourceIP")]
        pub source_ip: Option<bool>,
    }
    /// Envoy's own state.
    pub struct FilterState {
        pub key: String,
    }
}

impl ResourceSpec for MeshLoadBalancingStrategy {
    const DESCRIPTOR: &'static Descriptor = &DESCRIPTOR;
    type Status = NoStatus;

    fn validate(&self, _meta: &Meta, out: &mut Violations) {
        validate::top_level(self.target_ref.as_ref(), false, out);
        validate::each_to(&self.to, validate::ALL_TO_KINDS, out, |to, path, out| {
            to.default.validate(path, &to.target_ref.kind, out);
        });
    }
}

impl Conf {
    fn validate(&self, path: &Path, kind: &TargetKind, out: &mut Violations) {
        if *kind == TargetKind::MeshHttpRoute {
            let only =
                "field is not allowed when targetRef.kind is MeshHTTPRoute, only hashPolicies is supported";
            if self.load_balancer.is_some() {
                out.add(path.field("loadBalancer"), only);
            }
            if self.locality_awareness.is_some() {
                out.add(path.field("localityAwareness"), only);
            }
        } else {
            if let Some(balancer) = &self.load_balancer {
                balancer.validate(&path.field("loadBalancer"), out);
            }
            if let Some(awareness) = &self.locality_awareness {
                awareness.validate(&path.field("localityAwareness"), kind, out);
            }
        }
        for (i, policy) in self.hash_policies.iter().flatten().enumerate() {
            policy.validate(&path.field("hashPolicies").index(i), out);
        }
    }
}

impl LoadBalancer {
    fn validate(&self, path: &Path, out: &mut Violations) {
        if !self.balancer_type.is_known() {
            out.add(path.field("type"), must_be_one_of("type", LoadBalancerType::KNOWN));
        }
        if self.balancer_type != LoadBalancerType::LeastRequest {
            return;
        }
        let bias = self.least_request.as_ref().and_then(|least| least.active_request_bias.as_ref());
        let path = path.field("leastRequest.activeRequestBias");
        match bias.map(validate::number) {
            Some(None) => out.add(path, "string must be a valid number"),
            Some(Some(bias)) if bias < 0.0 => out.add(path, "must be greater or equal then: 0"),
            _ => {}
        }
    }
}

impl LocalityAwareness {
    fn validate(&self, path: &Path, kind: &TargetKind, out: &mut Violations) {
        if let Some(local) = &self.local_zone {
            let path = path.field("localZone.affinityTags");
            for (i, tag) in local.affinity_tags.iter().enumerate() {
                if tag.key.is_empty() {
                    out.add(path.index(i).field("key"), validate::MUST_NOT_BE_EMPTY);
                }
                validate::count_positive(&path.index(i).field("weight"), tag.weight, out);
            }
            let weighted = local.affinity_tags.iter().filter(|tag| tag.weight.is_some()).count();
            if weighted > 0 && weighted < local.affinity_tags.len() {
                out.add(path, "all or none affinity tags should have weight");
            }
        }
        let Some(cross) = &self.cross_zone else { return };
        let path = path.field("crossZone");
        if *kind == TargetKind::MeshService {
            out.add(&path, "must not be set: MeshService traffic is local");
        }
        for (i, failover) in cross.failover.iter().enumerate() {
            failover.validate(&path.field("failover").index(i), out);
        }
        if let Some(threshold) = &cross.failover_threshold {
            let path = path.field("failoverThreshold.percentage");
            match threshold.percentage.as_ref().map(validate::number) {
                None => out.add(path, validate::MUST_BE_DEFINED),
                Some(None) => out.add(path, "string must be a valid number"),
                Some(Some(share)) if !(0.0..=100.0).contains(&share) => {
                    out.add(path, "must be in inclusive range [0.0, 100.0]");
                }
                Some(Some(share)) if share <= 0.0 => out.add(path, "must be greater than 0"),
                Some(Some(_)) => {}
            }
        }
    }
}

impl Failover {
    fn validate(&self, path: &Path, out: &mut Violations) {
        if let Some(from) = &self.from {
            let path = path.field("from.zones");
            if from.zones.is_empty() {
                out.add(&path, validate::MUST_NOT_BE_EMPTY);
            }
            for (i, _) in from.zones.iter().enumerate().filter(|(_, zone)| zone.is_empty()) {
                out.add(path.index(i), validate::MUST_NOT_BE_EMPTY);
            }
        }
        let zones = path.field("to.zones");
        match &self.to.zone_type {
            kind @ (ToZoneType::Any | ToZoneType::None) => {
                if !self.to.zones.is_empty() {
                    out.add(zones, format!("must be empty when type is {kind}"));
                }
            }
            kind @ (ToZoneType::Only | ToZoneType::AnyExcept) => {
                if self.to.zones.is_empty() {
                    out.add(zones, format!("must not be empty when type is {kind}"));
                }
            }
            ToZoneType::Unknown(_) => out.add(path.field("to.type"), "unrecognized type"),
        }
    }
}

impl HashPolicy {
    fn validate(&self, path: &Path, out: &mut Violations) {
        let (field, there) = match &self.policy_type {
            HashPolicyType::Header => ("header", self.header.is_some()),
            HashPolicyType::Cookie => ("cookie", self.cookie.is_some()),
            HashPolicyType::Connection => ("connection", self.connection.is_some()),
            HashPolicyType::QueryParameter => ("queryParameter", self.query_parameter.is_some()),
            HashPolicyType::FilterState => ("filterState", self.filter_state.is_some()),
            HashPolicyType::Unknown(_) => return out.add(path.field("type"), "unrecognized type"),
        };
        if !there {
            out.add(path.field(field), validate::MUST_BE_DEFINED);
        }
        if self.policy_type != HashPolicyType::Cookie {
            return;
        }
        let cookie_path = self.cookie.as_ref().and_then(|cookie| cookie.path.as_deref());
        if cookie_path.is_some_and(|cookie_path| !cookie_path.starts_with('/')) {
            out.add(path.field("cookie.path"), "must be an absolute path");
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::table::faults;

    #[rstest::rstest]
    #[case::nothing("kind: Mesh", "", &[])]
    #[case::share(
        "kind: MeshMultiZoneService, labels: {a: b}",
        "localityAwareness: {crossZone: {failoverThreshold: {percentage: -1}}}",
        &[".localityAwareness.crossZone.failoverThreshold.percentage: must be in inclusive range [0.0, 100.0]"]
    )]
    #[case::zones(
        "kind: MeshMultiZoneService, labels: {a: b}",
        "localityAwareness: {crossZone: {failover: [{to: {type: Only}}, {to: {type: Any, zones: [a]}}, {to: {type: Some}}, {from: {zones: ['']}, to: {type: None}}]}}",
        &[
            ".localityAwareness.crossZone.failover[0].to.zones: must not be empty when type is Only",
            ".localityAwareness.crossZone.failover[1].to.zones: must be empty when type is Any",
            ".localityAwareness.crossZone.failover[2].to.type: unrecognized type",
            ".localityAwareness.crossZone.failover[3].from.zones[0]: must not be empty",
        ]
    )]
    #[case::hashes(
        "kind: MeshService, labels: {a: b}",
        "hashPolicies: [{type: Connection}, {type: SourceIP}, {type: Cookie, cookie: {name: a, path: b}}, {type: Header, header: {name: a}, cookie: {path: b}}]",
        &[
            ".hashPolicies[0].connection: must be defined",
            ".hashPolicies[1].type: unrecognized type",
            ".hashPolicies[2].cookie.path: must be an absolute path",
        ]
    )]
    #[case::other_balancer("kind: Mesh", "loadBalancer: {type: Random, leastRequest: {activeRequestBias: -1}}", &[])]
    fn strategies(#[case] target: &str, #[case] conf: &str, #[case] expected: &[&str]) {
        let spec = format!("to: [{{targetRef: {{{target}}}, default: {{{conf}}}}}]");
        let expected: Vec<String> =
            expected.iter().map(|fault| format!("spec.to[0].default{fault}")).collect();
        assert_eq!(faults("MeshLoadBalancingStrategy", &spec), expected);
    }
}
