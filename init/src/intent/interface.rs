//! The name of a network interface, or the beginning of several.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The kernel's limit, with the zero at the end.
const IFNAMSIZ: usize = 16;

/// One interface (`eth0`), or all that begin so (`br+`, as iptables writes it).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Interface {
    name: String,
    prefix: bool,
}

impl Interface {
    /// The loopback interface.
    pub fn lo() -> Self {
        Self { name: "lo".to_owned(), prefix: false }
    }

    /// The name, or the beginning of it, without `+`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether the name is only a beginning.
    pub const fn is_prefix(&self) -> bool {
        self.prefix
    }

    /// Whether an interface of that name is meant.
    pub fn matches(&self, name: &str) -> bool {
        if self.prefix { name.starts_with(&self.name) } else { name == self.name }
    }
}

/// The text can't be the name of an interface.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is no name of an interface: 1 to 15 bytes without `/`, `:`, quotes or spaces; `br+` means all that begin \
     with `br`"
)]
pub struct ParseInterfaceError(String);

impl FromStr for Interface {
    type Err = ParseInterfaceError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (name, prefix) = match text.strip_suffix('+') {
            Some(name) => (name, true),
            None => (text, false),
        };
        let forbidden = |c: char| {
            !c.is_ascii_graphic() || matches!(c, '/' | ':' | '"' | '\'' | '\\' | '+' | '*' | '!' | '#')
        };
        if name.is_empty() || name.len() >= IFNAMSIZ || name.contains(forbidden) || matches!(name, "." | "..")
        {
            return Err(ParseInterfaceError(text.to_owned()));
        }
        Ok(Self { name: name.to_owned(), prefix })
    }
}

impl TryFrom<String> for Interface {
    type Error = ParseInterfaceError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<Interface> for String {
    fn from(interface: Interface) -> Self {
        interface.to_string()
    }
}

impl fmt::Display for Interface {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)?;
        if self.prefix { f.write_str("+") } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_beginnings() {
        let bridges: Interface = "br+".parse().unwrap();
        assert!(bridges.matches("br0") && bridges.matches("br") && !bridges.matches("xbr0"));
        assert_eq!(bridges.to_string(), "br+");
        let eth0: Interface = "eth0".parse().unwrap();
        assert!(eth0.matches("eth0") && !eth0.matches("eth01"));
        for wrong in ["", "+", "a/b", "sixteen-letters-", "a b", "..", "a\"b", "b+r", "é"] {
            assert!(wrong.parse::<Interface>().is_err(), "{wrong}");
        }
    }
}
