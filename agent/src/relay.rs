//! Delta ADS towards Envoy from a cache that control fills, or from the last-good configuration.
//!
//! The relay ends the protocol on both sides: control's stream fills a [`Cache`] per workload, and every Envoy that
//! connects gets a [`Downstream`] of its own with its own nonces. The agent owns the cache; while no agent is
//! attached, the shim answers with the same code from what is on disk ([`serve_last_good`]).

mod access;
mod cache;
mod downstream;
mod kind;
mod last_good;
mod resource;
mod server;
mod upstream;

pub use cache::{Cache, Item, Rejection, Source, Unapplied};
pub use downstream::{Downstream, Request, Response};
pub use kind::Kind;
pub use last_good::{LastGood, LastGoodError, Reader};
pub(crate) use last_good::{hex, write_atomic};
pub(crate) use resource::value;
pub use resource::{ResourceError, item_from_encoded};
pub use server::{Admit, ServeError, children_of, is_of, serve, serve_last_good};
pub use upstream::{Upstream, UpstreamState};
