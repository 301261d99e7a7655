//! `ursa.v1.Session`: one stream per node. That it is open means that the node lives.

use std::future::Future;
use std::sync::Arc;

use http::uri::PathAndQuery;
use prost::{Message, Oneof};
use tokio_stream::Stream;
use tonic::{IntoStreamingRequest, Request, Response, Status, Streaming};
use tonic_prost::ProstCodec;

use crate::rpc;

const OPEN: &str = "/ursa.v1.Session/Open";

/// From a node.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct NodeMessage {
    /// What it is about.
    #[prost(oneof = "NodeEvent", tags = "1, 2, 3, 4")]
    pub event: Option<NodeEvent>,
}

/// The kinds of [`NodeMessage`].
#[derive(Clone, PartialEq, Eq, Oneof)]
pub enum NodeEvent {
    /// A workload appeared, or its Dataplane changed.
    #[prost(message, tag = "1")]
    Register(Register),
    /// A workload is gone for good.
    #[prost(message, tag = "2")]
    Deregister(ProxyRef),
    /// Something about a workload that belongs into its insight.
    #[prost(message, tag = "3")]
    Status(ProxyStatus),
    /// The answer to a [`ControlRequest`].
    #[prost(message, tag = "4")]
    Reply(Reply),
}

/// Registers a Dataplane.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Register {
    /// The Dataplane in its REST form.
    #[prost(string, tag = "1")]
    pub dataplane_json: String,
    /// A dataplane token, if the node's grant doesn't cover the workload.
    #[prost(string, tag = "2")]
    pub token: String,
}

/// Names a Dataplane.
#[derive(Clone, PartialEq, Eq, Hash, Message)]
pub struct ProxyRef {
    /// Its mesh.
    #[prost(string, tag = "1")]
    pub mesh: String,
    /// Its name.
    #[prost(string, tag = "2")]
    pub name: String,
}

/// What a node knows about a workload.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct ProxyStatus {
    /// The Dataplane's mesh.
    #[prost(string, tag = "1")]
    pub mesh: String,
    /// The Dataplane's name.
    #[prost(string, tag = "2")]
    pub name: String,
    /// A JSON object: `version` as in DataplaneInsight.
    #[prost(string, tag = "3")]
    pub json: String,
}

/// The answer to a [`ControlRequest`].
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Reply {
    /// The request's id.
    #[prost(uint64, tag = "1")]
    pub id: u64,
    /// `{"result": …}`, or `{"error": "…"}`.
    #[prost(string, tag = "2")]
    pub json: String,
}

/// From control.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct ControlMessage {
    /// What it is about.
    #[prost(oneof = "ControlEvent", tags = "1, 2, 3")]
    pub event: Option<ControlEvent>,
}

/// The kinds of [`ControlMessage`].
#[derive(Clone, PartialEq, Eq, Oneof)]
pub enum ControlEvent {
    /// A Dataplane is stored, and its discovery streams may open.
    #[prost(message, tag = "1")]
    Registered(ProxyRef),
    /// A Dataplane was refused.
    #[prost(message, tag = "2")]
    Refused(Refused),
    /// Control wants something from the node.
    #[prost(message, tag = "3")]
    Request(ControlRequest),
}

/// Why a Dataplane was refused.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Refused {
    /// Its mesh, if it could be read.
    #[prost(string, tag = "1")]
    pub mesh: String,
    /// Its name, if it could be read.
    #[prost(string, tag = "2")]
    pub name: String,
    /// What was wrong and what to do.
    #[prost(string, tag = "3")]
    pub reason: String,
    /// Trying again without a change is of no use.
    #[prost(bool, tag = "4")]
    pub permanent: bool,
}

/// Control wants something from the node, such as a dump.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct ControlRequest {
    /// To be repeated in the [`Reply`].
    #[prost(uint64, tag = "1")]
    pub id: u64,
    /// `config-dump`, `stats`, `clusters`.
    #[prost(string, tag = "2")]
    pub kind: String,
    /// Parameters: `mesh`, `name`; `includeEds` for a dump, `format` (`json`, else text) for the others.
    #[prost(string, tag = "3")]
    pub json: String,
}

impl From<NodeEvent> for NodeMessage {
    fn from(event: NodeEvent) -> Self {
        Self { event: Some(event) }
    }
}

impl From<ControlEvent> for ControlMessage {
    fn from(event: ControlEvent) -> Self {
        Self { event: Some(event) }
    }
}

/// What the server implements.
pub trait Session: Send + Sync + 'static {
    /// The stream towards the node.
    type Stream: Stream<Item = Result<ControlMessage, Status>> + Send + 'static;

    /// Called once per stream; the connection authenticates the node.
    fn open(
        &self,
        messages: Request<Streaming<NodeMessage>>,
    ) -> impl Future<Output = Result<Response<Self::Stream>, Status>> + Send;
}

rpc::server! {
    /// Serves [`Session`].
    SessionServer<Session>, "ursa.v1.Session", {
        OPEN => |handler, request| rpc::streaming(request, crate::discovery::MAX_MESSAGE, move |messages| {
            let handler = Arc::clone(&handler);
            async move { handler.open(messages).await }
        }),
    }
}

rpc::client! {
    /// A client of [`Session`].
    SessionClient {
        /// Opens the node's session.
        pub async fn open(
            &mut self,
            messages: impl IntoStreamingRequest<Message = NodeMessage>,
        ) -> Result<Response<Streaming<ControlMessage>>, Status> {
            self.grpc.ready().await.map_err(rpc::not_ready)?;
            self.grpc
                .streaming(
                    messages.into_streaming_request(),
                    PathAndQuery::from_static(OPEN),
                    ProstCodec::<NodeMessage, ControlMessage>::default(),
                )
                .await
        }
    }
}
