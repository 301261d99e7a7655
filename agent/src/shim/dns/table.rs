//! The compiled table: what is looked up for every query, keyed by names as they stand in a packet.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;

use hickory_proto::rr::Name;

use crate::shim::protocol::DnsTable;

/// Domains that are ours before any table said so.
const DEFAULT_DOMAINS: [&str; 2] = ["mesh.local", "mesh"];

/// Why a table can't be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TableError {
    /// A hostname or domain is no name.
    #[error("{name:?} is not a DNS name: {reason}")]
    Name {
        /// As it stands in the table.
        name: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The same name twice.
    #[error("{name:?} is there twice (names are compared without case and trailing dot)")]
    Duplicate {
        /// As it stands in the table.
        name: String,
    },
}

/// The addresses of one name, ready for the wire.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Addresses {
    /// For A.
    pub v4: Vec<[u8; 4]>,
    /// For AAAA.
    pub v6: Vec<[u8; 16]>,
}

/// What the table says about a name.
#[derive(Debug, PartialEq, Eq)]
pub enum Found<'a> {
    /// It has these addresses.
    Addresses(&'a Addresses),
    /// It exists and has none: a domain, or a name with names below it.
    Empty,
    /// It is ours and does not exist.
    Missing,
    /// It is ours, and no table has been loaded yet.
    Unknown,
    /// It is none of ours.
    Foreign,
}

/// A compiled [`DnsTable`].
#[derive(Debug)]
pub struct Table {
    loaded: bool,
    ttl: u32,
    names: HashMap<Box<[u8]>, Addresses>,
    domains: HashSet<Box<[u8]>>,
    /// Names that exist because names below them do (RFC 8020).
    inner: HashSet<Box<[u8]>>,
}

impl Table {
    /// The table before the first one: it knows which names are ours, and nothing about them.
    pub fn unloaded() -> Self {
        let domains = DEFAULT_DOMAINS.map(str::to_owned).to_vec();
        let mut table = Self::compile(&DnsTable { domains, ttl: 0, ..DnsTable::default() })
            .expect("invariant: the default domains are names");
        table.loaded = false;
        table
    }

    /// Compiles a table, or says what is wrong with it.
    pub fn compile(table: &DnsTable) -> Result<Self, TableError> {
        let domains: HashSet<_> =
            table.domains.iter().map(|domain| wire(domain)).collect::<Result<_, _>>()?;
        let mut names = HashMap::with_capacity(table.names.len());
        let mut inner = HashSet::new();
        for (name, addresses) in &table.names {
            let key = wire(name)?;
            for (at, ancestor) in suffixes(&key).skip(1) {
                // The root is everybody's; anything between it and the name exists because of the name.
                if at + 1 < key.len() {
                    inner.insert(Box::from(ancestor));
                }
            }
            let mut entry = Addresses::default();
            for address in addresses {
                match address {
                    IpAddr::V4(v4) => entry.v4.push(v4.octets()),
                    IpAddr::V6(v6) => entry.v6.push(v6.octets()),
                }
            }
            if names.insert(key, entry).is_some() {
                return Err(TableError::Duplicate { name: name.clone() });
            }
        }
        inner.retain(|name| suffixes(name).any(|(_, suffix)| domains.contains(suffix)));
        Ok(Self { loaded: true, ttl: table.ttl, names, domains, inner })
    }

    /// How many names it holds.
    pub fn len(&self) -> usize {
        self.names.len()
    }

    /// Whether it holds no name.
    pub fn is_empty(&self) -> bool {
        self.names.is_empty()
    }

    /// Whether it came from an agent.
    pub fn loaded(&self) -> bool {
        self.loaded
    }

    /// Seconds for which an answer may be kept.
    pub fn ttl(&self) -> u32 {
        self.ttl
    }

    /// Looks up a name in wire form and lower case.
    pub fn find(&self, name: &[u8]) -> Found<'_> {
        if let Some(addresses) = self.names.get(name) {
            return Found::Addresses(addresses);
        }
        if !suffixes(name).any(|(_, suffix)| self.domains.contains(suffix)) {
            return Found::Foreign;
        }
        if !self.loaded {
            Found::Unknown
        } else if self.inner.contains(name) || self.domains.contains(name) {
            Found::Empty
        } else {
            Found::Missing
        }
    }
}

/// The name itself and every domain it is in, the root excluded, each with its offset. `name` must be well formed.
fn suffixes(name: &[u8]) -> impl Iterator<Item = (usize, &[u8])> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let length = usize::from(*name.get(at)?);
        if length == 0 {
            return None;
        }
        let here = at;
        at += 1 + length;
        Some((here, &name[here..]))
    })
}

/// The name as it stands in a packet, in lower case.
fn wire(text: &str) -> Result<Box<[u8]>, TableError> {
    let wrong = |reason: String| TableError::Name { name: text.to_owned(), reason };
    let name = Name::from_ascii(text).map_err(|error| wrong(error.to_string()))?;
    if name.iter().next().is_none() {
        return Err(wrong("it is empty".into()));
    }
    let mut bytes = Vec::with_capacity(name.len() + 1);
    for label in &name {
        // hickory checks lengths; the cast cannot lose anything.
        bytes.push(u8::try_from(label.len()).map_err(|error| wrong(error.to_string()))?);
        bytes.extend(label.iter().map(u8::to_ascii_lowercase));
    }
    bytes.push(0);
    Ok(bytes.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(names: &[(&str, &[&str])], domains: &[&str]) -> Result<Table, TableError> {
        Table::compile(&DnsTable {
            names: names
                .iter()
                .map(|(name, addresses)| {
                    ((*name).to_owned(), addresses.iter().map(|a| a.parse().unwrap()).collect())
                })
                .collect(),
            domains: domains.iter().map(|d| (*d).to_owned()).collect(),
            ttl: 30,
        })
    }

    #[test]
    fn finds_names_and_knows_whose_the_others_are() {
        let table = table(
            &[("Backend.svc.mesh.local.", &["241.0.0.1", "fd75::1"]), ("api.example.com", &["241.0.0.2"])],
            &["mesh.local", "mesh."],
        )
        .unwrap();
        let find = |name: &str| table.find(&wire(name).unwrap());
        assert_eq!(
            find("backend.svc.mesh.local"),
            Found::Addresses(&Addresses {
                v4: vec![[241, 0, 0, 1]],
                v6: vec!["fd75::1".parse::<std::net::Ipv6Addr>().unwrap().octets()],
            })
        );
        assert!(matches!(find("api.example.com"), Found::Addresses(_)));
        assert_eq!(find("example.com"), Found::Foreign);
        assert_eq!(find("svc.mesh.local"), Found::Empty);
        assert_eq!(find("mesh.local"), Found::Empty);
        assert_eq!(find("nobody.svc.mesh.local"), Found::Missing);
        assert_eq!(find("mesh"), Found::Empty);
        assert_eq!(find("x.mesh"), Found::Missing);
        assert_eq!(find("local"), Found::Foreign);
        assert_eq!(find("notmesh.local"), Found::Foreign);
        assert_eq!(table.find(&[0]), Found::Foreign);
    }

    #[test]
    fn before_the_first_table_mesh_names_are_unknown_not_missing() {
        let table = Table::unloaded();
        assert_eq!(table.find(&wire("backend.svc.mesh.local").unwrap()), Found::Unknown);
        assert_eq!(table.find(&wire("debian.org").unwrap()), Found::Foreign);
    }

    #[test]
    fn refuses_what_is_no_name() {
        let long = "a".repeat(64);
        for name in ["", ".", "a..b", long.as_str(), "bücher.mesh"] {
            let error = table(&[(name, &["241.0.0.1"])], &["mesh"]);
            assert!(matches!(error, Err(TableError::Name { .. })), "{name:?} was taken");
        }
        assert!(matches!(
            table(&[("a.mesh", &[]), ("A.mesh.", &[])], &["mesh"]),
            Err(TableError::Duplicate { .. })
        ));
    }
}
