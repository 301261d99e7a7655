//! MeshHTTPRoute: which requests go where.

use std::collections::BTreeSet;

use crate::{
    meta::Meta,
    names,
    policy::{BackendRef, TargetRef},
    registry::{Descriptor, PolicyTraits},
    resource::{NoStatus, ResourceSpec},
    spec_struct,
    validate::{self, TargetRefRules},
    violation::{Path, Violations},
};

/// All that is known of the type.
pub static DESCRIPTOR: Descriptor = Descriptor::policy::<MeshHTTPRoute>(
    PolicyTraits::TO,
    "MeshHTTPRoute",
    "meshhttproutes",
    "mhttpr",
    "Mesh HTTP Route",
    "Mesh HTTP Routes",
);

crate::open_enum! {
    /// How a path is compared.
    pub enum PathMatchType { Exact = "Exact", PathPrefix = "PathPrefix", RegularExpression = "RegularExpression" }
    /// How a query parameter is compared.
    pub enum QueryParamMatchType { Exact = "Exact", RegularExpression = "RegularExpression" }
    /// How a header is compared.
    pub enum HeaderMatchType {
        Exact = "Exact", Present = "Present", RegularExpression = "RegularExpression", Absent = "Absent", Prefix = "Prefix",
    }
    /// What a filter does.
    pub enum FilterType {
        RequestHeaderModifier = "RequestHeaderModifier",
        ResponseHeaderModifier = "ResponseHeaderModifier",
        RequestRedirect = "RequestRedirect",
        UrlRewrite = "URLRewrite",
        RequestMirror = "RequestMirror",
    }
    /// How a path is rewritten.
    pub enum PathRewriteType { ReplaceFullPath = "ReplaceFullPath", ReplacePrefixMatch = "ReplacePrefixMatch" }
}

spec_struct! {
    /// Routes of requests to destinations.
    pub struct MeshHTTPRoute {
        pub target_ref: Option<TargetRef>,
        pub to: Vec<To>,
    }
    /// Routes to one destination.
    pub struct To {
        pub target_ref: TargetRef,
        pub hostnames: Vec<String>,
        pub rules: Vec<Rule>,
    }
    /// What to do with the requests that match.
    pub struct Rule {
        pub matches: Vec<RouteMatch>,
        pub default: RuleConf,
    }
    /// What to do.
    pub struct RuleConf {
        pub filters: Option<Vec<Filter>>,
        pub backend_refs: Option<Vec<BackendRef>>,
    }
    /// All parts must hold.
    pub struct RouteMatch {
        pub path: Option<PathMatch>,
        pub method: Option<String>,
        pub query_params: Vec<QueryParamMatch>,
        pub headers: Vec<HeaderMatch>,
    }
    /// Compares the path.
    pub struct PathMatch {
        #[serde(rename = "type")]
        pub match_type: PathMatchType,
        pub value: String,
    }
    /// Compares a query parameter.
    pub struct QueryParamMatch {
        #[serde(rename = "type")]
        pub match_type: QueryParamMatchType,
        pub name: String,
        pub value: String,
    }
    /// Compares a header.
    pub struct HeaderMatch {
        #[serde(rename = "type")]
        pub match_type: Option<HeaderMatchType>,
        pub name: String,
        pub value: String,
    }
    /// Something done to a request or response.
    pub struct Filter {
        #[serde(rename = "type")]
        pub filter_type: FilterType,
        pub request_header_modifier: Option<HeaderModifier>,
        pub response_header_modifier: Option<HeaderModifier>,
        pub request_redirect: Option<RequestRedirect>,
        pub url_rewrite: Option<UrlRewrite>,
        pub request_mirror: Option<RequestMirror>,
    }
    /// Changes headers.
    pub struct HeaderModifier {
        pub set: Vec<HeaderKeyValue>,
        pub add: Vec<HeaderKeyValue>,
        pub remove: Vec<String>,
    }
    /// A header.
    pub struct HeaderKeyValue {
        pub name: String,
        pub value: String,
    }
    /// Answers with a redirect.
    pub struct RequestRedirect {
        pub scheme: Option<String>,
        pub hostname: Option<String>,
        pub path: Option<PathRewrite>,
        pub port: Option<u32>,
        pub status_code: Option<u32>,
    }
    /// Changes host or path.
    pub struct UrlRewrite {
        pub hostname: Option<String>,
        pub path: Option<PathRewrite>,
        pub host_to_backend_hostname: bool,
    }
    /// The new path.
    pub struct PathRewrite {
        #[serde(rename = "type")]
        pub rewrite_type: PathRewriteType,
        pub replace_full_path: Option<String>,
        pub replace_prefix_match: Option<String>,
    }
    /// Sends a copy elsewhere.
    pub struct RequestMirror {
        pub percentage: Option<serde_json::Value>,
        pub backend_ref: BackendRef,
    }
}

impl ResourceSpec for MeshHTTPRoute {
    const DESCRIPTOR: &'static Descriptor = &DESCRIPTOR;
    type Status = NoStatus;

    fn validate(&self, _meta: &Meta, out: &mut Violations) {
        validate::top_level(self.target_ref.as_ref(), false, out);
        for (i, to) in self.to.iter().enumerate() {
            let path = Path::spec().field("to").index(i);
            let rules = TargetRefRules { kinds: validate::SERVICE_KINDS, is_inbound: false };
            validate::target_ref(&path.field("targetRef"), &to.target_ref, rules, out);
            for (j, rule) in to.rules.iter().enumerate() {
                rule.validate(&path.field("rules").index(j), out);
            }
            if !to.hostnames.is_empty() {
                out.add(path.field("hostnames"), validate::MUST_NOT_BE_DEFINED);
            }
        }
    }
}

impl Rule {
    fn validate(&self, path: &Path, out: &mut Violations) {
        for (i, entry) in self.matches.iter().enumerate() {
            entry.validate(&path.field("matches").index(i), out);
        }
        let path = path.field("default");
        let is_prefix = |entry: &RouteMatch| {
            entry.path.as_ref().is_some_and(|path| path.match_type == PathMatchType::PathPrefix)
        };
        let all_prefixes = self.matches.iter().all(is_prefix);
        for (i, filter) in self.default.filters.iter().flatten().enumerate() {
            filter.validate(&path.field("filters").index(i), all_prefixes, out);
        }
        for (i, backend) in self.default.backend_refs.iter().flatten().enumerate() {
            validate::backend_ref(&path.field("backendRefs").index(i), backend, out);
        }
    }
}

impl RouteMatch {
    fn validate(&self, path: &Path, out: &mut Violations) {
        if let Some(matched) = &self.path {
            matched.validate(&path.field("path"), out);
        }
        let mut seen = BTreeSet::new();
        for (i, parameter) in self.query_params.iter().enumerate() {
            let path = path.field("queryParams").index(i);
            if !seen.insert(&parameter.name) {
                out.add(path.field("name"), format!("multiple entries for name {}", parameter.name));
            }
            if parameter.match_type == QueryParamMatchType::RegularExpression {
                regular_expression(&path.field("value"), &parameter.value, out);
            }
        }
        for (i, header) in self.headers.iter().enumerate() {
            let path = path.field("headers").index(i);
            match header.match_type {
                Some(HeaderMatchType::Present | HeaderMatchType::Absent) if !header.value.is_empty() => {
                    out.add(path.field("value"), validate::MUST_NOT_BE_DEFINED);
                }
                Some(HeaderMatchType::RegularExpression) => {
                    regular_expression(&path.field("value"), &header.value, out);
                }
                _ => {}
            }
        }
    }
}

impl PathMatch {
    fn validate(&self, path: &Path, out: &mut Violations) {
        let path = path.field("value");
        if self.match_type == PathMatchType::RegularExpression {
            return if self.value.is_empty() {
                out.add(path, validate::MUST_NOT_BE_EMPTY);
            } else {
                regular_expression(&path, &self.value, out);
            };
        }
        if self.match_type == PathMatchType::PathPrefix && self.value != "/" && self.value.ends_with('/') {
            out.add(
                &path,
                "does not need a trailing slash because only a `/`-separated prefix or an entire path is matched",
            );
        }
        if !self.value.starts_with('/') {
            out.add(path, "must be an absolute path");
        }
    }
}

fn regular_expression(path: &Path, text: &str, out: &mut Violations) {
    if let Err(error) = regex::Regex::new(text) {
        out.add(path, format!("invalid regular expression: {error}"));
    }
}

impl Filter {
    fn validate(&self, path: &Path, all_prefixes: bool, out: &mut Violations) {
        let bodies = [
            (
                FilterType::RequestHeaderModifier,
                "requestHeaderModifier",
                self.request_header_modifier.is_some(),
            ),
            (
                FilterType::ResponseHeaderModifier,
                "responseHeaderModifier",
                self.response_header_modifier.is_some(),
            ),
            (FilterType::RequestRedirect, "requestRedirect", self.request_redirect.is_some()),
            (FilterType::UrlRewrite, "urlRewrite", self.url_rewrite.is_some()),
            (FilterType::RequestMirror, "requestMirror", self.request_mirror.is_some()),
        ];
        if !self.filter_type.is_known() {
            out.add(path.field("type"), validate::must_be_one_of("type", FilterType::KNOWN));
            return;
        }
        for (kind, field, there) in bodies {
            if kind == self.filter_type && !there {
                out.add(path.field(field), validate::MUST_BE_DEFINED);
            }
        }
        match self.filter_type {
            FilterType::RequestHeaderModifier => {
                if let Some(modifier) = &self.request_header_modifier {
                    modifier.validate(&path.field("requestHeaderModifier"), out);
                }
            }
            FilterType::ResponseHeaderModifier => {
                if let Some(modifier) = &self.response_header_modifier {
                    modifier.validate(&path.field("responseHeaderModifier"), out);
                }
            }
            FilterType::RequestRedirect => {
                if let Some(redirect) = &self.request_redirect {
                    redirect.validate(&path.field("requestRedirect"), all_prefixes, out);
                }
            }
            FilterType::UrlRewrite => {
                if let Some(rewrite) = &self.url_rewrite {
                    let path = path.field("urlRewrite");
                    if let Some(rewrite) = &rewrite.path {
                        rewrite.validate(&path.field("path"), all_prefixes, out);
                    }
                    validate_hostname(&path.field("hostname"), rewrite.hostname.as_ref(), out);
                    if rewrite.host_to_backend_hostname {
                        out.add(path.field("hostToBackendHostname"), "must not be set");
                    }
                }
            }
            FilterType::RequestMirror => {
                if let Some(mirror) = &self.request_mirror {
                    let path = path.field("requestMirror");
                    if let Some(percentage) = &mirror.percentage {
                        validate::percentage(&path.field("percentage"), percentage, out);
                    }
                    validate::backend_ref(&path.field("backendRef"), &mirror.backend_ref, out);
                }
            }
            FilterType::Unknown(_) => {}
        }
    }
}

/// A name that a request can be sent to: no address, no wildcard.
fn validate_hostname(path: &Path, hostname: Option<&String>, out: &mut Violations) {
    let Some(hostname) = hostname else { return };
    if names::is_ip(hostname) {
        return out.add(path, "cannot be an IP address");
    }
    for fault in names::dns_1123_subdomain(hostname) {
        out.add(path, fault);
    }
}

impl HeaderModifier {
    fn validate(&self, path: &Path, out: &mut Violations) {
        if self.set.is_empty() && self.add.is_empty() && self.remove.is_empty() {
            out.add(path, "must have at least one defined: set, add, remove");
        }
        let names =
            |list: &[HeaderKeyValue]| list.iter().map(|header| header.name.clone()).collect::<Vec<_>>();
        let lists = [("set", names(&self.set)), ("add", names(&self.add)), ("remove", self.remove.clone())];
        let mut seen = BTreeSet::new();
        for (field, list) in lists {
            for (i, name) in list.iter().enumerate() {
                if !seen.insert(name.to_ascii_lowercase()) {
                    out.add(path.field(field).index(i).field("name"), "duplicate header name");
                }
            }
        }
    }
}

impl RequestRedirect {
    fn validate(&self, path: &Path, all_prefixes: bool, out: &mut Violations) {
        if let Some(rewrite) = &self.path {
            rewrite.validate(&path.field("path"), all_prefixes, out);
        }
        validate_hostname(&path.field("hostname"), self.hostname.as_ref(), out);
        if let Some(port) = self.port {
            validate::port(&path.field("port"), port, out);
        }
        let codes = [301, 302, 303, 307, 308];
        if self.status_code.is_some_and(|code| !codes.contains(&code)) {
            out.add(path.field("statusCode"), "in body should be one of [301 302 303 307 308]");
        }
        if self.scheme.as_deref().is_some_and(|scheme| !matches!(scheme, "http" | "https")) {
            out.add(path.field("scheme"), "in body should be one of [http https]");
        }
    }
}

impl PathRewrite {
    fn validate(&self, path: &Path, all_prefixes: bool, out: &mut Violations) {
        match self.rewrite_type {
            PathRewriteType::ReplaceFullPath => {
                if self.replace_full_path.is_none() {
                    out.add(path.field("replaceFullPath"), validate::MUST_BE_DEFINED);
                }
            }
            PathRewriteType::ReplacePrefixMatch => {
                if self.replace_prefix_match.is_none() {
                    out.add(path.field("replacePrefixMatch"), validate::MUST_BE_DEFINED);
                }
            }
            PathRewriteType::Unknown(_) => {
                out.add(path.field("type"), validate::must_be_one_of("type", PathRewriteType::KNOWN));
            }
        }
        if self.replace_prefix_match.is_some() && !all_prefixes {
            out.add(path.field("replacePrefixMatch"), "can only appear if all matches match a path prefix");
        }
    }
}

#[cfg(test)]
mod tests;
