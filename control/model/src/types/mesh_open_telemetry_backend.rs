//! MeshOpenTelemetryBackend: a collector that policies send telemetry to.

use crate::{
    Path,
    meta::Meta,
    names, open_enum,
    registry::Descriptor,
    resource::{NoStatus, ResourceSpec},
    spec_struct,
    validate::{self, must_be_one_of},
    violation::Violations,
};

/// All that is known of the type.
pub static DESCRIPTOR: Descriptor = Descriptor {
    acted_on: false,
    ..Descriptor::of::<MeshOpenTelemetryBackend>(
        "MeshOpenTelemetryBackend",
        "meshopentelemetrybackends",
        "motb",
        "Mesh OpenTelemetry Backend",
        "Mesh OpenTelemetry Backends",
    )
};

open_enum! {
    /// What the collector speaks.
    pub enum BackendProtocol { Grpc = "grpc", Http = "http" }
    /// Whether the workload's environment counts.
    pub enum EnvMode { Disabled = "Disabled", Optional = "Optional", Required = "Required" }
    /// What counts first.
    pub enum EnvPrecedence { ExplicitFirst = "ExplicitFirst", EnvFirst = "EnvFirst" }
}

spec_struct! {
    /// A collector.
    pub struct MeshOpenTelemetryBackend {
        pub endpoint: Option<Endpoint>,
        pub protocol: Option<BackendProtocol>,
        pub env: Option<Env>,
    }
    /// Where it is.
    pub struct Endpoint {
        pub address: Option<String>,
        pub port: Option<u32>,
        pub path: Option<String>,
    }
    /// What the workload's environment may say.
    pub struct Env {
        pub mode: Option<EnvMode>,
        pub precedence: Option<EnvPrecedence>,
        pub allow_signal_overrides: Option<bool>,
    }
}

impl ResourceSpec for MeshOpenTelemetryBackend {
    const DESCRIPTOR: &'static Descriptor = &DESCRIPTOR;
    type Status = NoStatus;

    fn apply_defaults(&mut self) {
        self.protocol.get_or_insert(BackendProtocol::Grpc);
    }

    fn validate(&self, _meta: &Meta, out: &mut Violations) {
        let spec = Path::spec();
        if let Some(endpoint) = &self.endpoint {
            let path = spec.field("endpoint");
            if let Some(address) = &endpoint.address {
                if address.is_empty() {
                    out.add(path.field("address"), validate::MUST_NOT_BE_EMPTY);
                } else if !names::is_ip_or_dns_name(address) {
                    out.add(path.field("address"), "address has to be a valid IP or hostname");
                }
            }
            if let Some(port) = endpoint.port {
                validate::valid_port(&path.field("port"), port, out);
            }
            if let Some(text) = endpoint.path.as_deref().filter(|text| !text.is_empty()) {
                self.validate_path(&path.field("path"), text, out);
            }
        }
        if self.protocol.as_ref().is_some_and(|protocol| !protocol.is_known()) {
            out.add(spec.field("protocol"), must_be_one_of("protocol", BackendProtocol::KNOWN));
        }
        if let Some(env) = &self.env {
            let path = spec.field("env");
            if env.mode.as_ref().is_some_and(|mode| !mode.is_known()) {
                out.add(path.field("mode"), must_be_one_of("mode", EnvMode::KNOWN));
            }
            if env.precedence.as_ref().is_some_and(|precedence| !precedence.is_known()) {
                out.add(path.field("precedence"), must_be_one_of("precedence", EnvPrecedence::KNOWN));
            }
        }
    }
}

impl MeshOpenTelemetryBackend {
    fn validate_path(&self, path: &Path, text: &str, out: &mut Violations) {
        if self.protocol.as_ref().is_none_or(|protocol| *protocol == BackendProtocol::Grpc) {
            return out.add(path, "must not be set when protocol is grpc");
        }
        if !text.starts_with('/') {
            out.add(path, "must start with /");
        }
        if text.contains(['?', '#']) {
            out.add(path, "must not contain query or fragment");
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::table::faults;

    #[rstest::rstest]
    #[case::nothing("{}", &[])]
    #[case::grpc(
        "endpoint: {path: v1/traces?a}",
        &["spec.endpoint.path: must not be set when protocol is grpc"]
    )]
    #[case::http(
        "{protocol: http, endpoint: {path: 'v1?a'}}",
        &["spec.endpoint.path: must start with /", "spec.endpoint.path: must not contain query or fragment"]
    )]
    #[case::empty_path("endpoint: {path: ''}", &[])]
    #[case::endpoint(
        "endpoint: {address: 'a b', port: 0}",
        &[
            "spec.endpoint.address: address has to be a valid IP or hostname",
            "spec.endpoint.port: port must be a valid (1-65535)",
        ]
    )]
    fn backends(#[case] spec: &str, #[case] expected: &[&str]) {
        assert_eq!(faults("MeshOpenTelemetryBackend", spec), expected);
    }
}
