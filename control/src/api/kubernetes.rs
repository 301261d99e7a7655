//! A resource in the form of a Kubernetes object, for `?format=kubernetes`.

use serde_json::{Map, Value, json};
use ursa_model::{Form, Resource, Scope, labels};

/// The object's manifest; `namespace` is where the caller wants it, empty for where it comes from.
pub(super) fn manifest(resource: &Resource, namespace: &str) -> Value {
    let meta = &resource.meta;
    let kind = resource.descriptor.name;
    let mut metadata = Map::new();
    metadata.insert("name".into(), json!(meta.name));
    let namespaced =
        resource.descriptor.scope == Scope::Mesh || kind == "HostnameGenerator" || kind == "GlobalSecret";
    let namespace = if namespace.is_empty() { meta.namespace() } else { namespace };
    if namespaced && !namespace.is_empty() {
        metadata.insert("namespace".into(), json!(namespace));
    }
    let mut labels = meta.labels.clone();
    if resource.descriptor.scope == Scope::Mesh {
        labels.insert(labels::MESH.into(), meta.mesh.clone());
    }
    if !labels.is_empty() {
        metadata.insert("labels".into(), json!(labels));
    }
    if matches!(kind, "Secret" | "GlobalSecret") {
        let class = if kind == "Secret" { "system.kuma.io/secret" } else { "system.kuma.io/global-secret" };
        let value = resource.spec.get("data").cloned().unwrap_or_default();
        return json!({
            "apiVersion": "v1", "kind": "Secret", "type": class,
            "metadata": metadata, "data": { "value": value },
        });
    }
    let mut object = Map::new();
    object.insert("apiVersion".into(), json!("kuma.io/v1alpha1"));
    object.insert("kind".into(), json!(kind));
    object.insert("metadata".into(), Value::Object(metadata));
    if resource.descriptor.form == Form::Inline && resource.descriptor.scope == Scope::Mesh {
        object.insert("mesh".into(), json!(meta.mesh));
    }
    let empty = resource.spec.as_object().is_some_and(Map::is_empty);
    if !(empty && resource.descriptor.form == Form::Inline) {
        object.insert("spec".into(), resource.spec.clone());
    }
    if let Some(status) = &resource.status {
        object.insert("status".into(), status.clone());
    }
    Value::Object(object)
}
