//! MeshTrafficPermission: who may talk to whom.

use crate::{
    meta::Meta,
    policy::{Match, TargetRef},
    registry::{Descriptor, PolicyTraits},
    resource::{NoStatus, ResourceSpec},
    spec_struct,
    validate::{self, EmptyMatch},
    violation::{Path, Violations},
};

/// All that is known of the type.
pub static DESCRIPTOR: Descriptor = Descriptor::policy::<MeshTrafficPermission>(
    PolicyTraits::RULES,
    "MeshTrafficPermission",
    "meshtrafficpermissions",
    "mtp",
    "Mesh Traffic Permission",
    "Mesh Traffic Permissions",
);

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
            if lists.iter().all(|(_, list)| list.as_ref().is_none_or(Vec::is_empty)) {
                out.add(&path, "at least one of 'allow', 'allowWithShadowDeny', 'deny' has to be defined");
            }
            for (name, list) in lists {
                // An empty match would let everybody in: nobody is let in by what was left out.
                for (j, entry) in list.iter().flatten().enumerate() {
                    validate::peer_match(&path.field(name).index(j), entry, EmptyMatch::Refused, out);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::table::faults;

    #[rstest::rstest]
    #[case::empty("{}", &["spec: policy must define rules"])]
    #[case::empty_rule(
        "rules: [{default: {}}]",
        &["spec.rules[0]: at least one of 'allow', 'allowWithShadowDeny', 'deny' has to be defined"]
    )]
    #[case::empty_lists(
        "rules: [{default: {allow: [], deny: []}}]",
        &["spec.rules[0]: at least one of 'allow', 'allowWithShadowDeny', 'deny' has to be defined"]
    )]
    #[case::empty_match(
        "rules: [{default: {allow: [{}]}}]",
        &["spec.rules[0].allow[0]: must specify at least one of 'spiffeID' or 'sni'"]
    )]
    #[case::sni("rules: [{default: {allow: [{sni: {type: Exact, value: a.b}}]}}]", &[])]
    fn permissions(#[case] spec: &str, #[case] expected: &[&str]) {
        assert_eq!(faults("MeshTrafficPermission", spec), expected);
    }
}
