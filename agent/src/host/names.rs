//! Users, slices and ports of a service, from its name and its neighbours.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::Result;
use crate::relay::hex;

/// User names hold 31 characters (`useradd(8)`).
const USER_LENGTH: usize = 31;
/// The agent names a sidecar's directories by its service up to this length.
const SERVICE_LENGTH: usize = 40;
/// Slices below `ursa.slice` that are Ursa's own.
const OWN_SLICES: [&str; 3] = ["sidecar", "pod", "agent"];

/// The name of a service from what the operator typed, with or without `.service`.
pub(super) fn service(unit: &str) -> Result<String> {
    let name = unit.strip_suffix(".service").unwrap_or(unit);
    let other = ["socket", "timer", "target", "slice", "mount", "path", "scope"];
    if let Some((_, kind)) = name.rsplit_once('.')
        && other.contains(&kind)
    {
        return Err(format!("{unit} is a {kind}, and only services are in a mesh; name the .service").into());
    }
    if name.starts_with("ursa-") {
        return Err(
            format!("{unit} belongs to Ursa itself; name the service that is to be in the mesh").into()
        );
    }
    let harmless = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if name.is_empty() || name.len() > SERVICE_LENGTH || name.starts_with('.') || !name.chars().all(harmless)
    {
        return Err(format!(
            "the unit name `{unit}` can't name a sidecar: letters, digits, `-`, `_` and `.`, {SERVICE_LENGTH} at most (no \
             instances of templates); give the service a unit of another name"
        )
        .into());
    }
    Ok(name.to_owned())
}

/// The user of a service's sidecar.
pub(super) fn user(service: &str) -> String {
    let name = format!("ursa-{service}");
    let plain = name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '-' | '_'));
    if plain && name.len() <= USER_LENGTH {
        return name;
    }
    let clean: String = name
        .chars()
        .map(|c| c.to_ascii_lowercase())
        .map(|c| if c.is_ascii_alphanumeric() || c == '-' { c } else { '_' })
        .take(USER_LENGTH - 9)
        .collect();
    format!("{clean}-{}", digest(service))
}

/// The slice of a service that is told apart by one. A `-` would make it a part of another service's slice.
pub(super) fn slice(service: &str) -> String {
    if service.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') && !OWN_SLICES.contains(&service) {
        return format!("ursa-{service}.slice");
    }
    let clean: String = service.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect();
    format!("ursa-{clean}_{}.slice", digest(service))
}

fn digest(text: &str) -> String {
    hex(&Sha256::digest(text.as_bytes())[..4])
}

/// A name for a Dataplane: what control takes for one.
pub(super) fn dataplane(workload: &str, host: &str) -> String {
    let host = host.split('.').next().unwrap_or_default().to_ascii_lowercase();
    let host: String = host.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
    format!("{workload}-{}", host.trim_matches('-')).trim_end_matches('-').to_owned()
}

/// The ports of a sidecar.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct SidecarPorts {
    /// Envoy's, for what arrives.
    pub(super) inbound: u16,
    /// Envoy's, for what the service opens.
    pub(super) outbound: u16,
    /// The shim's name server.
    pub(super) dns: u16,
}

impl SidecarPorts {
    const fn from_base(base: u16) -> Self {
        Self { inbound: base + 6, outbound: base + 1, dns: base + 53 }
    }

    /// Those of a namespace of its own.
    pub(super) const ALONE: Self = Self::from_base(15_000);

    /// All three.
    pub(super) const fn all(self) -> [u16; 3] {
        [self.inbound, self.outbound, self.dns]
    }

    /// The first ones that are free on this machine and nobody else's: 15006, 15001 and 15053, then 15106 and so on.
    pub(super) fn free(taken: &BTreeSet<u16>) -> Result<Self> {
        let all = (0..60).map(|step| Self::from_base(15_000 + step * 100));
        all.into_iter().find(|ports| ports.all().iter().all(|port| !taken.contains(port))).ok_or_else(|| {
            "no ports are free for its sidecar: from 15001, 15006, 15053 up to 20901, 20906, 20953 in steps of 100 each \
             group has one in use (`ss -lntu`)"
                .to_owned()
                .into()
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that can't go on has failed")]
    use super::*;

    #[test]
    fn services_are_named_with_or_without_their_suffix() {
        assert_eq!(service("web.service").unwrap(), "web");
        assert_eq!(service("my-web_1.2").unwrap(), "my-web_1.2");
        for wrong in
            ["web.socket", "ursa-agent.service", "web@1.service", "", ".service", "a/b", &"a".repeat(41)]
        {
            assert!(service(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn users_fit_and_differ() {
        assert_eq!(user("web"), "ursa-web");
        let long = user("a-service-with-a-name-beyond-measure");
        assert_eq!(long.len(), 31);
        assert_ne!(long, user("a-service-with-a-name-beyond-measur"));
        assert_ne!(user("Web"), user("web"));
        assert!(user("a.b").starts_with("ursa-a_b-"), "{}", user("a.b"));
    }

    #[test]
    fn no_slice_lies_in_another_service() {
        assert_eq!(slice("web"), "ursa-web.slice");
        assert!(slice("my-web").starts_with("ursa-my_web_"), "{}", slice("my-web"));
        assert_ne!(slice("my-web"), slice("my_web"));
        assert_ne!(slice("sidecar"), "ursa-sidecar.slice");
    }

    #[test]
    fn the_first_free_ports_are_taken() {
        assert_eq!(SidecarPorts::free(&BTreeSet::new()).unwrap(), SidecarPorts::ALONE);
        let taken = [15_053, 15_101].into();
        assert_eq!(SidecarPorts::free(&taken).unwrap().all(), [15_206, 15_201, 15_253]);
        let all: BTreeSet<u16> = (15_000..=21_000).collect();
        assert!(SidecarPorts::free(&all).unwrap_err().to_string().contains("ss -lntu"));
    }

    #[test]
    fn a_dataplane_is_named_by_workload_and_machine() {
        assert_eq!(dataplane("web", "VM1.example.org"), "web-vm1");
        assert_eq!(dataplane("web", "a_b"), "web-a-b");
    }
}
