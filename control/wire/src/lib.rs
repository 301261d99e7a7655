//! What goes over gRPC between Ursa's parts, and between the agent and Envoy.
//!
//! - [`discovery`]: Envoy's delta discovery with resources as shared, already encoded bytes. The same
//!   messages serve both hops: control plane → agent (TLS) and agent → Envoy (unix socket).
//! - [`join`], [`identity`], [`session`]: Ursa's own services on the control plane's port 5678.
//! - [`resources`]: Ursa's own discovery resources; [`sds`]: the little of Envoy's secrets that an agent writes.
//! - [`ticket`]: the text form of a join ticket; [`tls`]: how a node finds and trusts its control plane.
//!
//! Messages are written by hand with prost's derive, so that no build needs `protoc`; `proto/ursa.proto`
//! describes Ursa's own services for readers and other languages.

pub mod discovery;
pub mod identity;
pub mod join;
pub mod resources;
mod rpc;
pub mod sds;
pub mod session;
pub mod ticket;
pub mod tls;
pub mod type_url;

pub use tonic::codegen::BoxStream;
