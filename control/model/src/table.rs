//! Tables of rules: what is wrong with a spec that is given as YAML.

use serde_json::{Value, json};

use crate::{Form, Meta, Resource, by_name, yaml};

/// The faults of a spec of a type, `field: message`, in their order. The resource has a name and mesh that are valid.
pub(crate) fn faults(kind: &str, spec: &str) -> Vec<String> {
    faults_named(kind, "name-1", spec)
}

/// The same for a resource of a certain name.
pub(crate) fn faults_named(kind: &str, name: &str, spec: &str) -> Vec<String> {
    let spec: Value = yaml::from_str(spec).expect("YAML");
    let descriptor = by_name(kind).expect("type");
    let mut object = if descriptor.form == Form::Inline { spec } else { json!({ "spec": spec }) };
    for (field, value) in [("type", kind), ("name", name), ("mesh", "default")] {
        object[field] = json!(value);
    }
    match Resource::from_json(&object) {
        Ok(resource) => resource.validate().lines(),
        Err(error) => error.violations().lines(),
    }
}

/// The faults of changing one spec of a type into another.
pub(crate) fn faults_of_update(kind: &str, before: &str, after: &str) -> Vec<String> {
    let [before, after] = [before, after].map(|spec| yaml::from_str::<Value>(spec).expect("YAML"));
    let mut out = crate::Violations::new();
    (by_name(kind).expect("type").codec.validate_update)(&Meta::default(), &before, &after, &mut out);
    out.lines()
}
