//! The few lines that every hand-written gRPC service shares.

use std::convert::Infallible;
use std::future::Future;

use http::{HeaderValue, Response, StatusCode};
use prost::Message;
use tonic::body::Body;
use tonic::codegen::{Body as HttpBody, BoxFuture, StdError};
use tonic::{Request, Status, Streaming};
use tonic_prost::ProstCodec;
use tower::service_fn;

/// What a server answers with: the HTTP response carries every gRPC error.
pub(crate) type ServerFuture = BoxFuture<Response<Body>, Infallible>;

/// Serves one unary method.
pub(crate) fn unary<In, Out, B, F, Fut>(request: http::Request<B>, method: F) -> ServerFuture
where
    In: Message + Default + 'static,
    Out: Message + Default + 'static,
    B: HttpBody + Send + 'static,
    B::Error: Into<StdError> + Send + 'static,
    F: FnMut(Request<In>) -> Fut + Send + 'static,
    Fut: Future<Output = Result<tonic::Response<Out>, Status>> + Send + 'static,
{
    Box::pin(async move {
        let mut grpc = tonic::server::Grpc::new(ProstCodec::<Out, In>::default());
        Ok(grpc.unary(service_fn(method), request).await)
    })
}

/// Serves one method with a stream in each direction.
pub(crate) fn streaming<In, Out, S, B, F, Fut>(
    request: http::Request<B>,
    limit: usize,
    method: F,
) -> ServerFuture
where
    In: Message + Default + 'static,
    Out: Message + Default + 'static,
    S: tokio_stream::Stream<Item = Result<Out, Status>> + Send + 'static,
    B: HttpBody + Send + 'static,
    B::Error: Into<StdError> + Send + 'static,
    F: FnMut(Request<Streaming<In>>) -> Fut + Send + 'static,
    Fut: Future<Output = Result<tonic::Response<S>, Status>> + Send + 'static,
{
    Box::pin(async move {
        let mut grpc =
            tonic::server::Grpc::new(ProstCodec::<Out, In>::default()).max_decoding_message_size(limit);
        Ok(grpc.streaming(service_fn(method), request).await)
    })
}

/// The answer to a method that the service doesn't have.
pub(crate) fn unimplemented() -> ServerFuture {
    Box::pin(async {
        let mut response = Response::new(Body::default());
        *response.status_mut() = StatusCode::OK;
        let headers = response.headers_mut();
        headers.insert(Status::GRPC_STATUS, HeaderValue::from(tonic::Code::Unimplemented as i32));
        headers.insert(http::header::CONTENT_TYPE, tonic::metadata::GRPC_CONTENT_TYPE);
        Ok(response)
    })
}

/// A client was not ready: the connection is gone or could not be made.
pub(crate) fn not_ready(error: impl Into<StdError>) -> Status {
    Status::unavailable(format!("the connection is not usable: {}", error.into()))
}

/// Declares a client struct, its constructor, and the bounds that tonic wants of a transport.
macro_rules! client {
    ($(#[$doc:meta])* $name:ident { $($methods:item)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone)]
        pub struct $name<C> {
            grpc: tonic::client::Grpc<C>,
        }

        impl<C> $name<C>
        where
            C: tonic::client::GrpcService<tonic::body::Body>,
            C::Error: Into<tonic::codegen::StdError>,
            C::ResponseBody: tonic::codegen::Body<Data = bytes::Bytes> + Send + 'static,
            <C::ResponseBody as tonic::codegen::Body>::Error: Into<tonic::codegen::StdError> + Send,
        {
            /// A client over `channel`, usually a [`tonic::transport::Channel`].
            pub fn new(channel: C) -> Self {
                Self {
                    grpc: tonic::client::Grpc::new(channel)
                        .max_decoding_message_size($crate::discovery::MAX_MESSAGE)
                        .max_encoding_message_size($crate::discovery::MAX_MESSAGE),
                }
            }

            $($methods)*
        }
    };
}
pub(crate) use client;

/// Declares a server struct around a handler trait, and the dispatch by path.
macro_rules! server {
    ($(#[$doc:meta])* $name:ident<$trait:ident>, $service:literal, { $($path:pat => $call:expr),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug)]
        pub struct $name<T> {
            handler: std::sync::Arc<T>,
        }

        impl<T> $name<T> {
            /// Serves with `handler`.
            pub fn new(handler: std::sync::Arc<T>) -> Self {
                Self { handler }
            }
        }

        impl<T> Clone for $name<T> {
            fn clone(&self) -> Self {
                Self { handler: std::sync::Arc::clone(&self.handler) }
            }
        }

        impl<T> tonic::server::NamedService for $name<T> {
            const NAME: &'static str = $service;
        }

        impl<T, B> tonic::codegen::Service<http::Request<B>> for $name<T>
        where
            T: $trait,
            B: tonic::codegen::Body + Send + 'static,
            B::Error: Into<tonic::codegen::StdError> + Send + 'static,
        {
            type Response = http::Response<tonic::body::Body>;
            type Error = std::convert::Infallible;
            type Future = crate::rpc::ServerFuture;

            fn poll_ready(
                &mut self,
                _context: &mut std::task::Context<'_>,
            ) -> std::task::Poll<Result<(), Self::Error>> {
                std::task::Poll::Ready(Ok(()))
            }

            fn call(&mut self, request: http::Request<B>) -> Self::Future {
                let handler = std::sync::Arc::clone(&self.handler);
                match request.uri().path() {
                    $($path => {
                        let call: fn(std::sync::Arc<T>, http::Request<B>) -> crate::rpc::ServerFuture = $call;
                        call(handler, request)
                    })*
                    _ => crate::rpc::unimplemented(),
                }
            }
        }
    };
}
pub(crate) use server;
