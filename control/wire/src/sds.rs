//! The little of `envoy.extensions.transport_sockets.tls.v3.Secret` that an agent writes: a certificate chain
//! with its key, inline.

use bytes::Bytes;
use prost::{Message, Oneof};

use crate::discovery::{EncodedResource, Resource};
use crate::type_url;

/// A named secret.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Secret {
    /// The name that listeners and clusters refer to.
    #[prost(string, tag = "1")]
    pub name: String,
    /// The content.
    #[prost(oneof = "SecretKind", tags = "2, 5")]
    pub kind: Option<SecretKind>,
}

/// The kinds of [`Secret`] that Ursa writes.
#[derive(Clone, PartialEq, Eq, Oneof)]
pub enum SecretKind {
    /// A chain and its key.
    #[prost(message, tag = "2")]
    TlsCertificate(TlsCertificate),
    /// Opaque bytes.
    #[prost(message, tag = "5")]
    GenericSecret(GenericSecret),
}

/// A chain and its key.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct TlsCertificate {
    /// PEM, leaf first.
    #[prost(message, optional, tag = "1")]
    pub certificate_chain: Option<DataSource>,
    /// PEM.
    #[prost(message, optional, tag = "2")]
    pub private_key: Option<DataSource>,
}

/// Opaque bytes.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct GenericSecret {
    /// The bytes.
    #[prost(message, optional, tag = "1")]
    pub secret: Option<DataSource>,
}

/// `envoy.config.core.v3.DataSource`, inline bytes only.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct DataSource {
    /// The bytes. A oneof in Envoy's definition, hence always written.
    #[prost(bytes = "bytes", optional, tag = "2")]
    pub inline_bytes: Option<Bytes>,
}

impl DataSource {
    /// Inline bytes.
    pub fn inline(bytes: impl Into<Bytes>) -> Self {
        Self { inline_bytes: Some(bytes.into()) }
    }
}

impl Secret {
    /// A certificate secret.
    pub fn certificate(name: &str, chain_pem: &str, key_pem: &str) -> Self {
        Self {
            name: name.to_owned(),
            kind: Some(SecretKind::TlsCertificate(TlsCertificate {
                certificate_chain: Some(DataSource::inline(chain_pem.as_bytes().to_vec())),
                private_key: Some(DataSource::inline(key_pem.as_bytes().to_vec())),
            })),
        }
    }

    /// As a discovery resource.
    pub fn to_resource(&self, version: &str) -> EncodedResource {
        Resource::new(type_url::SECRET, &self.name, version, self.encode_to_vec().into()).encoded()
    }
}
