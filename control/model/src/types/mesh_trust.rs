//! MeshTrust: which authorities vouch for a trust domain.

use base64::Engine as _;

use crate::{
    Path, meta::Meta, registry::Descriptor, resource::ResourceSpec, spec_struct, spiffe::TrustDomain,
    validate, violation::Violations,
};

/// All that is known of the type.
pub static DESCRIPTOR: Descriptor = Descriptor {
    ..Descriptor::of::<MeshTrust>("MeshTrust", "meshtrusts", "mtrust", "Mesh Trust", "Mesh Trusts")
};

crate::open_enum! {
    /// How a bundle is written.
    pub enum CaBundleType { Pem = "Pem" }
}

spec_struct! {
    /// The authorities of a trust domain.
    pub struct MeshTrust {
        pub trust_domain: String,
        pub ca_bundles: Vec<CaBundle>,
    }
    /// Certificates of authorities.
    pub struct CaBundle {
        #[serde(rename = "type")]
        pub bundle_type: CaBundleType,
        pub pem: Option<Pem>,
    }
    /// In PEM.
    pub struct Pem {
        pub value: String,
    }
    /// Where it comes from.
    pub struct MeshTrustStatus {
        pub origin: Option<Origin>,
    }
    /// The MeshIdentity that keeps it.
    pub struct Origin {
        pub kri: Option<String>,
    }
}

impl ResourceSpec for MeshTrust {
    const DESCRIPTOR: &'static Descriptor = &DESCRIPTOR;
    type Status = MeshTrustStatus;

    fn validate(&self, _meta: &Meta, out: &mut Violations) {
        let spec = Path::spec();
        let bundles = spec.field("caBundles");
        if self.ca_bundles.is_empty() {
            out.add(&bundles, validate::MUST_NOT_BE_EMPTY);
        }
        for (i, bundle) in self.ca_bundles.iter().enumerate() {
            if let CaBundleType::Unknown(given) = &bundle.bundle_type {
                // Peers leave the bundle's number out of this one path; clients know it so.
                out.add(bundles.field("type"), format!("{given} must be one of: Pem"));
                continue;
            }
            let path = bundles.index(i).field("pem");
            match &bundle.pem {
                None => out.add(path, validate::MUST_BE_DEFINED),
                Some(pem) if !is_certificates(&pem.value) => {
                    out.add(path.field("value"), "provided certificate has incorrect format");
                }
                Some(_) => {}
            }
        }
        let path = spec.field("trustDomain");
        if self.trust_domain.is_empty() {
            out.add(path, "trustDomain needs to be defined");
        } else if self.trust_domain.len() > 253 {
            out.add(path, "must not be longer than 253 characters");
        } else if let Err(error) = self.trust_domain.parse::<TrustDomain>() {
            out.add(path, error.why);
        }
    }
}

/// Whether a text in PEM holds certificates and nothing else; what they say is judged by who trusts them.
pub fn is_certificates(text: &str) -> bool {
    let mut blocks = 0;
    let mut rest = text;
    while let Some((_, after)) = rest.split_once("-----BEGIN ") {
        let Some((label, body)) = after.split_once("-----") else { return false };
        let Some((body, tail)) = body.split_once(&format!("-----END {label}-----")) else { return false };
        let body: String = body.chars().filter(|c| !c.is_whitespace()).collect();
        let decoded = base64::engine::general_purpose::STANDARD.decode(body);
        if label != "CERTIFICATE" || decoded.is_err() {
            return false;
        }
        blocks += 1;
        rest = tail;
    }
    blocks > 0
}

#[cfg(test)]
mod tests {
    use crate::table::faults;

    const CERTIFICATE: &str = "\"-----BEGIN CERTIFICATE-----\\nMAo=\\n-----END CERTIFICATE-----\\n\"";

    #[rstest::rstest]
    #[case::nothing("{}", &["spec.caBundles: must not be empty", "spec.trustDomain: trustDomain needs to be defined"])]
    #[case::valid("{trustDomain: a.b, caBundles: [{type: Pem, pem: {value: PEM}}]}", &[])]
    #[case::no_pem(
        "{trustDomain: a.b, caBundles: [{type: Pem, pem: {value: PEM}}, {type: Pem}]}",
        &["spec.caBundles[1].pem: must be defined"]
    )]
    #[case::no_certificate(
        "{trustDomain: a.b, caBundles: [{type: Pem, pem: {value: abc}}]}",
        &["spec.caBundles[0].pem.value: provided certificate has incorrect format"]
    )]
    #[case::a_key(
        "{trustDomain: a.b, caBundles: [{type: Pem, pem: {value: KEY}}]}",
        &["spec.caBundles[0].pem.value: provided certificate has incorrect format"]
    )]
    #[case::type_of_bundle(
        "{trustDomain: a.b, caBundles: [{type: Der}]}",
        &["spec.caBundles.type: Der must be one of: Pem"]
    )]
    #[case::domain(
        "{trustDomain: LONG, caBundles: [{type: Pem, pem: {value: PEM}}]}",
        &["spec.trustDomain: must not be longer than 253 characters"]
    )]
    fn trust(#[case] spec: &str, #[case] expected: &[&str]) {
        let spec = spec
            .replace("LONG", &"a".repeat(254))
            .replace("PEM}", &format!("{CERTIFICATE}}}"))
            .replace("KEY", &CERTIFICATE.replace("CERTIFICATE", "EC PRIVATE KEY"));
        assert_eq!(faults("MeshTrust", &spec), expected);
    }
}
