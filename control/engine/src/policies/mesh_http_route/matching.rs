//! Matches of requests.

use ursa_model::types::mesh_http_route::{
    HeaderMatch, HeaderMatchType, PathMatchType, QueryParamMatch, QueryParamMatchType, RouteMatch,
};

use crate::{
    envoy::types::route::{
        self, HeaderMatcher, QueryParameterMatcher, header_matcher::HeaderMatchSpecifier,
        query_parameter_matcher::QueryParameterMatchSpecifier, route_match::PathSpecifier,
    },
    xds::part,
};

/// One way to spell a path match in Envoy.
pub(super) struct Path {
    pub(super) specifier: PathSpecifier,
    /// Present when a prefix was matched.
    pub(super) prefix: Option<Prefix>,
}

/// How a prefix was matched.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Prefix {
    /// The whole path is the prefix, without a final slash.
    Whole,
    /// The path goes on; the matched text ends in a slash.
    WithSlash,
}

impl Prefix {
    /// What replaces the matched text so that slashes neither double nor vanish.
    pub(super) fn replacement(self, wanted: &str) -> String {
        let wanted = wanted.trim_end_matches('/');
        match self {
            Self::WithSlash => format!("{wanted}/"),
            Self::Whole if wanted.is_empty() => "/".to_owned(),
            Self::Whole => wanted.to_owned(),
        }
    }
}

/// A prefix matches whole segments, which takes two routes: the path itself, and everything below it.
pub(super) fn paths(matches: &RouteMatch) -> Vec<Path> {
    let everything =
        || Path { specifier: PathSpecifier::Prefix("/".to_owned()), prefix: Some(Prefix::WithSlash) };
    let Some(path) = &matches.path else { return vec![everything()] };
    match path.match_type {
        PathMatchType::Exact | PathMatchType::Unknown(_) => {
            vec![Path { specifier: PathSpecifier::Path(path.value.clone()), prefix: None }]
        }
        PathMatchType::RegularExpression => {
            vec![Path { specifier: PathSpecifier::SafeRegex(part::regex(&path.value)), prefix: None }]
        }
        PathMatchType::PathPrefix => {
            let value = path.value.trim_end_matches('/');
            if value.is_empty() {
                return vec![everything()];
            }
            vec![
                Path { specifier: PathSpecifier::Path(value.to_owned()), prefix: Some(Prefix::Whole) },
                Path {
                    specifier: PathSpecifier::Prefix(format!("{value}/")),
                    prefix: Some(Prefix::WithSlash),
                },
            ]
        }
    }
}

/// The match with one of its paths.
pub(super) fn route(matches: &RouteMatch, path: PathSpecifier) -> route::RouteMatch {
    let mut headers: Vec<HeaderMatcher> = matches.headers.iter().map(header).collect();
    if let Some(method) = &matches.method {
        headers.push(HeaderMatcher {
            name: ":method".to_owned(),
            header_match_specifier: Some(HeaderMatchSpecifier::StringMatch(part::exact(method))),
            ..HeaderMatcher::default()
        });
    }
    route::RouteMatch {
        path_specifier: Some(path),
        headers,
        query_parameters: matches.query_params.iter().map(query).collect(),
        ..route::RouteMatch::default()
    }
}

pub(super) fn takes_everything(matches: &RouteMatch) -> bool {
    let any_path = matches.path.as_ref().is_none_or(|path| {
        path.match_type == PathMatchType::PathPrefix && path.value.trim_end_matches('/').is_empty()
    });
    any_path && matches.method.is_none() && matches.headers.is_empty() && matches.query_params.is_empty()
}

/// Exact paths before expressions before prefixes, the longer before the shorter; then a method, then the number
/// of headers, then that of parameters.
pub(super) fn narrowness(matches: &RouteMatch) -> (u8, usize, bool, usize, usize) {
    let (class, length) = match &matches.path {
        None => (1, 1),
        Some(path) => match path.match_type {
            PathMatchType::Exact => (3, path.value.len()),
            PathMatchType::RegularExpression => (2, path.value.len()),
            PathMatchType::PathPrefix => (1, path.value.len()),
            PathMatchType::Unknown(_) => (0, 0),
        },
    };
    (class, length, matches.method.is_some(), matches.headers.len(), matches.query_params.len())
}

fn header(wanted: &HeaderMatch) -> HeaderMatcher {
    let specifier = match wanted.match_type.as_ref().unwrap_or(&HeaderMatchType::Exact) {
        HeaderMatchType::Exact | HeaderMatchType::Unknown(_) => {
            HeaderMatchSpecifier::StringMatch(part::exact(&wanted.value))
        }
        HeaderMatchType::Prefix => HeaderMatchSpecifier::StringMatch(part::prefix(&wanted.value)),
        HeaderMatchType::RegularExpression => {
            HeaderMatchSpecifier::StringMatch(part::expression(&wanted.value))
        }
        HeaderMatchType::Present => HeaderMatchSpecifier::PresentMatch(true),
        HeaderMatchType::Absent => HeaderMatchSpecifier::PresentMatch(false),
    };
    HeaderMatcher {
        name: wanted.name.clone(),
        header_match_specifier: Some(specifier),
        ..HeaderMatcher::default()
    }
}

fn query(wanted: &QueryParamMatch) -> QueryParameterMatcher {
    let matcher = match wanted.match_type {
        QueryParamMatchType::RegularExpression => part::expression(&wanted.value),
        QueryParamMatchType::Exact | QueryParamMatchType::Unknown(_) => part::exact(&wanted.value),
    };
    QueryParameterMatcher {
        name: wanted.name.clone(),
        query_parameter_match_specifier: Some(QueryParameterMatchSpecifier::StringMatch(matcher)),
    }
}
