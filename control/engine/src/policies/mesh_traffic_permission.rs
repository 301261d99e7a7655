//! MeshTrafficPermission: who may talk to a port. Deny wins over allow, and what nobody allows is refused.

use ursa_model::{
    Resource,
    policy::{Match, SpiffeIdMatchType},
    types::mesh_traffic_permission::{MeshTrafficPermission as Spec, Rule, RuleConf},
};

use super::{Effect, ReadPermission, parse};
use crate::{
    policy::merge::Item,
    xds::{
        permission::{Admitted, Permission, Verdict},
        rbac::{self, Condition, Entry, Text},
    },
};

pub(super) struct MeshTrafficPermission;

impl Effect for MeshTrafficPermission {
    fn kind(&self) -> &'static str {
        "MeshTrafficPermission"
    }

    fn check(&self, resource: &Resource) -> Result<(), String> {
        resource.spec_as::<Spec>().map(drop).map_err(|e| e.to_string())
    }

    fn permission(&self) -> Option<ReadPermission> {
        Some(permission)
    }
}

fn permission(rules: &[Item<'_>]) -> Result<Permission, String> {
    let mut lists = Lists::default();
    for item in rules {
        let rule: Rule = parse(item.body)?;
        lists.add(&item.policy.kri.to_string(), rule.default);
    }
    Ok(lists.finish())
}

/// All rules for a port, sorted by what they do.
#[derive(Default)]
struct Lists {
    deny: Vec<Entry>,
    allow: Vec<Entry>,
    shadow: Vec<Entry>,
    /// Names of policies that mean everybody, those without a certificate included.
    everybody_denied: Option<String>,
    everybody_allowed: Option<String>,
}

impl Lists {
    fn add(&mut self, name: &str, conf: RuleConf) {
        let deny = conf.deny.unwrap_or_default();
        let shadow = conf.allow_with_shadow_deny.unwrap_or_default();
        let mut allow = conf.allow.unwrap_or_default();
        allow.extend(shadow.iter().cloned());
        if deny.iter().any(is_everybody) {
            self.everybody_denied.get_or_insert_with(|| name.to_owned());
        }
        if allow.iter().any(is_everybody) {
            self.everybody_allowed.get_or_insert_with(|| name.to_owned());
        }
        push(&mut self.deny, name, false, &deny);
        push(&mut self.allow, name, true, &allow);
        push(&mut self.shadow, name, false, &shadow);
    }

    fn finish(self) -> Permission {
        // Rules name certificates and can't tell those apart who have none: only a rule for everybody reaches
        // them. It matters where MeshTLS takes plaintext at all; without such a rule plaintext is refused there too.
        let plain = match (&self.everybody_denied, &self.everybody_allowed) {
            (Some(name), _) => Verdict { name: name.clone(), allow: false },
            (None, Some(name)) => Verdict { name: name.clone(), allow: true },
            (None, None) => Verdict::refuse(),
        };
        let shadow = (!self.shadow.is_empty()).then(|| rbac::matcher(&self.shadow));
        let admitted = admitted(&self.allow);
        let mut entries = self.deny;
        entries.extend(self.allow);
        Permission { admitted, mesh: rbac::matcher(&entries), shadow, plain }
    }
}

fn push(list: &mut Vec<Entry>, name: &str, allow: bool, matches: &[Match]) {
    let any_of: Vec<Condition> = matches.iter().filter_map(condition).collect();
    if !any_of.is_empty() {
        list.push(Entry { name: name.to_owned(), allow, any_of });
    }
}

/// Whom allowing rules name, if they all name ids.
fn admitted(allow: &[Entry]) -> Admitted {
    let mut ids = Vec::new();
    for condition in allow.iter().flat_map(|entry| &entry.any_of) {
        match id(condition) {
            Some(text) => ids.push(text.clone()),
            None => return Admitted::Trusted,
        }
    }
    if ids.is_empty() { Admitted::Nobody } else { Admitted::Ids(ids) }
}

fn id(condition: &Condition) -> Option<&Text> {
    match condition {
        Condition::Id(text) => Some(text),
        Condition::Sni(_) => None,
        Condition::All(all) => all.iter().find_map(id),
    }
}

/// A whole trust domain: the widest that a rule can be, and so the one that also reaches callers who have no
/// certificate (yet).
fn is_everybody(matches: &Match) -> bool {
    matches.sni.is_none()
        && matches.spiffe_id.as_ref().is_some_and(|id| {
            let domain = id.value.strip_prefix("spiffe://").unwrap_or_default();
            id.match_type == SpiffeIdMatchType::Prefix && !domain.trim_end_matches('/').contains('/')
        })
}

/// None for a match that says nothing; it doesn't pass validation, and here it matches nobody.
fn condition(matches: &Match) -> Option<Condition> {
    let mut conditions = Vec::new();
    if let Some(id) = &matches.spiffe_id {
        conditions.push(Condition::Id(match id.match_type {
            SpiffeIdMatchType::Exact => Text::Exact(id.value.clone()),
            SpiffeIdMatchType::Prefix => Text::Prefix(id.value.clone()),
            SpiffeIdMatchType::Unknown(_) => return None,
        }));
    }
    if let Some(sni) = &matches.sni {
        conditions.push(Condition::Sni(Text::Exact(sni.value.clone())));
    }
    match conditions.len() {
        0 => None,
        1 => conditions.pop(),
        _ => Some(Condition::All(conditions)),
    }
}
