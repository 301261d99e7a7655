//! Bodies, in and out.

use std::time::Duration;

use axum::{
    body::Body,
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, StatusCode, header};
use serde::Serialize;
use serde_json::{
    Value,
    ser::{PrettyFormatter, Serializer},
};

use super::error::ApiError;

/// A client that sends slower than this isn't waited for.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);

/// A JSON answer, indented by one space as Kuma's.
pub(super) fn json(status: StatusCode, value: &Value) -> Response {
    let mut text = Vec::with_capacity(1024);
    let mut serializer = Serializer::with_formatter(&mut text, PrettyFormatter::with_indent(b" "));
    if let Err(error) = value.serialize(&mut serializer) {
        tracing::error!(%error, "an answer can't be written as JSON");
        return StatusCode::INTERNAL_SERVER_ERROR.into_response();
    }
    text.push(b'\n');
    let kind = HeaderValue::from_static("application/json");
    (status, [(header::CONTENT_TYPE, kind)], text).into_response()
}

/// A JSON answer with status 200.
pub(super) fn ok(value: &Value) -> Response {
    json(StatusCode::OK, value)
}

/// So much of a body that is refused is still taken and thrown away: a client that is cut off while it sends sees a
/// broken connection instead of the answer.
const DISCARD: u64 = 64 * 1024 * 1024;
/// And for so long.
const DISCARD_TIMEOUT: Duration = Duration::from_secs(10);

/// Takes what a client sends, keeps nothing of it, and ends at the limits above.
async fn discard(mut body: Body) {
    let all = async {
        let mut taken = 0;
        while let Some(Ok(frame)) = http_body_util::BodyExt::frame(&mut body).await {
            taken += frame.data_ref().map_or(0, |data| data.len() as u64);
            if taken > DISCARD {
                return;
            }
        }
    };
    // One that is slower, or sends more, is cut off.
    let _ = tokio::time::timeout(DISCARD_TIMEOUT, all).await;
}

/// Reads a body up to a limit. Of a body that announces to be longer nothing is kept.
pub(super) async fn body(headers: &HeaderMap, body: Body, limit: u64) -> Result<Bytes, ApiError> {
    let too_long = || {
        ApiError::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            "Request body too large",
            format!(
                "the request's body is longer than the limit of {limit} bytes; send smaller resources, or raise apiServer.maxBodyBytes"
            ),
        )
    };
    let announced =
        headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    if announced.is_some_and(|length| length > limit) {
        discard(body).await;
        return Err(too_long());
    }
    let most = usize::try_from(limit).unwrap_or(usize::MAX);
    let limited = http_body_util::Limited::new(body, most);
    match tokio::time::timeout(BODY_TIMEOUT, http_body_util::BodyExt::collect(limited)).await {
        Ok(Ok(collected)) => Ok(collected.to_bytes()),
        Ok(Err(error)) if error.is::<http_body_util::LengthLimitError>() => Err(too_long()),
        Ok(Err(error)) => Err(ApiError::bad_request(format_args!("the request's body broke off: {error}"))),
        Err(_) => Err(ApiError::new(
            StatusCode::REQUEST_TIMEOUT,
            "Request timeout",
            format!("the request's body didn't arrive within {} seconds", BODY_TIMEOUT.as_secs()),
        )),
    }
}
