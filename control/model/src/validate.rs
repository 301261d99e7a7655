//! Validators that several types share.

use crate::{
    GoDuration, Path, Violations, names, open_enum,
    policy::{
        BackendRef, DataSource, DataSourceType, Match, SniMatchType, SpiffeIdMatchType, TargetKind, TargetRef,
    },
    spiffe::SpiffeId,
};

/// Something that must be there and isn't.
pub const MUST_BE_DEFINED: &str = "must be defined";
/// Something that may not be there and is.
pub const MUST_NOT_BE_DEFINED: &str = "must not be defined";
/// A list without elements.
pub const MUST_NOT_BE_EMPTY: &str = "must not be empty";

/// Ports are 1 to 65535.
pub fn port(path: &Path, port: u32, out: &mut Violations) {
    if !(1..=65535).contains(&port) {
        out.add(path, "port must be in the range [1, 65535]");
    }
}

/// An address that other proxies connect to: IP or DNS name, not the unspecified address.
pub fn address(path: &Path, address: &str, out: &mut Violations) {
    if address.is_empty() {
        out.add(path, "address can't be empty");
        return;
    }
    if matches!(address, "0.0.0.0" | "::") {
        out.add(path, "must not be 0.0.0.0 or ::");
    }
    if !names::is_ip(address) && !names::is_dns_name(address) {
        out.add(path, "address has to be valid IP address or domain name");
    }
}

/// A duration above zero, when there is one.
pub fn duration_positive(path: &Path, duration: Option<GoDuration>, out: &mut Violations) {
    if duration.is_some_and(|duration| duration.nanos() <= 0) {
        out.add(path, "must be greater than zero when defined");
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

/// `"field" must be one of ["a", "b"]`.
pub fn must_be_one_of(field: &str, values: &[&str]) -> String {
    format!("{field:?} must be one of {}", quoted(values))
}

/// `["a", "b"]`.
pub fn quoted(values: &[&str]) -> String {
    let values: Vec<String> = values.iter().map(|value| format!("{value:?}")).collect();
    format!("[{}]", values.join(", "))
}

/// What a policy allows at its top level or in `to`.
#[derive(Debug, Clone, Copy)]
pub struct TargetRefRules<'a> {
    /// Kinds, as written.
    pub kinds: &'a [&'a str],
    /// Whether an inbound may be named by `sectionName` of a Dataplane.
    pub is_inbound: bool,
}

/// Kinds at the top level of every policy.
pub const TOP_LEVEL_KINDS: &[&str] = &["Mesh", "Dataplane"];
/// Destinations.
pub const SERVICE_KINDS: &[&str] = &["MeshService", "MeshExternalService", "MeshMultiZoneService"];

/// Judges a `targetRef`.
pub fn target_ref(path: &Path, target: &TargetRef, rules: TargetRefRules<'_>, out: &mut Violations) {
    let kind = target.kind.as_str();
    if kind.is_empty() {
        out.add(path.field("kind"), MUST_BE_DEFINED);
        return;
    }
    if !rules.kinds.contains(&kind) {
        out.add(path.field("kind"), format!("value '{kind}' is not supported"));
        return;
    }
    let section = target.section_name.as_deref().unwrap_or_default();
    match kind {
        "Mesh" => {
            if !target.labels.is_empty() {
                out.add(path.field("labels"), format!("must not be set with kind {kind}"));
            }
            if !section.is_empty() {
                out.add(path.field("sectionName"), format!("must not be set with kind {kind}"));
            }
        }
        "Dataplane" => {
            if !section.is_empty() && !rules.is_inbound {
                out.add(path.field("sectionName"), "can only be used with inbound policies");
            }
        }
        "MeshSubset" | "MeshGateway" => {}
        _ => {
            if target.labels.is_empty() {
                out.add(path.field("labels"), format!("must be set when kind is {kind}"));
            }
            if !section.is_empty() && !matches!(kind, "MeshService" | "MeshMultiZoneService") {
                out.add(path.field("sectionName"), format!("must not be set with kind {kind}"));
            }
        }
    }
}

/// Judges the top level of a policy; absent means the whole mesh.
pub fn top_level(target: Option<&TargetRef>, is_inbound: bool, out: &mut Violations) {
    if let Some(target) = target {
        let rules = TargetRefRules { kinds: TOP_LEVEL_KINDS, is_inbound };
        self::target_ref(&Path::spec().field("targetRef"), target, rules, out);
    }
}

/// Whether a policy is for the whole mesh.
pub fn is_whole_mesh(target: Option<&TargetRef>) -> bool {
    target.is_none_or(|target| target.kind == TargetKind::Mesh)
}

/// Judges where a route leads.
pub fn backend_ref(path: &Path, backend: &BackendRef, out: &mut Violations) {
    let target = TargetRef {
        kind: backend.kind.clone(),
        labels: backend.labels.clone(),
        section_name: backend.section_name.clone(),
    };
    target_ref(path, &target, TargetRefRules { kinds: SERVICE_KINDS, is_inbound: false }, out);
    if backend.kind == TargetKind::MeshMultiZoneService && backend.port.is_none() {
        out.add(path.field("port"), "must be defined with kind MeshMultiZoneService");
    }
    if backend.weight.is_some_and(|weight| weight > u64::from(u32::MAX)) {
        out.add(path.field("weight"), format!("must be in inclusive range [0, {}]", u32::MAX));
    }
}

/// Judges one entry of `matches`.
pub fn peer_match(path: &Path, entry: &Match, out: &mut Violations) {
    if entry.spiffe_id.is_none() && entry.sni.is_none() {
        out.add(path, "must specify at least one of 'spiffeID' or 'sni'");
    }
    if let Some(spiffe_id) = &entry.spiffe_id {
        let path = path.field("spiffeID");
        let known = match_type(&path, &spiffe_id.match_type.to_string(), SpiffeIdMatchType::KNOWN, out);
        // A prefix may end at a slash; that is even the safer form.
        let prefix = spiffe_id.match_type == SpiffeIdMatchType::Prefix;
        let value = spiffe_id.value.strip_suffix('/').filter(|_| prefix).unwrap_or(&spiffe_id.value);
        if known && let Err(error) = value.parse::<SpiffeId>() {
            out.add(&path, format!("must be a valid Spiffe ID: {}", error.why));
        }
    }
    if let Some(sni) = &entry.sni {
        let path = path.field("sni");
        let known = match_type(&path, &sni.match_type.to_string(), SniMatchType::KNOWN, out);
        if known {
            if sni.value.is_empty() {
                out.add(path.field("value"), MUST_BE_DEFINED);
            } else {
                for fault in names::dns_1123_subdomain(&sni.value) {
                    out.add(path.field("value"), format!("must be a valid SNI: {fault}"));
                }
            }
        }
    }
}

fn match_type(path: &Path, given: &str, known: &[&str], out: &mut Violations) -> bool {
    if given.is_empty() {
        out.add(path.field("type"), "must be set");
        return false;
    }
    if !known.contains(&given) {
        out.add(
            path.field("type"),
            format!("unrecognized type {given:?}, supported values are: {}", known.join(", ")),
        );
        return false;
    }
    true
}

/// Judges a data source whose kinds are restricted to `allowed`.
pub fn data_source(path: &Path, source: &DataSource, allowed: &[DataSourceType], out: &mut Violations) {
    if !allowed.contains(&source.source_type) {
        let allowed: Vec<&str> = allowed.iter().map(DataSourceType::as_str).collect();
        out.add(path.field("type"), must_be_one_of("type", &allowed));
        return;
    }
    let (field, value) = match &source.source_type {
        DataSourceType::File => ("file", source.file.as_ref().map(|file| ("path", file.path.as_str()))),
        DataSourceType::EnvVar => {
            ("envVar", source.env_var.as_ref().map(|variable| ("name", variable.name.as_str())))
        }
        DataSourceType::InsecureInline => {
            ("insecureInline", source.insecure_inline.as_ref().map(|inline| ("value", inline.value.as_str())))
        }
        DataSourceType::Secret | DataSourceType::SecretRef => {
            ("secretRef", source.secret_ref.as_ref().map(|secret| ("name", secret.name.as_str())))
        }
        DataSourceType::Unknown(_) => return,
    };
    match value {
        None => out.add(path.field(field), MUST_BE_DEFINED),
        Some((part, "")) => out.add(path.field(field).field(part), MUST_NOT_BE_EMPTY),
        Some(_) => {}
    }
}

/// Judges `<number>kbps`, `Mbps`, `Gbps`.
pub fn bandwidth(text: &str) -> Option<&'static str> {
    if text.is_empty() {
        return Some(MUST_BE_DEFINED);
    }
    let known = ["kbps", "Mbps", "Gbps"].iter().find_map(|unit| text.strip_suffix(unit));
    match known {
        Some(number) if number.is_empty() || is_decimal(number.trim_end()) => None,
        _ => Some("must be in kbps/Mbps/Gbps units"),
    }
}

fn is_decimal(text: &str) -> bool {
    let (whole, fraction) = text.split_once('.').unwrap_or((text, "0"));
    let digits = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
    digits(whole) && digits(fraction)
}

/// Judges a static OpenTelemetry attribute name.
pub fn otel_attribute_name(text: &str) -> Option<&'static str> {
    if text.is_empty() {
        return Some(MUST_BE_DEFINED);
    }
    if text.contains('%') {
        return Some(
            "must be a static OpenTelemetry attribute name; placeholders are only supported in values",
        );
    }
    if text == "otel" || text.starts_with("otel.") {
        return Some("must not use the reserved OpenTelemetry prefix 'otel.'");
    }
    let segment = |segment: &str| {
        !segment.is_empty() && segment.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit())
    };
    let starts = text.as_bytes().first().is_some_and(u8::is_ascii_lowercase);
    if starts && text.split(['.', '_']).all(segment) {
        return None;
    }
    Some(
        "must start with a lowercase letter, use only lowercase letters, digits, '.' or '_', avoid consecutive delimiters, and end with a letter or digit",
    )
}

open_enum! {
    /// Operations of a JSON patch.
    pub enum PatchOp { Add = "add", Remove = "remove", Replace = "replace", Move = "move", Copy = "copy" }
}

/// One operation of a JSON patch. Whether `value` is there matters, so it isn't a typed field.
#[derive(Debug, Clone, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct PatchOperation {
    /// What to do.
    #[serde(default)]
    pub op: PatchOp,
    /// Where.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// From where, for move and copy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
    /// The value, for add and replace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub value: Option<serde_json::Value>,
}

/// Judges a list of patch operations.
pub fn json_patches(path: &Path, operations: &[PatchOperation], out: &mut Violations) {
    if operations.is_empty() {
        out.add(path, MUST_NOT_BE_EMPTY);
    }
    for (i, operation) in operations.iter().enumerate() {
        let path = path.index(i);
        if !operation.op.is_known() {
            out.add(path.field("op"), must_be_one_of("op", PatchOp::KNOWN));
            continue;
        }
        let target = operation.path.as_deref().unwrap_or_default();
        if operation.op == PatchOp::Remove && matches!(target, "" | "/") {
            out.add(path.field("path"), "root path cannot be removed");
        }
        let wants = |field: &str, ops: &[&str], there: bool, out: &mut Violations| {
            let wanted = ops.contains(&operation.op.as_str());
            if there && !wanted {
                out.add(
                    path.field(field),
                    format!("{field:?} is allowed only when \"op\" is one of {}", quoted(ops)),
                );
            } else if !there && wanted {
                out.add(
                    path.field(field),
                    format!("{field:?} must not be empty when \"op\" is one of {}", quoted(ops)),
                );
            }
        };
        wants("from", &["move", "copy"], operation.from.is_some(), out);
        wants("value", &["add", "replace"], operation.value.is_some(), out);
    }
}

/// Kinds that `to` of most policies may name.
pub const ALL_TO_KINDS: &[&str] =
    &["Mesh", "MeshService", "MeshExternalService", "MeshMultiZoneService", "MeshHTTPRoute"];

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

open_enum! {
    /// Versions of TLS.
    pub enum TlsVersion {
        TlsAuto = "TLSAuto", Tls10 = "TLS10", Tls11 = "TLS11", Tls12 = "TLS12", Tls13 = "TLS13",
    }
}

crate::spec_struct! {
    /// A range of versions of TLS.
    pub struct TlsVersions {
        pub min: Option<TlsVersion>,
        pub max: Option<TlsVersion>,
    }
}

impl TlsVersions {
    /// Judges the bounds, each and together.
    pub fn validate(&self, path: &Path, out: &mut Violations) {
        for (field, bound) in [("min", &self.min), ("max", &self.max)] {
            if bound.as_ref().is_some_and(|bound| !bound.is_known()) {
                out.add(path.field(field), must_be_one_of(field, TlsVersion::KNOWN));
            }
        }
        let explicit = |bound: &Option<TlsVersion>| {
            bound.clone().filter(|bound| bound.is_known() && *bound != TlsVersion::TlsAuto)
        };
        if let (Some(min), Some(max)) = (explicit(&self.min), explicit(&self.max))
            && min > max
        {
            out.add(path.field("min"), "min version must be lower than max");
        }
    }
}

/// A policy has either `to` or `rules`.
pub fn to_or_rules<A, B>(to: &[A], rules: &[B], out: &mut Violations) {
    if to.is_empty() && rules.is_empty() {
        out.add(Path::spec(), "at least one of 'to' or 'rules' has to be defined");
    }
    if !to.is_empty() && !rules.is_empty() {
        out.add(Path::spec(), "fields 'to' must be empty when 'rules' is defined");
    }
}

/// Judges all entries of `matches`.
pub fn peer_matches(path: &Path, matches: &[Match], out: &mut Violations) {
    for (i, entry) in matches.iter().enumerate() {
        peer_match(&path.index(i), entry, out);
    }
}

/// Judges the reference to a collector.
pub fn otel_backend_ref(
    path: &Path,
    reference: Option<&crate::policy::OtelBackendRef>,
    out: &mut Violations,
) {
    let Some(reference) = reference else { return out.add(path, MUST_BE_DEFINED) };
    if reference.kind != "MeshOpenTelemetryBackend" {
        out.add(path.field("kind"), must_be_one_of("kind", &["MeshOpenTelemetryBackend"]));
    }
    if reference.labels.is_empty() {
        out.add(path, "backendRef must have exactly one defined: labels");
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

/// Why a field can't be set where peers are told apart by their identity.
pub const NOT_BY_PEER: &str = "can't be specified when matches contain spiffeID because this field cannot be conditioned on source identity";

/// A whole percentage, when there is one.
pub fn percent(path: &Path, percent: Option<u32>, out: &mut Violations) {
    if percent.is_some_and(|percent| percent > 100) {
        out.add(path, "must be in inclusive range [0, 100]");
    }
}

/// An HTTP status.
pub fn status_code(path: &Path, status: u32, out: &mut Violations) {
    if !(100..=599).contains(&status) {
        out.add(path, "must be in inclusive range [100, 599]");
    }
}

impl crate::form::Omit for PatchOperation {}
