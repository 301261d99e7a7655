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
        valid_port(&path.field("port"), self.matched.port, out);
        if !PROTOCOLS.contains(&self.matched.protocol.as_str()) {
            out.add(path.field("protocol"), must_be_one_of("protocol", &PROTOCOLS));
        }
        if self.extension.as_ref().is_some_and(|extension| extension.extension_type.is_empty()) {
            out.add(spec.field("extension.type"), validate::MUST_NOT_BE_EMPTY);
        }
        // With an extension its author judges the endpoints.
        if self.extension.is_none() {
            for (i, endpoint) in self.endpoints.iter().enumerate() {
                endpoint.validate(&spec.field("endpoints").index(i), out);
            }
        }
        if let Some(tls) = &self.tls {
            tls.validate(&spec.field("tls"), out);
        }
    }
}

fn valid_port(path: &Path, port: u32, out: &mut Violations) {
    if !(1..=65535).contains(&port) {
        out.add(path, "port must be a valid (1-65535)");
    }
}

impl Endpoint {
    fn validate(&self, path: &Path, out: &mut Violations) {
        let kind = if names::is_ip(&self.address) {
            "an IP"
        } else if names::is_dns_name(&self.address) {
            "a hostname"
        } else {
            out.add(path.field("address"), "address has to be a valid IP or hostname");
            return;
        };
        match self.port {
            None => out.add(path.field("port"), format!("must be defined when endpoint is {kind}")),
            Some(port) => valid_port(&path.field("port"), port, out),
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
        if verification.mode.as_ref().is_some_and(|mode| !mode.is_known()) {
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
        if verification.server_name.as_ref().is_some_and(|name| !names::is_dns_name(name)) {
            out.add(path.field("serverName"), "must be a valid DNS name");
        }
        match (&verification.client_cert, &verification.client_key) {
            (Some(_), None) => out.add(path.field("clientKey"), "must be defined when clientCert is defined"),
            (None, Some(_)) => out.add(path.field("clientCert"), "must be defined when clientKey is defined"),
            _ => {}
        }
        let sources = [
            ("caCert", &verification.ca_cert),
            ("clientCert", &verification.client_cert),
            ("clientKey", &verification.client_key),
        ];
        for (field, source) in sources {
            let Some(source) = source else { continue };
            let path = path.field(field);
            if CERTIFICATE_SOURCES.contains(&source.source_type) {
                validate::data_source(&path, source, &CERTIFICATE_SOURCES, out);
            } else {
                out.add(
                    path.field("type"),
                    format!("{} must be one of: Secret, InsecureInline", source.source_type),
                );
            }
        }
    }
}
