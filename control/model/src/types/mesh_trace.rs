//! MeshTrace: where traces go, and how many.

use crate::{
    Path,
    meta::Meta,
    open_enum,
    policy::{OtelBackendRef, TargetRef},
    registry::{Descriptor, PolicyTraits},
    resource::{NoStatus, ResourceSpec},
    spec_struct,
    validate::{self, must_be_one_of},
    violation::Violations,
};

/// All that is known of the type.
pub static DESCRIPTOR: Descriptor = Descriptor {
    acted_on: false,
    ..Descriptor::policy::<MeshTrace>(
        PolicyTraits::PROXY,
        "MeshTrace",
        "meshtraces",
        "mtr",
        "Mesh Trace",
        "Mesh Traces",
    )
};

open_enum! {
    /// What receives traces.
    pub enum BackendType { Zipkin = "Zipkin", Datadog = "Datadog", OpenTelemetry = "OpenTelemetry" }
}

spec_struct! {
    /// Traces of the selected proxies.
    pub struct MeshTrace {
        pub target_ref: Option<TargetRef>,
        pub default: Conf,
    }
    /// At most one backend.
    pub struct Conf {
        pub backends: Option<Vec<Backend>>,
        pub sampling: Option<Sampling>,
        pub tags: Vec<Tag>,
    }
    /// What receives traces.
    pub struct Backend {
        #[serde(rename = "type")]
        pub backend_type: BackendType,
        pub zipkin: Option<Zipkin>,
        pub datadog: Option<Datadog>,
        pub open_telemetry: Option<OpenTelemetry>,
    }
    /// Zipkin.
    pub struct Zipkin {
        pub url: String,
        #[serde(rename = "traceId128bit")]
        pub trace_id_128bit: Option<bool>,
        pub api_version: Option<String>,
        pub shared_span_context: Option<bool>,
    }
    /// Datadog's agent.
    pub struct Datadog {
        pub url: String,
        pub split_service: Option<bool>,
    }
    /// A collector.
    pub struct OpenTelemetry {
        pub backend_ref: Option<OtelBackendRef>,
    }
    /// How many of a hundred.
    pub struct Sampling {
        pub overall: Option<serde_json::Value>,
        pub client: Option<serde_json::Value>,
        pub random: Option<serde_json::Value>,
    }
    /// A tag of every span.
    pub struct Tag {
        pub name: String,
        pub literal: Option<String>,
        pub header: Option<HeaderTag>,
    }
    /// Its value is that of a header.
    pub struct HeaderTag {
        pub name: String,
        pub default: Option<String>,
    }
}

impl ResourceSpec for MeshTrace {
    const DESCRIPTOR: &'static Descriptor = &DESCRIPTOR;
    type Status = NoStatus;

    fn apply_defaults(&mut self) {
        for backend in self.default.backends.iter_mut().flatten() {
            if let Some(zipkin) = &mut backend.zipkin {
                zipkin.api_version.get_or_insert_with(|| "httpJson".to_owned());
                zipkin.shared_span_context.get_or_insert(true);
                zipkin.trace_id_128bit.get_or_insert(false);
            }
            if let Some(datadog) = &mut backend.datadog {
                datadog.split_service.get_or_insert(false);
            }
        }
    }

    fn validate(&self, _meta: &Meta, out: &mut Violations) {
        validate::top_level(self.target_ref.as_ref(), false, out);
        let path = Path::spec().field("default");
        let backends = path.field("backends");
        match self.default.backends.as_deref() {
            None => out.add(backends, validate::MUST_BE_DEFINED),
            Some([]) => {}
            Some([backend]) => backend.validate(&backends.index(0), out),
            Some(_) => out.add(backends, "must have zero or one backend defined"),
        }
        for (i, tag) in self.default.tags.iter().enumerate() {
            let path = path.field("tags").index(i);
            if tag.name.is_empty() {
                out.add(path.field("name"), validate::MUST_NOT_BE_EMPTY);
            }
            if tag.header.is_some() == tag.literal.is_some() {
                out.add(path, "tag must have only one type defined: header, literal");
            }
        }
        if let Some(sampling) = &self.default.sampling {
            let path = path.field("sampling");
            for (field, share) in
                [("client", &sampling.client), ("random", &sampling.random), ("overall", &sampling.overall)]
            {
                match share.as_ref().map(validate::number) {
                    Some(None) => out.add(path.field(field), "string is not a number"),
                    Some(Some(share)) if !(0.0..=100.0).contains(&share) => {
                        out.add(path.field(field), "must be between 0 and 100");
                    }
                    _ => {}
                }
            }
        }
    }
}

impl Backend {
    fn validate(&self, path: &Path, out: &mut Violations) {
        match &self.backend_type {
            BackendType::Zipkin => {
                let path = path.field("zipkin");
                let Some(zipkin) = &self.zipkin else { return out.add(path, validate::MUST_BE_DEFINED) };
                if zipkin.url.is_empty() {
                    out.add(path.field("url"), validate::MUST_NOT_BE_EMPTY);
                } else if !validate::is_address(&zipkin.url) {
                    out.add(path.field("url"), "must be a valid url");
                }
            }
            BackendType::Datadog => {
                let path = path.field("datadog");
                let Some(datadog) = &self.datadog else { return out.add(path, validate::MUST_BE_DEFINED) };
                validate_datadog_url(&path.field("url"), &datadog.url, out);
            }
            BackendType::OpenTelemetry => {
                let path = path.field("openTelemetry");
                let Some(telemetry) = &self.open_telemetry else {
                    return out.add(path, validate::MUST_BE_DEFINED);
                };
                validate::otel_backend_ref(&path.field("backendRef"), telemetry.backend_ref.as_ref(), out);
            }
            BackendType::Unknown(_) => {
                out.add(path.field("type"), must_be_one_of("type", BackendType::KNOWN));
            }
        }
    }
}

/// `http://host:port` and nothing else, as Datadog's agent is reached.
fn validate_datadog_url(path: &Path, url: &str, out: &mut Violations) {
    let Some((scheme, rest)) = url.split_once("://") else { return out.add(path, "must be a valid url") };
    if scheme != "http" {
        out.add(path, "scheme must be http");
    }
    let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    let (authority, tail) = rest.split_at(end);
    let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
    match host.rsplit_once(':') {
        None | Some((_, "")) => out.add(path, "port must be defined"),
        Some((_, port)) if !port.parse::<u16>().is_ok_and(|port| port > 0) => {
            out.add(path, "port must be a valid (1-65535)");
        }
        Some(_) => {}
    }
    let (before_fragment, fragment) = tail.split_once('#').unwrap_or((tail, ""));
    let (url_path, query) = before_fragment.split_once('?').unwrap_or((before_fragment, ""));
    let refused = [
        ("user", authority.contains('@')),
        ("path", !url_path.is_empty()),
        ("query", !query.is_empty()),
        ("fragment", !fragment.is_empty()),
    ];
    for (name, _) in refused.into_iter().filter(|(_, there)| *there) {
        out.add(path, format!("{name} must not be defined"));
    }
}

#[cfg(test)]
mod tests {
    use crate::table::faults;

    #[rstest::rstest]
    #[case::nothing("{}", &["spec.default.backends: must be defined"])]
    #[case::two(
        "default: {backends: [{type: Zipkin}, {type: Zipkin}]}",
        &["spec.default.backends: must have zero or one backend defined"]
    )]
    #[case::samples(
        "default: {backends: [], sampling: {client: a, random: -1, overall: '100.5'}}",
        &[
            "spec.default.sampling.client: string is not a number",
            "spec.default.sampling.random: must be between 0 and 100",
            "spec.default.sampling.overall: must be between 0 and 100",
        ]
    )]
    #[case::datadog(
        "default: {backends: [{type: Datadog, datadog: {url: 'http://a'}}]}",
        &["spec.default.backends[0].datadog.url: port must be defined"]
    )]
    fn traces(#[case] spec: &str, #[case] expected: &[&str]) {
        assert_eq!(faults("MeshTrace", spec), expected);
    }
}
