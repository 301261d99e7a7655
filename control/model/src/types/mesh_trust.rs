//! MeshTrust: which authorities vouch for a trust domain.

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
        if self.trust_domain.is_empty() {
            out.add(spec.field("trustDomain"), validate::MUST_NOT_BE_EMPTY);
        } else if let Err(error) = self.trust_domain.parse::<TrustDomain>() {
            out.add(spec.field("trustDomain"), error.why);
        }
        if self.ca_bundles.is_empty() {
            out.add(spec.field("caBundles"), validate::MUST_NOT_BE_EMPTY);
        }
        for (i, bundle) in self.ca_bundles.iter().enumerate() {
            let path = spec.field("caBundles").index(i);
            if !bundle.bundle_type.is_known() {
                out.add(path.field("type"), validate::must_be_one_of("type", CaBundleType::KNOWN));
                continue;
            }
            match &bundle.pem {
                None => out.add(path.field("pem"), validate::MUST_BE_DEFINED),
                Some(pem) if !pem.value.contains("-----BEGIN CERTIFICATE-----") => {
                    out.add(path.field("pem.value"), "must be a certificate in PEM");
                }
                Some(_) => {}
            }
        }
    }
}
