//! MeshTCPRoute: which connections go where.

use crate::{
    meta::Meta,
    policy::{BackendRef, TargetRef},
    registry::Descriptor,
    resource::{NoStatus, ResourceSpec},
    spec_struct,
    validate::{self, TargetRefRules},
    violation::{Path, Violations},
};

/// All that is known of the type.
pub static DESCRIPTOR: Descriptor = Descriptor {
    sync: crate::Sync { global_to_zone: true, zone_to_global: true, zone_to_zones: true },
    policy: Some(crate::PolicyTraits {
        has_to: true,
        has_rules: false,
        is_inbound: false,
        is_outbound: true,
    }),
    ..Descriptor::of::<MeshTCPRoute>(
        "MeshTCPRoute",
        "meshtcproutes",
        "mtcpr",
        "Mesh TCP Route",
        "Mesh TCP Routes",
    )
};

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
                out.add(
                    path.field("rules"),
                    "must have at most one element: a connection has nothing to match on",
                );
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
