//! Envoy's messages: short names for the types in use, and their canonical, versioned encoding.
//!
//! This module and `xds` are the only places that know the package the types come from.

pub(crate) mod canonical;
pub(crate) mod encode;
pub(crate) mod types;
