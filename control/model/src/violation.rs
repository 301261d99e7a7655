//! What is wrong with a resource, each fault with the path of its field.

use std::fmt;

use serde::{Deserialize, Serialize};

/// One fault: which field, and what is wrong with it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Violation {
    /// Path of the field, for example `spec.to[0].default`.
    pub field: String,
    /// What is wrong with it.
    pub message: String,
}

/// All the faults of one resource, in the order they were found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Violations(pub Vec<Violation>);

impl Violations {
    /// No fault yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Exactly one fault.
    pub fn one(field: impl fmt::Display, message: impl Into<String>) -> Self {
        let mut all = Self::new();
        all.add(field, message);
        all
    }

    /// Adds a fault.
    pub fn add(&mut self, field: impl fmt::Display, message: impl Into<String>) {
        self.0.push(Violation { field: field.to_string(), message: message.into() });
    }

    /// Adds all of another list.
    pub fn extend(&mut self, other: Violations) {
        self.0.extend(other.0);
    }

    /// Whether nothing is wrong.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The faults one after the other.
    pub fn iter(&self) -> std::slice::Iter<'_, Violation> {
        self.0.iter()
    }

    /// The faults as tables of tests have them, `field: message`.
    #[cfg(test)]
    pub(crate) fn lines(&self) -> Vec<String> {
        self.iter().map(|violation| format!("{}: {}", violation.field, violation.message)).collect()
    }

    /// `Ok` when nothing is wrong.
    pub fn into_result(self) -> Result<(), Violations> {
        if self.is_empty() { Ok(()) } else { Err(self) }
    }
}

impl fmt::Display for Violations {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, violation) in self.0.iter().enumerate() {
            if i > 0 {
                f.write_str("; ")?;
            }
            if violation.field.is_empty() {
                f.write_str(&violation.message)?;
            } else {
                write!(f, "{}: {}", violation.field, violation.message)?;
            }
        }
        Ok(())
    }
}

impl std::error::Error for Violations {}

impl IntoIterator for Violations {
    type Item = Violation;
    type IntoIter = std::vec::IntoIter<Violation>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
    }
}

impl<'a> IntoIterator for &'a Violations {
    type Item = &'a Violation;
    type IntoIter = std::slice::Iter<'a, Violation>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.iter()
    }
}

/// Path of a field while a resource is being validated.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Path(String);

impl Path {
    /// The path of the resource itself.
    pub fn root() -> Self {
        Self::default()
    }

    /// `spec`, where most validation starts.
    pub fn spec() -> Self {
        Self("spec".to_owned())
    }

    /// A field of this object; the name may itself be a dotted path.
    #[must_use]
    pub fn field(&self, name: impl fmt::Display) -> Self {
        if self.0.is_empty() { Self(name.to_string()) } else { Self(format!("{}.{name}", self.0)) }
    }

    /// An element of this list.
    #[must_use]
    pub fn index(&self, i: usize) -> Self {
        Self(format!("{}[{i}]", self.0))
    }

    /// A value of this map.
    #[must_use]
    pub fn key(&self, key: impl fmt::Display) -> Self {
        Self(format!("{}[\"{key}\"]", self.0))
    }
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
