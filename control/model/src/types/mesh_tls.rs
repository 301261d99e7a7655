//! MeshTLS: whether plaintext is accepted, and which TLS.

use crate::{
    meta::Meta,
    policy::TargetRef,
    registry::{Descriptor, PolicyTraits},
    resource::{NoStatus, ResourceSpec},
    spec_struct,
    validate::{self, TlsVersions, must_be_one_of},
    violation::{Path, Violations},
};

pub use crate::validate::{TlsVersion, TlsVersions as Version};

/// All that is known of the type.
pub static DESCRIPTOR: Descriptor = Descriptor::policy::<MeshTLS>(
    PolicyTraits::RULES,
    "MeshTLS",
    "meshtlses",
    "mtls",
    "Mesh TLS",
    "Mesh TLSes",
);

crate::open_enum! {
    /// Whether plaintext is accepted.
    pub enum Mode { Strict = "Strict", Permissive = "Permissive" }
}

spec_struct! {
    /// TLS of what comes in.
    pub struct MeshTLS {
        pub target_ref: Option<TargetRef>,
        pub rules: Vec<Rule>,
    }
    /// One rule.
    pub struct Rule {
        pub default: Conf,
    }
    /// Mode, versions, ciphers.
    pub struct Conf {
        pub mode: Option<Mode>,
        pub tls_version: Option<TlsVersions>,
        pub tls_ciphers: Option<Vec<String>>,
    }
}

impl ResourceSpec for MeshTLS {
    const DESCRIPTOR: &'static Descriptor = &DESCRIPTOR;
    type Status = NoStatus;

    fn validate(&self, _meta: &Meta, out: &mut Violations) {
        validate::top_level(self.target_ref.as_ref(), !self.rules.is_empty(), out);
        let whole_mesh = validate::is_whole_mesh(self.target_ref.as_ref());
        for (i, rule) in self.rules.iter().enumerate() {
            rule.default.validate(&Path::spec().field("rules").index(i).field("default"), whole_mesh, out);
        }
    }
}

/// The ciphers that may be named.
pub const CIPHERS: [&str; 6] = [
    "ECDHE-ECDSA-AES128-GCM-SHA256",
    "ECDHE-ECDSA-AES256-GCM-SHA384",
    "ECDHE-ECDSA-CHACHA20-POLY1305",
    "ECDHE-RSA-AES128-GCM-SHA256",
    "ECDHE-RSA-AES256-GCM-SHA384",
    "ECDHE-RSA-CHACHA20-POLY1305",
];

impl Conf {
    fn validate(&self, path: &Path, whole_mesh: bool, out: &mut Violations) {
        if self.mode.as_ref().is_some_and(|mode| !mode.is_known()) {
            out.add(path.field("mode"), must_be_one_of("mode", Mode::KNOWN));
        }
        if let Some(ciphers) = &self.tls_ciphers {
            if !whole_mesh && !ciphers.is_empty() {
                out.add(
                    path.field("tlsCiphers"),
                    "tlsCiphers can only be defined with top level targetRef kind: Mesh",
                );
            } else if ciphers.iter().any(|cipher| !CIPHERS.contains(&cipher.as_str())) {
                out.add(path.field("tlsCiphers"), must_be_one_of("tlsCiphers", &CIPHERS));
            }
        }
        if let Some(version) = &self.tls_version {
            let path = path.field("tlsVersion");
            if !whole_mesh {
                out.add(path, "tlsVersion can only be defined with top level targetRef kind: Mesh");
                return;
            }
            version.validate(&path, out);
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::table::faults;

    #[rstest::rstest]
    #[case::nothing("{}", &[])]
    #[case::no_ciphers("{targetRef: {kind: Dataplane}, rules: [{default: {mode: Strict, tlsCiphers: []}}]}", &[])]
    #[case::versions(
        "rules: [{default: {tlsVersion: {min: TLS13, max: TLS12}}}]",
        &["spec.rules[0].default.tlsVersion.min: min version must be lower than max"]
    )]
    #[case::any_version("rules: [{default: {tlsVersion: {min: TLS13, max: TLSAuto}}}]", &[])]
    fn tls(#[case] spec: &str, #[case] expected: &[&str]) {
        assert_eq!(faults("MeshTLS", spec), expected);
    }
}
