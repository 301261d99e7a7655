//! What a schema would say of a spec: of which type its fields are, and what a policy may be attached to.
//!
//! Structure is judged before meaning, and all its faults are told at once.

use serde::de::DeserializeOwned;
use serde_json::Value;
use serde_path_to_error::{Path as At, Segment};

use crate::{Path, Violations, validate::TOP_LEVEL_KINDS};

/// More faults than these aren't looked for.
const MOST: usize = 100;

/// Parses a spec; the error holds every field of the wrong type, in the order of their paths.
pub(crate) fn parse<T: DeserializeOwned>(
    input: &Value,
    root: &Path,
    is_policy: bool,
) -> Result<T, Violations> {
    let first = match T::deserialize(input) {
        Ok(spec) => return Ok(spec),
        Err(error) => error.to_string(),
    };
    let mut out = Violations::new();
    let mut rest = input.clone();
    let mut taken = None;
    // The parser stops at a fault. With that field taken away it finds the next one.
    while out.0.len() < MOST
        && let Err(error) = serde_path_to_error::deserialize::<_, T>(&rest)
    {
        let at = error.path().to_string();
        if taken.as_ref() == Some(&at) {
            // It can't do without this one, so nothing behind it can be found.
            break;
        }
        let field = if at == "." { root.clone() } else { root.field(&at) };
        let found = value_at(&mut rest, error.path());
        out.add(field, message(&error.inner().to_string(), found.as_deref()));
        match found {
            Some(found) => *found = Value::Null,
            None => break,
        }
        taken = Some(at);
    }
    if out.is_empty() {
        out.add(root, first);
    }
    if is_policy {
        out.extend(attachment(input));
    }
    out.0.sort_by(|a, b| a.field.cmp(&b.field));
    Err(out)
}

/// Whether the spec of a policy is attached to something that policies can be attached to.
pub fn attachment(spec: &Value) -> Violations {
    match spec.pointer("/targetRef/kind").and_then(Value::as_str) {
        Some(kind) if !kind.is_empty() && !TOP_LEVEL_KINDS.contains(&kind) => Violations::one(
            Path::spec().field("targetRef.kind"),
            format!("in body should be one of [{}]", TOP_LEVEL_KINDS.join(" ")),
        ),
        _ => Violations::new(),
    }
}

fn value_at<'a>(root: &'a mut Value, path: &At) -> Option<&'a mut Value> {
    path.iter().try_fold(root, |value, segment| match segment {
        Segment::Seq { index } => value.get_mut(*index),
        Segment::Map { key } => value.get_mut(key),
        Segment::Enum { .. } | Segment::Unknown => None,
    })
}

/// A wrong type in the words of a schema; anything else as the parser says it.
fn message(reason: &str, found: Option<&Value>) -> String {
    let wanted = reason.strip_prefix("invalid type: ").and_then(|rest| rest.rsplit_once(", expected "));
    let wanted = wanted.and_then(|(_, wanted)| match wanted {
        "a string" => Some("string"),
        "a boolean" => Some("boolean"),
        "u32" | "i32" | "u64" | "i64" | "u16" => Some("integer"),
        "a sequence" => Some("array"),
        "a map" => Some("object"),
        other => other.starts_with("struct ").then_some("object"),
    });
    match (wanted, found) {
        (Some(wanted), Some(found)) => {
            format!("in body must be of type {wanted}: \"{}\"", type_of(found))
        }
        _ => reason.to_owned(),
    }
}

fn type_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::types::mesh_timeout::MeshTimeout;

    #[test]
    fn an_array_is_no_object() {
        let spec = json!({ "targetRef": ["Mesh"], "to": [{ "targetRef": [], "default": ["1s"] }] });
        let faults = parse::<MeshTimeout>(&spec, &Path::spec(), true).unwrap_err().lines();
        assert_eq!(
            faults,
            [
                "spec.targetRef: in body must be of type object: \"array\"",
                "spec.to[0].default: in body must be of type object: \"array\"",
                "spec.to[0].targetRef: in body must be of type object: \"array\"",
            ]
        );
        let faults = parse::<MeshTimeout>(&json!([]), &Path::spec(), true).unwrap_err().lines();
        assert_eq!(faults, ["spec: in body must be of type object: \"array\""]);
    }

    #[test]
    fn all_faults_are_told() {
        let spec = json!({
            "targetRef": { "kind": "MeshService", "sectionName": 2 },
            "to": [{ "targetRef": { "kind": true }, "default": "x" }],
        });
        let faults = parse::<MeshTimeout>(&spec, &Path::spec(), true).unwrap_err();
        let faults: Vec<_> =
            faults.iter().map(|fault| (fault.field.as_str(), fault.message.as_str())).collect();
        assert_eq!(
            faults,
            [
                ("spec.targetRef.kind", "in body should be one of [Mesh Dataplane]"),
                ("spec.targetRef.sectionName", "in body must be of type string: \"number\""),
                ("spec.to[0].default", "in body must be of type object: \"string\""),
                ("spec.to[0].targetRef.kind", "in body must be of type string: \"boolean\""),
            ]
        );
    }
}
