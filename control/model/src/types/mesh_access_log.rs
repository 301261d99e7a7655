//! MeshAccessLog: which requests and connections are logged, and where.

use crate::{
    Path,
    meta::Meta,
    open_enum,
    policy::{OtelBackendRef, Rule, TargetRef, To},
    registry::{Descriptor, PolicyTraits},
    resource::{NoStatus, ResourceSpec},
    spec_struct,
    validate::{self, EmptyMatch, must_be_one_of},
    violation::Violations,
};

/// All that is known of the type.
pub static DESCRIPTOR: Descriptor = Descriptor {
    acted_on: false,
    ..Descriptor::policy::<MeshAccessLog>(
        PolicyTraits::TO_AND_RULES,
        "MeshAccessLog",
        "meshaccesslogs",
        "mal",
        "Mesh Access Log",
        "Mesh Access Logs",
    )
};

open_enum! {
    /// Where logs go.
    pub enum BackendType { Tcp = "Tcp", File = "File", OpenTelemetry = "OpenTelemetry" }
    /// How an entry is written.
    pub enum FormatType { Plain = "Plain", Json = "Json" }
}

spec_struct! {
    /// Logs of what comes in (`rules`) or goes out (`to`).
    pub struct MeshAccessLog {
        pub target_ref: Option<TargetRef>,
        pub to: Vec<To<Conf>>,
        pub rules: Vec<Rule<Conf>>,
    }
    /// Where logs go; an empty list means nowhere.
    pub struct Conf {
        pub backends: Option<Vec<Backend>>,
    }
    /// One of them.
    pub struct Backend {
        #[serde(rename = "type")]
        pub backend_type: BackendType,
        pub tcp: Option<TcpBackend>,
        pub file: Option<FileBackend>,
        pub open_telemetry: Option<OpenTelemetryBackend>,
    }
    /// A TCP sink.
    pub struct TcpBackend {
        pub address: String,
        pub format: Option<Format>,
    }
    /// A file on the workload's machine.
    pub struct FileBackend {
        pub path: String,
        pub format: Option<Format>,
    }
    /// A collector.
    pub struct OpenTelemetryBackend {
        pub attributes: Vec<JsonValue>,
        pub body: Option<serde_json::Value>,
        pub backend_ref: Option<OtelBackendRef>,
    }
    /// How an entry is written.
    pub struct Format {
        #[serde(rename = "type")]
        pub format_type: FormatType,
        pub plain: Option<String>,
        pub json: Option<Vec<JsonValue>>,
        pub omit_empty_values: Option<bool>,
    }
    /// A key and the text that gives its value.
    pub struct JsonValue {
        pub key: String,
        pub value: String,
    }
}

impl ResourceSpec for MeshAccessLog {
    const DESCRIPTOR: &'static Descriptor = &DESCRIPTOR;
    type Status = NoStatus;

    fn apply_defaults(&mut self) {
        let confs = self.to.iter_mut().map(|to| &mut to.default);
        let confs = confs.chain(self.rules.iter_mut().map(|rule| &mut rule.default));
        for backend in confs.filter_map(|conf| conf.backends.as_mut()).flatten() {
            let file = backend.file.as_mut().and_then(|file| file.format.as_mut());
            let tcp = backend.tcp.as_mut().and_then(|tcp| tcp.format.as_mut());
            for format in file.into_iter().chain(tcp) {
                format.omit_empty_values.get_or_insert(false);
            }
        }
    }

    fn validate(&self, _meta: &Meta, out: &mut Violations) {
        validate::top_level(self.target_ref.as_ref(), !self.rules.is_empty(), out);
        validate::to_or_rules(&self.to, &self.rules, out);
        validate::each_to(&self.to, validate::ALL_TO_KINDS, out, |to, path, out| {
            to.default.validate(path, out);
        });
        validate::each_rule(&self.rules, EmptyMatch::Everybody, out, |rule, path, out| {
            rule.default.validate(path, out);
        });
    }
}

impl Conf {
    fn validate(&self, path: &Path, out: &mut Violations) {
        let path = path.field("backends");
        let Some(backends) = &self.backends else {
            out.add(path, validate::MUST_BE_DEFINED);
            return;
        };
        for (i, backend) in backends.iter().enumerate() {
            backend.validate(&path.index(i), out);
        }
    }
}

impl Backend {
    fn validate(&self, path: &Path, out: &mut Violations) {
        match &self.backend_type {
            BackendType::File => {
                let path = path.field("file");
                let Some(file) = &self.file else { return out.add(path, validate::MUST_BE_DEFINED) };
                if let Some(format) = &file.format {
                    format.validate(&path.field("format"), out);
                }
                if !validate::is_file_path(&file.path) {
                    out.add(path.field("path"), "file backend requires a valid path");
                }
            }
            BackendType::Tcp => {
                let path = path.field("tcp");
                let Some(tcp) = &self.tcp else { return out.add(path, validate::MUST_BE_DEFINED) };
                if let Some(format) = &tcp.format {
                    format.validate(&path.field("format"), out);
                }
                if !validate::is_address(&tcp.address) {
                    out.add(path.field("address"), "tcp backend requires valid address");
                }
            }
            BackendType::OpenTelemetry => {
                let path = path.field("openTelemetry");
                let Some(telemetry) = &self.open_telemetry else {
                    return out.add(path, validate::MUST_BE_DEFINED);
                };
                validate::otel_backend_ref(&path.field("backendRef"), telemetry.backend_ref.as_ref(), out);
                for (i, attribute) in telemetry.attributes.iter().enumerate() {
                    if let Some(fault) = validate::otel_attribute_name(&attribute.key) {
                        out.add(path.field("attributes").index(i).field("key"), fault);
                    }
                }
            }
            BackendType::Unknown(_) => {
                out.add(path.field("type"), must_be_one_of("type", BackendType::KNOWN));
            }
        }
    }
}

impl Format {
    fn validate(&self, path: &Path, out: &mut Violations) {
        match self.format_type {
            FormatType::Plain => match self.plain.as_deref() {
                None => out.add(path.field("plain"), validate::MUST_BE_DEFINED),
                Some("") => out.add(path.field("plain"), validate::MUST_NOT_BE_EMPTY),
                Some(_) => {}
            },
            FormatType::Json => {
                let path = path.field("json");
                let Some(fields) = &self.json else { return out.add(path, validate::MUST_BE_DEFINED) };
                if fields.is_empty() {
                    out.add(&path, validate::MUST_NOT_BE_EMPTY);
                }
                for (i, field) in fields.iter().enumerate() {
                    field.validate(&path.index(i), out);
                }
            }
            FormatType::Unknown(_) => out.add(path.field("type"), must_be_one_of("type", FormatType::KNOWN)),
        }
    }
}

impl JsonValue {
    fn validate(&self, path: &Path, out: &mut Violations) {
        if self.key.is_empty() {
            out.add(path.field("key"), "key cannot be empty");
        }
        if self.value.is_empty() {
            out.add(path.field("value"), "value cannot be empty");
        }
        // Envoy gets them as texts in JSON, unescaped.
        let text = format!("{{\"{}\": \"{}\"}}", self.key, self.value);
        if serde_json::from_str::<serde_json::Value>(&text).is_err() {
            out.add(path, "is not a valid JSON object");
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::table::faults;

    #[rstest::rstest]
    #[case::both(
        "{to: [{targetRef: {kind: Mesh}, default: {backends: []}}], rules: [{default: {backends: []}}]}",
        &["spec: fields 'to' must be empty when 'rules' is defined"]
    )]
    #[case::everybody("rules: [{matches: [{}], default: {backends: []}}]", &[])]
    #[case::file(
        "rules: [{default: {backends: [{type: File, file: {path: logs/a.log}}]}}]",
        &["spec.rules[0].default.backends[0].file.path: file backend requires a valid path"]
    )]
    #[case::no_body(
        "rules: [{default: {backends: [{type: Tcp}, {type: File}, {type: OpenTelemetry}]}}]",
        &[
            "spec.rules[0].default.backends[0].tcp: must be defined",
            "spec.rules[0].default.backends[1].file: must be defined",
            "spec.rules[0].default.backends[2].openTelemetry: must be defined",
        ]
    )]
    #[case::collector(
        "rules: [{default: {backends: [{type: OpenTelemetry, openTelemetry: {backendRef: {kind: MeshService, labels: {a: b}}}}]}}]",
        &["spec.rules[0].default.backends[0].openTelemetry.backendRef.kind: \"kind\" must be one of [\"MeshOpenTelemetryBackend\"]"]
    )]
    fn logs(#[case] spec: &str, #[case] expected: &[&str]) {
        assert_eq!(faults("MeshAccessLog", spec), expected);
    }
}
