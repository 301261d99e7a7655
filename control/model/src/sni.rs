//! SNI of a destination: `sni.<type>.<mesh>[.<zone>[.<namespace>]].<name>.<section>`.

use serde::Serialize;
use serde_json::Value;

use crate::{kri::Kri, names, resource::Resource};

/// Longest name that DNS, and so SNI, allows.
const MAX_LENGTH: usize = 253;
/// Types that traffic can be sent to.
const DESTINATIONS: [&str; 3] = ["msvc", "extsvc", "mzsvc"];

/// Why there is no SNI for an identifier, or no identifier for an SNI.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SniError {
    /// The type is no destination.
    #[error("resource type {0:?} has no SNI: only destinations (msvc, extsvc, mzsvc) have")]
    Type(String),
    /// A part that must be there isn't.
    #[error("mesh, name and sectionName must be non-empty")]
    Empty,
    /// A part can't be a label of a DNS name.
    #[error("{part} {value:?} does not conform to RFC 1123: {why}")]
    Part {
        /// Which part.
        part: &'static str,
        /// What it is.
        value: String,
        /// What is wrong with it.
        why: String,
    },
    /// It is too long.
    #[error("computed SNI is {0} characters which exceeds the DNS hostname limit (253)")]
    Length(usize),
    /// It has not the form of an SNI.
    #[error("SNI {0:?} must be sni.<type>.<mesh>[.<zone>[.<namespace>]].<name>.<section>")]
    Form(String),
}

/// The SNI of an identifier with a section. The namespace counts only together with a zone.
pub fn encode(kri: &Kri) -> Result<String, SniError> {
    if !DESTINATIONS.contains(&kri.short_name.as_str()) {
        return Err(SniError::Type(kri.short_name.clone()));
    }
    if kri.mesh.is_empty() || kri.name.is_empty() || kri.section.is_empty() {
        return Err(SniError::Empty);
    }
    let mut parts = vec![("mesh", &kri.mesh)];
    if !kri.zone.is_empty() {
        parts.push(("zone", &kri.zone));
        if !kri.namespace.is_empty() {
            parts.push(("namespace", &kri.namespace));
        }
    }
    parts.extend([("name", &kri.name), ("sectionName", &kri.section)]);
    for (part, value) in &parts {
        let faults = if value.contains('.') {
            vec!["must not contain dots".to_owned()]
        } else {
            names::dns_1123_label(value)
        };
        if !faults.is_empty() {
            return Err(SniError::Part { part, value: (*value).clone(), why: faults.join("; ") });
        }
    }
    let mut sni = format!("sni.{}", kri.short_name);
    for (_, value) in parts {
        sni.push('.');
        sni.push_str(value);
    }
    if sni.len() > MAX_LENGTH { Err(SniError::Length(sni.len())) } else { Ok(sni) }
}

/// The identifier that an SNI was made from.
pub fn decode(sni: &str) -> Result<Kri, SniError> {
    let parts: Vec<&str> = sni.split('.').collect();
    let form = || SniError::Form(sni.to_owned());
    let (zone, namespace) = match parts.as_slice() {
        [_, _, _, _, _] => ("", ""),
        [_, _, _, zone, _, _] => (*zone, ""),
        [_, _, _, zone, namespace, _, _] => (*zone, *namespace),
        _ => return Err(form()),
    };
    let [name, section] = parts[parts.len() - 2..] else { return Err(form()) };
    if parts[0] != "sni" || parts.iter().any(|part| !names::dns_1123_label(part).is_empty()) {
        return Err(form());
    }
    if !DESTINATIONS.contains(&parts[1]) {
        return Err(SniError::Type(parts[1].to_owned()));
    }
    Ok(Kri {
        short_name: parts[1].to_owned(),
        mesh: parts[2].to_owned(),
        zone: zone.to_owned(),
        namespace: namespace.to_owned(),
        name: name.to_owned(),
        section: section.to_owned(),
    })
}

/// The SNI of one port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PortSni {
    /// The port.
    pub port: u32,
    /// Its SNI.
    pub sni: String,
}

/// The SNIs of a destination's ports, in their order.
pub fn of_resource(resource: &Resource) -> Vec<PortSni> {
    let ports: Vec<&Value> = match resource.spec.get("ports").or_else(|| resource.spec.get("match")) {
        Some(Value::Array(ports)) => ports.iter().collect(),
        Some(single) => vec![single],
        None => Vec::new(),
    };
    ports
        .into_iter()
        .filter_map(|port| {
            let number = u32::try_from(port.get("port")?.as_u64()?).ok()?;
            let name = port.get("name").and_then(Value::as_str).unwrap_or_default();
            let section = if name.is_empty() { number.to_string() } else { name.to_owned() };
            let sni = encode(&resource.kri(Some(&section))).ok()?;
            Some(PortSni { port: number, sni })
        })
        .collect()
}
