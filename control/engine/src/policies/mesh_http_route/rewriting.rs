//! Filters: what happens to a request that a route took.

use serde_json::Value;
use ursa_model::types::mesh_http_route::{
    Filter, FilterType, HeaderKeyValue, HeaderModifier, PathRewrite, PathRewriteType, RequestRedirect,
    UrlRewrite,
};

use super::matching::Prefix;
use crate::{
    envoy::types::{
        core::{
            HeaderValue, HeaderValueOption, RuntimeFractionalPercent, header_value_option::HeaderAppendAction,
        },
        envoy_type::{FractionalPercent, fractional_percent::DenominatorType},
        matching::RegexMatchAndSubstitute,
        route::{
            RedirectAction, Route, RouteAction,
            redirect_action::{PathRewriteSpecifier, RedirectResponseCode, SchemeRewriteSpecifier},
            route::Action,
            route_action::{HostRewriteSpecifier, RequestMirrorPolicy},
        },
    },
    xds::part,
};

/// Applies one filter. `mirrors` yields the cluster of each mirror filter in turn.
pub(super) fn apply<'a>(
    filter: &Filter,
    prefix: Option<&Prefix>,
    mirrors: &mut impl Iterator<Item = &'a Option<String>>,
    route: &mut Route,
) {
    match filter.filter_type {
        FilterType::RequestHeaderModifier => {
            if let Some(modifier) = &filter.request_header_modifier {
                route.request_headers_to_add.extend(additions(modifier));
                route.request_headers_to_remove.extend(modifier.remove.iter().cloned());
            }
        }
        FilterType::ResponseHeaderModifier => {
            if let Some(modifier) = &filter.response_header_modifier {
                route.response_headers_to_add.extend(additions(modifier));
                route.response_headers_to_remove.extend(modifier.remove.iter().cloned());
            }
        }
        FilterType::RequestRedirect => {
            if let Some(redirection) = &filter.request_redirect {
                route.action = Some(Action::Redirect(redirect(redirection, prefix)));
            }
        }
        FilterType::UrlRewrite => {
            if let (Some(wanted), Some(Action::Route(action))) = (&filter.url_rewrite, &mut route.action) {
                rewrite(wanted, prefix, action);
            }
        }
        FilterType::RequestMirror => {
            let Some(mirror) = &filter.request_mirror else { return };
            let cluster = mirrors.next().cloned().flatten();
            if let (Some(cluster), Some(Action::Route(action))) = (cluster, &mut route.action) {
                action.request_mirror_policies.push(RequestMirrorPolicy {
                    cluster,
                    runtime_fraction: mirror.percentage.as_ref().and_then(percentage),
                    ..RequestMirrorPolicy::default()
                });
            }
        }
        FilterType::Unknown(_) => {}
    }
}

fn additions(modifier: &HeaderModifier) -> impl Iterator<Item = HeaderValueOption> {
    let option = |header: &HeaderKeyValue, action: HeaderAppendAction| HeaderValueOption {
        header: Some(HeaderValue {
            key: header.name.clone(),
            value: header.value.clone(),
            ..HeaderValue::default()
        }),
        append_action: action as i32,
        ..HeaderValueOption::default()
    };
    let set = modifier.set.iter().map(move |h| option(h, HeaderAppendAction::OverwriteIfExistsOrAdd));
    let add = modifier.add.iter().map(move |h| option(h, HeaderAppendAction::AppendIfExistsOrAdd));
    set.chain(add)
}

fn redirect(wanted: &RequestRedirect, prefix: Option<&Prefix>) -> RedirectAction {
    let code = match wanted.status_code {
        Some(301) => RedirectResponseCode::MovedPermanently,
        Some(303) => RedirectResponseCode::SeeOther,
        Some(307) => RedirectResponseCode::TemporaryRedirect,
        Some(308) => RedirectResponseCode::PermanentRedirect,
        _ => RedirectResponseCode::Found,
    };
    let path = wanted.path.as_ref().and_then(|path| new_path(path, prefix)).map(|path| match path {
        NewPath::Whole(path) => PathRewriteSpecifier::PathRedirect(path),
        NewPath::Prefix(replacement) => PathRewriteSpecifier::PrefixRewrite(replacement),
    });
    RedirectAction {
        host_redirect: wanted.hostname.clone().unwrap_or_default(),
        port_redirect: wanted.port.unwrap_or_default(),
        response_code: code as i32,
        scheme_rewrite_specifier: wanted.scheme.clone().map(SchemeRewriteSpecifier::SchemeRedirect),
        path_rewrite_specifier: path,
        ..RedirectAction::default()
    }
}

fn rewrite(wanted: &UrlRewrite, prefix: Option<&Prefix>, action: &mut RouteAction) {
    if let Some(hostname) = &wanted.hostname {
        action.host_rewrite_specifier = Some(HostRewriteSpecifier::HostRewriteLiteral(hostname.clone()));
    }
    match wanted.path.as_ref().and_then(|path| new_path(path, prefix)) {
        Some(NewPath::Prefix(replacement)) => action.prefix_rewrite = replacement,
        Some(NewPath::Whole(path)) => {
            let pattern = Some(part::regex(".*"));
            action.regex_rewrite = Some(RegexMatchAndSubstitute { pattern, substitution: path });
        }
        None => {}
    }
}

enum NewPath {
    Whole(String),
    Prefix(String),
}

/// A prefix can only be replaced where one was matched.
fn new_path(wanted: &PathRewrite, prefix: Option<&Prefix>) -> Option<NewPath> {
    match wanted.rewrite_type {
        PathRewriteType::ReplaceFullPath => wanted.replace_full_path.clone().map(NewPath::Whole),
        PathRewriteType::ReplacePrefixMatch => {
            Some(NewPath::Prefix(prefix?.replacement(wanted.replace_prefix_match.as_deref()?)))
        }
        PathRewriteType::Unknown(_) => None,
    }
}

/// A number or a text such as `"12.5"`, in percent.
fn percentage(value: &Value) -> Option<RuntimeFractionalPercent> {
    let percent = value.as_f64().or_else(|| value.as_str()?.parse().ok())?;
    if !(0.0..=100.0).contains(&percent) {
        return None;
    }
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "between 0 and 1,000,000")]
    let numerator = (percent * 10_000.0).round() as u32;
    Some(RuntimeFractionalPercent {
        default_value: Some(FractionalPercent { numerator, denominator: DenominatorType::Million as i32 }),
        ..RuntimeFractionalPercent::default()
    })
}
