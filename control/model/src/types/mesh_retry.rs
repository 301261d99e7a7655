//! MeshRetry: what is tried again, how often and when.

use crate::{
    GoDuration, Path,
    meta::Meta,
    open_enum,
    policy::{TargetRef, To},
    registry::{Descriptor, PolicyTraits},
    resource::{NoStatus, ResourceSpec},
    spec_struct,
    validate::{self, must_be_one_of},
    violation::Violations,
};

/// All that is known of the type.
pub static DESCRIPTOR: Descriptor = Descriptor {
    acted_on: false,
    ..Descriptor::policy::<MeshRetry>(
        PolicyTraits::TO,
        "MeshRetry",
        "meshretries",
        "mr",
        "Mesh Retry",
        "Mesh Retries",
    )
};

open_enum! {
    /// Which hosts a retry leaves out.
    pub enum PredicateType {
        OmitPreviousHosts = "OmitPreviousHosts",
        OmitHostsWithTags = "OmitHostsWithTags",
        OmitPreviousPriorities = "OmitPreviousPriorities",
    }
    /// How a header tells when to try again.
    pub enum RateLimitFormat { Seconds = "Seconds", UnixTimestamp = "UnixTimestamp" }
}

spec_struct! {
    /// Retries towards destinations.
    pub struct MeshRetry {
        pub target_ref: Option<TargetRef>,
        pub to: Vec<To<Conf>>,
    }
    /// By protocol.
    pub struct Conf {
        pub tcp: Option<Tcp>,
        pub http: Option<Http>,
        pub grpc: Option<Grpc>,
    }
    /// Of connections.
    pub struct Tcp {
        pub max_connect_attempt: Option<u32>,
    }
    /// Of HTTP requests.
    pub struct Http {
        pub num_retries: Option<u32>,
        pub per_try_timeout: Option<GoDuration>,
        pub back_off: Option<BackOff>,
        pub rate_limited_back_off: Option<RateLimitedBackOff>,
        pub retry_on: Option<Vec<Item>>,
        pub retriable_response_headers: Option<Vec<crate::types::mesh_http_route::HeaderMatch>>,
        pub retriable_request_headers: Option<Vec<crate::types::mesh_http_route::HeaderMatch>>,
        pub host_selection: Option<Vec<Predicate>>,
        pub host_selection_max_attempts: Option<i32>,
    }
    /// Of gRPC calls.
    pub struct Grpc {
        pub num_retries: Option<u32>,
        pub per_try_timeout: Option<GoDuration>,
        pub back_off: Option<BackOff>,
        pub rate_limited_back_off: Option<RateLimitedBackOff>,
        pub retry_on: Option<Vec<Item>>,
    }
    /// How long to wait, growing.
    pub struct BackOff {
        pub base_interval: Option<GoDuration>,
        pub max_interval: Option<GoDuration>,
    }
    /// How long to wait, as the answer says.
    pub struct RateLimitedBackOff {
        pub reset_headers: Option<Vec<ResetHeader>>,
        pub max_interval: Option<GoDuration>,
    }
    /// A header that says it.
    pub struct ResetHeader {
        pub name: String,
        pub format: RateLimitFormat,
    }
    /// Which hosts a retry leaves out.
    pub struct Predicate {
        pub predicate: PredicateType,
        pub tags: Option<std::collections::BTreeMap<String, String>>,
        pub update_frequency: Option<i32>,
    }
}

/// A reason to try again; statuses may be written as numbers.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
#[serde(transparent)]
pub struct Item(pub String);

impl<'de> serde::Deserialize<'de> for Item {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(Self(match serde_json::Value::deserialize(deserializer)? {
            serde_json::Value::String(text) => text,
            other => other.to_string(),
        }))
    }
}

const HTTP_REASONS: [&str; 17] = [
    "5xx",
    "GatewayError",
    "Reset",
    "Retriable4xx",
    "ConnectFailure",
    "EnvoyRatelimited",
    "RefusedStream",
    "Http3PostConnectFailure",
    "HttpMethodConnect",
    "HttpMethodDelete",
    "HttpMethodGet",
    "HttpMethodHead",
    "HttpMethodOptions",
    "HttpMethodPatch",
    "HttpMethodPost",
    "HttpMethodPut",
    "HttpMethodTrace",
];
const GRPC_REASONS: [&str; 5] =
    ["Canceled", "DeadlineExceeded", "Internal", "ResourceExhausted", "Unavailable"];
/// Statuses with a registered meaning, as ranges.
const STATUSES: [(u32, u32); 10] = [
    (100, 103),
    (200, 208),
    (226, 226),
    (300, 305),
    (307, 308),
    (400, 418),
    (421, 426),
    (428, 429),
    (431, 431),
    (451, 451),
];

fn is_status(text: &str) -> bool {
    let within = |status: u32| {
        STATUSES.iter().any(|(first, last)| (*first..=*last).contains(&status))
            || (500..=508).contains(&status)
            || matches!(status, 510 | 511)
    };
    text.parse().is_ok_and(within)
}

impl ResourceSpec for MeshRetry {
    const DESCRIPTOR: &'static Descriptor = &DESCRIPTOR;
    type Status = NoStatus;

    fn validate(&self, _meta: &Meta, out: &mut Violations) {
        validate::top_level(self.target_ref.as_ref(), false, out);
        let on_route = validate::is_on_route(self.target_ref.as_ref());
        let kinds = if on_route { validate::TO_KINDS_OF_A_ROUTE } else { validate::ALL_TO_KINDS };
        // Peers put `conf` between; clients know the paths so.
        validate::each_to(&self.to, kinds, out, |to, path, out| {
            to.default.validate(&path.field("conf"), out);
        });
    }
}

impl Conf {
    fn validate(&self, path: &Path, out: &mut Violations) {
        if self.tcp.is_none() && self.http.is_none() && self.grpc.is_none() {
            out.add(path, "at least one of the 'tcp', 'http', 'grpc' must be specified");
        }
        if let Some(tcp) = &self.tcp {
            let path = path.field("tcp");
            if tcp.max_connect_attempt.is_none() {
                out.add(&path, validate::MUST_NOT_BE_EMPTY);
            }
            validate::count_positive(&path.field("maxConnectAttempt"), tcp.max_connect_attempt, out);
        }
        if let Some(http) = &self.http {
            http.validate(&path.field("http"), out);
        }
        if let Some(grpc) = &self.grpc {
            let path = path.field("grpc");
            if *grpc == Grpc::default() {
                out.add(&path, validate::MUST_NOT_BE_EMPTY);
            }
            validate::duration_not_negative(&path.field("perTryTimeout"), grpc.per_try_timeout, out);
            validate_back_off(&path, grpc.back_off.as_ref(), out);
            validate_rate_limited(&path, grpc.rate_limited_back_off.as_ref(), out);
            let known = |item: &str| GRPC_REASONS.contains(&item);
            validate_items(&path, grpc.retry_on.as_deref(), known, out);
        }
    }
}

impl Http {
    fn validate(&self, path: &Path, out: &mut Violations) {
        // How often hosts are selected means nothing alone.
        if *self
            == (Http { host_selection_max_attempts: self.host_selection_max_attempts, ..Http::default() })
        {
            out.add(path, validate::MUST_NOT_BE_EMPTY);
        }
        validate::duration_not_negative(&path.field("perTryTimeout"), self.per_try_timeout, out);
        validate_back_off(path, self.back_off.as_ref(), out);
        validate_rate_limited(path, self.rate_limited_back_off.as_ref(), out);
        let known = |item: &str| HTTP_REASONS.contains(&item) || is_status(item);
        validate_items(path, self.retry_on.as_deref(), known, out);
        let mut priorities = 0;
        for (i, predicate) in self.host_selection.iter().flatten().enumerate() {
            let path = path.field("hostSelection").index(i);
            match &predicate.predicate {
                PredicateType::OmitPreviousHosts => {}
                PredicateType::OmitHostsWithTags => {
                    if predicate.tags.is_none() {
                        out.add(path.field("tags"), validate::MUST_BE_DEFINED);
                    }
                }
                PredicateType::OmitPreviousPriorities => {
                    priorities += 1;
                    if priorities > 1 {
                        out.add(
                            path.field("predicate"),
                            "OmitPreviousPriorities must only be specified once",
                        );
                    }
                    if predicate.update_frequency.is_none_or(|frequency| frequency <= 0) {
                        out.add(path.field("updateFrequency"), validate::DEFINED_AND_ABOVE_ZERO);
                    }
                }
                PredicateType::Unknown(other) => {
                    out.add(path.field("predicate"), format!("unknown predicate type '{other}'"));
                }
            }
        }
    }
}

fn validate_items(path: &Path, items: Option<&[Item]>, known: impl Fn(&str) -> bool, out: &mut Violations) {
    for (i, Item(item)) in items.iter().copied().flatten().enumerate() {
        if !known(item) {
            out.add(path.field("retryOn").index(i), format!("unknown item '{item}'"));
        }
    }
}

fn validate_back_off(path: &Path, back_off: Option<&BackOff>, out: &mut Violations) {
    let Some(back_off) = back_off else { return };
    let path = path.field("backOff");
    if back_off.base_interval.is_none() && back_off.max_interval.is_none() {
        out.add(&path, validate::MUST_NOT_BE_EMPTY);
    }
    validate::duration_positive(&path.field("baseInterval"), back_off.base_interval, out);
    validate::duration_positive(&path.field("maxInterval"), back_off.max_interval, out);
}

fn validate_rate_limited(path: &Path, back_off: Option<&RateLimitedBackOff>, out: &mut Violations) {
    let Some(back_off) = back_off else { return };
    let path = path.field("rateLimitedBackOff");
    if back_off.max_interval.is_some_and(|interval| interval.nanos() <= 0) {
        out.add(path.field("maxInterval"), validate::DEFINED_AND_ABOVE_ZERO);
    }
    let path = path.field("resetHeaders");
    let Some(headers) = &back_off.reset_headers else { return out.add(path, validate::MUST_BE_DEFINED) };
    for (i, header) in headers.iter().enumerate() {
        if header.name.is_empty() {
            out.add(path.index(i).field("name"), validate::MUST_BE_DEFINED);
        }
        if !header.format.is_known() {
            out.add(path.index(i).field("format"), must_be_one_of("format", RateLimitFormat::KNOWN));
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::table::faults;

    #[rstest::rstest]
    #[case::nothing("{}", &["conf: at least one of the 'tcp', 'http', 'grpc' must be specified"])]
    #[case::attempts_alone("http: {hostSelectionMaxAttempts: 3}", &["conf.http: must not be empty"])]
    #[case::no_timeout("http: {perTryTimeout: 0s}", &[])]
    #[case::waiting(
        "grpc: {rateLimitedBackOff: {maxInterval: 0s, resetHeaders: []}}",
        &["conf.grpc.rateLimitedBackOff.maxInterval: must be defined and greater than zero"]
    )]
    #[case::priorities_twice(
        "http: {hostSelection: [{predicate: OmitPreviousPriorities, updateFrequency: 1}, {predicate: OmitPreviousPriorities, updateFrequency: 1}]}",
        &["conf.http.hostSelection[1].predicate: OmitPreviousPriorities must only be specified once"]
    )]
    #[case::tags(
        "http: {hostSelection: [{predicate: OmitHostsWithTags}]}",
        &["conf.http.hostSelection[0].tags: must be defined"]
    )]
    fn retries(#[case] conf: &str, #[case] expected: &[&str]) {
        let spec = format!("to: [{{targetRef: {{kind: Mesh}}, default: {}}}]", braced(conf));
        let expected: Vec<String> =
            expected.iter().map(|fault| format!("spec.to[0].default.{fault}")).collect();
        assert_eq!(faults("MeshRetry", &spec), expected);
    }

    fn braced(conf: &str) -> String {
        if conf.starts_with('{') { conf.to_owned() } else { format!("{{{conf}}}") }
    }
}
