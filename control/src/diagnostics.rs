//! Health and metrics on the loopback diagnostics port.

mod metrics;

use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

pub use metrics::Metrics;

use crate::world::World;

#[derive(Clone)]
struct Shared {
    world: World,
    metrics: Arc<Metrics>,
}

/// Serves `/ready`, `/healthy` and `/metrics` until `shutdown`.
pub async fn serve(
    listener: TcpListener,
    world: World,
    metrics: Arc<Metrics>,
    shutdown: CancellationToken,
) -> std::io::Result<()> {
    let router = Router::new()
        .route("/ready", get(ready))
        .route("/healthy", get(|| async { "OK\n" }))
        .route("/metrics", get(text))
        .with_state(Shared { world, metrics });
    axum::serve(listener, router).with_graceful_shutdown(shutdown.cancelled_owned()).await
}

async fn ready(State(shared): State<Shared>) -> Response {
    if shared.world.is_ready() {
        "OK\n".into_response()
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "the store has not been read yet\n").into_response()
    }
}

async fn text(State(shared): State<Shared>) -> Response {
    match shared.metrics.encode() {
        Ok(text) => ([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], text).into_response(),
        Err(error) => {
            (StatusCode::INTERNAL_SERVER_ERROR, format!("can't write metrics: {error}\n")).into_response()
        }
    }
}
