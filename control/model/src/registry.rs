//! What types of resources exist, and what is to be known of each.

use serde_json::Value;

use crate::{
    meta::Meta,
    resource::{ParseError, ResourceSpec},
    structure, types,
    violation::{Path, Violations},
};

/// Where a resource lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// Once in the whole deployment.
    Global,
    /// Inside one mesh.
    Mesh,
}

/// How a resource is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// Fields below `spec`.
    Spec,
    /// Fields beside `type`, `mesh` and `name`.
    Inline,
}

/// Between which control planes a type is copied.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sync {
    /// From the global control plane to the zones.
    pub global_to_zone: bool,
    /// From a zone to the global control plane.
    pub zone_to_global: bool,
    /// From a zone, by way of global, to the other zones.
    pub zone_to_zones: bool,
}

/// What a policy may hold.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PolicyTraits {
    /// It has `to`.
    pub has_to: bool,
    /// It has `rules`.
    pub has_rules: bool,
    /// It configures what comes in.
    pub is_inbound: bool,
    /// It configures what goes out.
    pub is_outbound: bool,
}

impl PolicyTraits {
    /// It has `to` and `rules`.
    pub(crate) const TO_AND_RULES: Self =
        Self { has_to: true, has_rules: true, is_inbound: true, is_outbound: true };
    /// It has `to` only.
    pub(crate) const TO: Self = Self { has_to: true, has_rules: false, is_inbound: false, is_outbound: true };
    /// It has `rules` only.
    pub(crate) const RULES: Self =
        Self { has_to: false, has_rules: true, is_inbound: true, is_outbound: false };
    /// It configures the proxy as a whole.
    pub(crate) const PROXY: Self =
        Self { has_to: false, has_rules: false, is_inbound: false, is_outbound: false };
}

/// A spec in canonical form, and the paths of the fields that were ignored on the way.
pub type Normalised = (Value, Vec<String>);

/// Functions of a type over the erased form.
#[derive(Debug, Clone, Copy)]
pub struct Codec {
    /// Parses a spec and gives it back in canonical form, defaults applied; the fields it ignored too.
    pub normalise: fn(&Value) -> Result<Normalised, ParseError>,
    /// Adds all that is wrong with a canonical spec.
    pub validate: fn(&Meta, &Value, &mut Violations),
    /// Adds all that an update may not change: the canonical spec before and after.
    pub validate_update: fn(&Meta, &Value, &Value, &mut Violations),
    /// What is allowed but unwise.
    pub warnings: fn(&Meta, &Value) -> Vec<String>,
    /// The part of the status that configuration depends on.
    pub project_status: fn(&Value) -> Value,
    /// The status that a new resource has; none for types without one.
    pub initial_status: fn() -> Option<Value>,
}

/// All that is known of a type; there is one per type, and it is static.
#[derive(Debug, Clone, Copy)]
pub struct Descriptor {
    /// `MeshTimeout`.
    pub name: &'static str,
    /// `meshtimeouts`, its collection in the API.
    pub path: &'static str,
    /// Other names of the collection.
    pub aliases: &'static [&'static str],
    /// `mt`, empty for types without a KRI.
    pub short_name: &'static str,
    /// `Mesh Timeout`.
    pub singular: &'static str,
    /// `Mesh Timeouts`.
    pub plural: &'static str,
    /// Global or in a mesh.
    pub scope: Scope,
    /// With `spec` or inlined.
    pub form: Form,
    /// Written by the control plane only.
    pub read_only: bool,
    /// Read and written by administrators only.
    pub admin_only: bool,
    /// Where copies go.
    pub sync: Sync,
    /// Whether `export` for a federation takes it along.
    pub include_in_federation: bool,
    /// What it may hold, when it is a policy.
    pub policy: Option<PolicyTraits>,
    /// Whether traffic can be sent to it, so that it has SNIs and hostnames.
    pub is_destination: bool,
    /// Whether this version configures anything by it; what it doesn't act on is stored with a warning.
    pub acted_on: bool,
    /// Its functions.
    pub codec: Codec,
}

impl Descriptor {
    /// The usual type: in a mesh, with `spec`, from global to zones and back.
    pub(crate) const fn of<T: ResourceSpec>(
        name: &'static str,
        path: &'static str,
        short_name: &'static str,
        singular: &'static str,
        plural: &'static str,
    ) -> Self {
        Self {
            name,
            path,
            aliases: &[],
            short_name,
            singular,
            plural,
            scope: Scope::Mesh,
            form: Form::Spec,
            read_only: false,
            admin_only: false,
            sync: Sync { global_to_zone: true, zone_to_global: true, zone_to_zones: false },
            include_in_federation: true,
            policy: None,
            is_destination: false,
            acted_on: true,
            codec: Codec {
                normalise: normalise::<T>,
                validate: validate::<T>,
                validate_update: validate_update::<T>,
                warnings: warnings::<T>,
                project_status: T::project_status,
                initial_status: initial_status::<T>,
            },
        }
    }

    /// A policy: attached to proxies, copied everywhere.
    pub(crate) const fn policy<T: ResourceSpec>(
        traits: PolicyTraits,
        name: &'static str,
        path: &'static str,
        short_name: &'static str,
        singular: &'static str,
        plural: &'static str,
    ) -> Self {
        Self {
            sync: Sync { global_to_zone: true, zone_to_global: true, zone_to_zones: true },
            policy: Some(traits),
            ..Self::of::<T>(name, path, short_name, singular, plural)
        }
    }

    /// Whether a zone's control plane may be its origin.
    pub fn provided_by_zone(&self) -> bool {
        self.sync.zone_to_global
    }

    /// Whether the global control plane may be its origin.
    pub fn provided_by_global(&self) -> bool {
        self.sync.global_to_zone
    }

    /// Whether it is a policy with `targetRef`.
    pub fn is_policy(&self) -> bool {
        self.policy.is_some()
    }
}

impl PartialEq for Descriptor {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name
    }
}

impl Eq for Descriptor {}

fn normalise<T: ResourceSpec>(value: &Value) -> Result<Normalised, ParseError> {
    let root = if matches!(T::DESCRIPTOR.form, Form::Spec) { Path::spec() } else { Path::root() };
    let empty = Value::Object(serde_json::Map::new());
    let input = if value.is_null() { &empty } else { value };
    let mut spec: T =
        structure::parse(input, &root, T::DESCRIPTOR.is_policy()).map_err(ParseError::Invalid)?;
    spec.apply_defaults();
    let canonical = serde_json::to_value(&spec).map_err(|error| ParseError::Malformed(error.to_string()))?;
    let mut ignored = Vec::new();
    ignored_fields(input, &canonical, &root, &mut ignored);
    Ok((canonical, ignored))
}

/// Fields that hold something in the input and are gone in the canonical form.
fn ignored_fields(input: &Value, canonical: &Value, path: &Path, out: &mut Vec<String>) {
    match (input, canonical) {
        (Value::Object(input), Value::Object(canonical)) => {
            for (name, value) in input {
                let below = path.field(name);
                match canonical.get(name) {
                    Some(kept) => ignored_fields(value, kept, &below, out),
                    None if is_zero(value) => {}
                    None => out.push(below.to_string()),
                }
            }
        }
        (Value::Array(input), Value::Array(canonical)) => {
            for (i, (value, kept)) in input.iter().zip(canonical).enumerate() {
                ignored_fields(value, kept, &path.index(i), out);
            }
        }
        _ => {}
    }
}

fn is_zero(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(value) => !value,
        Value::Number(value) => value.as_f64() == Some(0.0),
        Value::String(value) => value.is_empty(),
        Value::Array(value) => value.iter().all(is_zero),
        Value::Object(value) => value.values().all(is_zero),
    }
}

fn validate<T: ResourceSpec>(meta: &Meta, spec: &Value, out: &mut Violations) {
    match serde_path_to_error::deserialize::<_, T>(spec) {
        Ok(spec) => spec.validate(meta, out),
        Err(error) => out.add(error.path(), error.inner().to_string()),
    }
}

fn validate_update<T: ResourceSpec>(meta: &Meta, before: &Value, after: &Value, out: &mut Violations) {
    // What can't be read before says nothing of what may change; what can't be read after is told by `validate`.
    if let (Ok(before), Ok(after)) = (T::deserialize(before), T::deserialize(after)) {
        after.validate_update(meta, &before, out);
    }
}

fn warnings<T: ResourceSpec>(meta: &Meta, spec: &Value) -> Vec<String> {
    serde_json::from_value::<T>(spec.clone()).map(|spec| spec.warnings(meta)).unwrap_or_default()
}

fn initial_status<T: ResourceSpec>() -> Option<Value> {
    if T::DESCRIPTOR.form == Form::Inline
        || T::DESCRIPTOR.scope == Scope::Global && !T::DESCRIPTOR.is_policy()
    {
        return None;
    }
    serde_json::to_value(T::Status::default()).ok()
}

/// Every type that exists, in the order of their names.
pub fn registry() -> &'static [&'static Descriptor] {
    types::ALL
}

/// The type of a name, `MeshTimeout`.
pub fn by_name(name: &str) -> Option<&'static Descriptor> {
    registry().iter().copied().find(|descriptor| descriptor.name == name)
}

/// The type of a collection, `meshtimeouts`.
pub fn by_path(path: &str) -> Option<&'static Descriptor> {
    registry()
        .iter()
        .copied()
        .find(|descriptor| descriptor.path == path || descriptor.aliases.contains(&path))
}

/// The type of a short name, `mt`.
pub fn by_short_name(short_name: &str) -> Option<&'static Descriptor> {
    registry()
        .iter()
        .copied()
        .find(|descriptor| !short_name.is_empty() && descriptor.short_name == short_name)
}
