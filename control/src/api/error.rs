//! Errors as clients see them, in Kuma's form.

use axum::response::{IntoResponse, Response};
use http::StatusCode;
use serde_json::{Map, Value, json};
use ursa_model::{ParseError, Violations};

use super::respond;
use crate::{access::Denied, store::StoreError, tokens::TokenError};

/// An answer that isn't what was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiError {
    /// The HTTP status.
    pub status: StatusCode,
    /// What was tried.
    pub title: String,
    /// What was found.
    pub detail: String,
    /// Which fields are wrong, and why.
    pub invalid: Vec<(String, String)>,
}

impl ApiError {
    /// An error with a status, what was tried and what was found.
    pub fn new(status: StatusCode, title: impl Into<String>, detail: impl Into<String>) -> Self {
        Self { status, title: title.into(), detail: detail.into(), invalid: Vec::new() }
    }

    /// The request can't be understood.
    pub fn bad_request(detail: impl std::fmt::Display) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "Bad Request", format!("bad request: {detail}"))
    }

    /// There is no such thing. The peer says only "Not found"; this goes on with what was asked for.
    pub fn not_found(title: impl Into<String>, what: impl std::fmt::Display) -> Self {
        Self::new(StatusCode::NOT_FOUND, title, format!("Not found: {what}"))
    }

    /// Fields are wrong.
    pub fn invalid(title: impl Into<String>, violations: Violations) -> Self {
        let invalid = violations.into_iter().map(|found| (found.field, found.message)).collect();
        Self { invalid, ..Self::new(StatusCode::BAD_REQUEST, title, "Resource is not valid") }
    }

    /// One parameter is wrong.
    pub fn parameter(title: &str, detail: &str, field: impl Into<String>, reason: impl Into<String>) -> Self {
        let invalid = vec![(field.into(), reason.into())];
        Self { invalid, ..Self::new(StatusCode::BAD_REQUEST, title, detail) }
    }

    /// This can't be written here.
    pub fn method_not_allowed(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "Method not Allowed", detail)
    }

    /// Nobody knows who asks.
    pub fn unauthenticated(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::UNAUTHORIZED, "Invalid authentication data", detail)
    }

    /// The store's error, of an operation that `title` names.
    pub fn store(title: impl Into<String>, error: &StoreError) -> Self {
        match error {
            StoreError::NotFound(what) => Self::not_found(title, what),
            StoreError::Exists(_) | StoreError::Conflict(_) => {
                Self::new(StatusCode::CONFLICT, "Conflict", error.to_string())
            }
            StoreError::Full(_) | StoreError::Closed => {
                tracing::error!(%error, "the store can't serve");
                Self::new(StatusCode::SERVICE_UNAVAILABLE, "Service unavailable", error.to_string())
            }
            _ => {
                let title = title.into();
                tracing::error!(%error, %title, "the store failed");
                Self::new(StatusCode::INTERNAL_SERVER_ERROR, title, "Internal Server Error")
            }
        }
    }

    /// A text is no resource.
    pub fn parse(title: &str, kind: &str, error: ParseError) -> Self {
        match error {
            ParseError::Invalid(violations) => Self::invalid(title, violations),
            ParseError::UnknownType(_) => Self::bad_request(error),
            ParseError::Malformed(reason) => Self::new(
                StatusCode::BAD_REQUEST,
                "Bad Request",
                format!("invalid {kind} object: {reason:?}"),
            ),
        }
    }

    /// The error's body.
    pub fn body(&self) -> Value {
        let mut body = Map::new();
        body.insert("type".into(), json!("/std-errors"));
        body.insert("status".into(), json!(self.status.as_u16()));
        body.insert("title".into(), json!(self.title));
        body.insert("detail".into(), json!(self.detail));
        // The same again for clients from before problem details.
        body.insert("details".into(), json!(self.detail));
        if !self.invalid.is_empty() {
            let list = |word: &str| -> Value {
                self.invalid.iter().map(|(field, reason)| json!({ "field": field, word: reason })).collect()
            };
            body.insert("invalid_parameters".into(), list("reason"));
            body.insert("causes".into(), list("message"));
        }
        Value::Object(body)
    }
}

impl From<Denied> for ApiError {
    fn from(denied: Denied) -> Self {
        Self::new(StatusCode::FORBIDDEN, "Access Denied", denied.to_string())
    }
}

impl From<TokenError> for ApiError {
    fn from(error: TokenError) -> Self {
        match &error {
            TokenError::NoSigningKey { .. } => {
                Self::new(StatusCode::NOT_FOUND, "Signing Key not found", error.to_string())
            }
            TokenError::BadKey(..) | TokenError::Refused(_) => {
                Self::new(StatusCode::BAD_REQUEST, "Could not issue a token", error.to_string())
            }
            TokenError::Store(error) => Self::store("Could not issue a token", error),
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = respond::json(self.status, &self.body());
        if self.status == StatusCode::UNAUTHORIZED {
            response
                .headers_mut()
                .insert(http::header::WWW_AUTHENTICATE, http::HeaderValue::from_static("Bearer"));
        }
        response
    }
}
