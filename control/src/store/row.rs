//! How a resource lies in a row.

use std::collections::BTreeMap;

use rusqlite::Row;
use time::OffsetDateTime;
use ursa_model::{Meta, Resource, ResourceKey};

use super::{StoreError, vault::Vault};

/// The columns that [`Raw::read`] expects, in its order.
pub(super) const COLUMNS: &str =
    "kind, mesh, name, version, revision, created, modified, labels, spec, status, sealed";

/// A row as it lies in the database.
pub(super) struct Raw {
    pub(super) kind: String,
    pub(super) mesh: String,
    pub(super) name: String,
    version: i64,
    pub(super) revision: i64,
    created: Option<i64>,
    modified: Option<i64>,
    labels: String,
    spec: Vec<u8>,
    status: Option<String>,
    sealed: bool,
}

impl Raw {
    pub(super) fn read(row: &Row<'_>) -> rusqlite::Result<Self> {
        Ok(Self {
            kind: row.get(0)?,
            mesh: row.get(1)?,
            name: row.get(2)?,
            version: row.get(3)?,
            revision: row.get(4)?,
            created: row.get(5)?,
            modified: row.get(6)?,
            labels: row.get(7)?,
            spec: row.get(8)?,
            status: row.get(9)?,
            sealed: row.get(10)?,
        })
    }

    /// The resource in this row.
    pub(super) fn into_resource(self, vault: &Vault) -> Result<Resource, StoreError> {
        let place = place(&self.kind, &self.mesh, &self.name);
        let corrupt = |reason: String| StoreError::Corrupt(place.clone(), reason);
        let descriptor =
            ursa_model::by_name(&self.kind).ok_or_else(|| corrupt("its type is unknown".into()))?;
        let spec = if self.sealed { vault.unseal(&place, &self.spec)? } else { self.spec };
        let json = |text: &[u8]| serde_json::from_slice(text).map_err(|error| corrupt(error.to_string()));
        let labels: BTreeMap<String, String> =
            serde_json::from_str(&self.labels).map_err(|error| corrupt(error.to_string()))?;
        Ok(Resource {
            descriptor,
            meta: Meta {
                name: self.name,
                mesh: self.mesh,
                labels,
                creation_time: from_nanos(self.created),
                modification_time: from_nanos(self.modified),
                version: self.version.unsigned_abs(),
            },
            spec: json(&spec)?,
            status: self.status.as_deref().map(|text| json(text.as_bytes())).transpose()?,
            ignored: Vec::new(),
        })
    }
}

/// The content of a resource in the form of the columns.
pub(super) struct Content {
    pub(super) labels: String,
    pub(super) spec: Vec<u8>,
    pub(super) status: Option<String>,
    pub(super) sealed: bool,
}

impl Content {
    pub(super) fn of(resource: &Resource, vault: &Vault) -> Result<Self, StoreError> {
        let meta = &resource.meta;
        let failed = |error: serde_json::Error| StoreError::Failed(error.to_string());
        let plain = serde_json::to_vec(&resource.spec).map_err(failed)?;
        let sealed = resource.descriptor.admin_only;
        let spec = if sealed {
            vault.seal(&place(resource.descriptor.name, &meta.mesh, &meta.name), &plain)?
        } else {
            plain
        };
        Ok(Self {
            labels: serde_json::to_string(&meta.labels).map_err(failed)?,
            spec,
            status: resource.status.as_ref().map(serde_json::to_string).transpose().map_err(failed)?,
            sealed,
        })
    }
}

/// The name of an object's place, bound into its encryption.
pub(super) fn place(kind: &str, mesh: &str, name: &str) -> String {
    format!("{kind}/{mesh}/{name}")
}

/// The key of an object whose type this program knows.
pub(super) fn key(kind: &str, mesh: String, name: String) -> Option<ResourceKey> {
    ursa_model::by_name(kind).map(|descriptor| ResourceKey { kind: descriptor.name, mesh, name })
}

pub(super) fn to_nanos(time: Option<OffsetDateTime>) -> Option<i64> {
    time.and_then(|time| i64::try_from(time.unix_timestamp_nanos()).ok())
}

fn from_nanos(nanos: Option<i64>) -> Option<OffsetDateTime> {
    nanos.and_then(|nanos| OffsetDateTime::from_unix_timestamp_nanos(i128::from(nanos)).ok())
}
