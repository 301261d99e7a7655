//! `ursa.v1.Join`: how a node gets its certificate, and renews it.

use std::future::Future;
use std::sync::Arc;

use http::uri::PathAndQuery;
use prost::Message;
use tonic::{Request, Response, Status};
use tonic_prost::ProstCodec;

use crate::rpc;

const JOIN: &str = "/ursa.v1.Join/Join";
const RENEW: &str = "/ursa.v1.Join/RenewNode";

/// Asks for a node certificate by a ticket.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct JoinRequest {
    /// The ticket's secret ([`crate::ticket::Ticket::secret`]), not its whole text.
    #[prost(string, tag = "1")]
    pub ticket: String,
    /// PKCS#10 in DER. Nothing but its public key is believed.
    #[prost(bytes = "vec", tag = "2")]
    pub csr_der: Vec<u8>,
    /// What the operator calls this machine; shown, not trusted.
    #[prost(string, tag = "3")]
    pub node_name: String,
}

/// Asks for a new certificate on the connection that the old one authenticates.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct RenewRequest {
    /// PKCS#10 in DER.
    #[prost(bytes = "vec", tag = "1")]
    pub csr_der: Vec<u8>,
}

/// A node certificate.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct NodeCertificate {
    /// Leaf first.
    #[prost(string, tag = "1")]
    pub chain_pem: String,
    /// The control CA, which also signed the server's certificate.
    #[prost(string, tag = "2")]
    pub ca_pem: String,
    /// The zone's name.
    #[prost(string, tag = "3")]
    pub zone: String,
    /// The node's id, as in the certificate's URI SAN.
    #[prost(string, tag = "4")]
    pub node_id: String,
    /// Unix seconds.
    #[prost(int64, tag = "5")]
    pub not_before: i64,
    /// Unix seconds.
    #[prost(int64, tag = "6")]
    pub not_after: i64,
}

/// What the server implements.
pub trait Join: Send + Sync + 'static {
    /// Exchanges a ticket and a public key for a node certificate. No client certificate.
    fn join(
        &self,
        request: Request<JoinRequest>,
    ) -> impl Future<Output = Result<Response<NodeCertificate>, Status>> + Send;

    /// Renews the certificate of the node that the connection authenticates.
    fn renew(
        &self,
        request: Request<RenewRequest>,
    ) -> impl Future<Output = Result<Response<NodeCertificate>, Status>> + Send;
}

rpc::server! {
    /// Serves [`Join`].
    JoinServer<Join>, "ursa.v1.Join", {
        JOIN => |handler, request| rpc::unary(request, move |message| {
            let handler = Arc::clone(&handler);
            async move { handler.join(message).await }
        }),
        RENEW => |handler, request| rpc::unary(request, move |message| {
            let handler = Arc::clone(&handler);
            async move { handler.renew(message).await }
        }),
    }
}

rpc::client! {
    /// A client of [`Join`].
    JoinClient {
        /// Exchanges a ticket and a public key for a node certificate.
        pub async fn join(&mut self, request: JoinRequest) -> Result<NodeCertificate, Status> {
            self.grpc.ready().await.map_err(rpc::not_ready)?;
            self.grpc
                .unary(
                    Request::new(request),
                    PathAndQuery::from_static(JOIN),
                    ProstCodec::<JoinRequest, NodeCertificate>::default(),
                )
                .await
                .map(Response::into_inner)
        }

        /// Renews the certificate that authenticates this connection.
        pub async fn renew(&mut self, request: RenewRequest) -> Result<NodeCertificate, Status> {
            self.grpc.ready().await.map_err(rpc::not_ready)?;
            self.grpc
                .unary(
                    Request::new(request),
                    PathAndQuery::from_static(RENEW),
                    ProstCodec::<RenewRequest, NodeCertificate>::default(),
                )
                .await
                .map(Response::into_inner)
        }
    }
}
