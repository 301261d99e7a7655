//! Ursa's own discovery resources. They end at the agent; Envoy never sees them.

use prost::Message;

/// A DNS entry of one workload's view ([`crate::type_url::NAME`]).
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Name {
    /// Without a final dot.
    #[prost(string, tag = "1")]
    pub hostname: String,
    /// IPv4 and IPv6 addresses as text.
    #[prost(string, repeated, tag = "2")]
    pub addresses: Vec<String>,
    /// The listener that must be acknowledged before the name may be answered.
    #[prost(string, tag = "3")]
    pub listener: String,
}

/// Which identity a workload is to hold ([`crate::type_url::WORKLOAD_IDENTITY`]).
#[derive(Clone, PartialEq, Eq, Message)]
pub struct WorkloadIdentity {
    /// The SDS name: the KRI of the `MeshIdentity`.
    #[prost(string, tag = "1")]
    pub secret_name: String,
    /// The SPIFFE id that the certificate will carry.
    #[prost(string, tag = "2")]
    pub spiffe_id: String,
    /// Its trust domain.
    #[prost(string, tag = "3")]
    pub trust_domain: String,
    /// When it changes, the certificate is to be asked for anew.
    #[prost(string, tag = "4")]
    pub generation: String,
}
