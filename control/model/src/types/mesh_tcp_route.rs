//! MeshTCPRoute: which connections go where.

use crate::{
    meta::Meta,
    policy::{BackendRef, TargetRef},
    registry::{Descriptor, PolicyTraits},
    resource::{NoStatus, ResourceSpec},
    spec_struct,
    validate::{self, TargetRefRules},
    violation::{Path, Violations},
};

/// All that is known of the type.
pub static DESCRIPTOR: Descriptor = Descriptor::policy::<MeshTCPRoute>(
    PolicyTraits::TO,
    "MeshTCPRoute",
    "meshtcproutes",
    "mtcpr",
    "Mesh TCP Route",
    "Mesh TCP Routes",
);

spec_struct! {
    /// Routes of connections to destinations.
    pub struct MeshTCPRoute {
        pub target_ref: Option<TargetRef>,
        pub to: Vec<To>,
    }
    /// Routes to one destination.
    pub struct To {
        pub target_ref: TargetRef,
        pub rules: Vec<Rule>,
    }
    /// One route.
    pub struct Rule {
        pub default: RuleConf,
    }
    /// Where it leads.
    pub struct RuleConf {
        pub backend_refs: Vec<BackendRef>,
    }
}

impl ResourceSpec for MeshTCPRoute {
    const DESCRIPTOR: &'static Descriptor = &DESCRIPTOR;
    type Status = NoStatus;

    fn validate(&self, _meta: &Meta, out: &mut Violations) {
        validate::top_level(self.target_ref.as_ref(), false, out);
        for (i, to) in self.to.iter().enumerate() {
            let path = Path::spec().field("to").index(i);
            let rules = TargetRefRules { kinds: validate::SERVICE_KINDS, is_inbound: false };
            validate::target_ref(&path.field("targetRef"), &to.target_ref, rules, out);
            if to.rules.len() > 1 {
                // A connection has nothing that a second rule could match on.
                out.add(path.field("rules"), "in body should have at most 1 items");
            }
            for (j, rule) in to.rules.iter().enumerate() {
                let path = path.field("rules").index(j).field("default.backendRefs");
                if rule.default.backend_refs.is_empty() {
                    out.add(&path, validate::MUST_BE_DEFINED);
                }
                for (k, backend) in rule.default.backend_refs.iter().enumerate() {
                    validate::backend_ref(&path.index(k), backend, out);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::table::faults;

    #[rstest::rstest]
    #[case::no_backends(
        "to: [{targetRef: {kind: MeshService, labels: {a: b}}, rules: [{default: {backendRefs: []}}]}]",
        &["spec.to[0].rules[0].default.backendRefs: must be defined"]
    )]
    #[case::two_rules(
        "to: [{targetRef: {kind: MeshService, labels: {a: b}}, rules: [
            {default: {backendRefs: [{kind: MeshService, labels: {a: b}}]}},
            {default: {backendRefs: [{kind: MeshMultiZoneService, labels: {a: b}}]}}]}]",
        &[
            "spec.to[0].rules: in body should have at most 1 items",
            "spec.to[0].rules[1].default.backendRefs[0].port: must be defined with kind MeshMultiZoneService",
        ]
    )]
    #[case::nowhere("to: []", &[])]
    fn routes(#[case] spec: &str, #[case] expected: &[&str]) {
        assert_eq!(faults("MeshTCPRoute", spec), expected);
    }
}
