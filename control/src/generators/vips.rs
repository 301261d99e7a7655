//! Addresses of MeshServices: each service keeps its address as long as it exists, and an address that was
//! given back is not given out again until the range has been gone through.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr};

use ursa_model::types::mesh_service::{MeshService, Vip};
use ursa_model::{ResourceKey, ResourceSpec as _, vip};

use crate::world::Index;

/// Which addresses are held, by whom.
#[derive(Debug)]
pub(super) struct Vips {
    /// Where new addresses come from; one that is held stays, wherever it is.
    range: vip::Range,
    by_service: HashMap<ResourceKey, Ipv4Addr>,
    held: HashSet<Ipv4Addr>,
    /// The last address that was given out.
    last: u32,
}

impl Vips {
    /// What is held according to the services themselves.
    pub(super) fn load(index: &Index, range: vip::Range) -> Self {
        let mut vips = Self::new(range);
        for service in index.list_all(MeshService::DESCRIPTOR.name) {
            let Ok(status) = service.status_as::<MeshService>() else { continue };
            if let Some(address) = v4_of(&status.vips) {
                vips.hold(service.key(), address);
            }
        }
        vips
    }

    fn new(range: vip::Range) -> Self {
        let (by_service, held) = (HashMap::new(), HashSet::new());
        Self { range, by_service, held, last: bounds(range).0 }
    }

    /// The addresses of a service, given out now if it has none: IPv4, and the IPv6 made of it.
    pub(super) fn of(&mut self, service: &ResourceKey) -> Vec<Vip> {
        let Some(address) = self.by_service.get(service).copied().or_else(|| self.allocate(service)) else {
            tracing::error!(
                "{service} gets no address: the range {} is exhausted; see ipam.meshService.cidr",
                self.range
            );
            return Vec::new();
        };
        vec![Vip { ip: address.to_string() }, Vip { ip: vip::v6_of(address).to_string() }]
    }

    /// The service is gone.
    pub(super) fn release(&mut self, service: &ResourceKey) {
        if let Some(address) = self.by_service.remove(service) {
            self.held.remove(&address);
        }
    }

    fn hold(&mut self, service: ResourceKey, address: Ipv4Addr) {
        // Of two holders the first by name keeps it; the other gets a new one.
        if self.held.insert(address) {
            if self.range.contains(IpAddr::V4(address)) {
                self.last = self.last.max(address.to_bits());
            }
            self.by_service.insert(service, address);
        }
    }

    fn allocate(&mut self, service: &ResourceKey) -> Option<Ipv4Addr> {
        let (first, end) = bounds(self.range);
        let size = end - first;
        // The first and the last address of the range stay out, as they do in any network.
        let found = (1..=size)
            .map(|step| first + (self.last - first + step) % size)
            .filter(|bits| *bits != first)
            .map(Ipv4Addr::from_bits)
            .find(|address| !self.held.contains(address))?;
        self.last = found.to_bits();
        self.held.insert(found);
        self.by_service.insert(service.clone(), found);
        Some(found)
    }
}

/// First and last address.
fn bounds(range: vip::Range) -> (u32, u32) {
    let IpAddr::V4(base) = range.base else { return (0, 1) };
    let first = base.to_bits();
    (first, first | u32::MAX.checked_shr(u32::from(range.prefix)).unwrap_or(0))
}

fn v4_of(vips: &[Vip]) -> Option<Ipv4Addr> {
    vips.iter()
        .filter_map(|vip| vip.ip.parse::<Ipv4Addr>().ok())
        .find(|address| vip::MESH_SERVICE.contains(IpAddr::V4(*address)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(name: &str) -> ResourceKey {
        ResourceKey::new(MeshService::DESCRIPTOR, "default", name)
    }

    fn vips() -> Vips {
        Vips::new(vip::MESH_SERVICE)
    }

    #[test]
    fn an_address_is_kept_and_comes_in_both_families() {
        let mut vips = vips();
        let first = vips.of(&service("a"));
        assert_eq!(first, vips.of(&service("a")));
        assert_eq!(first[0].ip, "241.0.0.1");
        assert_eq!(first[1].ip, "fd75:7273:6100::f100:1");
        assert_ne!(first, vips.of(&service("b")));
    }

    #[test]
    fn a_released_address_is_not_given_to_the_next() {
        let mut vips = vips();
        let old = vips.of(&service("a"));
        vips.release(&service("a"));
        assert_ne!(vips.of(&service("b")), old);
        vips.last = bounds(vip::MESH_SERVICE).1 - 1;
        assert_eq!(vips.of(&service("c")), old, "only after the whole range");
    }

    #[test]
    fn new_addresses_come_from_the_configured_range_and_held_ones_stay() {
        let mut vips = Vips::new("241.7.0.0/30".parse().unwrap());
        vips.hold(service("old"), "241.0.0.9".parse().unwrap());
        assert_eq!(vips.of(&service("old"))[0].ip, "241.0.0.9");
        let new = vips.of(&service("a"));
        assert_eq!(
            new.iter().map(|vip| vip.ip.as_str()).collect::<Vec<_>>(),
            ["241.7.0.1", "fd75:7273:6100::f107:1"]
        );
        assert_eq!(vips.of(&service("b"))[0].ip, "241.7.0.2");
        assert!(vips.of(&service("c")).is_empty(), "four addresses, of which two are usable");
    }
}
