//! What policies share: `targetRef`, `matches`, `backendRefs`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::Value;

use crate::{
    Meta, Resource,
    form::{Omit, null_as_absent},
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

/// What a policy configures for one destination.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(
    rename_all = "camelCase",
    default,
    remote = "Self",
    bound(serialize = "C: Serialize + Omit", deserialize = "C: DeserializeOwned + Default")
)]
pub struct To<C> {
    /// The destination.
    #[serde(skip_serializing_if = "Omit::omit", deserialize_with = "null_as_absent")]
    pub target_ref: TargetRef,
    /// What is configured.
    #[serde(skip_serializing_if = "Omit::omit", deserialize_with = "null_as_absent")]
    pub default: C,
}

/// What a policy configures for what comes in.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(
    rename_all = "camelCase",
    default,
    remote = "Self",
    bound(serialize = "C: Serialize + Omit", deserialize = "C: DeserializeOwned + Default")
)]
pub struct Rule<C> {
    /// For which peers; none = for all.
    #[serde(skip_serializing_if = "Omit::omit", deserialize_with = "null_as_absent")]
    pub matches: Vec<Match>,
    /// What is configured.
    #[serde(skip_serializing_if = "Omit::omit", deserialize_with = "null_as_absent")]
    pub default: C,
}

crate::object_form!(To<C>);
crate::object_form!(Rule<C>);

/// Which proxies a policy is attached to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Attachment {
    /// All of its mesh.
    Mesh,
    /// Those that have these labels.
    Dataplane {
        /// All of them must be there.
        labels: BTreeMap<String, String>,
        /// Only one of their inbounds or listeners, by its name or else its port.
        section: Option<String>,
    },
    /// None.
    Nobody,
}

impl Attachment {
    /// The attachment of a policy with a `targetRef`. Who writes a policy for others to follow is heard in the whole
    /// mesh, anybody else in their namespace; without a namespace nowhere.
    pub fn of(meta: &Meta, target: Option<&TargetRef>) -> Self {
        let (mut wanted, section) = match target {
            None => (BTreeMap::new(), None),
            Some(target) => match target.kind {
                TargetKind::Mesh => (BTreeMap::new(), None),
                TargetKind::Dataplane => {
                    (target.labels.clone(), target.section_name.clone().filter(|section| !section.is_empty()))
                }
                _ => return Self::Nobody,
            },
        };
        let is_attached_to_proxies = target.is_some_and(|target| target.kind == TargetKind::Dataplane);
        match PolicyRole::of(meta) {
            PolicyRole::System | PolicyRole::Producer if is_attached_to_proxies => {
                Self::Dataplane { labels: wanted, section }
            }
            PolicyRole::System | PolicyRole::Producer => Self::Mesh,
            PolicyRole::Consumer | PolicyRole::WorkloadOwner => {
                let Some(own) = meta.label(labels::NAMESPACE) else { return Self::Nobody };
                let before = wanted.insert(labels::NAMESPACE.to_owned(), own.to_owned());
                if before.is_some_and(|before| before != own) {
                    return Self::Nobody;
                }
                Self::Dataplane { labels: wanted, section }
            }
        }
    }

    /// Whether it has a proxy with these labels.
    pub fn selects(&self, labels: &BTreeMap<String, String>) -> bool {
        match self {
            Self::Mesh => true,
            Self::Dataplane { labels: wanted, .. } => {
                wanted.iter().all(|(name, value)| labels.get(name) == Some(value))
            }
            Self::Nobody => false,
        }
    }

    /// Whether it has this inbound or listener of a proxy that it has.
    pub fn covers(&self, section: &str) -> bool {
        match self {
            Self::Dataplane { section: Some(wanted), .. } => wanted == section,
            _ => true,
        }
    }
}

/// Whether a policy is attached to a Dataplane, as a whole or to some of its inbounds.
pub fn selects(policy: &Resource, dataplane: &Resource) -> bool {
    let target =
        match policy.spec.get("targetRef").filter(|target| !target.is_null()).map(TargetRef::deserialize) {
            None => None,
            Some(Ok(target)) => Some(target),
            Some(Err(_)) => return false,
        };
    let attachment = Attachment::of(&policy.meta, target.as_ref());
    let has_section = match &attachment {
        Attachment::Dataplane { section: Some(section), .. } => has_section(dataplane, section),
        _ => true,
    };
    has_section && attachment.selects(&dataplane.meta.labels)
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
        File = "File", Secret = "Secret", EnvVar = "EnvVar", InsecureInline = "InsecureInline",
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
    /// A Secret of the mesh; the kind is always `Secret`.
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
    fn a_policy_of_a_namespace_that_it_does_not_name_is_attached_to_nobody() {
        let labels = json!({ "kuma.io/policy-role": "consumer" });
        assert!(!selects(&policy(&labels, &json!({ "kind": "Mesh" })), &dataplane("demo")));
        let labels = json!({ "k8s.kuma.io/namespace": "demo", "kuma.io/policy-role": "workload-owner" });
        let elsewhere = json!({ "kind": "Dataplane", "labels": { "k8s.kuma.io/namespace": "other" } });
        assert!(!selects(&policy(&labels, &elsewhere), &dataplane("other")));
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
