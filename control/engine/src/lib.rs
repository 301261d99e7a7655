//! The engine: resources in, Envoy configuration out.
//!
//! Pure and synchronous: no IO, no clock, no tasks. The caller owns one [`Engine`], feeds it [`Change`]s and
//! reads [`Snapshot`]s. How a change travels, file by file:
//!
//! 1. `input`: an object is projected to what configuration depends on and hashed; an equal projection ends here.
//! 2. `graph`: what the object is in its mesh (dataplane, service, identity, trust, policy), with indexes from
//!    labels to dataplanes, so that a selector costs what it selects.
//! 3. `policy`: which policies select which proxy, in which order, merged into one configuration per destination.
//! 4. `policies`: one file per policy: its configuration, its defaults, and what it does to Envoy resources.
//! 5. `xds`: the Envoy resources themselves, one file per kind; `envoy` encodes and versions them.
//! 6. `view` holds what proxies share, `own` what is one proxy's.
//! 7. `engine`: keeps derived values current for connected proxies and says which resources of whom changed.
//!
//! Proxies that see the same policies under the same identity share one `view` (all outbound resources), so a
//! change costs per view and not per proxy, and each resource exists once in memory.

mod encoded;
mod engine;
mod envoy;
mod graph;
mod input;
mod own;
mod policies;
mod policy;
mod resources;
mod shared;
mod snapshot;
mod touched;
mod view;
mod views;
mod xds;

pub use encoded::{Encoded, TypeUrl};
pub use engine::{Change, Counters, Engine, EngineConfig, Outcome};
pub use resources::{Name, WorkloadIdentity};
pub use snapshot::{Names, ProxyKey, Snapshot};
