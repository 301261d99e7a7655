//! What a policy is attached to, where a route leads, and which peers a rule is for.

use super::MUST_BE_DEFINED;
use crate::{
    Path, Violations, names,
    policy::{BackendRef, Match, Rule, SniMatchType, SpiffeIdMatchType, TargetKind, TargetRef, To},
    spiffe::SpiffeId,
};

/// What a policy allows at its top level or in `to`.
#[derive(Debug, Clone, Copy)]
pub struct TargetRefRules<'a> {
    /// Kinds, as written.
    pub kinds: &'a [&'a str],
    /// Whether an inbound may be named by `sectionName` of a Dataplane.
    pub is_inbound: bool,
}

/// Kinds at the top level of every policy.
pub const TOP_LEVEL_KINDS: &[&str] = &["Mesh", "Dataplane"];
/// Destinations.
pub const SERVICE_KINDS: &[&str] = &["MeshService", "MeshExternalService", "MeshMultiZoneService"];
/// Kinds that `to` of most policies may name.
pub const ALL_TO_KINDS: &[&str] =
    &["Mesh", "MeshService", "MeshExternalService", "MeshMultiZoneService", "MeshHTTPRoute"];
/// Kinds that `to` may name where the top level, against the rules, names a route.
pub const TO_KINDS_OF_A_ROUTE: &[&str] = &["Mesh", "MeshExternalService"];
/// Why a field can't be set where peers are told apart by their identity.
pub const NOT_BY_PEER: &str = "can't be specified when matches contain spiffeID because this field cannot be conditioned on source identity";

/// Judges a `targetRef`.
pub fn target_ref(path: &Path, target: &TargetRef, rules: TargetRefRules<'_>, out: &mut Violations) {
    let kind = target.kind.as_str();
    if kind.is_empty() {
        out.add(path.field("kind"), MUST_BE_DEFINED);
        return;
    }
    if !rules.kinds.contains(&kind) {
        out.add(path.field("kind"), format!("value '{kind}' is not supported"));
        return;
    }
    let must_not_be_set = |field: &str, set: bool, out: &mut Violations| {
        if set {
            out.add(path.field(field), format!("must not be set with kind {kind}"));
        }
    };
    let has_section = target.section_name.as_ref().is_some_and(|section| !section.is_empty());
    match target.kind {
        TargetKind::Mesh => {
            must_not_be_set("labels", !target.labels.is_empty(), out);
            must_not_be_set("sectionName", has_section, out);
            return;
        }
        TargetKind::Dataplane => {
            if has_section && !rules.is_inbound {
                out.add(path.field("sectionName"), "can only be used with inbound policies");
            }
            return;
        }
        TargetKind::MeshHttpRoute | TargetKind::MeshExternalService => {
            must_not_be_set("sectionName", has_section, out);
        }
        // A section is one of the ports.
        TargetKind::MeshService | TargetKind::MeshMultiZoneService => {}
        // Kinds of other versions: a caller that supports them judges them itself.
        TargetKind::Unknown(_) => return,
    }
    if target.labels.is_empty() {
        out.add(path.field("labels"), format!("must be set when kind is {kind}"));
    }
}

/// Judges the top level of a policy; absent means the whole mesh.
pub fn top_level(target: Option<&TargetRef>, is_inbound: bool, out: &mut Violations) {
    if let Some(target) = target {
        let rules = TargetRefRules { kinds: TOP_LEVEL_KINDS, is_inbound };
        self::target_ref(&Path::spec().field("targetRef"), target, rules, out);
    }
}

/// Whether a policy is for the whole mesh.
pub fn is_whole_mesh(target: Option<&TargetRef>) -> bool {
    target.is_none_or(|target| target.kind == TargetKind::Mesh)
}

/// Whether a policy is attached to a route at its top level, which it can't be; what else is wrong with it then
/// is told too.
pub fn is_on_route(target: Option<&TargetRef>) -> bool {
    target.is_some_and(|target| target.kind == TargetKind::MeshHttpRoute)
}

/// A policy has either `to` or `rules`.
pub fn to_or_rules<A, B>(to: &[A], rules: &[B], out: &mut Violations) {
    if to.is_empty() && rules.is_empty() {
        out.add(Path::spec(), "at least one of 'to' or 'rules' has to be defined");
    }
    if !to.is_empty() && !rules.is_empty() {
        out.add(Path::spec(), "fields 'to' must be empty when 'rules' is defined");
    }
}

/// Judges the entries of `to`: their kinds, and what is configured for each by `judge`, at the path of `default`.
pub fn each_to<C>(
    to: &[To<C>],
    kinds: &[&str],
    out: &mut Violations,
    judge: impl Fn(&To<C>, &Path, &mut Violations),
) {
    for (i, entry) in to.iter().enumerate() {
        let path = Path::spec().field("to").index(i);
        let rules = TargetRefRules { kinds, is_inbound: false };
        target_ref(&path.field("targetRef"), &entry.target_ref, rules, out);
        judge(entry, &path.field("default"), out);
    }
}

/// Judges the entries of `rules`: whom they are for, and what is configured by `judge`, at the path of `default`.
pub fn each_rule<C>(
    rules: &[Rule<C>],
    empty: EmptyMatch,
    out: &mut Violations,
    judge: impl Fn(&Rule<C>, &Path, &mut Violations),
) {
    for (i, rule) in rules.iter().enumerate() {
        let path = Path::spec().field("rules").index(i);
        for (j, entry) in rule.matches.iter().enumerate() {
            peer_match(&path.field("matches").index(j), entry, empty, out);
        }
        judge(rule, &path.field("default"), out);
    }
}

/// Judges where a route leads.
pub fn backend_ref(path: &Path, backend: &BackendRef, out: &mut Violations) {
    let target = TargetRef {
        kind: backend.kind.clone(),
        labels: backend.labels.clone(),
        section_name: backend.section_name.clone(),
    };
    target_ref(path, &target, TargetRefRules { kinds: SERVICE_KINDS, is_inbound: false }, out);
    if backend.kind == TargetKind::MeshMultiZoneService && backend.port.is_none() {
        out.add(path.field("port"), "must be defined with kind MeshMultiZoneService");
    }
    if backend.weight.is_some_and(|weight| weight > u64::from(u32::MAX)) {
        out.add(path.field("weight"), format!("must be in inclusive range [0, {}]", u32::MAX));
    }
}

/// What an entry of `matches` without anything in it means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EmptyMatch {
    /// Every peer, as no entry at all.
    Everybody,
    /// A mistake.
    Refused,
}

/// Judges one entry of `matches`.
pub fn peer_match(path: &Path, entry: &Match, empty: EmptyMatch, out: &mut Violations) {
    if empty == EmptyMatch::Refused && entry.spiffe_id.is_none() && entry.sni.is_none() {
        out.add(path, "must specify at least one of 'spiffeID' or 'sni'");
    }
    if let Some(spiffe_id) = &entry.spiffe_id
        && let Err(error) = spiffe_id.value.parse::<SpiffeId>()
    {
        out.add(path.field("spiffeID"), format!("must be a valid Spiffe ID: {}", error.why));
    }
    if let Some(sni) = &entry.sni {
        let path = path.field("sni");
        match_type(&path, sni.match_type.as_str(), SniMatchType::KNOWN, out);
        if sni.value.is_empty() {
            out.add(path.field("value"), "must be set");
        }
        for fault in names::dns_1123_subdomain(&sni.value).into_iter().filter(|_| !sni.value.is_empty()) {
            out.add(path.field("value"), fault);
        }
    }
    if let Some(spiffe_id) = &entry.spiffe_id {
        match_type(&path.field("spiffeID"), spiffe_id.match_type.as_str(), SpiffeIdMatchType::KNOWN, out);
    }
}

fn match_type(path: &Path, given: &str, known: &[&str], out: &mut Violations) {
    if given.is_empty() {
        out.add(path.field("type"), "must be set");
    } else if !known.contains(&given) {
        let known = known.join(", ");
        out.add(path.field("type"), format!("unrecognized type {given:?}, supported values are: {known}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::yaml;

    #[rstest::rstest]
    #[case("{kind: MeshExternalService, sectionName: a}", &["t.sectionName: must not be set with kind MeshExternalService", "t.labels: must be set when kind is MeshExternalService"])]
    #[case("{kind: MeshMultiZoneService, labels: {a: b}, sectionName: a}", &[])]
    #[case("{kind: MeshHTTPRoute, labels: {a: b}, sectionName: a}", &["t.sectionName: must not be set with kind MeshHTTPRoute"])]
    #[case("{kind: Mesh, labels: {a: b}, sectionName: a}", &["t.labels: must not be set with kind Mesh", "t.sectionName: must not be set with kind Mesh"])]
    #[case("{kind: Other}", &["t.kind: value 'Other' is not supported"])]
    fn a_section_is_a_port(#[case] text: &str, #[case] expected: &[&str]) {
        let mut out = Violations::new();
        let rules = TargetRefRules { kinds: ALL_TO_KINDS, is_inbound: false };
        target_ref(&Path::root().field("t"), &yaml::from_str(text).expect("targetRef"), rules, &mut out);
        assert_eq!(out.lines(), expected);
    }

    #[rstest::rstest]
    #[case("{}", EmptyMatch::Everybody, &[])]
    #[case("{}", EmptyMatch::Refused, &["m: must specify at least one of 'spiffeID' or 'sni'"])]
    #[case("{sni: {type: Prefix}}", EmptyMatch::Refused, &["m.sni.type: unrecognized type \"Prefix\", supported values are: Exact", "m.sni.value: must be set"])]
    #[case("{spiffeID: {value: a}}", EmptyMatch::Refused, &["m.spiffeID: must be a valid Spiffe ID: scheme is missing or invalid", "m.spiffeID.type: must be set"])]
    #[case("{spiffeID: {type: Prefix, value: spiffe://a/b/}}", EmptyMatch::Refused, &["m.spiffeID: must be a valid Spiffe ID: path cannot have a trailing slash"])]
    fn all_faults_of_a_match_are_told(
        #[case] text: &str,
        #[case] empty: EmptyMatch,
        #[case] expected: &[&str],
    ) {
        let mut out = Violations::new();
        peer_match(&Path::root().field("m"), &yaml::from_str(text).expect("match"), empty, &mut out);
        assert_eq!(out.lines(), expected);
    }
}
