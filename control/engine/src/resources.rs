//! Ursa's own resources on the discovery stream. `ursa-wire` has the same messages for their readers.

/// A mesh name that the workload's DNS answers.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Name {
    /// The host name, without a final dot.
    #[prost(string, tag = "1")]
    pub hostname: String,
    /// IPv4 and IPv6 addresses as text.
    #[prost(string, repeated, tag = "2")]
    pub addresses: Vec<String>,
    /// The listener of the address; the name appears only when Envoy has it.
    #[prost(string, tag = "3")]
    pub listener: String,
}

/// The identity that the agent obtains for the workload.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct WorkloadIdentity {
    /// The SDS name under which Envoy asks for the certificate: the KRI of the MeshIdentity.
    #[prost(string, tag = "1")]
    pub secret_name: String,
    /// The SPIFFE id that control will certify.
    #[prost(string, tag = "2")]
    pub spiffe_id: String,
    /// Its trust domain.
    #[prost(string, tag = "3")]
    pub trust_domain: String,
    /// Changes when the certificate must be obtained anew although it is still valid.
    #[prost(string, tag = "4")]
    pub generation: String,
}
