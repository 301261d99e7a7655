//! Labels that mean something to the mesh, and those that are computed when a resource is written.

use std::collections::BTreeMap;

use crate::{
    meta::Meta,
    names,
    policy::{TargetKind, TargetRef},
    registry::{Descriptor, Form, Scope},
    resource::Resource,
    types::dataplane::{Dataplane, ListenerType},
    violation::{Path, Violations},
};

/// The mesh of a resource.
pub const MESH: &str = "kuma.io/mesh";
/// The zone that a resource comes from.
pub const ZONE: &str = "kuma.io/zone";
/// Where a resource comes from: `global` or `zone`.
pub const ORIGIN: &str = "kuma.io/origin";
/// The name that people gave it, which copies in other zones keep.
pub const DISPLAY_NAME: &str = "kuma.io/display-name";
/// `universal` or `kubernetes`.
pub const ENV: &str = "kuma.io/env";
/// Who a policy speaks for.
pub const POLICY_ROLE: &str = "kuma.io/policy-role";
/// The workload that a Dataplane belongs to.
pub const WORKLOAD: &str = "kuma.io/workload";
/// Who keeps a generated resource up to date.
pub const MANAGED_BY: &str = "kuma.io/managed-by";
/// `shadow` = the policy is only judged, not applied.
pub const EFFECT: &str = "kuma.io/effect";
/// The Dataplane has a zone ingress listener.
pub const LISTENER_ZONE_INGRESS: &str = "kuma.io/listener-zoneingress";
/// The Dataplane has a zone egress listener.
pub const LISTENER_ZONE_EGRESS: &str = "kuma.io/listener-zoneegress";
/// The Kubernetes namespace.
pub const NAMESPACE: &str = "k8s.kuma.io/namespace";
/// The Kubernetes service account of a Dataplane.
pub const SERVICE_ACCOUNT: &str = "k8s.kuma.io/service-account";

/// What an older peer wrote on Dataplanes; removed when seen.
const LEGACY_PROXY_TYPE: &str = "kuma.io/proxy-type";
/// Longest name of a resource, and of a mesh where it is referred to.
const MAX_NAME_LENGTH: usize = 253;

/// Labels of a resource.
pub type Labels = BTreeMap<String, String>;

/// What kind of control plane writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// A zone, federated or alone.
    Zone,
    /// The global control plane.
    Global,
}

impl Mode {
    /// The origin of what this control plane writes.
    pub fn origin(self) -> &'static str {
        match self {
            Mode::Zone => "zone",
            Mode::Global => "global",
        }
    }
}

/// The control plane that computes labels.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Context {
    /// Its mode.
    pub mode: Mode,
    /// The name of its zone, empty on global.
    pub zone: String,
    /// Whether it runs on Kubernetes.
    pub kubernetes: bool,
    /// The namespace of the control plane on Kubernetes.
    pub system_namespace: String,
    /// The namespace that the resource is written to on Kubernetes, empty when it has none.
    pub namespace: String,
    /// Whether the zone belongs to a global control plane.
    pub federated: bool,
    /// Whether `kuma.io/origin` must fit this control plane.
    pub check_origin: bool,
    /// A write of the control plane itself, such as a copy from another: what comes from elsewhere keeps its
    /// labels.
    pub privileged: bool,
}

impl Context {
    /// A zone on machines, on its own.
    pub fn zone(name: impl Into<String>) -> Self {
        Self {
            mode: Mode::Zone,
            zone: name.into(),
            kubernetes: false,
            system_namespace: String::new(),
            namespace: String::new(),
            federated: false,
            check_origin: true,
            privileged: false,
        }
    }

    /// The global control plane on machines.
    pub fn global() -> Self {
        Self { mode: Mode::Global, ..Self::zone("") }
    }

    fn in_system_namespace(&self) -> bool {
        self.namespace.is_empty() || self.namespace == self.system_namespace
    }
}

/// Who a policy speaks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum PolicyRole {
    /// The operator of the mesh.
    System,
    /// The owner of the destination.
    Producer,
    /// The owner of the clients.
    Consumer,
    /// The owner of the proxies it configures.
    WorkloadOwner,
}

impl PolicyRole {
    /// As the label has it.
    pub fn as_str(self) -> &'static str {
        match self {
            PolicyRole::System => "system",
            PolicyRole::Producer => "producer",
            PolicyRole::Consumer => "consumer",
            PolicyRole::WorkloadOwner => "workload-owner",
        }
    }

    /// The role that a stored policy has; without a label it is the operator's.
    pub fn of(meta: &Meta) -> Self {
        match meta.label(POLICY_ROLE) {
            Some("producer") => PolicyRole::Producer,
            Some("consumer") => PolicyRole::Consumer,
            Some("workload-owner") => PolicyRole::WorkloadOwner,
            _ => PolicyRole::System,
        }
    }
}

/// The role of a policy that is written to a namespace; `None` stands for the system namespace and for machines.
pub fn policy_role(policy: &Resource, namespace: Option<&str>) -> Result<PolicyRole, Violations> {
    let Some(namespace) = namespace else { return Ok(PolicyRole::System) };
    let to: Vec<TargetRef> = policy
        .spec
        .get("to")
        .and_then(|to| to.as_array())
        .into_iter()
        .flatten()
        .filter_map(|item| serde_json::from_value(item.get("targetRef")?.clone()).ok())
        .collect();
    if to.is_empty() {
        return Ok(PolicyRole::WorkloadOwner);
    }
    // A producer's item names one resource of its own namespace, and nothing wider.
    let is_producer = |target: &&TargetRef| {
        matches!(target.kind, TargetKind::MeshService | TargetKind::MeshHttpRoute)
            && target.labels.get(DISPLAY_NAME).is_some_and(|name| !name.is_empty())
            && target.labels.keys().all(|key| key == DISPLAY_NAME || key == NAMESPACE)
            && target.labels.get(NAMESPACE).is_none_or(|own| own.is_empty() || own == namespace)
    };
    match to.iter().filter(is_producer).count() {
        0 => Ok(PolicyRole::Consumer),
        n if n == to.len() => Ok(PolicyRole::Producer),
        _ => Err(Violations::one(
            Path::spec().field("to"),
            "it's not allowed to mix producer and consumer items in the same policy",
        )),
    }
}

/// What is wrong with the labels that a resource came with.
pub fn validate(resource: &Resource, context: &Context) -> Violations {
    let mut out = Violations::new();
    let meta = &resource.meta;
    let path = |key: &str| Path::root().field("labels").key(key);
    if context.kubernetes {
        validate_kubernetes(resource, context, &mut out);
    } else {
        let origin = meta.label(ORIGIN);
        if let Some(origin) = origin
            && !matches!(origin, "global" | "zone")
        {
            out.add(path(ORIGIN), format!("unknown resource origin {origin:?}"));
        }
        validate_origin(resource, context, &mut out);
        if context.mode == Mode::Zone && origin != Some("global") {
            if let Some(zone) = meta.label(ZONE)
                && zone != context.zone
            {
                out.add(path(ZONE), format!("{ZONE} label should have {} value", context.zone));
            }
            if let Some(mesh) = meta.label(MESH)
                && resource.descriptor.scope == Scope::Mesh
                && mesh != meta.mesh
            {
                out.add(path(MESH), format!("{MESH} label must not differ from mesh set on resource"));
            }
        }
        if resource.descriptor.is_policy()
            && let Some(role) = meta.label(POLICY_ROLE)
            && !matches!(role, "system" | "")
        {
            out.add(path(POLICY_ROLE), format!("{POLICY_ROLE} label should have system value, got {role}"));
        }
        validate_workload(resource, context, &mut out);
    }
    for (key, value) in &meta.labels {
        for fault in names::label_key(key) {
            out.add(path(key), fault);
        }
        // Kubernetes keeps it as an annotation, because a name is longer than a label may be.
        if key == DISPLAY_NAME {
            if value.len() > MAX_NAME_LENGTH {
                out.add(path(key), format!("must not be longer than {MAX_NAME_LENGTH} characters"));
            }
            continue;
        }
        for fault in names::label_value(value) {
            out.add(path(key), fault);
        }
    }
    out
}

/// Whether this control plane may write a resource of that origin; also asked before one is deleted.
pub fn validate_origin(resource: &Resource, context: &Context, out: &mut Violations) {
    if !context.check_origin {
        return;
    }
    let origin = resource.meta.label(ORIGIN);
    let refused = match context.mode {
        Mode::Global => origin.is_some_and(|origin| origin != "global"),
        Mode::Zone => {
            context.federated && is_plugin_originated(resource.descriptor) && origin != Some("zone")
        }
    };
    if refused {
        let field = Path::root().field("labels").key(ORIGIN);
        out.add(field, format!("the origin label must be set to '{}'", context.mode.origin()));
    }
}

/// Types with `spec`, which a federated zone may write only when they say so.
fn is_plugin_originated(descriptor: &Descriptor) -> bool {
    descriptor.form == Form::Spec
}

fn validate_kubernetes(resource: &Resource, context: &Context, out: &mut Violations) {
    let path = |key: &str| Path::root().field("labels").key(key);
    let origin = resource.meta.label(ORIGIN);
    if !context.check_origin || !is_plugin_originated(resource.descriptor) {
        return;
    }
    if context.mode == Mode::Zone
        && context.federated
        && context.in_system_namespace()
        && origin != Some("zone")
    {
        out.add(
            path(ORIGIN),
            "Operation not allowed. Applying policies on Zone CP on a system namespace requires 'kuma.io/origin' label to be set to 'zone'.",
        );
    }
    if context.mode == Mode::Zone
        && origin != Some("global")
        && let Some(zone) = resource.meta.label(ZONE)
        && zone != context.zone
    {
        out.add(
            path(ZONE),
            format!(
                "Operation not allowed. '{ZONE}' label should have '{}' value, got '{zone}'",
                context.zone
            ),
        );
    }
}

fn validate_workload(resource: &Resource, context: &Context, out: &mut Violations) {
    let Some(workload) = resource.meta.label(WORKLOAD).filter(|workload| !workload.is_empty()) else {
        return;
    };
    if resource.descriptor.name != "Dataplane" {
        return;
    }
    let path = Path::root().field("labels").key(WORKLOAD);
    if context.mode == Mode::Global {
        out.add(path, "not allowed on Global control plane");
        return;
    }
    let faults = names::dns_1035_label(workload);
    if !faults.is_empty() {
        out.add(
            path,
            format!(
                "must be a valid DNS-1035 label (at most 63 characters, matching regex [a-z]([-a-z0-9]*[a-z0-9])?): {}",
                faults.join("; ")
            ),
        );
    }
}

/// What an update may not change in the stored labels.
pub fn validate_immutable(stored: &Labels, updated: &Labels) -> Violations {
    let mut out = Violations::new();
    let path = Path::root().field("labels").key(ZONE);
    match (stored.get(ZONE), updated.get(ZONE)) {
        (Some(was), None) => out.add(path, format!("is immutable, cannot be removed (was {was:?})")),
        (Some(was), Some(now)) if was != now => {
            out.add(path, format!("is immutable, cannot be changed from {was:?} to {now:?}"));
        }
        _ => {}
    }
    out
}

/// The labels that a resource is stored with, or what is wrong with those it came with.
pub fn compute(resource: &Resource, context: &Context) -> Result<Labels, Violations> {
    let mut labels = resource.meta.labels.clone();
    let local = |labels: &Labels| labels.get(ORIGIN).is_none_or(|origin| origin == context.mode.origin());
    if context.privileged && !local(&labels) {
        return Ok(labels);
    }
    validate(resource, context).into_result()?;
    let descriptor = resource.descriptor;
    let mut set = |key: &str, value: &str| labels.insert(key.to_owned(), value.to_owned());

    set(DISPLAY_NAME, &resource.meta.name);
    set(ORIGIN, context.mode.origin());
    // A secret stays where it was made, so it carries its zone although no zone gives it to others.
    if context.mode == Mode::Zone && (descriptor.provided_by_zone() || descriptor.admin_only) {
        set(ZONE, &context.zone);
        set(ENV, if context.kubernetes { "kubernetes" } else { "universal" });
    }
    let mesh = if resource.meta.mesh.is_empty() { "default" } else { &resource.meta.mesh };
    if descriptor.scope == Scope::Mesh {
        labels.entry(MESH.to_owned()).or_insert_with(|| mesh.to_owned());
    }
    // The namespace feeds identities, so what somebody wrote there never counts.
    if context.kubernetes {
        if !context.namespace.is_empty() {
            labels.insert(NAMESPACE.to_owned(), context.namespace.clone());
        }
    } else {
        labels.remove(NAMESPACE);
        labels.remove(SERVICE_ACCOUNT);
    }
    if descriptor.is_policy() && !context.namespace.is_empty() {
        let namespace = (!context.in_system_namespace()).then_some(context.namespace.as_str());
        labels.insert(POLICY_ROLE.to_owned(), policy_role(resource, namespace)?.as_str().to_owned());
    }
    if let Ok(dataplane) = resource.spec_as::<Dataplane>() {
        label_dataplane(&dataplane, &mut labels);
    }
    Ok(labels)
}

fn label_dataplane(dataplane: &Dataplane, labels: &mut Labels) {
    labels.remove(LEGACY_PROXY_TYPE);
    let listeners =
        dataplane.networking.as_ref().map(|networking| networking.listeners.as_slice()).unwrap_or_default();
    for (kind, label) in
        [(ListenerType::ZoneIngress, LISTENER_ZONE_INGRESS), (ListenerType::ZoneEgress, LISTENER_ZONE_EGRESS)]
    {
        if listeners.iter().any(|listener| listener.listener_type == kind) {
            labels.insert(label.to_owned(), "enabled".to_owned());
        } else {
            labels.remove(label);
        }
    }
}

/// What is wrong with the name of a resource.
pub fn fault_of_name(name: &str) -> Option<String> {
    fault_of_identifier(
        name,
        names::dns_1123_subdomain(name).is_empty(),
        "invalid characters. A lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start and end with an alphanumeric character",
    )
}

fn fault_of_identifier(text: &str, is_well_formed: bool, form: &str) -> Option<String> {
    if text.is_empty() {
        Some("cannot be empty".to_owned())
    } else if text.len() > MAX_NAME_LENGTH {
        Some(format!("value length must less or equal {MAX_NAME_LENGTH}"))
    } else {
        (!is_well_formed).then(|| form.to_owned())
    }
}

/// What is wrong with a name or mesh.
pub fn validate_meta(scope: Scope, meta: &Meta) -> Violations {
    let mut out = Violations::new();
    if let Some(fault) = fault_of_name(&meta.name) {
        out.add("name", fault);
    }
    let mesh = &meta.mesh;
    // Wider than what a new mesh may be named: one that is older may have these characters.
    let is_mesh = mesh.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-_.".contains(&b));
    let form = "invalid characters. Valid characters are numbers, lowercase latin letters and '-', '_', '.' symbols.";
    if scope == Scope::Mesh
        && let Some(fault) = fault_of_identifier(mesh, is_mesh, form)
    {
        out.add("mesh", fault);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resource(text: &str) -> Resource {
        Resource::from_yaml(text).expect("resource")
    }

    #[test]
    fn a_zone_labels_what_it_writes() {
        let dataplane =
            resource("{type: Dataplane, mesh: default, name: a, networking: {address: 10.0.0.1}}");
        let labels = compute(&dataplane, &Context::zone("east")).expect("labels");
        let expected =
            [(DISPLAY_NAME, "a"), (ENV, "universal"), (MESH, "default"), (ORIGIN, "zone"), (ZONE, "east")];
        let labels: Vec<(&str, &str)> = labels.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
        assert_eq!(labels, expected);
    }

    #[test]
    fn another_zone_is_refused() {
        let dataplane = resource(
            "{type: Dataplane, mesh: default, name: a, labels: {kuma.io/zone: west}, networking: {address: 10.0.0.1}}",
        );
        let faults = compute(&dataplane, &Context::zone("east")).expect_err("refused");
        assert_eq!(faults.0[0].field, "labels[\"kuma.io/zone\"]");
    }

    #[rstest::rstest]
    #[case("a", "b", &[])]
    #[case("", "", &["name: cannot be empty", "mesh: cannot be empty"])]
    #[case("LONG", "b", &["name: value length must less or equal 253"])]
    #[case("a", "LONG", &["mesh: value length must less or equal 253"])]
    #[case("a", "B", &["mesh: invalid characters. Valid characters are numbers, lowercase latin letters and '-', '_', '.' symbols."])]
    fn names_and_meshes(#[case] name: &str, #[case] mesh: &str, #[case] expected: &[&str]) {
        let [name, mesh] = [name, mesh].map(|text| text.replace("LONG", &"a".repeat(254)));
        assert_eq!(validate_meta(Scope::Mesh, &Meta::new(mesh, name)).lines(), expected);
    }

    #[test]
    fn the_zone_of_a_stored_resource_stays() {
        let labels = |zone: &str| Labels::from([(ZONE.to_owned(), zone.to_owned())]);
        assert!(validate_immutable(&labels("a"), &labels("a")).is_empty());
        assert!(!validate_immutable(&labels("a"), &labels("b")).is_empty());
        assert!(!validate_immutable(&labels("a"), &Labels::new()).is_empty());
    }
}
