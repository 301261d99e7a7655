//! MeshIdentity: who issues which identities to which proxies.

use crate::{
    GoDuration,
    meta::Meta,
    policy::DataSourceType,
    policy::{DataSource, LabelSelector},
    registry::Descriptor,
    resource::ResourceSpec,
    spec_struct,
    template::Template,
    validate,
    violation::{Path, Violations},
};

/// All that is known of the type.
pub static DESCRIPTOR: Descriptor = Descriptor {
    ..Descriptor::of::<MeshIdentity>(
        "MeshIdentity",
        "meshidentities",
        "mid",
        "Mesh Identity",
        "Mesh Identities",
    )
};

crate::open_enum! {
    /// Who issues certificates.
    pub enum ProviderType { Bundled = "Bundled", Spire = "Spire", Extension = "Extension" }
    /// Whether a MeshTrust is made along.
    pub enum MeshTrustCreation { Enabled = "Enabled", Disabled = "Disabled" }
}

spec_struct! {
    /// Identities of the proxies it selects.
    pub struct MeshIdentity {
        pub selector: Option<Selector>,
        #[serde(rename = "spiffeID")]
        pub spiffe_id: Option<SpiffeIdTemplate>,
        pub provider: Option<Provider>,
    }
    /// Which proxies.
    pub struct Selector {
        pub dataplane: Option<LabelSelector>,
    }
    /// Templates of the two parts of an id.
    pub struct SpiffeIdTemplate {
        pub trust_domain: Option<String>,
        pub path: Option<String>,
    }
    /// Who issues certificates.
    pub struct Provider {
        #[serde(rename = "type")]
        pub provider_type: ProviderType,
        pub bundled: Option<Bundled>,
        pub spire: Option<Spire>,
        pub extension: Option<Extension>,
    }
    /// The control plane issues them.
    pub struct Bundled {
        pub mesh_trust_creation: Option<MeshTrustCreation>,
        pub insecure_allow_self_signed: Option<bool>,
        pub certificate_parameters: Option<CertificateParameters>,
        pub autogenerate: Option<Autogenerate>,
        pub ca: Option<Ca>,
    }
    /// Of the certificates issued.
    pub struct CertificateParameters {
        pub expiry: Option<GoDuration>,
    }
    /// The control plane makes the authority.
    pub struct Autogenerate {
        pub enabled: Option<bool>,
    }
    /// An authority that somebody provides.
    pub struct Ca {
        pub certificate: Option<DataSource>,
        pub private_key: Option<DataSource>,
    }
    /// SPIRE issues them.
    pub struct Spire {
        pub agent: Option<SpireAgent>,
    }
    /// The agent on the node.
    pub struct SpireAgent {
        pub timeout: Option<GoDuration>,
    }
    /// Something else issues them.
    pub struct Extension {
        pub name: String,
        pub config: Option<serde_json::Value>,
    }
    /// What became of it.
    pub struct MeshIdentityStatus {
        pub conditions: Vec<Condition>,
    }
    /// One thing that holds or doesn't.
    pub struct Condition {
        #[serde(rename = "type")]
        pub condition_type: String,
        pub status: String,
        pub reason: String,
        pub message: String,
    }
}

impl ResourceSpec for MeshIdentity {
    const DESCRIPTOR: &'static Descriptor = &DESCRIPTOR;
    type Status = MeshIdentityStatus;

    fn validate(&self, _meta: &Meta, out: &mut Violations) {
        let spec = Path::spec();
        if let Some(id) = &self.spiffe_id {
            let path = spec.field("spiffeID");
            for (field, template) in [("trustDomain", &id.trust_domain), ("path", &id.path)] {
                if let Some(template) = template
                    && let Err(error) = Template::parse(template)
                {
                    out.add(path.field(field), format!("couldn't parse template: {error}"));
                }
            }
        }
        let Some(provider) = &self.provider else { return };
        let path = spec.field("provider");
        match &provider.provider_type {
            ProviderType::Bundled => match &provider.bundled {
                None => out.add(path.field("bundled"), validate::MUST_BE_DEFINED),
                Some(bundled) => bundled.validate(&path.field("bundled"), out),
            },
            ProviderType::Spire => {
                if provider.spire.is_none() {
                    out.add(path.field("spire"), validate::MUST_BE_DEFINED);
                }
            }
            ProviderType::Extension => match &provider.extension {
                None => out.add(path.field("extension"), validate::MUST_BE_DEFINED),
                Some(extension) if extension.name.is_empty() => {
                    out.add(path.field("extension.name"), validate::MUST_NOT_BE_EMPTY);
                }
                Some(_) => {}
            },
            ProviderType::Unknown(_) => {
                out.add(path.field("type"), validate::must_be_one_of("type", ProviderType::KNOWN));
            }
        }
    }

    fn project_status(status: &serde_json::Value) -> serde_json::Value {
        status.get("conditions").cloned().unwrap_or_default()
    }
}

/// Where an authority may be kept.
const CA_SOURCES: [DataSourceType; 4] =
    [DataSourceType::File, DataSourceType::Secret, DataSourceType::EnvVar, DataSourceType::InsecureInline];

impl Bundled {
    fn validate(&self, path: &Path, out: &mut Violations) {
        if self.mesh_trust_creation.as_ref().is_some_and(|creation| !creation.is_known()) {
            let given = self.mesh_trust_creation.as_ref().map(MeshTrustCreation::as_str).unwrap_or_default();
            out.add(
                path.field("meshTrustCreation"),
                validate::must_be_one_of(given, MeshTrustCreation::KNOWN),
            );
        }
        if let Some(parameters) = &self.certificate_parameters {
            validate::duration_positive(&path.field("certificateParameters.expiry"), parameters.expiry, out);
        }
        let autogenerated =
            self.autogenerate.as_ref().is_some_and(|autogenerate| autogenerate.enabled.unwrap_or_default());
        match (&self.ca, autogenerated) {
            (Some(_), true) => out.add(path.field("ca"), "must not be defined when autogenerate is enabled"),
            (None, false) => {
                out.add(path.field("ca"), "must be defined when autogenerate is disabled");
            }
            (Some(ca), false) => {
                for (field, source) in [("certificate", &ca.certificate), ("privateKey", &ca.private_key)] {
                    let path = path.field("ca").field(field);
                    match source {
                        None => out.add(path, validate::MUST_BE_DEFINED),
                        Some(source) => validate::data_source(&path, source, &CA_SOURCES, out),
                    }
                }
            }
            // That a self-signed authority was allowed is asked when it is made, and told in the status.
            (None, true) => {}
        }
    }
}
