//! The virtual addresses of mesh services.
//!
//! An address is allocated once, as IPv4; its IPv6 twin carries it in its last 32 bits, so the pair can't
//! diverge.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// One range that belongs to the mesh: address and prefix length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// First address.
    pub base: IpAddr,
    /// Length of the prefix in bits.
    pub prefix: u8,
}

impl Range {
    const fn v4(first: u8) -> Self {
        Self { base: IpAddr::V4(Ipv4Addr::new(first, 0, 0, 0)), prefix: 8 }
    }

    /// Whether the range holds the address.
    pub fn contains(self, address: IpAddr) -> bool {
        match (self.base, address) {
            (IpAddr::V4(base), IpAddr::V4(address)) => {
                let shift = 32 - u32::from(self.prefix);
                base.to_bits() >> shift == address.to_bits() >> shift
            }
            (IpAddr::V6(base), IpAddr::V6(address)) => {
                let shift = 128 - u32::from(self.prefix);
                base.to_bits() >> shift == address.to_bits() >> shift
            }
            _ => false,
        }
    }
}

impl Range {
    /// Whether the range holds every address of another.
    pub fn covers(self, other: Self) -> bool {
        other.prefix >= self.prefix && self.contains(other.base)
    }
}

/// A text is no IPv4 range.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no IPv4 range such as 241.7.0.0/16")]
pub struct NoRange(String);

impl std::str::FromStr for Range {
    type Err = NoRange;

    /// An IPv4 range in CIDR notation; bits after the prefix don't count.
    fn from_str(text: &str) -> Result<Self, NoRange> {
        let wrong = || NoRange(text.to_owned());
        let (base, prefix) = text.split_once('/').ok_or_else(wrong)?;
        let base: Ipv4Addr = base.parse().map_err(|_| wrong())?;
        let prefix: u8 = prefix.parse().ok().filter(|prefix| (1..=32).contains(prefix)).ok_or_else(wrong)?;
        let mask = u32::MAX << (32 - u32::from(prefix));
        Ok(Self { base: IpAddr::V4(Ipv4Addr::from_bits(base.to_bits() & mask)), prefix })
    }
}

impl std::fmt::Display for Range {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.base, self.prefix)
    }
}

/// Where MeshService addresses come from.
pub const MESH_SERVICE: Range = Range::v4(241);
/// Where MeshExternalService addresses come from.
pub const MESH_EXTERNAL_SERVICE: Range = Range::v4(242);
/// Where MeshMultiZoneService addresses come from.
pub const MESH_MULTI_ZONE_SERVICE: Range = Range::v4(243);

/// The first 64 bits of every IPv6 address of the mesh.
pub const V6_PREFIX: Ipv6Addr = Ipv6Addr::new(0xfd75, 0x7273, 0x6100, 0, 0, 0, 0, 0);
/// Where the IPv6 twins live.
pub const V6: Range = Range { base: IpAddr::V6(V6_PREFIX), prefix: 64 };

/// Every range that belongs to the mesh: routed to `lo`, and closed in passthrough.
pub const VIP_RANGES: [Range; 4] = [MESH_SERVICE, MESH_EXTERNAL_SERVICE, MESH_MULTI_ZONE_SERVICE, V6];

/// The IPv6 twin of an allocated IPv4 address.
pub fn v6_of(address: Ipv4Addr) -> Ipv6Addr {
    Ipv6Addr::from_bits(V6_PREFIX.to_bits() | u128::from(address.to_bits()))
}

/// Whether an address belongs to the mesh.
pub fn is_vip(address: IpAddr) -> bool {
    VIP_RANGES.iter().any(|range| range.contains(address))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_read_and_compared() {
        let part: Range = "241.7.1.1/16".parse().expect("a range");
        assert_eq!(part.to_string(), "241.7.0.0/16");
        assert!(MESH_SERVICE.covers(part) && !part.covers(MESH_SERVICE));
        for wrong in ["241.0.0.0", "241.0.0.0/33", "241.0.0.0/0", "fd00::/64", ""] {
            assert!(wrong.parse::<Range>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn twins_share_their_low_bits() {
        let v6 = v6_of(Ipv4Addr::new(241, 0, 0, 7));
        assert_eq!(v6.to_string(), "fd75:7273:6100::f100:7");
        assert!(is_vip(IpAddr::V6(v6)));
        assert!(!is_vip("fd75:7273:6101::1".parse().expect("address")));
        assert!(!is_vip("240.0.0.1".parse().expect("address")));
    }
}
