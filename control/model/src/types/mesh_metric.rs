//! MeshMetric: which metrics are shown, and to whom.

use crate::{
    GoDuration, Path,
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
    ..Descriptor::policy::<MeshMetric>(
        PolicyTraits::PROXY,
        "MeshMetric",
        "meshmetrics",
        "mm",
        "Mesh Metric",
        "Mesh Metrics",
    )
};

open_enum! {
    /// What receives metrics.
    pub enum BackendType { Prometheus = "Prometheus", OpenTelemetry = "OpenTelemetry" }
    /// How a metric's name is compared.
    pub enum SelectorType { Prefix = "Prefix", Regex = "Regex", Exact = "Exact", Contains = "Contains" }
}

spec_struct! {
    /// Metrics of the selected proxies.
    pub struct MeshMetric {
        pub target_ref: Option<TargetRef>,
        pub default: Conf,
    }
    /// Of the proxy, of the applications behind it, to whom.
    pub struct Conf {
        pub sidecar: Option<Sidecar>,
        pub applications: Vec<Application>,
        pub backends: Vec<Backend>,
    }
    /// Of the proxy.
    pub struct Sidecar {
        pub profiles: Option<Profiles>,
        pub include_unused: Option<bool>,
    }
    /// Which of them.
    pub struct Profiles {
        pub append_profiles: Vec<Profile>,
        pub exclude: Vec<Selector>,
        pub include: Vec<Selector>,
    }
    /// A named choice.
    pub struct Profile {
        pub name: String,
    }
    /// Some by name.
    pub struct Selector {
        #[serde(rename = "type")]
        pub selector_type: SelectorType,
        #[serde(rename = "match")]
        pub matched: String,
    }
    /// Of an application.
    pub struct Application {
        pub name: Option<String>,
        pub path: Option<String>,
        pub address: Option<String>,
        pub port: u32,
    }
    /// To whom.
    pub struct Backend {
        #[serde(rename = "type")]
        pub backend_type: BackendType,
        pub prometheus: Option<Prometheus>,
        pub open_telemetry: Option<OpenTelemetry>,
    }
    /// Prometheus asks.
    pub struct Prometheus {
        pub client_id: Option<String>,
        pub port: Option<u32>,
        pub path: Option<String>,
        pub tls: Option<PrometheusTls>,
    }
    /// How it is answered.
    pub struct PrometheusTls {
        pub mode: Option<String>,
    }
    /// A collector is told.
    pub struct OpenTelemetry {
        pub backend_ref: Option<OtelBackendRef>,
        pub refresh_interval: Option<GoDuration>,
    }
}

const PROFILES: [&str; 3] = ["All", "None", "Basic"];
const TLS_MODES: [&str; 3] = ["Disabled", "ProvidedTLS", "ActiveMTLSBackend"];

impl ResourceSpec for MeshMetric {
    const DESCRIPTOR: &'static Descriptor = &DESCRIPTOR;
    type Status = NoStatus;

    fn apply_defaults(&mut self) {
        for application in &mut self.default.applications {
            application.path.get_or_insert_with(|| "/metrics".to_owned());
        }
        for prometheus in self.default.backends.iter_mut().filter_map(|backend| backend.prometheus.as_mut()) {
            prometheus.port.get_or_insert(5670);
            prometheus.path.get_or_insert_with(|| "/metrics".to_owned());
        }
    }

    fn validate(&self, _meta: &Meta, out: &mut Violations) {
        validate::top_level(self.target_ref.as_ref(), false, out);
        let path = Path::spec().field("default");
        if let Some(profiles) = self.default.sidecar.as_ref().and_then(|sidecar| sidecar.profiles.as_ref()) {
            profiles.validate(&path.field("sidecar.profiles"), out);
        }
        // Peers name the elements `application` and `backend` below their lists; clients know the paths so.
        for (i, application) in self.default.applications.iter().enumerate() {
            validate::valid_port(&path.field("applications.application").index(i), application.port, out);
        }
        for (i, backend) in self.default.backends.iter().enumerate() {
            backend.validate(&path.field("backends.backend").index(i), out);
        }
    }
}

impl Profiles {
    fn validate(&self, path: &Path, out: &mut Violations) {
        for (field, selectors) in [("exclude", &self.exclude), ("include", &self.include)] {
            for (i, selector) in selectors.iter().enumerate() {
                let path = path.field(field).index(i);
                match &selector.selector_type {
                    SelectorType::Regex if regex::Regex::new(&selector.matched).is_err() => {
                        out.add(path.field("match"), "invalid regex");
                    }
                    SelectorType::Unknown(other) => out.add(
                        path.field("type"),
                        format!("unrecognized type '{other}' - 'Regex', 'Prefix', 'Exact', 'Contains' are supported"),
                    ),
                    _ => {}
                }
            }
        }
        for (i, profile) in self.append_profiles.iter().enumerate() {
            if !PROFILES.contains(&profile.name.as_str()) {
                out.add(
                    path.field("appendProfiles").index(i).field("name"),
                    format!(
                        "unrecognized profile name '{}' - 'All', 'None', 'Basic' are supported",
                        profile.name
                    ),
                );
            }
        }
    }
}

impl Backend {
    fn validate(&self, path: &Path, out: &mut Violations) {
        match self.backend_type {
            BackendType::Prometheus => {
                let Some(prometheus) = &self.prometheus else {
                    return out.add(path.field("prometheus"), validate::MUST_BE_DEFINED);
                };
                if let Some(port) = prometheus.port {
                    validate::valid_port(&path.field("port"), port, out);
                }
                let mode = prometheus.tls.as_ref().and_then(|tls| tls.mode.as_deref());
                if mode.is_some_and(|mode| !TLS_MODES.contains(&mode)) {
                    out.add(path.field("prometheus.tls.mode"), must_be_one_of("mode", &TLS_MODES));
                }
            }
            BackendType::OpenTelemetry => {
                let path = path.field("openTelemetry");
                let Some(telemetry) = &self.open_telemetry else {
                    return out.add(path, validate::MUST_BE_DEFINED);
                };
                validate::otel_backend_ref(&path.field("backendRef"), telemetry.backend_ref.as_ref(), out);
            }
            BackendType::Unknown(_) => out.add(path, "unrecognized type"),
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::table::faults;

    #[rstest::rstest]
    #[case::nothing("{}", &[])]
    #[case::port("default: {backends: [{type: Prometheus, prometheus: {port: 0}}]}", &["spec.default.backends.backend[0].port: port must be a valid (1-65535)"])]
    #[case::no_body(
        "default: {backends: [{type: Prometheus}, {type: OpenTelemetry}, {type: Other}]}",
        &[
            "spec.default.backends.backend[0].prometheus: must be defined",
            "spec.default.backends.backend[1].openTelemetry: must be defined",
            "spec.default.backends.backend[2]: unrecognized type",
        ]
    )]
    fn metrics(#[case] spec: &str, #[case] expected: &[&str]) {
        assert_eq!(faults("MeshMetric", spec), expected);
    }

    #[test]
    fn a_selector_names_its_type() {
        let faults =
            faults("MeshMetric", "default: {sidecar: {profiles: {include: [{type: Some, match: a}]}}}");
        assert!(
            faults[0]
                .starts_with("spec.default.sidecar.profiles.include[0].type: unrecognized type 'Some' - ")
        );
    }
}
