//! The gRPC service of delta ADS, both sides.

use std::future::Future;
use std::sync::Arc;

use http::uri::PathAndQuery;
use tokio_stream::Stream;
use tonic::{IntoStreamingRequest, Request, Response, Status, Streaming};
use tonic_prost::ProstCodec;

use super::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, MAX_MESSAGE};
use crate::rpc;

/// The method's path.
pub const METHOD: &str = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources";

/// What a server of delta ADS implements.
pub trait AggregatedDiscovery: Send + Sync + 'static {
    /// The stream of responses.
    type Stream: Stream<Item = Result<DeltaDiscoveryResponse, Status>> + Send + 'static;

    /// Called once per stream.
    fn delta(
        &self,
        requests: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> impl Future<Output = Result<Response<Self::Stream>, Status>> + Send;
}

rpc::server! {
    /// Serves delta ADS; add it to a tonic router.
    AggregatedDiscoveryServer<AggregatedDiscovery>,
    "envoy.service.discovery.v3.AggregatedDiscoveryService",
    {
        METHOD => |handler, request| rpc::streaming(request, MAX_MESSAGE, move |requests| {
            let handler = Arc::clone(&handler);
            async move { handler.delta(requests).await }
        }),
    }
}

rpc::client! {
    /// A client of delta ADS.
    AggregatedDiscoveryClient {
        /// Opens a stream.
        pub async fn delta(
            &mut self,
            requests: impl IntoStreamingRequest<Message = DeltaDiscoveryRequest>,
        ) -> Result<Response<Streaming<DeltaDiscoveryResponse>>, Status> {
            self.grpc.ready().await.map_err(rpc::not_ready)?;
            self.grpc
                .streaming(
                    requests.into_streaming_request(),
                    PathAndQuery::from_static(METHOD),
                    ProstCodec::<DeltaDiscoveryRequest, DeltaDiscoveryResponse>::default(),
                )
                .await
        }
    }
}
