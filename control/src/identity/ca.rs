//! A certificate authority: ECDSA P-256, one level, leaves for exactly what control decided.

use std::fmt;

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PublicKeyData as _, SanType, SerialNumber,
    SubjectPublicKeyInfo,
};
use sha2::{Digest, Sha256};
use time::{Duration, OffsetDateTime};
use x509_parser::prelude::{FromDer as _, X509Certificate, X509CertificationRequest};

/// How far a certificate's start lies before its issuing, for clocks that are behind.
pub const BACKDATE: Duration = Duration::minutes(10);

/// How long a root lives.
pub const ROOT_LIFETIME: Duration = Duration::days(3650);

/// Why a certificate could not be made.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    /// The request is no PKCS#10, or its signature is wrong.
    #[error("the certificate request is unusable: {0}; send a PKCS#10 request in DER, signed by its own key")]
    Request(String),
    /// The request's key is not of the one kind that is issued for.
    #[error("the certificate request holds a key of another kind than ECDSA P-256; make a P-256 key")]
    KeyKind,
    /// A stored CA can't be loaded.
    #[error("the CA is unusable: {0}")]
    Load(String),
    /// Signing failed.
    #[error("signing failed: {0}")]
    Sign(#[from] rcgen::Error),
}

/// A public key whose owner proved that he holds the private one.
#[derive(Debug)]
pub struct ProvenKey {
    spki: SubjectPublicKeyInfo,
    hash: String,
}

impl ProvenKey {
    /// Reads a PKCS#10 request, checks its signature, and keeps nothing but the public key.
    pub fn from_csr(der: &[u8]) -> Result<Self, CaError> {
        let (rest, request) =
            X509CertificationRequest::from_der(der).map_err(|error| CaError::Request(error.to_string()))?;
        if !rest.is_empty() {
            return Err(CaError::Request("it has trailing bytes".into()));
        }
        request.verify_signature().map_err(|error| CaError::Request(error.to_string()))?;
        let raw = request.certification_request_info.subject_pki.raw;
        let spki = SubjectPublicKeyInfo::from_der(raw).map_err(|_| CaError::KeyKind)?;
        if spki.algorithm() != &PKCS_ECDSA_P256_SHA256 {
            return Err(CaError::KeyKind);
        }
        Ok(Self { hash: hex_digest(raw), spki })
    }

    /// SHA-256 of the `SubjectPublicKeyInfo`, in hex: the key's name.
    pub fn hash(&self) -> &str {
        &self.hash
    }
}

/// SHA-256 in hex.
pub fn hex_digest(bytes: &[u8]) -> String {
    ursa_wire::tls::fingerprint(bytes)
}

/// What a leaf is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Usage {
    /// A workload: client and server.
    Peer,
    /// A node: client only, so that no node can pose as the control plane.
    Client,
    /// The control plane: server only.
    Server,
}

/// What is to stand in a leaf.
#[derive(Debug)]
pub struct Leaf<'a> {
    /// The URI SAN.
    pub uri: Option<&'a str>,
    /// DNS SANs.
    pub dns: &'a [&'a str],
    /// Key usages.
    pub usage: Usage,
    /// The moment of issuing.
    pub now: OffsetDateTime,
    /// From `now`; cut at the CA's own end.
    pub lifetime: Duration,
}

/// A signed leaf.
#[derive(Debug, Clone)]
pub struct Issued {
    /// The leaf.
    pub pem: String,
    /// The leaf.
    pub der: Vec<u8>,
    /// Start.
    pub not_before: OffsetDateTime,
    /// End.
    pub not_after: OffsetDateTime,
}

/// A CA with its key.
pub struct Authority {
    certificate_pem: String,
    certificate_der: Vec<u8>,
    key_pem: String,
    not_after: OffsetDateTime,
    issuer: Issuer<'static, KeyPair>,
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authority")
            .field("fingerprint", &self.fingerprint())
            .field("not_after", &self.not_after)
            .finish_non_exhaustive()
    }
}

impl Authority {
    /// Makes a new root.
    pub fn generate(unit: &str, common_name: &str, uri: &str, now: OffsetDateTime) -> Result<Self, CaError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let mut params = CertificateParams::default();
        let mut name = DistinguishedName::new();
        name.push(DnType::OrganizationName, "Ursa");
        name.push(DnType::OrganizationalUnitName, unit);
        name.push(DnType::CommonName, common_name);
        params.distinguished_name = name;
        params.subject_alt_names = vec![SanType::URI(uri.try_into()?)];
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.not_before = now - BACKDATE;
        params.not_after = now + ROOT_LIFETIME;
        params.serial_number = Some(serial());
        let certificate = params.self_signed(&key)?;
        Self::from_pem(&certificate.pem(), &key.serialize_pem())
    }

    /// Loads a root, and checks that it is one and that the key is its own.
    pub fn from_pem(certificate_pem: &str, key_pem: &str) -> Result<Self, CaError> {
        let load = |what: &str| CaError::Load(what.to_owned());
        let block = pem::parse(certificate_pem)
            .map_err(|error| CaError::Load(format!("the certificate is not PEM: {error}")))?;
        let der = block.contents().to_vec();
        let key = KeyPair::from_pem(key_pem)
            .map_err(|error| CaError::Load(format!("the key is not a PKCS#8 PEM key: {error}")))?;
        let not_after = {
            let (_, certificate) = X509Certificate::from_der(&der)
                .map_err(|error| CaError::Load(format!("the certificate is damaged: {error}")))?;
            if !certificate.is_ca() {
                return Err(load("the certificate is no CA's (basic constraints)"));
            }
            if certificate.public_key().raw != key.subject_public_key_info() {
                return Err(load("the key is not that of the certificate"));
            }
            certificate.validity().not_after.to_datetime()
        };
        let issuer = Issuer::from_ca_cert_der(&der.clone().into(), key)?;
        Ok(Self {
            certificate_pem: certificate_pem.to_owned(),
            certificate_der: der,
            key_pem: key_pem.to_owned(),
            not_after,
            issuer,
        })
    }

    /// The root, PEM.
    pub fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }

    /// The root, DER.
    pub fn certificate_der(&self) -> &[u8] {
        &self.certificate_der
    }

    /// The key, PKCS#8 PEM; for the store only.
    pub fn key_pem(&self) -> &str {
        &self.key_pem
    }

    /// SHA-256 of the certificate in hex, as it stands in tickets.
    pub fn fingerprint(&self) -> String {
        hex_digest(&self.certificate_der)
    }

    /// Signs a leaf for a proven key.
    pub fn sign(&self, key: &ProvenKey, leaf: &Leaf<'_>) -> Result<Issued, CaError> {
        self.sign_spki(&key.spki, leaf)
    }

    /// Signs a leaf for a key of our own.
    pub fn sign_own(&self, key: &KeyPair, leaf: &Leaf<'_>) -> Result<Issued, CaError> {
        self.sign_spki(key, leaf)
    }

    fn sign_spki(&self, key: &impl rcgen::PublicKeyData, leaf: &Leaf<'_>) -> Result<Issued, CaError> {
        let mut params = CertificateParams::default();
        // An empty subject: the name is the SAN, and nobody can mistake another text for it.
        params.distinguished_name = DistinguishedName::new();
        if let Some(uri) = leaf.uri {
            params.subject_alt_names.push(SanType::URI(uri.try_into()?));
        }
        for dns in leaf.dns {
            params.subject_alt_names.push(SanType::DnsName((*dns).try_into()?));
        }
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = match leaf.usage {
            Usage::Peer => vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth],
            Usage::Client => vec![ExtendedKeyUsagePurpose::ClientAuth],
            Usage::Server => vec![ExtendedKeyUsagePurpose::ServerAuth],
        };
        params.use_authority_key_identifier_extension = true;
        params.not_before = whole_second(leaf.now - BACKDATE);
        params.not_after = whole_second((leaf.now + leaf.lifetime).min(self.not_after));
        params.serial_number = Some(serial());
        let certificate = params.signed_by(key, &self.issuer)?;
        Ok(Issued {
            pem: certificate.pem(),
            der: certificate.der().to_vec(),
            not_before: params.not_before,
            not_after: params.not_after,
        })
    }
}

/// A positive random serial of 16 bytes.
fn serial() -> SerialNumber {
    let mut bytes = *uuid::Uuid::new_v4().as_bytes();
    bytes[0] = (bytes[0] & 0x7f) | 0x40;
    SerialNumber::from_slice(&bytes)
}

/// Certificates know no fractions of a second; what we report must be what they say.
fn whole_second(time: OffsetDateTime) -> OffsetDateTime {
    time.replace_nanosecond(0).unwrap_or(time)
}

/// The first URI SAN and the SPKI hash of a certificate.
pub fn subject_of(der: &[u8]) -> Option<(String, String)> {
    use x509_parser::extensions::GeneralName;
    let (_, certificate) = X509Certificate::from_der(der).ok()?;
    let names = certificate.subject_alternative_name().ok()??;
    let uri = names.value.general_names.iter().find_map(|name| match name {
        GeneralName::URI(uri) => Some((*uri).to_owned()),
        _ => None,
    })?;
    let mut digest = Sha256::new();
    digest.update(certificate.public_key().raw);
    Some((uri, hex_digest(certificate.public_key().raw)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn csr(forged: &[&str]) -> Vec<u8> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).expect("key");
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "root");
        for uri in forged {
            params.subject_alt_names.push(SanType::URI((*uri).try_into().expect("uri")));
        }
        params.serialize_request(&key).expect("csr").der().to_vec()
    }

    fn now() -> OffsetDateTime {
        OffsetDateTime::now_utc()
    }

    #[test]
    fn a_leaf_says_only_what_control_decided() {
        let ca = Authority::generate("Mesh", "td", "spiffe://td", now()).expect("ca");
        let key = ProvenKey::from_csr(&csr(&["spiffe://td/workload/admin"])).expect("csr");
        let leaf = ca
            .sign(
                &key,
                &Leaf {
                    uri: Some("spiffe://td/workload/web"),
                    dns: &[],
                    usage: Usage::Peer,
                    now: now(),
                    lifetime: Duration::hours(48),
                },
            )
            .expect("leaf");
        let (_, parsed) = X509Certificate::from_der(&leaf.der).expect("der");
        let names = parsed.subject_alternative_name().expect("san").expect("san");
        assert_eq!(names.value.general_names.len(), 1);
        assert_eq!(subject_of(&leaf.der).expect("subject").0, "spiffe://td/workload/web");
        assert_eq!(parsed.subject().iter().count(), 0);
        assert!(leaf.not_before < now() - Duration::minutes(9));
        assert_eq!(subject_of(&leaf.der).expect("subject").1, key.hash());
    }

    #[test]
    fn requests_that_prove_nothing_are_refused() {
        let mut broken = csr(&[]);
        let last = broken.len() - 1;
        broken[last] ^= 1;
        assert!(matches!(ProvenKey::from_csr(&broken), Err(CaError::Request(_))));
        assert!(ProvenKey::from_csr(b"nonsense").is_err());
        let ed = KeyPair::generate_for(&rcgen::PKCS_ED25519).expect("key");
        let request = CertificateParams::default().serialize_request(&ed).expect("csr");
        assert!(matches!(ProvenKey::from_csr(request.der()), Err(CaError::KeyKind)));
    }

    #[test]
    fn a_ca_survives_its_text_form_and_foreign_keys_are_noticed() {
        let one = Authority::generate("Mesh", "td", "spiffe://td", now()).expect("ca");
        let two = Authority::generate("Mesh", "td", "spiffe://td", now()).expect("ca");
        let again = Authority::from_pem(one.certificate_pem(), one.key_pem()).expect("load");
        assert_eq!(again.fingerprint(), one.fingerprint());
        assert!(Authority::from_pem(one.certificate_pem(), two.key_pem()).is_err());
    }
}
