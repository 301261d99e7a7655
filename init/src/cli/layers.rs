//! The redirect's document in layers: later ones win, field by field, and each field remembers its source.

use std::collections::BTreeMap;
use std::fmt;

use serde_json::Value;

use crate::intent::RedirectIntent;

/// Where a field's value comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Source {
    /// Nobody said anything.
    Default,
    /// A document (its path, or `-`).
    File(String),
    /// A pod's annotations in a file.
    Annotations(String),
    /// A variable.
    Variable(String),
    /// A flag.
    Flag(String),
    /// Found on this machine: resolvers, sshd's ports.
    Machine(String),
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File(path) if path == "-" => f.write_str("standard input"),
            Self::File(path) => f.write_str(path),
            Self::Annotations(path) => write!(f, "annotations in {path}"),
            Self::Variable(name) => f.write_str(name),
            Self::Flag(name) => write!(f, "--{name}"),
            Self::Machine(what) => f.write_str(what),
        }
    }
}

/// The document so far.
#[derive(Debug, Clone)]
pub(crate) struct Layers {
    document: Value,
    /// By path; what isn't here is a default.
    sources: BTreeMap<String, Source>,
}

impl Default for Layers {
    fn default() -> Self {
        Self { document: tree(&RedirectIntent::default()), sources: BTreeMap::new() }
    }
}

/// A document as a tree. It holds only numbers, texts, lists and mappings by text, which always become one.
fn tree(intent: &RedirectIntent) -> Value {
    serde_json::to_value(intent).unwrap_or_default()
}

impl Layers {
    /// Lays a part of a document over what is there. Mappings are merged, everything else is replaced.
    pub(crate) fn lay(&mut self, path: &str, value: Value, source: &Source) {
        let mut place = &mut self.document;
        for key in path.split('.').filter(|key| !key.is_empty()) {
            place = &mut place[key];
        }
        merge(place, value, path, &mut |path| {
            self.sources.insert(path, source.clone());
        });
    }

    /// Replaces the document by one that was computed from it; what differs has this source.
    pub(crate) fn change(&mut self, intent: &RedirectIntent, source: &Source) {
        let before = self.leaves();
        self.document = tree(intent);
        for (path, value) in self.leaves() {
            if before.get(&path) != Some(&value) {
                self.sources.insert(path, source.clone());
            }
        }
    }

    /// The document, typed.
    pub(crate) fn intent(&self) -> Result<RedirectIntent, serde_json::Error> {
        serde_json::from_value(self.document.clone())
    }

    /// Where a field's value comes from.
    pub(crate) fn source(&self, path: &str) -> &Source {
        self.sources.get(path).unwrap_or(&Source::Default)
    }

    /// Every field that isn't a mapping, by path.
    pub(crate) fn leaves(&self) -> BTreeMap<String, Value> {
        let mut leaves = BTreeMap::new();
        visit(&self.document, "", &mut |path, value| {
            leaves.insert(path.to_owned(), value.clone());
        });
        leaves
    }

    /// The document as YAML, with each field's source behind it.
    pub(crate) fn annotated(&self) -> Vec<String> {
        let mut lines = Vec::new();
        self.write(&self.document, "", 0, &mut lines);
        lines
    }

    fn write(&self, value: &Value, path: &str, depth: usize, lines: &mut Vec<String>) {
        let Value::Object(object) = value else { return };
        for (key, value) in object {
            let below = join(path, key);
            let indent = "  ".repeat(depth);
            if value.is_object() {
                lines.push(format!("{indent}{key}:"));
                self.write(value, &below, depth + 1, lines);
            } else {
                lines.push(format!("{indent}{key}: {value}  # {}", self.source(&below)));
            }
        }
    }
}

fn merge(place: &mut Value, value: Value, path: &str, set: &mut impl FnMut(String)) {
    match (place, value) {
        (Value::Object(place), Value::Object(value)) => {
            for (key, value) in value {
                let below = join(path, &key);
                merge(place.entry(key).or_insert(Value::Null), value, &below, set);
            }
        }
        (place, value) => {
            *place = value;
            set(path.to_owned());
        }
    }
}

fn visit(value: &Value, path: &str, leaf: &mut impl FnMut(&str, &Value)) {
    match value {
        Value::Object(object) => {
            for (key, value) in object {
                visit(value, &join(path, key), leaf);
            }
        }
        value => leaf(path, value),
    }
}

fn join(path: &str, key: &str) -> String {
    if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") }
}
