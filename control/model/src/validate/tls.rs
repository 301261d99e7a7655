//! Versions of TLS.

use super::must_be_one_of;
use crate::{Path, Violations, open_enum};

open_enum! {
    /// Versions of TLS.
    pub enum TlsVersion {
        TlsAuto = "TLSAuto", Tls10 = "TLS10", Tls11 = "TLS11", Tls12 = "TLS12", Tls13 = "TLS13",
    }
}

crate::spec_struct! {
    /// A range of versions of TLS.
    pub struct TlsVersions {
        pub min: Option<TlsVersion>,
        pub max: Option<TlsVersion>,
    }
}

impl TlsVersions {
    /// Judges the bounds, each and together.
    pub fn validate(&self, path: &Path, out: &mut Violations) {
        for (field, bound) in [("min", &self.min), ("max", &self.max)] {
            if bound.as_ref().is_some_and(|bound| !bound.is_known()) {
                out.add(path.field(field), must_be_one_of(field, TlsVersion::KNOWN));
            }
        }
        let explicit = |bound: &Option<TlsVersion>| {
            bound.clone().filter(|bound| bound.is_known() && *bound != TlsVersion::TlsAuto)
        };
        if let (Some(min), Some(max)) = (explicit(&self.min), explicit(&self.max))
            && min > max
        {
            out.add(path.field("min"), "min version must be lower than max");
        }
    }
}
