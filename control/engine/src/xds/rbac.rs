//! Role-based access control as a matcher: the first predicate that holds decides, and when none holds, nobody
//! passes.

use crate::envoy::{
    encode::any,
    types::{
        Any, http_rbac,
        network_inputs::ServerNameInput,
        network_rbac,
        rbac::{Action, rbac},
        ssl_inputs::UriSanInput,
        xds_core::TypedExtensionConfig,
        xds_matching::{
            Matcher, StringMatcher,
            matcher::{
                MatcherList, MatcherType, OnMatch,
                matcher_list::{
                    FieldMatcher, Predicate,
                    predicate::{MatchType, PredicateList, SinglePredicate, single_predicate},
                },
                on_match,
            },
            string_matcher::MatchPattern,
        },
    },
};

/// What a rule looks at, and what it wants to see.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Condition {
    /// The peer's SPIFFE id.
    Id(Text),
    /// The server name that the peer asked for.
    Sni(Text),
    /// All of these.
    All(Vec<Condition>),
}

/// How a text is compared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Text {
    Exact(String),
    Prefix(String),
}

/// One entry of the list: any of the conditions decides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    /// Who decided, for statistics and logs.
    pub(crate) name: String,
    pub(crate) allow: bool,
    pub(crate) any_of: Vec<Condition>,
}

/// Who passes, among peers that are known by their certificates.
pub(crate) fn matcher(entries: &[Entry]) -> Matcher {
    let matchers: Vec<FieldMatcher> = entries
        .iter()
        .filter(|entry| !entry.any_of.is_empty())
        .map(|entry| FieldMatcher {
            predicate: Some(one_or_any(entry.any_of.iter().map(predicate).collect())),
            on_match: Some(decide(&entry.name, entry.allow)),
        })
        .collect();
    Matcher {
        matcher_type: (!matchers.is_empty()).then_some(MatcherType::MatcherList(MatcherList { matchers })),
        on_no_match: Some(Box::new(decide("default", false))),
    }
}

/// One answer for everybody.
pub(crate) fn constant(name: &str, allow: bool) -> Matcher {
    Matcher { matcher_type: None, on_no_match: Some(Box::new(decide(name, allow))) }
}

/// The HTTP filter's configuration.
pub(crate) fn http(matcher: Matcher, shadow: Option<Matcher>) -> Any {
    any(&http_rbac::Rbac { matcher: Some(matcher), shadow_matcher: shadow, ..http_rbac::Rbac::default() })
}

/// The type of [`http`].
pub(crate) fn http_type() -> String {
    <http_rbac::Rbac as prost::Name>::type_url()
}

/// The network filter's configuration.
pub(crate) fn network(stat_prefix: &str, matcher: Matcher, shadow: Option<Matcher>) -> Any {
    any(&network_rbac::Rbac {
        stat_prefix: stat_prefix.to_owned(),
        matcher: Some(matcher),
        shadow_matcher: shadow,
        ..network_rbac::Rbac::default()
    })
}

fn decide(name: &str, allow: bool) -> OnMatch {
    let action = if allow { rbac::Action::Allow } else { rbac::Action::Deny };
    OnMatch {
        on_match: Some(on_match::OnMatch::Action(TypedExtensionConfig {
            name: "envoy.filters.rbac.action".to_owned(),
            typed_config: Some(any(&Action { name: name.to_owned(), action: action as i32 })),
        })),
        ..OnMatch::default()
    }
}

fn predicate(condition: &Condition) -> Predicate {
    let match_type = match condition {
        Condition::Id(text) => single("envoy.matching.inputs.uri_san", any(&UriSanInput {}), text),
        Condition::Sni(text) => single("envoy.matching.inputs.server_name", any(&ServerNameInput {}), text),
        Condition::All(conditions) => {
            MatchType::AndMatcher(PredicateList { predicate: conditions.iter().map(predicate).collect() })
        }
    };
    Predicate { match_type: Some(match_type) }
}

/// Envoy wants two predicates at least in a disjunction.
fn one_or_any(mut predicates: Vec<Predicate>) -> Predicate {
    if predicates.len() == 1 {
        return predicates.remove(0);
    }
    Predicate { match_type: Some(MatchType::OrMatcher(PredicateList { predicate: predicates })) }
}

fn single(input: &str, config: Any, text: &Text) -> MatchType {
    let pattern = match text {
        Text::Exact(text) => MatchPattern::Exact(text.clone()),
        Text::Prefix(text) => MatchPattern::Prefix(text.clone()),
    };
    MatchType::SinglePredicate(SinglePredicate {
        input: Some(TypedExtensionConfig { name: input.to_owned(), typed_config: Some(config) }),
        matcher: Some(single_predicate::Matcher::ValueMatch(StringMatcher {
            match_pattern: Some(pattern),
            ..StringMatcher::default()
        })),
    })
}
