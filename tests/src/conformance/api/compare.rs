//! Comparing answers as the group's README says: values, not text; times and traces don't count.

use serde_json::{Map, Value};

use crate::conformance::deviations::WORDINGS;

const TIMES: [&str; 3] = ["creationTime", "modificationTime", "createdAt"];

/// What differs between two bodies.
pub(super) fn bodies(expected: &Value, found: &Value) -> Option<String> {
    let (expected, found) = (normalise(expected), normalise(found));
    if expected == found {
        return None;
    }
    let mut differences = Vec::new();
    walk("", &expected, &found, &mut differences);
    Some(differences.join("\n"))
}

/// What differs between a body and a shape, where `<…>` stands for any value.
pub(super) fn shape(expected: &Map<String, Value>, found: &Value) -> Option<String> {
    let mut differences = Vec::new();
    for (key, wanted) in expected {
        let value = found.get(key).cloned().unwrap_or_default();
        let any = wanted.as_str().is_some_and(|text| text.starts_with('<') && text.ends_with('>'));
        if value.is_null() || (!any && *wanted != value) {
            differences.push(format!("{key}: expected {wanted}, got {value}"));
        }
    }
    (!differences.is_empty()).then(|| differences.join("\n"))
}

/// Without what may differ; absent, null and empty are the same.
fn normalise(value: &Value) -> Value {
    match value {
        Value::Object(fields) => {
            let mut kept = Map::new();
            for (key, value) in fields {
                // Errors say the same twice, and traces are of this run.
                if matches!(key.as_str(), "instance" | "details" | "causes") {
                    continue;
                }
                let value = if TIMES.contains(&key.as_str()) {
                    Value::from("0001-01-01T00:00:00Z")
                } else {
                    normalise(value)
                };
                if !is_empty(&value) {
                    kept.insert(key.clone(), value);
                }
            }
            Value::Object(kept)
        }
        Value::Array(items) => items.iter().map(normalise).collect(),
        Value::String(text) => {
            let wording = WORDINGS.iter().find(|wording| text.starts_with(wording.ours));
            let text = wording.map_or(text.as_str(), |wording| wording.theirs);
            Value::from(text.replace("{{address}}", super::server::ADDRESS))
        }
        other => other.clone(),
    }
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        _ => false,
    }
}

fn walk(path: &str, expected: &Value, found: &Value, out: &mut Vec<String>) {
    match (expected, found) {
        (Value::Object(a), Value::Object(b)) => {
            for key in a.keys().chain(b.keys().filter(|key| !a.contains_key(*key))) {
                let (x, y) = (a.get(key).unwrap_or(&Value::Null), b.get(key).unwrap_or(&Value::Null));
                walk(&format!("{path}.{key}"), x, y, out);
            }
        }
        (Value::Array(a), Value::Array(b)) if a.len() == b.len() => {
            for (i, (x, y)) in a.iter().zip(b).enumerate() {
                walk(&format!("{path}[{i}]"), x, y, out);
            }
        }
        (a, b) if a != b => out.push(format!("{path}: expected {a}, got {b}")),
        _ => {}
    }
}
