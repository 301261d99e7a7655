//! `ursa.v1.Identity`: a workload's certificate.

use std::future::Future;
use std::sync::Arc;

use http::uri::PathAndQuery;
use prost::Message;
use tonic::{Request, Response, Status};
use tonic_prost::ProstCodec;

use crate::rpc;

const ISSUE: &str = "/ursa.v1.Identity/Issue";

/// Asks for the certificate of one registered Dataplane.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct IssueRequest {
    /// The Dataplane's mesh.
    #[prost(string, tag = "1")]
    pub mesh: String,
    /// The Dataplane's name.
    #[prost(string, tag = "2")]
    pub dataplane: String,
    /// PKCS#10 in DER. Nothing but its public key is believed.
    #[prost(bytes = "vec", tag = "3")]
    pub csr_der: Vec<u8>,
}

/// A workload's certificate.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct IssuedIdentity {
    /// The name by which listeners and clusters ask for it: the KRI of the `MeshIdentity`.
    #[prost(string, tag = "1")]
    pub secret_name: String,
    /// The one URI SAN.
    #[prost(string, tag = "2")]
    pub spiffe_id: String,
    /// Leaf first.
    #[prost(string, tag = "3")]
    pub chain_pem: String,
    /// Unix seconds.
    #[prost(int64, tag = "4")]
    pub not_before: i64,
    /// Unix seconds.
    #[prost(int64, tag = "5")]
    pub not_after: i64,
    /// The CA certificates of the trust domain.
    #[prost(string, tag = "6")]
    pub bundle_pem: String,
}

/// What the server implements.
pub trait Identity: Send + Sync + 'static {
    /// Issues a certificate to the node that the connection authenticates.
    fn issue(
        &self,
        request: Request<IssueRequest>,
    ) -> impl Future<Output = Result<Response<IssuedIdentity>, Status>> + Send;
}

rpc::server! {
    /// Serves [`Identity`].
    IdentityServer<Identity>, "ursa.v1.Identity", {
        ISSUE => |handler, request| rpc::unary(request, move |message| {
            let handler = Arc::clone(&handler);
            async move { handler.issue(message).await }
        }),
    }
}

rpc::client! {
    /// A client of [`Identity`].
    IdentityClient {
        /// Asks for a certificate.
        pub async fn issue(&mut self, request: IssueRequest) -> Result<IssuedIdentity, Status> {
            self.grpc.ready().await.map_err(rpc::not_ready)?;
            self.grpc
                .unary(
                    Request::new(request),
                    PathAndQuery::from_static(ISSUE),
                    ProstCodec::<IssueRequest, IssuedIdentity>::default(),
                )
                .await
                .map(Response::into_inner)
        }
    }
}
