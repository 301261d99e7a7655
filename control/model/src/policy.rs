//! What policies share: `targetRef`, `matches`, `backendRefs`.

use std::collections::BTreeMap;

use serde::Deserialize as _;
use serde_json::Value;

use crate::{
    Resource,
    labels::{self, PolicyRole},
    open_enum, spec_struct,
};

open_enum! {
    /// What a `targetRef` points at.
    pub enum TargetKind {
        Mesh = "Mesh",
        Dataplane = "Dataplane",
        MeshService = "MeshService",
        MeshExternalService = "MeshExternalService",
        MeshMultiZoneService = "MeshMultiZoneService",
        MeshHttpRoute = "MeshHTTPRoute",
    }
    /// How a SPIFFE id is compared.
    pub enum SpiffeIdMatchType { Exact = "Exact", Prefix = "Prefix" }
    /// How an SNI is compared.
    pub enum SniMatchType { Exact = "Exact" }
}

spec_struct! {
    /// Selects resources by kind and labels.
    pub struct TargetRef {
        pub kind: TargetKind,
        pub labels: BTreeMap<String, String>,
        pub section_name: Option<String>,
    }
    /// Compares a peer's SPIFFE id.
    pub struct SpiffeIdMatch {
        #[serde(rename = "type")]
        pub match_type: SpiffeIdMatchType,
        pub value: String,
    }
    /// Compares the server name that a peer asked for.
    pub struct SniMatch {
        #[serde(rename = "type")]
        pub match_type: SniMatchType,
        pub value: String,
    }
    /// Which peers a rule is for; all its parts must hold.
    pub struct Match {
        #[serde(rename = "spiffeID")]
        pub spiffe_id: Option<SpiffeIdMatch>,
        pub sni: Option<SniMatch>,
    }
    /// Where a route sends traffic.
    pub struct BackendRef {
        pub kind: TargetKind,
        pub labels: BTreeMap<String, String>,
        pub name: Option<String>,
        pub namespace: Option<String>,
        pub section_name: Option<String>,
        pub port: Option<u32>,
        pub weight: Option<u64>,
    }
    /// Labels that must all be there; an empty selector selects everything.
    pub struct LabelSelector {
        pub match_labels: BTreeMap<String, String>,
    }
}

impl LabelSelector {
    /// Whether labels have all that is wanted.
    pub fn matches(&self, labels: &BTreeMap<String, String>) -> bool {
        self.match_labels.iter().all(|(key, value)| labels.get(key) == Some(value))
    }
}

/// Whether a policy is attached to a Dataplane, as a whole or to some of its inbounds.
pub fn selects(policy: &Resource, dataplane: &Resource) -> bool {
    // Who writes a policy for others to follow is heard in the whole mesh, anybody else in their namespace.
    let own_namespace = match PolicyRole::of(&policy.meta) {
        PolicyRole::System | PolicyRole::Producer => None,
        PolicyRole::Consumer | PolicyRole::WorkloadOwner => policy.meta.label(labels::NAMESPACE),
    };
    if own_namespace.is_some_and(|own| dataplane.meta.label(labels::NAMESPACE) != Some(own)) {
        return false;
    }
    let Some(target) = policy.spec.get("targetRef").filter(|target| !target.is_null()) else { return true };
    let Ok(target) = TargetRef::deserialize(target) else { return false };
    match target.kind {
        TargetKind::Mesh => true,
        TargetKind::Dataplane => {
            target.labels.iter().all(|(name, value)| dataplane.meta.label(name) == Some(value))
                && target
                    .section_name
                    .as_deref()
                    .filter(|section| !section.is_empty())
                    .is_none_or(|section| has_section(dataplane, section))
        }
        _ => false,
    }
}

/// Whether one of a Dataplane's inbounds or listeners has this name; one without a name goes by its port.
fn has_section(dataplane: &Resource, section: &str) -> bool {
    ["/networking/inbound", "/networking/listeners"]
        .iter()
        .filter_map(|list| dataplane.spec.pointer(list)?.as_array())
        .flatten()
        .any(|entry| match entry.get("name").and_then(Value::as_str).filter(|name| !name.is_empty()) {
            Some(name) => name == section,
            None => entry.get("port").and_then(Value::as_u64).is_some_and(|port| port.to_string() == section),
        })
}

open_enum! {
    /// Where data comes from.
    pub enum DataSourceType {
        File = "File", Secret = "Secret", SecretRef = "SecretRef", EnvVar = "EnvVar", InsecureInline = "InsecureInline",
    }
}

spec_struct! {
    /// Data kept elsewhere, or inline.
    pub struct DataSource {
        #[serde(rename = "type")]
        pub source_type: DataSourceType,
        pub file: Option<FileSource>,
        pub secret_ref: Option<SecretRef>,
        pub env_var: Option<EnvVarSource>,
        pub insecure_inline: Option<InlineSource>,
    }
    /// A file of the control plane.
    pub struct FileSource { pub path: String }
    /// A Secret of the mesh.
    pub struct SecretRef { pub kind: String, pub name: String }
    /// A variable in the control plane's environment.
    pub struct EnvVarSource { pub name: String }
    /// The data itself.
    pub struct InlineSource { pub value: String }
}

spec_struct! {
    /// Points at a MeshOpenTelemetryBackend.
    pub struct OtelBackendRef {
        pub kind: String,
        pub labels: BTreeMap<String, String>,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn dataplane(namespace: &str) -> Resource {
        Resource::from_json(&json!({
            "type": "Dataplane", "mesh": "default", "name": "dp",
            "labels": { "app": "web", "k8s.kuma.io/namespace": namespace },
            "networking": { "address": "10.0.0.1", "inbound": [{ "port": 80, "name": "http" }, { "port": 81 }] },
        }))
        .unwrap()
    }

    fn policy(labels: &Value, target: &Value) -> Resource {
        Resource::from_json(&json!({
            "type": "MeshTimeout", "mesh": "default", "name": "p", "labels": labels, "spec": { "targetRef": target },
        }))
        .unwrap()
    }

    #[test]
    fn a_policy_is_attached_by_labels_and_sections() {
        for (target, expected) in [
            (json!(null), true),
            (json!({ "kind": "Mesh" }), true),
            (json!({ "kind": "Dataplane" }), true),
            (json!({ "kind": "Dataplane", "labels": { "app": "web" } }), true),
            (json!({ "kind": "Dataplane", "labels": { "app": "db" } }), false),
            (json!({ "kind": "Dataplane", "sectionName": "http" }), true),
            (json!({ "kind": "Dataplane", "sectionName": "81" }), true),
            (json!({ "kind": "Dataplane", "sectionName": "80" }), false),
            (json!({ "kind": "MeshService", "labels": { "app": "web" } }), false),
        ] {
            assert_eq!(selects(&policy(&json!({}), &target), &dataplane("demo")), expected, "{target}");
        }
    }

    #[test]
    fn policies_of_a_namespace_stay_there() {
        for (role, namespace, expected) in [
            ("consumer", "demo", true),
            ("consumer", "other", false),
            ("workload-owner", "other", false),
            ("producer", "other", true),
            ("system", "other", true),
        ] {
            let labels = json!({ "k8s.kuma.io/namespace": "demo", "kuma.io/policy-role": role });
            let found = selects(&policy(&labels, &json!({ "kind": "Mesh" })), &dataplane(namespace));
            assert_eq!(found, expected, "{role} {namespace}");
        }
    }
}
