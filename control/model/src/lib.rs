//! Ursa's resources: their types, forms, names, labels and rules. No IO, no clock, no async.
//!
//! A [`Resource`] is one object in its erased form: a [`Descriptor`] that says what kind it is, its
//! [`Meta`], and a canonical spec. The typed specs live in [`types`], one file per type; the
//! [`registry`] lists them. Everything that reads or writes resources goes through these.

pub mod dataplane_token;
pub mod duration;
pub mod form;
pub mod hostname;
pub mod identity;
pub mod injection;
pub mod kri;
pub mod labels;
mod meta;
pub mod names;
pub mod policy;
pub mod protocol;
mod registry;
mod resource;
pub mod services;
pub mod sni;
pub mod spiffe;
pub mod structure;
#[cfg(test)]
mod table;
pub mod template;
pub mod types;
pub mod validate;
mod violation;
pub mod vip;
pub mod yaml;

pub use duration::GoDuration;
pub use kri::Kri;
pub use meta::Meta;
pub use protocol::Protocol;
pub use registry::{
    Codec, Descriptor, Form, Normalised, PolicyTraits, Scope, Sync, by_name, by_path, by_short_name, registry,
};
pub use resource::{NoStatus, ParseError, Resource, ResourceKey, ResourceSpec};
pub use violation::{Path, Violation, Violations};
