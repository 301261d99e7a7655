//! MeshExternalService: a service outside the mesh.

use crate::{
    Path,
    meta::Meta,
    names, open_enum,
    policy::{DataSource, DataSourceType},
    registry::Descriptor,
    resource::ResourceSpec,
    spec_struct,
    validate::{self, must_be_one_of},
    violation::Violations,
};

/// All that is known of the type.
pub static DESCRIPTOR: Descriptor = Descriptor {
    acted_on: false,
    is_destination: true,
    ..Descriptor::of::<MeshExternalService>(
        "MeshExternalService",
        "meshexternalservices",
        "extsvc",
        "Mesh External Service",
        "Mesh External Services",
    )
};

open_enum! {
    /// How traffic is recognised.
    pub enum MatchType { HostnameGenerator = "HostnameGenerator" }
    /// What is not verified of the peer.
    pub enum VerificationMode {
        SkipSan = "SkipSAN", SkipCa = "SkipCA", SkipAll = "SkipAll", Secured = "Secured",
    }
    /// How a name in a certificate is compared.
    pub enum SanMatchType { Prefix = "Prefix", Exact = "Exact" }
}

spec_struct! {
    /// A service outside the mesh.
    pub struct MeshExternalService {
        #[serde(rename = "match")]
        pub matched: Match,
        pub extension: Option<Extension>,
        pub endpoints: Vec<Endpoint>,
        pub tls: Option<Tls>,
    }
    /// The port that workloads see.
    pub struct Match {
        #[serde(rename = "type")]
        pub match_type: Option<MatchType>,
        pub port: u32,
        pub protocol: String,
    }
    /// Somebody else's way to reach it.
    pub struct Extension {
        #[serde(rename = "type")]
        pub extension_type: String,
        pub config: Option<serde_json::Value>,
    }
    /// Where it is.
    pub struct Endpoint {
        pub address: String,
        pub port: Option<u32>,
        pub priority: Option<u32>,
    }
    /// TLS towards it.
    pub struct Tls {
        pub enabled: bool,
        pub version: Option<validate::TlsVersions>,
        pub allow_renegotiation: bool,
        pub verification: Option<Verification>,
    }
    /// How it is verified, and what is shown to it.
    pub struct Verification {
        pub mode: Option<VerificationMode>,
        pub server_name: Option<String>,
        pub subject_alt_names: Vec<SanMatch>,
        pub ca_cert: Option<DataSource>,
        pub client_cert: Option<DataSource>,
        pub client_key: Option<DataSource>,
    }
    /// A name that its certificate must have.
    pub struct SanMatch {
        #[serde(rename = "type")]
        pub match_type: Option<SanMatchType>,
        pub value: String,
    }
    /// What the control plane found out.
    pub struct MeshExternalServiceStatus {
        pub vip: Option<crate::types::mesh_service::Vip>,
        pub addresses: Vec<crate::types::mesh_service::Address>,
        pub hostname_generators: Vec<crate::types::mesh_service::HostnameGeneratorStatus>,
    }
}

/// Protocols that the port may speak.
const PROTOCOLS: [&str; 4] = ["tcp", "grpc", "http", "http2"];
/// Where certificates may be kept; files and variables would be the control plane's own.
const CERTIFICATE_SOURCES: [DataSourceType; 2] = [DataSourceType::Secret, DataSourceType::InsecureInline];

impl ResourceSpec for MeshExternalService {
    const DESCRIPTOR: &'static Descriptor = &DESCRIPTOR;
    type Status = MeshExternalServiceStatus;

    fn apply_defaults(&mut self) {
        self.matched.match_type.get_or_insert(MatchType::HostnameGenerator);
        if self.matched.protocol.is_empty() {
            "tcp".clone_into(&mut self.matched.protocol);
        }
    }

    fn validate(&self, meta: &Meta, out: &mut Violations) {
        validate::display_name(meta, out);
        let spec = Path::spec();
        let path = spec.field("match");
        if let Some(MatchType::Unknown(other)) = &self.matched.match_type {
            out.add(
                path.field("type"),
                format!("unrecognized type '{other}' - only 'HostnameGenerator' is supported"),
            );
        }
        validate::valid_port(&path.field("port"), self.matched.port, out);
        if !PROTOCOLS.contains(&self.matched.protocol.as_str()) {
            out.add(path.field("protocol"), must_be_one_of("protocol", &PROTOCOLS));
        }
        match &self.extension {
            None => {
                for (i, endpoint) in self.endpoints.iter().enumerate() {
                    endpoint.validate(&spec.field("endpoints").index(i), out);
                }
                if let Some(tls) = &self.tls {
                    tls.validate(&spec.field("tls"), out);
                }
            }
            // Its author judges endpoints and TLS, but not what the control plane reads.
            Some(extension) => {
                if let Some(verification) = self.tls.as_ref().and_then(|tls| tls.verification.as_ref()) {
                    verification.validate_sources(&spec.field("tls.verification"), out);
                }
                if extension.extension_type.is_empty() {
                    out.add(spec.field("extension.type"), validate::MUST_NOT_BE_EMPTY);
                }
            }
        }
    }
}

impl Endpoint {
    fn validate(&self, path: &Path, out: &mut Violations) {
        if names::is_ip_or_dns_name(&self.address) {
            validate::valid_port(&path.field("port"), self.port.unwrap_or_default(), out);
        } else {
            out.add(path.field("address"), "address has to be a valid IP or hostname");
        }
    }
}

impl Tls {
    fn validate(&self, path: &Path, out: &mut Violations) {
        if let Some(version) = &self.version {
            version.validate(&path.field("version"), out);
        }
        let Some(verification) = &self.verification else { return };
        let path = path.field("verification");
        if verification.server_name.as_ref().is_some_and(|name| !names::is_dns_name(name)) {
            out.add(path.field("serverName"), "must be a valid DNS name");
        }
        if verification.mode.as_ref().is_some_and(|mode| !mode.is_known() && !mode.as_str().is_empty()) {
            out.add(path.field("mode"), must_be_one_of("mode", VerificationMode::KNOWN));
        }
        for (i, san) in verification.subject_alt_names.iter().enumerate() {
            if san.match_type.as_ref().is_some_and(|kind| !kind.is_known()) {
                out.add(
                    path.field("subjectAltNames").index(i).field("type"),
                    must_be_one_of("type", SanMatchType::KNOWN),
                );
            }
        }
        match (&verification.client_cert, &verification.client_key) {
            (Some(_), None) => out.add(path.field("clientKey"), "must be defined when clientCert is defined"),
            (None, Some(_)) => out.add(path.field("clientCert"), "must be defined when clientKey is defined"),
            _ => {}
        }
        verification.validate_sources(&path, out);
    }
}

impl Verification {
    /// Files and variables would be the control plane's own, which no author of a service may have read.
    fn validate_sources(&self, path: &Path, out: &mut Violations) {
        let sources =
            [("caCert", &self.ca_cert), ("clientCert", &self.client_cert), ("clientKey", &self.client_key)];
        for (field, source) in sources {
            match source {
                Some(source) if matches!(source.source_type, DataSourceType::Unknown(_)) => {
                    validate::of_control_plane(&path.field(field), source, out);
                }
                Some(source) => validate::data_source(&path.field(field), source, &CERTIFICATE_SOURCES, out),
                None => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::table::faults;

    #[rstest::rstest]
    #[case::nothing("{}", &["spec.match.port: port must be a valid (1-65535)"])]
    #[case::endpoints(
        "{match: {port: 80}, endpoints: [{address: a.example}, {address: 10.0.0.1, port: 70000}, {address: 'unix:///a', port: 1}]}",
        &[
            "spec.endpoints[0].port: port must be a valid (1-65535)",
            "spec.endpoints[1].port: port must be a valid (1-65535)",
            "spec.endpoints[2].address: address has to be a valid IP or hostname",
        ]
    )]
    #[case::an_extension_judges_its_tls(
        "{match: {port: 80}, extension: {}, tls: {version: {min: SSL3}, verification: {serverName: 'a b', caCert: {type: File, file: {path: /a}}}}}",
        &[
            "spec.tls.verification.caCert.type: File must be one of: Secret, InsecureInline",
            "spec.extension.type: must not be empty",
        ]
    )]
    #[case::tls(
        "{match: {port: 80}, tls: {verification: {serverName: 'a b', mode: Some, subjectAltNames: [{type: Some}], clientCert: {type: Secret}}}}",
        &[
            "spec.tls.verification.serverName: must be a valid DNS name",
            "spec.tls.verification.mode: \"mode\" must be one of [\"SkipSAN\", \"SkipCA\", \"SkipAll\", \"Secured\"]",
            "spec.tls.verification.subjectAltNames[0].type: \"type\" must be one of [\"Prefix\", \"Exact\"]",
            "spec.tls.verification.clientKey: must be defined when clientCert is defined",
            "spec.tls.verification.clientCert.secretRef: must be defined",
        ]
    )]
    fn services(#[case] spec: &str, #[case] expected: &[&str]) {
        assert_eq!(faults("MeshExternalService", spec), expected);
    }
}
