//! The entry that is put into the network's list.

use serde_json::{Map, Value, json};

use super::conflist::Plugin;
use crate::config::Config;
use crate::spec::NEWEST;

/// The plugin's type, which is its program's name.
pub const TYPE: &str = "ursa-cni";

/// The entry: defaults, what a file says instead, and namespaces that are left alone beside those of the file.
///
/// # Errors
/// The file is no JSON object, or its `type` is another plugin's.
pub fn entry(file: Option<&str>, exclude_namespaces: &[String]) -> Result<Plugin, String> {
    let mut entry = Map::new();
    entry.insert("type".to_owned(), json!(TYPE));
    entry.insert("capabilities".to_owned(), json!({"io.kubernetes.cri.pod-annotations": true}));
    entry.insert("excludeNamespaces".to_owned(), json!(["kube-system"]));
    if let Some(text) = file {
        match serde_json::from_str(text) {
            Ok(Value::Object(given)) => entry.extend(given),
            Ok(_) => return Err("it is no JSON object".to_owned()),
            Err(error) => return Err(format!("it is no JSON: {error}")),
        }
    }
    if entry.get("type") != Some(&json!(TYPE)) {
        return Err(format!("its `type` must be \"{TYPE}\", the name of the plugin's program"));
    }
    if let Some(Value::Array(list)) = entry.get_mut("excludeNamespaces") {
        for namespace in exclude_namespaces {
            if !list.contains(&json!(namespace)) {
                list.push(json!(namespace));
            }
        }
    }
    Ok(entry)
}

/// Reads the entry as the plugin will at ADD, so that a mistake is found now and not by a pod.
///
/// # Errors
/// What the plugin would say.
pub fn check(entry: &Plugin) -> Result<(), String> {
    let mut document = entry.clone();
    document.insert("cniVersion".to_owned(), json!(NEWEST));
    document.insert("name".to_owned(), json!("check"));
    let config = Config::parse(&Value::Object(document).to_string());
    let read = config.and_then(|config| config.conf.intent(None).map(drop));
    read.map_err(|failure| format!("{}: {}", failure.message, failure.details))
}

/// Replaces `__NAME__` in every text of the entry by its value.
///
/// # Errors
/// A mark without a value.
pub fn fill(entry: &Plugin, value_of: &dyn Fn(&str) -> Option<String>) -> Result<Plugin, String> {
    entry.iter().map(|(key, value)| Ok((key.clone(), fill_value(value, value_of)?))).collect()
}

fn fill_value(value: &Value, value_of: &dyn Fn(&str) -> Option<String>) -> Result<Value, String> {
    Ok(match value {
        Value::String(text) => Value::String(fill_text(text, value_of)?),
        Value::Array(items) => {
            Value::Array(items.iter().map(|item| fill_value(item, value_of)).collect::<Result<_, _>>()?)
        }
        Value::Object(object) => Value::Object(fill(object, value_of)?),
        other => other.clone(),
    })
}

fn fill_text(text: &str, value_of: &dyn Fn(&str) -> Option<String>) -> Result<String, String> {
    let mut out = String::new();
    let mut rest = text;
    while let Some((before, behind)) = rest.split_once("__") {
        out.push_str(before);
        let is_mark = |name: &str| {
            name.starts_with(|c: char| c.is_ascii_uppercase())
                && name.chars().all(|c| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_')
        };
        if let Some((name, after)) = behind.split_once("__").filter(|(name, _)| is_mark(name)) {
            let value = value_of(name);
            out.push_str(&value.ok_or_else(|| {
                format!("`__{name}__` has no value: set the environment variable {name} of the installer")
            })?);
            rest = after;
        } else {
            out.push_str("__");
            rest = behind;
        }
    }
    out.push_str(rest);
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_wins_over_defaults() {
        let file = r#"{"excludeNamespaces": ["a"], "runDir": "/r"}"#;
        let entry = entry(Some(file), &["b".to_owned(), "a".to_owned()]).unwrap();
        assert_eq!(entry["excludeNamespaces"], json!(["a", "b"]));
        assert_eq!((&entry["type"], &entry["runDir"]), (&json!("ursa-cni"), &json!("/r")));
        assert!(super::entry(Some(r#"{"type": "bridge"}"#), &[]).unwrap_err().contains("type"));
    }

    #[test]
    fn a_mistake_is_found_now() {
        let entry = entry(Some(r#"{"redirect": {"outbound": {"excludePorts": ["x"]}}}"#), &[]).unwrap();
        assert!(check(&entry).unwrap_err().contains("redirect"));
        assert_eq!(check(&super::entry(None, &[]).unwrap()), Ok(()));
    }

    #[test]
    fn marks_get_their_values() {
        let value_of = |name: &str| (name == "NODE").then(|| "n1".to_owned());
        let entry = json!({"a": ["x-__NODE__-y", "__not a mark__"], "b": "__init__"});
        let filled = fill(entry.as_object().unwrap(), &value_of).unwrap();
        assert_eq!(Value::Object(filled), json!({"a": ["x-n1-y", "__not a mark__"], "b": "__init__"}));
        let missing = json!({"a": "__NONE__"});
        assert!(fill(missing.as_object().unwrap(), &value_of).unwrap_err().contains("NONE"));
    }
}
