//! MeshTrafficPermission: who may talk to whom.

use crate::{
    meta::Meta,
    policy::{Match, TargetRef},
    registry::Descriptor,
    resource::{NoStatus, ResourceSpec},
    spec_struct, validate,
    violation::{Path, Violations},
};

/// All that is known of the type.
pub static DESCRIPTOR: Descriptor = Descriptor {
    sync: crate::Sync { global_to_zone: true, zone_to_global: true, zone_to_zones: true },
    policy: Some(crate::PolicyTraits {
        has_to: false,
        has_rules: true,
        is_inbound: true,
        is_outbound: false,
    }),
    ..Descriptor::of::<MeshTrafficPermission>(
        "MeshTrafficPermission",
        "meshtrafficpermissions",
        "mtp",
        "Mesh Traffic Permission",
        "Mesh Traffic Permissions",
    )
};

spec_struct! {
    /// Who may talk to the selected proxies.
    pub struct MeshTrafficPermission {
        pub target_ref: Option<TargetRef>,
        pub rules: Vec<Rule>,
    }
    /// One rule.
    pub struct Rule {
        pub default: RuleConf,
    }
    /// Deny wins over allow.
    pub struct RuleConf {
        pub deny: Option<Vec<Match>>,
        pub allow: Option<Vec<Match>>,
        pub allow_with_shadow_deny: Option<Vec<Match>>,
    }
}

impl ResourceSpec for MeshTrafficPermission {
    const DESCRIPTOR: &'static Descriptor = &DESCRIPTOR;
    type Status = NoStatus;

    fn validate(&self, _meta: &Meta, out: &mut Violations) {
        validate::top_level(self.target_ref.as_ref(), !self.rules.is_empty(), out);
        let spec = Path::spec();
        if self.rules.is_empty() {
            out.add(&spec, "policy must define rules");
        }
        for (i, rule) in self.rules.iter().enumerate() {
            // Peers name these fields without `default`, and so do clients that show them.
            let path = spec.field("rules").index(i);
            let lists = [
                ("allow", &rule.default.allow),
                ("allowWithShadowDeny", &rule.default.allow_with_shadow_deny),
                ("deny", &rule.default.deny),
            ];
            if lists.iter().all(|(_, list)| list.is_none()) {
                out.add(
                    path.field("default"),
                    "at least one of 'allow', 'allowWithShadowDeny', 'deny' has to be defined",
                );
            }
            for (name, list) in lists {
                for (j, entry) in list.iter().flatten().enumerate() {
                    validate::peer_match(&path.field(name).index(j), entry, out);
                }
            }
        }
    }
}
