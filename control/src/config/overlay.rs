//! Laying one configuration over another.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::{Config, ConfigError};

const PREFIX: &str = "URSA_";

/// Variables of other programs of ours, which may well be in the same environment (a shell, a unit's file).
const OTHERS: [&str; 24] = [
    // What is no setting, but a flag of this program and of others.
    "URSA_CONFIG",
    "URSA_LOG",
    "URSA_SOCKET",
    // ursa
    "URSA_CONFIG_FILE",
    // ursa-agent
    "URSA_AGENT_CONFIG",
    "URSA_CONTROL_PLANE",
    "URSA_RUN_DIR",
    "URSA_STATE_DIR",
    "URSA_WORKLOADS_DIR",
    "URSA_ENVOY",
    "URSA_SHIM",
    "URSA_LAUNCHER",
    "URSA_NODE",
    "URSA_PROXY_UID",
    "URSA_PROXY_GID",
    "URSA_CONCURRENCY",
    "URSA_LOG_LEVEL",
    "URSA_RESOLV_CONF",
    "URSA_DRAIN_SECONDS",
    // ursa-init; those that are near to a setting of ours
    "URSA_NETNS",
    "URSA_HOST",
    "URSA_REDIRECT",
    "URSA_DNS",
    "URSA_DNS_PORT",
];

pub(super) fn defaults() -> Value {
    to_value(&Config::default())
}

pub(super) fn to_value(config: &Config) -> Value {
    serde_json::to_value(config).unwrap_or_default()
}

/// Lays `layer` over `base`. `base` holds every key that exists, so a key it lacks is unknown.
pub(super) fn merge(base: &mut Value, layer: Value, origin: &str) -> Result<(), ConfigError> {
    // An empty file, or one with only comments, is a configuration without settings.
    if layer.is_null() {
        return Ok(());
    }
    merge_at(base, layer, "", origin)
}

fn merge_at(base: &mut Value, layer: Value, path: &str, origin: &str) -> Result<(), ConfigError> {
    match (base, layer) {
        (Value::Object(base), Value::Object(layer)) => {
            for (key, value) in layer {
                let full = join(path, &key);
                let Some(slot) = base.get_mut(&key) else {
                    return Err(unknown(&full, origin, base, path));
                };
                // A section that is named without content leaves its defaults.
                if !value.is_null() {
                    merge_at(slot, value, &full, origin)?;
                }
            }
            Ok(())
        }
        (Value::Object(_), other) => Err(ConfigError::Value {
            key: if path.is_empty() { "(the whole file)".into() } else { path.into() },
            origin: origin.into(),
            reason: format!("expected a section with keys, found {other}"),
        }),
        (slot, value) => {
            *slot = value;
            Ok(())
        }
    }
}

/// Lays the variables over `base`.
pub(super) fn variables(base: &mut Value, variables: &BTreeMap<String, String>) -> Result<(), ConfigError> {
    let mut names = BTreeMap::new();
    collect(base, "", &mut names);
    // A variable that is no setting is somebody else's: it doesn't keep the control plane from starting.
    for (name, text) in variables {
        if let Some(path) = names.get(name) {
            set(base, path, text, &format!("the variable {name}"))?;
        }
    }
    Ok(())
}

/// The variable that exists and that `name`, which doesn't, was probably meant to be.
pub(super) fn meant(name: &str) -> Option<String> {
    let mut names = BTreeMap::new();
    collect(&defaults(), "", &mut names);
    if !name.starts_with(PREFIX) || OTHERS.contains(&name) || names.contains_key(name) {
        return None;
    }
    nearest(name, names.keys()).map(str::to_owned)
}

/// Sets one leaf from text, in the form that the leaf has now.
pub(super) fn set(base: &mut Value, path: &str, text: &str, origin: &str) -> Result<(), ConfigError> {
    let slot = leaf(base, path, origin)?;
    let wrong = |expected: &str| ConfigError::Value {
        key: path.into(),
        origin: origin.into(),
        reason: format!("expected {expected}, found {text:?}"),
    };
    *slot = match slot {
        Value::Bool(_) => Value::Bool(text.trim().parse().map_err(|_| wrong("true or false"))?),
        Value::Number(_) => Value::from(text.trim().parse::<i64>().map_err(|_| wrong("a number"))?),
        Value::Array(_) if text.trim().is_empty() => Value::Array(Vec::new()),
        Value::Array(_) => text.split(',').map(|item| Value::from(item.trim())).collect(),
        Value::Object(_) => return Err(wrong("one of its keys to be set, not the section")),
        Value::Null | Value::String(_) => Value::from(text),
    };
    Ok(())
}

/// Sets one leaf or section from a value.
pub(super) fn set_value(base: &mut Value, path: &str, value: Value, origin: &str) -> Result<(), ConfigError> {
    let slot = leaf(base, path, origin)?;
    merge_at(slot, value, path, origin)
}

fn leaf<'a>(base: &'a mut Value, path: &str, origin: &str) -> Result<&'a mut Value, ConfigError> {
    let mut slot = base;
    let mut walked = String::new();
    for key in path.split('.') {
        let parent = walked.clone();
        walked = join(&walked, key);
        let known = slot.as_object().is_some_and(|section| section.contains_key(key));
        if !known {
            let empty = Map::new();
            return Err(unknown(&walked, origin, slot.as_object().unwrap_or(&empty), &parent));
        }
        slot = &mut slot[key];
    }
    Ok(slot)
}

/// Reads the merged value; the error names the key whose value has the wrong form.
pub(super) fn read(value: Value) -> Result<Config, ConfigError> {
    let config: Config = serde_path_to_error::deserialize(value).map_err(|error| ConfigError::Value {
        key: error.path().to_string(),
        origin: "the configuration".into(),
        reason: error.inner().to_string(),
    })?;
    config.check()?;
    Ok(config)
}

/// Every leaf's variable → its path.
fn collect(value: &Value, path: &str, names: &mut BTreeMap<String, String>) {
    if let Value::Object(section) = value
        && (path.is_empty() || !section.is_empty())
    {
        for (key, value) in section {
            collect(value, &join(path, key), names);
        }
        return;
    }
    names.insert(variable(path), path.to_owned());
}

fn variable(path: &str) -> String {
    let mut name = PREFIX.to_owned();
    let mut before_lower = false;
    for c in path.chars() {
        if c == '.' {
            name.push('_');
            before_lower = false;
        } else {
            if c.is_ascii_uppercase() && before_lower {
                name.push('_');
            }
            before_lower = c.is_ascii_lowercase() || c.is_ascii_digit();
            name.push(c.to_ascii_uppercase());
        }
    }
    name
}

fn join(path: &str, key: &str) -> String {
    if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") }
}

fn unknown(path: &str, origin: &str, section: &Map<String, Value>, parent: &str) -> ConfigError {
    let last = path.rsplit('.').next().unwrap_or(path);
    let hint = match nearest(last, section.keys()) {
        Some(near) => format!("; did you mean {:?}?", join(parent, near)),
        None if section.is_empty() => String::new(),
        None => {
            let known: Vec<&str> = section.keys().map(String::as_str).collect();
            format!("; known here: {}", known.join(", "))
        }
    };
    ConfigError::UnknownKey { key: path.into(), origin: origin.into(), hint }
}

/// The known name that differs least from `name`, if it is close.
fn nearest<'a>(name: &str, known: impl Iterator<Item = &'a String>) -> Option<&'a str> {
    let lower = name.to_lowercase();
    known
        .map(|candidate| (distance(&lower, &candidate.to_lowercase()), candidate))
        .filter(|(distance, _)| *distance <= 1 + name.len() / 5)
        .min()
        .map(|(_, candidate)| candidate.as_str())
}

fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let next = (diagonal + usize::from(x != *y)).min(row[j] + 1).min(row[j + 1] + 1);
            diagonal = row[j + 1];
            row[j + 1] = next;
        }
    }
    row[b.len()]
}

/// Replaces what must not be shown.
pub(super) fn redact(value: &mut Value) {
    match value {
        Value::Object(section) => {
            for (key, value) in section {
                let lower = key.to_ascii_lowercase();
                let secret = ["password", "secret", "privatekey"].iter().any(|word| lower.ends_with(word));
                if secret && value.is_string() {
                    if value != "" {
                        *value = Value::from("*****");
                    }
                } else {
                    redact(value);
                }
            }
        }
        Value::Array(items) => items.iter_mut().for_each(redact),
        _ => {}
    }
}
