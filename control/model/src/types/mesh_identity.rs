//! MeshIdentity: who issues which identities to which proxies.

use crate::{
    GoDuration,
    meta::Meta,
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
            // What they render to is told in the status: it hangs on the mesh, the zone and the workload.
            for (field, template) in [("trustDomain", &id.trust_domain), ("path", &id.path)] {
                if let Some(Err(error)) = template.as_deref().map(Template::parse) {
                    out.add(path.field(field), format!("couldn't parse template: {error}"));
                }
            }
        }
        let Some(provider) = &self.provider else { return };
        let path = spec.field("provider");
        let missing = "configuration needs to be defined";
        match &provider.provider_type {
            ProviderType::Bundled => match &provider.bundled {
                None => out.add(path.field("bundled"), missing),
                Some(bundled) => bundled.validate(&path.field("bundled"), out),
            },
            ProviderType::Spire => match &provider.spire {
                None => out.add(path.field("spire"), missing),
                Some(spire) => {
                    let timeout = spire.agent.as_ref().and_then(|agent| agent.timeout);
                    // Peers write the middle of this path twice; clients know it so.
                    let path = path.field("spire.agent.spire.agent.timeout");
                    validate::duration_not_negative(&path, timeout, out);
                }
            },
            ProviderType::Extension => match &provider.extension {
                None => out.add(path.field("extension"), missing),
                Some(extension) if extension.name.is_empty() => {
                    out.add(path.field("extension.name"), "extension name needs to be defined");
                }
                Some(_) => {}
            },
            ProviderType::Unknown(given) => {
                out.add(path.field("type"), validate::must_be_one_of(given, ProviderType::KNOWN));
            }
        }
    }

    /// A trust domain names a space of identities and the path the workloads in it: moving either is a migration,
    /// because certificates, MeshTrusts and permissions would not move together.
    fn validate_update(&self, _meta: &Meta, before: &Self, out: &mut Violations) {
        let path = Path::spec().field("spiffeID");
        let parts = |spec: &Self| {
            let id = spec.spiffe_id.clone().unwrap_or_default();
            [id.trust_domain.unwrap_or_default(), id.path.unwrap_or_default()]
        };
        for (field, (was, now)) in
            ["trustDomain", "path"].into_iter().zip(parts(before).into_iter().zip(parts(self)))
        {
            if was != now {
                out.add(
                    path.field(field),
                    format!(
                        "is immutable, cannot be changed from {was:?} to {now:?}. Create a MeshIdentity under a different name with the new value and delete this one once every workload has migrated"
                    ),
                );
            }
        }
    }

    fn project_status(status: &serde_json::Value) -> serde_json::Value {
        status.get("conditions").cloned().unwrap_or_default()
    }
}

impl Bundled {
    fn validate(&self, path: &Path, out: &mut Violations) {
        if let Some(MeshTrustCreation::Unknown(given)) = &self.mesh_trust_creation {
            out.add(
                path.field("meshTrustCreation"),
                validate::must_be_one_of(given, MeshTrustCreation::KNOWN),
            );
        }
        let autogenerated =
            self.autogenerate.as_ref().is_some_and(|autogenerate| autogenerate.enabled.unwrap_or_default());
        match (&self.ca, autogenerated) {
            (Some(_), true) => out.add(path.field("ca"), "shouldn't be defined once using autogenerated"),
            (None, false) => out.add(path.field("ca"), validate::MUST_BE_DEFINED),
            (Some(ca), false) => {
                for (field, source) in [("certificate", &ca.certificate), ("privateKey", &ca.private_key)] {
                    let path = path.field("ca").field(field);
                    match source {
                        None => out.add(path, validate::MUST_BE_DEFINED),
                        Some(source) => validate::of_control_plane(&path, source, out),
                    }
                }
            }
            // That a self-signed authority was allowed is asked when it is made, and told in the status.
            (None, true) => {}
        }
        let expiry = self.certificate_parameters.as_ref().and_then(|parameters| parameters.expiry);
        let path = path.field("certificateParameters.expiry");
        if expiry.is_some_and(|expiry| expiry.nanos() == 0) {
            // Peers issue certificates that are expired at once.
            out.add(path, validate::ABOVE_ZERO_WHEN_DEFINED);
        } else {
            validate::duration_not_negative(&path, expiry, out);
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::table::{faults, faults_of_update};

    #[rstest::rstest]
    #[case::no_provider("{}", &[])]
    #[case::bundled("provider: {type: Bundled}", &["spec.provider.bundled: configuration needs to be defined"])]
    #[case::spire("provider: {type: Spire}", &["spec.provider.spire: configuration needs to be defined"])]
    #[case::extension("provider: {type: Extension}", &["spec.provider.extension: configuration needs to be defined"])]
    #[case::nameless(
        "provider: {type: Extension, extension: {}}",
        &["spec.provider.extension.name: extension name needs to be defined"]
    )]
    #[case::timeout(
        "provider: {type: Spire, spire: {agent: {timeout: -1s}}}",
        &["spec.provider.spire.agent.spire.agent.timeout: must not be negative when defined"]
    )]
    #[case::provider(
        "provider: {type: Other}",
        &["spec.provider.type: \"Other\" must be one of [\"Bundled\", \"Spire\", \"Extension\"]"]
    )]
    #[case::both_authorities(
        "provider: {type: Bundled, bundled: {autogenerate: {enabled: true}, ca: {}}}",
        &["spec.provider.bundled.ca: shouldn't be defined once using autogenerated"]
    )]
    #[case::no_authority(
        "provider: {type: Bundled, bundled: {autogenerate: {enabled: false}, certificateParameters: {expiry: -1h}}}",
        &[
            "spec.provider.bundled.ca: must be defined",
            "spec.provider.bundled.certificateParameters.expiry: must not be negative when defined",
        ]
    )]
    #[case::half_an_authority(
        "provider: {type: Bundled, bundled: {ca: {certificate: {type: EnvVar, envVar: {}}}}}",
        &[
            "spec.provider.bundled.ca.certificate.envVar.name: must be defined",
            "spec.provider.bundled.ca.privateKey: must be defined",
        ]
    )]
    #[case::expiry(
        "provider: {type: Bundled, bundled: {autogenerate: {enabled: true}, certificateParameters: {expiry: 0s}}}",
        &["spec.provider.bundled.certificateParameters.expiry: must be greater than zero when defined"]
    )]
    #[case::template(
        "spiffeID: {trustDomain: '{{ .Zone', path: '/a b/{{ .Pod }}'}",
        &["spec.spiffeID.trustDomain: couldn't parse template: template: :1: unclosed action"]
    )]
    fn identities(#[case] spec: &str, #[case] expected: &[&str]) {
        assert_eq!(faults("MeshIdentity", spec), expected);
    }

    #[rstest::rstest]
    #[case::same("spiffeID: {path: /a}", "spiffeID: {path: /a}", &[])]
    #[case::absent_is_empty("{}", "spiffeID: {}", &[])]
    #[case::moved("spiffeID: {trustDomain: a}", "spiffeID: {trustDomain: b, path: /a}", &["trustDomain", "path"])]
    fn an_id_does_not_move(#[case] before: &str, #[case] after: &str, #[case] moved: &[&str]) {
        let faults = faults_of_update("MeshIdentity", before, after);
        assert_eq!(faults.len(), moved.len(), "{faults:?}");
        for (fault, field) in faults.iter().zip(moved) {
            assert!(
                fault.starts_with(&format!("spec.spiffeID.{field}: is immutable, cannot be changed from "))
            );
        }
    }
}
