//! SPIFFE ids and trust domains, and the templates that a MeshIdentity makes them from.

use std::{fmt, str::FromStr};

/// The trust domain of a MeshIdentity that names none.
pub const DEFAULT_TRUST_DOMAIN_TEMPLATE: &str = "{{ .Mesh }}.{{ .Zone }}.mesh.local";
/// The path on machines of a MeshIdentity that names none.
pub const DEFAULT_PATH_TEMPLATE: &str = "/workload/{{ .Workload }}";
/// The path in pods of a MeshIdentity that names none.
pub const DEFAULT_KUBERNETES_PATH_TEMPLATE: &str = "/ns/{{ .Namespace }}/sa/{{ .ServiceAccount }}";

/// A text that is no SPIFFE id or trust domain.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a valid {what}: {why}")]
pub struct InvalidSpiffe {
    /// What was wanted.
    pub what: &'static str,
    /// What was given.
    pub text: String,
    /// What is wrong with it.
    pub why: &'static str,
}

/// The authority of SPIFFE ids: lower-case letters, digits, `.`, `-` and `_`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TrustDomain(String);

impl TrustDomain {
    /// As text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The id of the trust domain itself, `spiffe://<domain>`.
    pub fn id(&self) -> String {
        format!("spiffe://{}", self.0)
    }
}

impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for TrustDomain {
    type Err = InvalidSpiffe;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let invalid = |why| InvalidSpiffe { what: "trust domain", text: text.to_owned(), why };
        if text.is_empty() {
            return Err(invalid("trust domain is missing"));
        }
        if text.len() > 253 {
            return Err(invalid("it is longer than 253 characters"));
        }
        if !text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b".-_".contains(&b)) {
            return Err(invalid(
                "trust domain characters are limited to lowercase letters, numbers, dots, dashes, and underscores",
            ));
        }
        Ok(Self(text.to_owned()))
    }
}

/// `spiffe://<trust domain><path>`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SpiffeId {
    trust_domain: TrustDomain,
    path: String,
}

impl SpiffeId {
    /// An id from its parts; the path is empty or starts with a slash.
    pub fn new(trust_domain: TrustDomain, path: &str) -> Result<Self, InvalidSpiffe> {
        let parsed: Self = format!("spiffe://{trust_domain}{path}").parse()?;
        Ok(Self { trust_domain, path: parsed.path })
    }

    /// Its trust domain.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// Its path, starting with a slash (or empty).
    pub fn path(&self) -> &str {
        &self.path
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "spiffe://{}{}", self.trust_domain, self.path)
    }
}

impl FromStr for SpiffeId {
    type Err = InvalidSpiffe;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let invalid = |why| InvalidSpiffe { what: "SPIFFE ID", text: text.to_owned(), why };
        if text.is_empty() {
            return Err(invalid("cannot be empty"));
        }
        let rest = text.strip_prefix("spiffe://").ok_or_else(|| invalid("scheme is missing or invalid"))?;
        let end = rest.find('/').unwrap_or(rest.len());
        let (domain, path) = rest.split_at(end);
        let trust_domain: TrustDomain = domain.parse().map_err(|error: InvalidSpiffe| invalid(error.why))?;
        if !path.is_empty() {
            for segment in path[1..].split('/') {
                match segment {
                    "" if path.ends_with('/') => return Err(invalid("path cannot have a trailing slash")),
                    "" => return Err(invalid("path cannot contain empty segments")),
                    "." | ".." => return Err(invalid("path cannot contain dot segments")),
                    _ if !segment.bytes().all(|b| b.is_ascii_alphanumeric() || b".-_".contains(&b)) => {
                        return Err(invalid(
                            "path segment characters are limited to letters, numbers, dots, dashes, and underscores",
                        ));
                    }
                    _ => {}
                }
            }
        }
        if text.len() > 2048 {
            return Err(invalid("it is longer than 2048 characters"));
        }
        Ok(Self { trust_domain, path: path.to_owned() })
    }
}
