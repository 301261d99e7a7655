//! Query parameters of lists: pages and filters.

use axum::extract::Query;
use http::Uri;
use ursa_model::{Resource, Violations};

use super::error::ApiError;

const TITLE: &str = "Could not retrieve resources";
const DEFAULT_SIZE: u64 = 100;
const MAX_SIZE: u64 = 1000;

/// The decoded query of a request.
#[derive(Debug, Clone, Default)]
pub(super) struct Params(Vec<(String, String)>);

impl Params {
    pub(super) fn of(uri: &Uri) -> Result<Self, ApiError> {
        Query::<Vec<(String, String)>>::try_from_uri(uri)
            .map(|Query(pairs)| Self(pairs))
            .map_err(|error| ApiError::bad_request(format_args!("the query can't be read: {error}")))
    }

    /// The first value of a parameter; empty if it is absent.
    pub(super) fn first(&self, name: &str) -> &str {
        self.0.iter().find(|(key, _)| key == name).map_or("", |(_, value)| value)
    }

    pub(super) fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        self.0.iter().filter(move |(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    pub(super) fn contains(&self, name: &str) -> bool {
        self.0.iter().any(|(key, _)| key == name)
    }

    /// This query with another offset, encoded, its keys sorted.
    fn with_offset(&self, offset: u64) -> String {
        let mut pairs: Vec<(&str, String)> = self
            .0
            .iter()
            .filter(|(key, _)| key != "offset")
            .map(|(key, value)| (key.as_str(), value.clone()))
            .collect();
        pairs.push(("offset", offset.to_string()));
        pairs.sort_by_key(|(key, _)| *key);
        let encoded: Vec<String> =
            pairs.iter().map(|(key, value)| format!("{}={}", encode(key), encode(value))).collect();
        encoded.join("&")
    }
}

fn encode(text: &str) -> String {
    use std::fmt::Write as _;
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => out.push(char::from(byte)),
            b' ' => out.push('+'),
            other => {
                let _ = write!(out, "%{other:02X}");
            }
        }
    }
    out
}

/// Which part of a list is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct PageAsked {
    pub(super) offset: u64,
    pub(super) size: u64,
}

impl PageAsked {
    pub(super) fn of(params: &Params) -> Result<Self, ApiError> {
        let wrong = |reason: String| ApiError::parameter(TITLE, "Invalid page size", "size", reason);
        let size = if params.contains("size") {
            let size: i64 = params.first("size").parse().map_err(|_| wrong("invalid format".into()))?;
            match u64::try_from(size) {
                Ok(0) | Err(_) => return Err(wrong("must be greater than 0".into())),
                Ok(size) if size > MAX_SIZE => {
                    return Err(wrong(format!(
                        "invalid page size of {size}. Maximum page size is {MAX_SIZE}"
                    )));
                }
                Ok(size) => size,
            }
        } else {
            DEFAULT_SIZE
        };
        Ok(Self { offset: offset(params)?, size })
    }

    /// This page of a list that is at hand, and how long the list is.
    pub(super) fn cut<T>(self, items: Vec<T>) -> (Vec<T>, u64) {
        let total = items.len() as u64;
        let skip = usize::try_from(self.offset).unwrap_or(usize::MAX);
        let take = usize::try_from(self.size).unwrap_or(usize::MAX);
        (items.into_iter().skip(skip).take(take).collect(), total)
    }

    /// The link to the next page, if there is one.
    pub(super) fn next(self, base: &str, path: &str, params: &Params, total: u64) -> Option<String> {
        let end = self.offset.saturating_add(self.size);
        (end < total).then(|| format!("{base}{path}?{}", params.with_offset(end)))
    }
}

fn offset(params: &Params) -> Result<u64, ApiError> {
    let text = params.first("offset");
    if text.is_empty() {
        return Ok(0);
    }
    let wrong = |detail: String| ApiError::new(http::StatusCode::BAD_REQUEST, TITLE, detail);
    // The words are those that clients of the peer already know.
    let parsed: i64 = text.parse().map_err(|_| {
        wrong(format!("invalid: invalid offset: strconv.Atoi: parsing {text:?}: invalid syntax"))
    })?;
    u64::try_from(parsed).map_err(|_| wrong("invalid: invalid offset: must be non-negative".into()))
}

/// What a list is narrowed by, beside the name.
#[derive(Debug, Clone, Default)]
pub(super) struct Filter {
    labels: Vec<(String, String)>,
    tags: Vec<(String, String)>,
    gateway: Option<bool>,
}

impl Filter {
    /// The filters of a request on the list that is served at the pattern `route`.
    pub(super) fn of(params: &Params, route: &str, dataplanes: bool) -> Result<Self, ApiError> {
        let mut filter = Self::default();
        let mut violations = Violations::new();
        for (key, value) in params.0.iter().filter(|(key, _)| key.starts_with("filter[")) {
            let field = format!("{route}.{key}");
            let Some(rest) = key.strip_prefix("filter[labels.") else {
                violations.add(field, "filters are only supported on labels");
                continue;
            };
            match rest.split_once(']') {
                Some((label, "")) => {
                    // The last one of a label given twice counts.
                    filter.labels.retain(|(known, _)| known != label);
                    filter.labels.push((label.to_owned(), value.clone()));
                }
                Some(_) => violations.add(field, "advanced filters are not supported"),
                None => {
                    violations.add(field, "the closing bracket is missing, expected filter[labels.<label>]");
                }
            }
        }
        if dataplanes {
            // What isn't `name:value` narrows nothing.
            for (name, value) in params.all("tag").filter_map(|tag| tag.split_once(':')) {
                filter.tags.push((name.to_owned(), value.to_owned()));
            }
            match params.first("gateway").to_lowercase().as_str() {
                "" => {}
                "true" | "delegated" => filter.gateway = Some(true),
                "false" => filter.gateway = Some(false),
                other => violations.add(
                    format!("{route}.gateway"),
                    format!("should use `true`, `false` or `delegated` instead of {other}"),
                ),
            }
        }
        if violations.is_empty() { Ok(filter) } else { Err(ApiError::invalid(TITLE, violations)) }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.labels.is_empty() && self.tags.is_empty() && self.gateway.is_none()
    }

    pub(super) fn accepts(&self, resource: &Resource) -> bool {
        let label = |name: &str| resource.meta.label(name);
        self.labels.iter().all(|(name, value)| label(name) == Some(value))
            && self.tags.iter().all(|(name, value)| label(name).is_some_and(|found| found.contains(value)))
            && self.gateway.is_none_or(|wanted| {
                wanted
                    == resource.spec.pointer("/networking/gateway").is_some_and(|gateway| !gateway.is_null())
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn params(query: &str) -> Params {
        Params::of(&format!("http://h/x?{query}").parse().unwrap()).unwrap()
    }

    #[test]
    fn next_keeps_the_other_parameters() {
        let params = params("size=1&name=a%20b&filter[labels.k]=v");
        let page = PageAsked::of(&params).unwrap();
        assert_eq!(
            page.next("http://h", "/x", &params, 2).as_deref(),
            Some("http://h/x?filter%5Blabels.k%5D=v&name=a+b&offset=1&size=1")
        );
        assert_eq!(page.next("http://h", "/x", &params, 1), None);
    }

    #[test]
    fn sizes_are_bounded() {
        for (query, reason) in [
            ("size=0", "must be greater than 0"),
            ("size=-1", "must be greater than 0"),
            ("size=x", "invalid format"),
            ("size=1001", "invalid page size of 1001. Maximum page size is 1000"),
        ] {
            assert_eq!(PageAsked::of(&params(query)).unwrap_err().invalid, [("size".into(), reason.into())]);
        }
        assert_eq!(PageAsked::of(&params("")).unwrap(), PageAsked { offset: 0, size: 100 });
    }

    #[test]
    fn dataplanes_are_narrowed_by_tags_and_gateways() {
        let filter = Filter::of(&params("tag=a:b:c&tag=d&gateway=TRUE"), "/x", true).unwrap();
        assert_eq!(filter.tags, [("a".to_owned(), "b:c".to_owned())]);
        assert_eq!(filter.gateway, Some(true));
        let error = Filter::of(&params("gateway=no"), "/x", true).unwrap_err();
        let reason = "should use `true`, `false` or `delegated` instead of no";
        assert_eq!(error.invalid, [("/x.gateway".to_owned(), reason.to_owned())]);
    }

    #[test]
    fn an_unclosed_filter_is_refused() {
        let error = Filter::of(&params("filter[labels.k=v"), "/x", false).unwrap_err();
        assert_eq!(error.status, http::StatusCode::BAD_REQUEST);
    }
}
