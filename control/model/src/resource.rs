//! A resource in its erased form, and its way from and to JSON.

use std::{collections::BTreeMap, fmt};

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::{Map, Value, json};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use crate::{
    form::Omit,
    kri::Kri,
    meta::Meta,
    registry::{Descriptor, Form, Scope, by_name},
    sni,
    violation::Violations,
    yaml,
};

/// A typed spec. One file per type implements it.
pub trait ResourceSpec: Serialize + DeserializeOwned + 'static {
    /// The type it is the spec of.
    const DESCRIPTOR: &'static Descriptor;
    /// Its status; [`NoStatus`] when it has none.
    type Status: Serialize + DeserializeOwned + Default;

    /// Adds all that is wrong, with paths from the resource's root.
    fn validate(&self, meta: &Meta, out: &mut Violations);

    /// Adds all that an update may not change.
    fn validate_update(&self, _meta: &Meta, _before: &Self, _out: &mut Violations) {}

    /// Fills in what may be absent.
    fn apply_defaults(&mut self) {}

    /// What is allowed but unwise.
    fn warnings(&self, _meta: &Meta) -> Vec<String> {
        Vec::new()
    }

    /// The part of the status that configuration depends on; nothing by default.
    fn project_status(_status: &Value) -> Value {
        Value::Null
    }
}

/// The status of a type that has none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NoStatus {}

/// Why a text is no resource.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseError {
    /// Not YAML or JSON, or not an object.
    #[error("{0}")]
    Malformed(String),
    /// There is no such type.
    #[error("unknown type {0:?}: `ursa get --help` lists the types that exist")]
    UnknownType(String),
    /// A field doesn't have the form that its type wants.
    #[error("{0}")]
    Invalid(Violations),
}

impl ParseError {
    /// The faults by field; a malformed text has one without a field.
    pub fn violations(&self) -> Violations {
        match self {
            ParseError::Invalid(violations) => violations.clone(),
            ParseError::UnknownType(_) => Violations::one("type", self.to_string()),
            ParseError::Malformed(message) => Violations::one("", message.clone()),
        }
    }
}

/// What makes a resource unique.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct ResourceKey {
    /// Name of the type.
    pub kind: &'static str,
    /// The mesh, empty in global scope.
    pub mesh: String,
    /// The name.
    pub name: String,
}

impl ResourceKey {
    /// Key of a resource of a type.
    pub fn new(descriptor: &Descriptor, mesh: impl Into<String>, name: impl Into<String>) -> Self {
        Self { kind: descriptor.name, mesh: mesh.into(), name: name.into() }
    }
}

impl fmt::Display for ResourceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.mesh.is_empty() {
            write!(f, "{} {:?}", self.kind, self.name)
        } else {
            write!(f, "{} {:?} in mesh {:?}", self.kind, self.name, self.mesh)
        }
    }
}

/// One object of any type.
#[derive(Debug, Clone, PartialEq)]
pub struct Resource {
    /// What kind it is.
    pub descriptor: &'static Descriptor,
    /// Name, mesh, labels, history.
    pub meta: Meta,
    /// The spec as canonical JSON, defaults applied.
    pub spec: Value,
    /// What the control plane found out about it.
    pub status: Option<Value>,
    /// Paths of fields that the type doesn't have; they were ignored while parsing.
    pub ignored: Vec<String>,
}

impl Resource {
    /// A resource from a typed spec.
    pub fn new<T: ResourceSpec>(meta: Meta, spec: &T) -> Self {
        Self {
            descriptor: T::DESCRIPTOR,
            meta,
            // Specs hold string keys and finite numbers only, so they always have a JSON form.
            spec: serde_json::to_value(spec).unwrap_or_default(),
            status: None,
            ignored: Vec::new(),
        }
    }

    /// The same resource with a typed status.
    #[must_use]
    pub fn with_status<S: Serialize>(mut self, status: &S) -> Self {
        self.status = serde_json::to_value(status).ok();
        self
    }

    /// From the API's form; the type is read from `type`.
    pub fn from_json(value: &Value) -> Result<Self, ParseError> {
        let object = as_object(value)?;
        let name = match object.get("type") {
            Some(Value::String(name)) if !name.is_empty() => name,
            _ => return Err(ParseError::Invalid(Violations::one("type", "must be defined"))),
        };
        let descriptor = by_name(name).ok_or_else(|| ParseError::UnknownType(name.clone()))?;
        Self::from_json_as(descriptor, value)
    }

    /// From the API's form, of a known type; `type` in the object isn't looked at.
    pub fn from_json_as(descriptor: &'static Descriptor, value: &Value) -> Result<Self, ParseError> {
        let object = as_object(value)?;
        let mut meta = Meta {
            name: text(object, "name")?,
            mesh: text(object, "mesh")?,
            labels: labels(object)?,
            creation_time: moment(object, "creationTime")?,
            modification_time: moment(object, "modificationTime")?,
            version: 0,
        };
        if descriptor.scope == Scope::Global {
            meta.mesh = String::new();
        }
        let (raw, status) = match descriptor.form {
            Form::Spec => (
                object.get("spec").cloned().unwrap_or_else(|| json!({})),
                object.get("status").filter(|status| !status.is_null()).cloned(),
            ),
            Form::Inline => {
                let spec: Map<String, Value> = object
                    .iter()
                    .filter(|(field, _)| !META_FIELDS.contains(&field.as_str()))
                    .map(|(field, value)| (field.clone(), value.clone()))
                    .collect();
                (Value::Object(spec), None)
            }
        };
        let (spec, ignored) = (descriptor.codec.normalise)(&raw)?;
        Ok(Self { descriptor, meta, spec, status, ignored })
    }

    /// From one YAML (or JSON) document in the API's form.
    pub fn from_yaml(text: &str) -> Result<Self, ParseError> {
        let value: Value = yaml::from_str(text).map_err(|error| ParseError::Malformed(error.to_string()))?;
        Self::from_json(&value)
    }

    /// All documents of a YAML stream; empty documents are left out.
    pub fn many_from_yaml(text: &str) -> Result<Vec<Self>, ParseError> {
        let values: Vec<Value> =
            yaml::from_documents(text).map_err(|error| ParseError::Malformed(error.to_string()))?;
        values.iter().filter(|value| !value.is_null()).map(Self::from_json).collect()
    }

    /// In the API's form, with what is computed for reading (`kri`, `snis`, times).
    pub fn to_json(&self) -> Value {
        let mut object = Map::new();
        object.insert("type".to_owned(), json!(self.descriptor.name));
        if self.descriptor.scope == Scope::Mesh {
            object.insert("mesh".to_owned(), json!(self.meta.mesh));
        }
        object.insert("name".to_owned(), json!(self.meta.name));
        if let Some(time) = self.meta.creation_time {
            object.insert("creationTime".to_owned(), json!(rfc3339(time)));
        }
        if let Some(time) = self.meta.modification_time {
            object.insert("modificationTime".to_owned(), json!(rfc3339(time)));
        }
        if !self.meta.labels.is_empty() {
            object.insert("labels".to_owned(), json!(self.meta.labels));
        }
        if !self.descriptor.short_name.is_empty() {
            object.insert("kri".to_owned(), json!(self.kri(None).to_string()));
        }
        match self.descriptor.form {
            Form::Spec => {
                if self.descriptor.is_destination {
                    let snis = sni::of_resource(self);
                    if !snis.is_empty() {
                        object.insert("snis".to_owned(), json!(snis));
                    }
                }
                object.insert("spec".to_owned(), self.spec.clone());
                if let Some(status) = &self.status {
                    object.insert("status".to_owned(), status.clone());
                }
            }
            Form::Inline => {
                if let Value::Object(spec) = &self.spec {
                    object.extend(spec.iter().map(|(field, value)| (field.clone(), value.clone())));
                }
            }
        }
        Value::Object(object)
    }

    /// In the API's form as YAML.
    pub fn to_yaml(&self) -> Result<String, yaml::Error> {
        yaml::to_string(&self.to_json())
    }

    /// What makes it unique.
    pub fn key(&self) -> ResourceKey {
        ResourceKey::new(self.descriptor, self.meta.mesh.clone(), self.meta.name.clone())
    }

    /// The typed spec; fails when the resource is of another type.
    pub fn spec_as<T: ResourceSpec>(&self) -> Result<T, ParseError> {
        if self.descriptor != T::DESCRIPTOR {
            return Err(ParseError::Malformed(format!(
                "a {} is not a {}",
                self.descriptor.name,
                T::DESCRIPTOR.name
            )));
        }
        T::deserialize(&self.spec).map_err(|error| ParseError::Malformed(error.to_string()))
    }

    /// The typed status; the default when there is none.
    pub fn status_as<T: ResourceSpec>(&self) -> Result<T::Status, ParseError> {
        match &self.status {
            None => Ok(T::Status::default()),
            Some(status) => {
                T::Status::deserialize(status).map_err(|error| ParseError::Malformed(error.to_string()))
            }
        }
    }

    /// All that is wrong with it: name, mesh, spec. Labels are judged by [`crate::labels::compute`].
    pub fn validate(&self) -> Violations {
        let mut out = crate::labels::validate_meta(self.descriptor.scope, &self.meta);
        (self.descriptor.codec.validate)(&self.meta, &self.spec, &mut out);
        out
    }

    /// All that changing the stored resource into this one may not change: its spec. Labels are judged by
    /// [`crate::labels::validate_immutable`].
    pub fn validate_update(&self, stored: &Self) -> Violations {
        let mut out = Violations::new();
        (self.descriptor.codec.validate_update)(&self.meta, &stored.spec, &self.spec, &mut out);
        out
    }

    /// What is allowed but unwise, ignored fields included.
    pub fn warnings(&self) -> Vec<String> {
        let mut warnings = (self.descriptor.codec.warnings)(&self.meta, &self.spec);
        if !self.descriptor.acted_on {
            let name = self.descriptor.name;
            warnings.push(format!("{name} is stored, but this version does not act on it yet"));
        }
        warnings.extend(
            self.ignored
                .iter()
                .map(|field| format!("{field} is no field of {} and was ignored", self.descriptor.name)),
        );
        warnings
    }

    /// Its identifier, or that of one of its sections.
    pub fn kri(&self, section: Option<&str>) -> Kri {
        Kri::of(self, section)
    }

    /// What configuration is generated from: spec, labels, and the status fields that matter.
    pub fn projection(&self) -> Value {
        let status = self.status.as_ref().map_or(Value::Null, self.descriptor.codec.project_status);
        json!({ "spec": self.spec, "labels": self.meta.labels, "status": status })
    }
}

const META_FIELDS: [&str; 9] =
    ["type", "mesh", "name", "labels", "creationTime", "modificationTime", "kri", "snis", "status"];

fn as_object(value: &Value) -> Result<&Map<String, Value>, ParseError> {
    value.as_object().ok_or_else(|| {
        ParseError::Malformed(
            "a resource must be an object with type, name and, for most types, mesh".to_owned(),
        )
    })
}

fn text(object: &Map<String, Value>, field: &str) -> Result<String, ParseError> {
    match object.get(field) {
        None | Some(Value::Null) => Ok(String::new()),
        Some(Value::String(text)) => Ok(text.clone()),
        Some(_) => Err(ParseError::Invalid(Violations::one(field, "must be a string"))),
    }
}

fn labels(object: &Map<String, Value>) -> Result<BTreeMap<String, String>, ParseError> {
    let mut labels = BTreeMap::new();
    match object.get("labels") {
        None | Some(Value::Null) => {}
        Some(Value::Object(map)) => {
            for (key, value) in map {
                let Value::String(value) = value else {
                    let field = format!("labels[\"{key}\"]");
                    return Err(ParseError::Invalid(Violations::one(field, "must be a string")));
                };
                labels.insert(key.clone(), value.clone());
            }
        }
        Some(_) => {
            return Err(ParseError::Invalid(Violations::one("labels", "must be an object of strings")));
        }
    }
    Ok(labels)
}

fn moment(object: &Map<String, Value>, field: &str) -> Result<Option<OffsetDateTime>, ParseError> {
    let text = text(object, field)?;
    if text.is_empty() {
        return Ok(None);
    }
    OffsetDateTime::parse(&text, &Rfc3339).map(Some).map_err(|error| {
        ParseError::Invalid(Violations::one(field, format!("must be an RFC 3339 time: {error}")))
    })
}

/// A time as the API writes it.
pub(crate) fn rfc3339(time: OffsetDateTime) -> String {
    time.format(&Rfc3339).unwrap_or_default()
}

impl Omit for NoStatus {}
