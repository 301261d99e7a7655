//! `/_kri/{kri}`: a resource by its identifier.

use ursa_model::{
    Descriptor, Kri, Resource, ResourceKey, Scope, by_short_name,
    labels::{Context, Mode},
};

use std::sync::Arc;

use super::{Shared, error::ApiError};

/// Reads an identifier; the error is in the words that clients know.
pub fn parse(text: &str) -> Result<(Kri, &'static Descriptor), ApiError> {
    let parts: Vec<&str> = text.split('_').collect();
    if parts.len() < 2 {
        return Err(ApiError::bad_request(format_args!("invalid identifier string: {text:?}")));
    }
    if parts[0] != "kri" {
        return Err(ApiError::bad_request(format_args!("identifier must start with 'kri': {text:?}")));
    }
    let Some(descriptor) = by_short_name(parts[1]) else {
        return Err(ApiError::bad_request(format_args!(
            "unknown short name of resource type: {:?}",
            parts[1]
        )));
    };
    let [_, short_name, mesh, zone, namespace, name, section] = parts[..] else {
        return Err(ApiError::bad_request(format_args!(
            "invalid identifier string: {text:?} (expected kri_<type>_<mesh>_<zone>_<namespace>_<name>_<section>)"
        )));
    };
    let kri = Kri {
        short_name: short_name.into(),
        mesh: mesh.into(),
        zone: zone.into(),
        namespace: namespace.into(),
        name: name.into(),
        section: section.into(),
    };
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
    let mut hashed = format!("{}{}", kri.mesh, kri.name);
    hashed.push_str(&kri.zone);
    hashed.push_str(&kri.namespace);
    let name = format!("{}-{}", kri.name, safe(fnv64a(hashed.as_bytes())));
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

fn fnv64a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

/// A hash in letters that spell no words, as Kubernetes writes hashes.
fn safe(hash: u64) -> String {
    const ALPHABET: &[u8; 27] = b"bcdfghjklmnpqrstvwxz2456789";
    format!("{hash:016x}").bytes().map(|c| char::from(ALPHABET[usize::from(c) % ALPHABET.len()])).collect()
}
