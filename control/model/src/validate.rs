//! Validators that several types share. Words and paths are Kuma's, because clients and people know them.

use crate::{GoDuration, Path, Violations, names};

mod patch;
mod source;
mod target;
mod telemetry;
mod tls;

pub use patch::{PatchOp, PatchOperation, json_patches};
pub use source::{data_source, of_control_plane};
pub use target::{
    ALL_TO_KINDS, EmptyMatch, NOT_BY_PEER, SERVICE_KINDS, TO_KINDS_OF_A_ROUTE, TOP_LEVEL_KINDS,
    TargetRefRules, backend_ref, each_rule, each_to, is_on_route, is_whole_mesh, peer_match, target_ref,
    to_or_rules, top_level,
};
pub use telemetry::{otel_attribute_name, otel_backend_ref};
pub use tls::{TlsVersion, TlsVersions};

/// Something that must be there and isn't.
pub const MUST_BE_DEFINED: &str = "must be defined";
/// Something that may not be there and is.
pub const MUST_NOT_BE_DEFINED: &str = "must not be defined";
/// A list without elements.
pub const MUST_NOT_BE_EMPTY: &str = "must not be empty";
/// A number or duration that is there but not above zero.
pub const ABOVE_ZERO_WHEN_DEFINED: &str = "must be greater than zero when defined";
/// A number or duration that isn't there or not above zero.
pub const DEFINED_AND_ABOVE_ZERO: &str = "must be defined and greater than zero";

/// A port of a Dataplane.
pub fn port(path: &Path, port: u32, out: &mut Violations) {
    if !(1..=65535).contains(&port) {
        out.add(path, "port must be in the range [1, 65535]");
    }
}

/// A port of anything else, which Kuma refuses in other words.
pub fn valid_port(path: &Path, port: u32, out: &mut Violations) {
    if !(1..=65535).contains(&port) {
        out.add(path, "port must be a valid (1-65535)");
    }
}

/// An address of a Dataplane, which other proxies connect to: IP or DNS name, not the unspecified address.
pub fn address(path: &Path, address: &str, out: &mut Violations) {
    if address.is_empty() {
        out.add(path, "address can't be empty");
        return;
    }
    if matches!(address, "0.0.0.0" | "::") {
        out.add(path, "must not be 0.0.0.0 or ::");
    }
    if !names::is_ip_or_dns_name(address) {
        out.add(path, "address has to be valid IP address or domain name");
    }
}

/// A duration above zero, when there is one.
pub fn duration_positive(path: &Path, duration: Option<GoDuration>, out: &mut Violations) {
    if duration.is_some_and(|duration| duration.nanos() <= 0) {
        out.add(path, ABOVE_ZERO_WHEN_DEFINED);
    }
}

/// A duration of zero or more, when there is one.
pub fn duration_not_negative(path: &Path, duration: Option<GoDuration>, out: &mut Violations) {
    if duration.is_some_and(|duration| duration.nanos() < 0) {
        out.add(path, "must not be negative when defined");
    }
}

/// A count above zero, when there is one.
pub fn count_positive(path: &Path, count: Option<u32>, out: &mut Violations) {
    if count == Some(0) {
        out.add(path, "must be greater than 0");
    }
}

/// A threshold above zero, when there is one.
pub fn value_positive(path: &Path, value: Option<i32>, out: &mut Violations) {
    if value.is_some_and(|value| value <= 0) {
        out.add(path, ABOVE_ZERO_WHEN_DEFINED);
    }
}

/// `"field" must be one of ["a", "b"]`.
pub fn must_be_one_of(field: &str, values: &[&str]) -> String {
    format!("{field:?} must be one of {}", quoted(values))
}

/// `["a", "b"]`.
pub fn quoted(values: &[&str]) -> String {
    let values: Vec<String> = values.iter().map(|value| format!("{value:?}")).collect();
    format!("[{}]", values.join(", "))
}

/// Judges `<number>kbps`, `Mbps`, `Gbps`; the number is whole, and one blank may stand before the unit.
pub fn bandwidth(text: &str) -> Option<&'static str> {
    if text.is_empty() {
        return Some(MUST_BE_DEFINED);
    }
    let number = ["kbps", "Mbps", "Gbps"].iter().find_map(|unit| text.strip_suffix(unit));
    let number = number.map(|number| number.strip_suffix(char::is_whitespace).unwrap_or(number));
    let is_whole = number.is_some_and(|number| number.bytes().all(|b| b.is_ascii_digit()));
    (!is_whole).then_some("must be in kbps/Mbps/Gbps units")
}

/// A destination's display name becomes part of a DNS name.
pub fn display_name(meta: &crate::Meta, out: &mut Violations) {
    for fault in names::dns_1035_label(meta.display_name()) {
        out.add("name", fault);
    }
}

/// Protocols that a destination's port may speak.
pub fn app_protocol(port: &Path, protocol: Option<&crate::Protocol>, out: &mut Violations) {
    use crate::Protocol;
    let known = [Protocol::Grpc, Protocol::Http, Protocol::Http2, Protocol::Tcp];
    if protocol.is_some_and(|protocol| !known.contains(protocol)) {
        out.add(port.field("appProtocol"), "appProtocol must be one of: grpc, http, http2, tcp");
    }
}

/// A percentage as a number or as text, 0 to 100.
pub fn percentage(path: &Path, value: &serde_json::Value, out: &mut Violations) {
    match number(value) {
        None => out.add(path, "string must be a valid number"),
        Some(number) if !(0.0..=100.0).contains(&number) => {
            out.add(path, "must be in inclusive range [0.0, 100.0]");
        }
        Some(_) => {}
    }
}

/// A number that may be written as text.
pub fn number(value: &serde_json::Value) -> Option<f64> {
    match value {
        serde_json::Value::Number(number) => number.as_f64(),
        serde_json::Value::String(text) => text.parse::<f64>().ok().filter(|number| number.is_finite()),
        _ => None,
    }
}

/// Whether a text is `[scheme://]host[:port][/path]` with a host that is an IP or has a dot or is `localhost`.
pub fn is_address(text: &str) -> bool {
    let rest = text.split_once("://").map_or(text, |(_, rest)| rest);
    let authority = rest.split('/').next().unwrap_or_default();
    let host = match authority.rsplit_once(':') {
        Some((host, port)) if !host.is_empty() && port.parse::<u16>().is_ok() => host,
        _ => authority,
    };
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let named = host == "localhost" || text.contains("://") || authority.contains(':') || host.contains('.');
    names::is_ip(host) || (named && names::is_dns_name(host) && !host.contains('_'))
}

/// Whether a text is the path of a file on the machine, from the root.
pub fn is_file_path(text: &str) -> bool {
    text.starts_with('/') && !text.contains('\0')
}

/// A whole percentage, when there is one.
pub fn percent(path: &Path, percent: Option<i64>, out: &mut Violations) {
    if percent.is_some_and(|percent| !(0..=100).contains(&percent)) {
        out.add(path, "must be in inclusive range [0, 100]");
    }
}

/// An HTTP status.
pub fn status_code(path: &Path, status: u32, out: &mut Violations) {
    if !(100..=599).contains(&status) {
        out.add(path, "must be in inclusive range [100, 599]");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[rstest::rstest]
    #[case("1kbps", None)]
    #[case("10 Mbps", None)]
    #[case("Gbps", None)]
    #[case("1.5Mbps", Some("must be in kbps/Mbps/Gbps units"))]
    #[case("1  kbps", Some("must be in kbps/Mbps/Gbps units"))]
    #[case("5", Some("must be in kbps/Mbps/Gbps units"))]
    #[case("", Some("must be defined"))]
    fn bandwidth_is_a_whole_number_with_a_unit(#[case] text: &str, #[case] fault: Option<&str>) {
        assert_eq!(bandwidth(text), fault);
    }

    #[rstest::rstest]
    #[case("/tmp/access.log", true)]
    #[case("tmp/access.log", false)]
    #[case("", false)]
    fn files_are_named_from_the_root(#[case] text: &str, #[case] valid: bool) {
        assert_eq!(is_file_path(text), valid);
    }
}
