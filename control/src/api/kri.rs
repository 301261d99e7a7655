//! `/_kri/{kri}`: a resource by its identifier.

use ursa_model::{
    Descriptor, Kri, Resource, ResourceKey, Scope,
    labels::{Context, Mode},
    names,
};

use std::sync::Arc;

use super::{Shared, error::ApiError};

/// Reads an identifier.
pub fn parse(text: &str) -> Result<(Kri, &'static Descriptor), ApiError> {
    let kri: Kri = text.parse().map_err(ApiError::bad_request)?;
    // What was parsed names a type that exists.
    let descriptor = kri.descriptor();
    let descriptor = descriptor.ok_or_else(|| ApiError::not_found("Could not retrieve a resource", text))?;
    Ok((kri, descriptor))
}

/// The name under which the resource of an identifier is stored here: its own where it comes from
/// this control plane, a hashed one where it is a copy.
pub fn core_name(kri: &Kri, context: &Context) -> String {
    let cluster_scoped = matches!(kri.short_name.as_str(), "m" | "z");
    let local = match context.mode {
        Mode::Global => kri.zone.is_empty(),
        Mode::Zone => kri.zone == context.zone,
    };
    let with_namespace = |name: String, namespace: &str| {
        if context.kubernetes && !cluster_scoped && !namespace.is_empty() {
            format!("{name}.{namespace}")
        } else {
            name
        }
    };
    if local || cluster_scoped {
        return with_namespace(kri.name.clone(), &kri.namespace);
    }
    let name = names::of_copy(&kri.mesh, &kri.name, &kri.zone, &kri.namespace);
    with_namespace(name, &context.system_namespace)
}

/// The resource of an identifier; none if there is none.
pub(super) async fn find(
    state: &Shared,
    kri: &Kri,
    descriptor: &'static Descriptor,
) -> Result<Option<Arc<Resource>>, ApiError> {
    let failed = |error| ApiError::store("Could not retrieve a resource", &error);
    let store = &state.control.store;
    let mesh = if descriptor.scope == Scope::Mesh { kri.mesh.clone() } else { String::new() };
    let key = ResourceKey {
        kind: descriptor.name,
        mesh: mesh.clone(),
        name: core_name(kri, &state.control.label_context()),
    };
    if let Some(found) = store.get(&key).await.map_err(failed)? {
        return Ok(Some(found));
    }
    // What was stored without the labels of its origin keeps its plain name.
    let key = ResourceKey { kind: descriptor.name, mesh, name: kri.name.clone() };
    let plain = store.get(&key).await.map_err(failed)?;
    Ok(plain.filter(|found| found.kri(None) == kri.clone().with_section("")))
}
