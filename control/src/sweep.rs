//! What is left of a mesh that was deleted goes, too. Deleting a mesh isn't atomic: a process that is
//! killed between leaves remains, which the next start finds.

use std::collections::HashSet;

use ursa_model::{Scope, registry};

use crate::store::{Store, StoreError};

/// Deletes everything that belongs to a mesh which doesn't exist any more.
pub async fn mesh(store: &Store, mesh: &str) -> Result<(), StoreError> {
    for descriptor in registry().iter().filter(|found| found.scope == Scope::Mesh) {
        for resource in store.list(descriptor.name, Some(mesh)).await? {
            match store.delete(&resource.key(), None).await {
                Ok(()) | Err(StoreError::NotFound(_)) => {}
                Err(error) => return Err(error),
            }
        }
    }
    Ok(())
}

/// Deletes the remains of all meshes that don't exist.
pub async fn all(store: &Store) -> Result<(), StoreError> {
    let known: HashSet<String> =
        store.list("Mesh", None).await?.iter().map(|found| found.meta.name.clone()).collect();
    let mut gone = HashSet::new();
    for descriptor in registry().iter().filter(|found| found.scope == Scope::Mesh) {
        for resource in store.list(descriptor.name, None).await? {
            if !known.contains(&resource.meta.mesh) {
                gone.insert(resource.meta.mesh.clone());
            }
        }
    }
    for name in gone {
        tracing::info!(mesh = %name, "deleting what is left of a mesh that was deleted");
        mesh(store, &name).await?;
    }
    Ok(())
}
