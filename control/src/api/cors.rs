//! Requests of web pages from elsewhere: allowed from the origins in `apiServer.corsAllowedDomains` only.
//!
//! Browsers ask first, without credentials, so this comes before authentication. It opens nothing by itself: a page
//! that may ask still needs a token, and `localhostIsAdmin` never holds for a page of another origin.

use std::sync::Arc;

use axum::{
    extract::{Request, State},
    middleware::Next,
    response::{IntoResponse, Response},
};
use http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use regex::Regex;

const METHODS: HeaderValue = HeaderValue::from_static("GET, PUT, POST, DELETE");
const HEADERS: HeaderValue = HeaderValue::from_static("authorization, content-type");
/// Seconds for which a browser needn't ask again.
const MAX_AGE: HeaderValue = HeaderValue::from_static("600");

/// The origins that may ask.
#[derive(Debug, Clone, Default)]
pub struct Origins(Arc<Vec<Origin>>);

#[derive(Debug)]
enum Origin {
    /// `https://ui.example.com`
    Exact(String),
    /// `https://.*\.example\.com`, of the whole origin.
    Pattern(Regex),
}

impl Origins {
    /// Reads the configured list; an entry is an origin, or a regular expression of whole origins.
    pub fn parse(domains: &[String]) -> Result<Self, regex::Error> {
        let literal = |c: char| c.is_ascii_alphanumeric() || ".:/-_[]".contains(c);
        let parse = |domain: &String| {
            Ok(if domain == "*" {
                Origin::Pattern(Regex::new("")?)
            } else if domain.chars().all(literal) {
                Origin::Exact(domain.trim_end_matches('/').to_owned())
            } else {
                Origin::Pattern(Regex::new(&format!("^(?:{domain})$"))?)
            })
        };
        domains.iter().map(parse).collect::<Result<Vec<_>, _>>().map(|all| Self(Arc::new(all)))
    }

    /// The request's origin, if it may ask.
    fn allowed(&self, headers: &HeaderMap) -> Option<HeaderValue> {
        let value = headers.get(header::ORIGIN)?;
        let text = value.to_str().ok()?;
        let fits = |origin: &Origin| match origin {
            Origin::Exact(exact) => exact.eq_ignore_ascii_case(text),
            Origin::Pattern(pattern) => pattern.is_match(text),
        };
        self.0.iter().any(fits).then(|| value.clone())
    }
}

/// Answers a browser's question, and marks answers that a page of an allowed origin may read.
pub(super) async fn allow(State(origins): State<Origins>, request: Request, next: Next) -> Response {
    let allowed = origins.allowed(request.headers());
    let asks = request.method() == Method::OPTIONS
        && request.headers().contains_key(header::ACCESS_CONTROL_REQUEST_METHOD);
    let mut response = if asks && allowed.is_some() {
        let answer = [
            (header::ACCESS_CONTROL_ALLOW_METHODS, METHODS),
            (header::ACCESS_CONTROL_ALLOW_HEADERS, HEADERS),
            (header::ACCESS_CONTROL_MAX_AGE, MAX_AGE),
        ];
        (StatusCode::NO_CONTENT, answer).into_response()
    } else {
        next.run(request).await
    };
    if !origins.0.is_empty() {
        // The answer depends on who asks, and caches must know.
        response.headers_mut().append(header::VARY, HeaderValue::from_static("origin"));
    }
    if let Some(origin) = allowed {
        response.headers_mut().insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
        response
            .headers_mut()
            .insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, HeaderValue::from_static("warning"));
    }
    response
}
