//! Who a request is from; everything but `/` and health is asked for it.

use axum::{
    extract::{Request, State},
    middleware::Next,
    response::{IntoResponse, Response},
};
use http::{header, request::Parts};

use super::{Shared, error::ApiError};
use crate::{
    access::{Peer, User},
    tokens::TokenError,
};

/// Finds out who asks and puts the [`User`] into the request's extensions, or refuses the request.
pub(super) async fn authenticate(State(state): State<Shared>, request: Request, next: Next) -> Response {
    if request.uri().path() == "/" {
        return next.run(request).await;
    }
    let (mut parts, body) = request.into_parts();
    let user = match identify(&state, &parts).await {
        Ok(user) => user,
        Err(error) => return error.into_response(),
    };
    if has_nul(parts.uri.path()) {
        // No name holds one, and what stores texts may cut them there.
        return ApiError::bad_request("the path holds a NUL byte").into_response();
    }
    parts.extensions.insert(user);
    next.run(Request::from_parts(parts, body)).await
}

async fn identify(state: &Shared, request: &Parts) -> Result<User, ApiError> {
    let headers = &request.headers;
    // Credentials that were given on purpose come first: then they are what counts.
    if let Some(value) = headers.get(header::AUTHORIZATION) {
        let token = value
            .to_str()
            .ok()
            .and_then(|text| text.strip_prefix("Bearer "))
            .map(str::trim)
            .filter(|token| !token.is_empty())
            .ok_or_else(|| {
                ApiError::unauthenticated("the Authorization header must be of the form: Bearer <user token>")
            })?;
        return match state.tokens.verify_user(token).await {
            Ok(claims) => Ok(User::named(claims.name, claims.groups)),
            Err(TokenError::Store(error)) => Err(ApiError::store("Could not authenticate", &error)),
            Err(error) => {
                tracing::warn!(%error, "a user token was refused");
                Err(ApiError::unauthenticated(error.to_string()))
            }
        };
    }
    let peer = request.extensions.get::<Peer>().copied();
    let authority = request.uri.authority().map(http::uri::Authority::as_str);
    if peer.is_some_and(|peer| state.access.is_operator(peer, headers, authority)) {
        return Ok(User::admin());
    }
    Err(ApiError::unauthenticated(
        "Unauthenticated: send a user token as \"Authorization: Bearer …\", or use the unix socket of the control plane as root",
    ))
}

fn has_nul(path: &str) -> bool {
    path.contains("%00")
}
