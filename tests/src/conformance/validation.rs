//! Group 02: which resources are valid, and which labels they are stored with.

use std::path::Path;

use serde::Deserialize;
use serde_json::{Value, json};
use ursa_model::{
    Meta, ParseError, Resource, Scope, Violations, by_name,
    labels::{self, Context},
    policy::TargetRef,
    validate::{self, PatchOperation, TargetRefRules},
    yaml,
};

use super::{GroupReport, listed, read_list, yaml_files};

mod delete_origin;

/// Judges all cases of the group; `corpus` is the root of the corpus.
pub fn run(corpus: &Path) -> GroupReport {
    let mut report = GroupReport::new("02-validation");
    let root = corpus.join("02-validation");
    let types = yaml_files(&root.join("types"));
    if types.is_empty() {
        report
            .judged("types", Some(format!("expected lists in {}; found none", root.join("types").display())));
    }
    for file in types {
        let list = read_list(&file, &mut report);
        if list.is_object() && list.get("resourceType").is_none() && list.get("cases").is_none() {
            report.unsupported(file.display().to_string(), "it is no list of cases");
            continue;
        }
        let kind = list["resourceType"].as_str().unwrap_or_default().to_owned();
        for case in cases(&list, &name_of(&file), &mut report) {
            judge_type(&kind, &case, &mut report);
        }
    }
    for (name, judge) in [
        ("targetref", judge_target_ref as fn(&Case) -> Option<String>),
        ("jsonpatch", judge_json_patch),
        ("meta", judge_meta),
        ("scalars", judge_scalar),
    ] {
        let file = format!("common/{name}.yaml");
        let list = read_list(&root.join(&file), &mut report);
        for case in cases(&list, &file, &mut report) {
            report.judged(&case.id, judge(&case));
        }
    }
    for name in ["global", "zone-uni", "zone-k8s"] {
        let file = format!("labels-on-apply/{name}.yaml");
        let list = read_list(&root.join(&file), &mut report);
        for case in listed(&list, "cases", &file, &mut report) {
            judge_labels(name, case, &mut report);
        }
    }
    let origins = read_list(&root.join("labels-on-apply/delete-origin.yaml"), &mut report);
    for case in listed(&origins, "cases", "labels-on-apply/delete-origin.yaml", &mut report) {
        let id = case["id"].as_str().unwrap_or_default();
        report.judged(format!("delete-origin/{id}"), delete_origin::judge(case));
    }
    let warnings = read_list(&root.join("warnings.yaml"), &mut report);
    let kind = warnings["resourceType"].as_str().unwrap_or_default().to_owned();
    for case in listed(&warnings, "cases", "warnings.yaml", &mut report) {
        let id = format!("warnings/{}", case["id"].as_str().unwrap_or_default());
        report.judged(id, judge_warnings(&kind, case));
    }
    report
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Case {
    id: String,
    valid: bool,
    input_format: String,
    input: Option<String>,
    inputs: Vec<String>,
    meta: Option<CaseMeta>,
    scope: String,
    options: Value,
    root_field: String,
    validator: String,
    message: String,
    violations: Vec<Expected>,
    order: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct CaseMeta {
    name: Option<String>,
    mesh: Option<String>,
    labels: Option<std::collections::BTreeMap<String, String>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Expected {
    field: String,
    message: Option<String>,
    message_contains: Option<String>,
}

/// The cases of a list; one that can't be read fails on its own.
fn cases(list: &Value, file: &str, report: &mut GroupReport) -> Vec<Case> {
    let list = listed(list, "cases", file, report).iter();
    list.filter_map(|case| report.readable(case)).collect()
}

fn name_of(file: &Path) -> String {
    file.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn judge_type(kind: &str, case: &Case, report: &mut GroupReport) {
    let Some(descriptor) = by_name(kind) else {
        report.judged(&case.id, Some(format!("there is no type {kind:?}")));
        return;
    };
    let mut input: Value = match yaml::from_str(case.input.as_deref().unwrap_or_default()) {
        Ok(input) => input,
        Err(error) => {
            report.judged(&case.id, Some(format!("the input is no YAML: {error}")));
            return;
        }
    };
    let meta = case.meta.as_ref();
    let name = meta.and_then(|meta| meta.name.clone()).unwrap_or_else(|| "name-1".to_owned());
    let mesh = meta.and_then(|meta| meta.mesh.clone()).filter(|mesh| !mesh.is_empty());
    let mesh = mesh.unwrap_or_else(|| "default".to_owned());
    let mut object = if case.input_format == "resource" {
        input
    } else if descriptor.form == ursa_model::Form::Inline {
        if input.is_null() {
            input = json!({});
        }
        input
    } else {
        json!({ "spec": input })
    };
    for (field, value) in [("type", kind), ("name", &name), ("mesh", &mesh)] {
        if let Some(object) = object.as_object_mut() {
            object.entry(field).or_insert_with(|| json!(value));
        }
    }
    if let (Some(labels), Some(object)) = (meta.and_then(|meta| meta.labels.clone()), object.as_object_mut())
    {
        object.insert("labels".to_owned(), json!(labels));
    }
    let found = match Resource::from_json(&object) {
        Ok(resource) => resource.validate(),
        Err(error) => error.violations(),
    };
    report.judged(&case.id, compare(case, &found));
}

/// Accepted or rejected, the set of fields, and the order where it matters; messages by their text.
fn compare(case: &Case, found: &Violations) -> Option<String> {
    if case.valid {
        return (!found.is_empty()).then(|| format!("expected no violation\nfound    {found}"));
    }
    let mut expected: Vec<&str> = case.violations.iter().map(|violation| violation.field.as_str()).collect();
    let mut fields: Vec<&str> = found.iter().map(|violation| violation.field.as_str()).collect();
    if case.order != "exact" {
        expected.sort_unstable();
        fields.sort_unstable();
    }
    expected.dedup();
    fields.dedup();
    let fits = |wanted: &Expected| {
        found.iter().any(|violation| {
            let text = wanted.message.as_ref().or(wanted.message_contains.as_ref());
            violation.field == wanted.field
                && text.is_none_or(|text| violation.message.contains(text.as_str()))
        })
    };
    if expected == fields && case.violations.iter().all(fits) {
        return None;
    }
    let expected: Vec<String> = case
        .violations
        .iter()
        .map(|violation| {
            let text = violation.message.as_ref().or(violation.message_contains.as_ref());
            format!("{}: {}", violation.field, text.map_or("", |text| text))
        })
        .collect();
    Some(format!("expected {}\nfound    {found}", expected.join("; ")))
}

fn judge_target_ref(case: &Case) -> Option<String> {
    let target: TargetRef = match yaml::from_str(case.input.as_deref().unwrap_or_default()) {
        Ok(target) => target,
        Err(error) => return Some(format!("the input doesn't parse: {error}")),
    };
    let kinds: Vec<&str> =
        case.options["supportedKinds"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    let is_inbound = case.options["isInboundPolicy"].as_bool().unwrap_or_default();
    let mut found = Violations::new();
    let path = ursa_model::Path::root().field(&case.root_field);
    validate::target_ref(&path, &target, TargetRefRules { kinds: &kinds, is_inbound }, &mut found);
    compare(case, &found)
}

fn judge_json_patch(case: &Case) -> Option<String> {
    let operations: Result<Vec<PatchOperation>, _> =
        case.inputs.iter().map(|text| yaml::from_str(text)).collect();
    let operations = match operations {
        Ok(operations) => operations,
        Err(error) => return Some(format!("the input doesn't parse: {error}")),
    };
    let mut found = Violations::new();
    validate::json_patches(&ursa_model::Path::root().field(&case.root_field), &operations, &mut found);
    compare(case, &found)
}

fn judge_meta(case: &Case) -> Option<String> {
    let meta = case.meta.as_ref()?;
    let scope = if case.scope == "Global" { Scope::Global } else { Scope::Mesh };
    let meta = Meta::new(meta.mesh.clone().unwrap_or_default(), meta.name.clone().unwrap_or_default());
    compare(case, &labels::validate_meta(scope, &meta))
}

fn judge_scalar(case: &Case) -> Option<String> {
    let input = case.input.as_deref().unwrap_or_default();
    let found = match case.validator.as_str() {
        "ValidateBandwidth" => validate::bandwidth(input),
        "ValidateOtelAttributeName" => validate::otel_attribute_name(input),
        other => return Some(format!("no validator {other}")),
    };
    let expected = (!case.valid).then_some(case.message.as_str());
    (found != expected).then(|| format!("expected {expected:?}\nfound    {found:?}"))
}

fn judge_labels(target: &str, case: &Value, report: &mut GroupReport) {
    let id = case["id"].as_str().unwrap_or_default();
    if target == "zone-k8s" && id.ends_with("/mesh-other") {
        report.unsupported(id, "Kubernetes admission, which looks the mesh up");
        return;
    }
    let context = match target {
        "global" => Context::global(),
        "zone-uni" => universal_zone("kuma-4"),
        _ => kubernetes_zone("kuma-1"),
    };
    let input = case["input"].as_str().unwrap_or_default();
    let parsed = if context.kubernetes { from_kubernetes(input) } else { Resource::from_yaml(input) };
    let resource = match parsed {
        Ok(resource) => resource,
        Err(error) => {
            report.judged(id, Some(format!("the input doesn't parse: {error}")));
            return;
        }
    };
    let faults = resource.validate();
    let result = faults.into_result().and_then(|()| labels::compute(&resource, &context));
    report.judged(id, compare_labels(case, &context, result));
}

/// A zone on machines under a global control plane.
fn universal_zone(name: &str) -> Context {
    Context { federated: true, ..Context::zone(name) }
}

/// A zone on Kubernetes under a global control plane, and its own namespace.
fn kubernetes_zone(name: &str) -> Context {
    Context {
        federated: true,
        kubernetes: true,
        system_namespace: "kuma-system".to_owned(),
        namespace: "kuma-system".to_owned(),
        ..Context::zone(name)
    }
}

fn compare_labels(
    case: &Value,
    context: &Context,
    result: Result<labels::Labels, Violations>,
) -> Option<String> {
    let accepted = case["accepted"].as_bool().unwrap_or_default();
    let found = match result {
        Ok(computed) => {
            if !accepted {
                return Some(format!("expected to be refused\nfound    {computed:?}"));
            }
            // Most cases are about being accepted, and say no more.
            let expected = case["expected"].get("labels")?;
            return (json!(computed) != *expected)
                .then(|| format!("expected {expected}\nfound    {computed:?}"));
        }
        Err(found) => found,
    };
    if accepted {
        return Some(format!("expected to be accepted\nfound    {found}"));
    }
    if context.kubernetes {
        let output = case["expected"]["kubectlOutput"].as_str().unwrap_or_default();
        return (!found.iter().any(|violation| output.contains(&violation.message)))
            .then(|| format!("expected {output}\nfound    {found}"));
    }
    let expected: Vec<(&str, &str)> = case["expected"]["body"]["invalid_parameters"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|parameter| {
            (
                parameter["field"].as_str().unwrap_or_default(),
                parameter["reason"].as_str().unwrap_or_default(),
            )
        })
        .collect();
    let found_pairs: Vec<(&str, &str)> =
        found.iter().map(|violation| (violation.field.as_str(), violation.message.as_str())).collect();
    (expected != found_pairs).then(|| format!("expected {expected:?}\nfound    {found}"))
}

/// The API's form of a Kubernetes object: the mesh is a label there.
fn from_kubernetes(text: &str) -> Result<Resource, ParseError> {
    let object: Value = yaml::from_str(text).map_err(|error| ParseError::Malformed(error.to_string()))?;
    let metadata = &object["metadata"];
    let mesh = metadata["labels"].get(labels::MESH).cloned().unwrap_or_else(|| json!("default"));
    Resource::from_json(&json!({
        "type": object["kind"],
        "name": metadata["name"],
        "mesh": mesh,
        "labels": metadata["labels"],
        "spec": object["spec"],
    }))
}

fn judge_warnings(kind: &str, case: &Value) -> Option<String> {
    let spec: Value = match yaml::from_str(case["input"].as_str().unwrap_or_default()) {
        Ok(spec) => spec,
        Err(error) => return Some(error.to_string()),
    };
    let object =
        json!({ "type": kind, "name": case["meta"]["name"], "mesh": case["meta"]["mesh"], "spec": spec });
    let found = match Resource::from_json(&object) {
        Ok(resource) => resource.warnings(),
        Err(error) => return Some(error.to_string()),
    };
    let wanted: Vec<&str> =
        case["warningsContain"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    let fits = if wanted.is_empty() {
        found.is_empty()
    } else {
        wanted.iter().all(|wanted| found.iter().any(|warning| warning.contains(wanted)))
    };
    (!fits).then(|| format!("expected warnings {wanted:?}\nfound    {found:?}"))
}
