//! Envoy's delta discovery (`envoy.service.discovery.v3`), with resources as bytes that are encoded once.
//!
//! Fields that neither side uses are left out: protobuf readers skip what they don't know. A response's
//! resources are [`EncodedResource`]s, each an encoded [`Resource`]: on the wire a repeated message and a
//! repeated `bytes` field are the same (tag, length, payload), so sending one resource to many streams copies
//! its bytes into each connection's buffer and encodes nothing.

mod service;

use std::collections::HashMap;

use bytes::Bytes;
use prost::Message;

pub use service::{AggregatedDiscovery, AggregatedDiscoveryClient, AggregatedDiscoveryServer, METHOD};

/// An encoded [`Resource`].
pub type EncodedResource = Bytes;

/// The largest message that either side accepts.
pub const MAX_MESSAGE: usize = 64 << 20;

/// What control puts into [`ControlPlane::identifier`].
pub const CONTROL_PLANE: &str = "ursa";

/// The `system_version_info` of the response that ends the initial state of a type, and of all later ones.
pub const SYNCED: &str = "synced";

/// Who asks. Sent with the first request of a stream only.
#[derive(Clone, PartialEq, Message)]
pub struct Node {
    /// `<mesh>.<dataplane name>`.
    #[prost(string, tag = "1")]
    pub id: String,
    /// The workload's name.
    #[prost(string, tag = "2")]
    pub cluster: String,
    /// An encoded `google.protobuf.Struct`.
    #[prost(bytes = "bytes", optional, tag = "3")]
    pub metadata: Option<Bytes>,
    /// `envoy`, or `ursa-agent`.
    #[prost(string, tag = "6")]
    pub user_agent_name: String,
    /// Version of the above as text.
    #[prost(string, tag = "7")]
    pub user_agent_version: String,
}

/// `google.rpc.Status`.
#[derive(Clone, PartialEq, Message)]
pub struct ErrorDetail {
    /// A gRPC status code.
    #[prost(int32, tag = "1")]
    pub code: i32,
    /// Envoy's words; from an agent, a JSON list of [`Rejection`]s.
    #[prost(string, tag = "2")]
    pub message: String,
}

/// One resource that was refused: by Envoy in [`Applied::refused`], by the agent in [`ErrorDetail::message`].
#[derive(Clone, PartialEq, Eq, Message, serde::Serialize, serde::Deserialize)]
pub struct Rejection {
    /// The resource's name.
    #[prost(string, tag = "1")]
    pub name: String,
    /// The version that was refused.
    #[prost(string, tag = "2")]
    #[serde(default)]
    pub version: String,
    /// In the words of whoever refused it.
    #[prost(string, tag = "3")]
    pub message: String,
}

/// What Envoy has made of one type's resources; only agents say this.
///
/// An agent acknowledges a response as soon as it has stored it, so that control never waits for an Envoy that
/// is slow or dead. What Envoy acknowledged stands here, as exceptions: of everything up to and including
/// `through`, Envoy runs the newest version except where `pending` or `refused` say otherwise. Each one replaces
/// the former.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Applied {
    /// The nonce of the newest response that is taken into account; empty: what was held when the stream opened.
    #[prost(string, tag = "1")]
    pub through: String,
    /// Names whose newest version Envoy has not answered yet.
    #[prost(string, repeated, tag = "2")]
    pub pending: Vec<String>,
    /// What Envoy refused, in its words; it keeps the version before, if it had one.
    #[prost(message, repeated, tag = "3")]
    pub refused: Vec<Rejection>,
    /// No Envoy is connected to the agent: everything that isn't refused is pending.
    #[prost(bool, tag = "4")]
    pub no_envoy: bool,
}

impl Rejection {
    /// The text for [`ErrorDetail::message`].
    pub fn encode_all(rejections: &[Self]) -> String {
        serde_json::to_string(rejections).unwrap_or_default()
    }

    /// Reads [`ErrorDetail::message`]; text that is no list of rejections is one without a name.
    pub fn decode_all(message: &str) -> Vec<Self> {
        serde_json::from_str(message).unwrap_or_else(|_| {
            vec![Self { name: String::new(), version: String::new(), message: message.to_owned() }]
        })
    }
}

/// A subscription change, an acknowledgement, or a refusal.
#[derive(Clone, PartialEq, Message)]
pub struct DeltaDiscoveryRequest {
    /// Who asks; in a stream's first request.
    #[prost(message, optional, tag = "1")]
    pub node: Option<Node>,
    /// The type that this request is about.
    #[prost(string, tag = "2")]
    pub type_url: String,
    /// Names to subscribe to; `*`, or nothing in a type's first request, is everything.
    #[prost(string, repeated, tag = "3")]
    pub resource_names_subscribe: Vec<String>,
    /// Names to unsubscribe from.
    #[prost(string, repeated, tag = "4")]
    pub resource_names_unsubscribe: Vec<String>,
    /// Name → version of what the client still holds from an earlier stream; in a type's first request.
    #[prost(map = "string, string", tag = "5")]
    pub initial_resource_versions: HashMap<String, String>,
    /// The nonce of the response that this request acknowledges or refuses.
    #[prost(string, tag = "6")]
    pub response_nonce: String,
    /// Present when the response is refused.
    #[prost(message, optional, tag = "7")]
    pub error_detail: Option<ErrorDetail>,
    /// What Envoy has made of this type so far. Ours, far away from Envoy's fields; with or without a nonce.
    #[prost(message, optional, tag = "1001")]
    pub applied: Option<Applied>,
}

/// Which control plane answers.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct ControlPlane {
    /// [`CONTROL_PLANE`] or the agent's own.
    #[prost(string, tag = "1")]
    pub identifier: String,
}

/// Changes of one type since the last response.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct DeltaDiscoveryResponse {
    /// [`SYNCED`] once the type's initial state has been sent.
    #[prost(string, tag = "1")]
    pub system_version_info: String,
    /// Encoded [`Resource`]s.
    #[prost(bytes = "bytes", repeated, tag = "2")]
    pub resources: Vec<EncodedResource>,
    /// The type of all resources in this response.
    #[prost(string, tag = "4")]
    pub type_url: String,
    /// To be repeated in the acknowledgement.
    #[prost(string, tag = "5")]
    pub nonce: String,
    /// Names that no longer exist.
    #[prost(string, repeated, tag = "6")]
    pub removed_resources: Vec<String>,
    /// Which control plane answers.
    #[prost(message, optional, tag = "7")]
    pub control_plane: Option<ControlPlane>,
}

impl DeltaDiscoveryResponse {
    /// Whether the initial state of this type is complete with this response.
    pub fn is_synced(&self) -> bool {
        self.system_version_info == SYNCED
    }
}

/// `google.protobuf.Any` with shared bytes.
#[derive(Clone, PartialEq, Eq, Hash, Message)]
pub struct Any {
    /// The type of `value`.
    #[prost(string, tag = "1")]
    pub type_url: String,
    /// An encoded message of that type.
    #[prost(bytes = "bytes", tag = "2")]
    pub value: Bytes,
}

/// One named and versioned resource.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Resource {
    /// Changes whenever the content does.
    #[prost(string, tag = "1")]
    pub version: String,
    /// The content.
    #[prost(message, optional, tag = "2")]
    pub resource: Option<Any>,
    /// Unique within its type and stream.
    #[prost(string, tag = "3")]
    pub name: String,
}

impl Resource {
    /// A resource with content.
    pub fn new(type_url: &str, name: &str, version: &str, value: Bytes) -> Self {
        Self {
            version: version.to_owned(),
            resource: Some(Any { type_url: type_url.to_owned(), value }),
            name: name.to_owned(),
        }
    }

    /// Encodes once; the result may be put into any number of responses.
    pub fn encoded(&self) -> EncodedResource {
        Bytes::from(self.encode_to_vec())
    }

    /// Reads an encoded resource. The content shares `encoded`'s memory.
    pub fn parse(encoded: &EncodedResource) -> Result<Self, prost::DecodeError> {
        Self::decode(encoded.clone())
    }

    /// The content's bytes, empty if absent.
    pub fn value(&self) -> Bytes {
        self.resource.as_ref().map(|any| any.value.clone()).unwrap_or_default()
    }
}
