//! Trust bundles.

use std::collections::BTreeMap;

use super::tls::TRUST_BUNDLE;
use crate::envoy::{
    encode::any,
    types::{
        core::{DataSource, TypedExtensionConfig, data_source::Specifier},
        tls::{
            CertificateValidationContext, Secret, SpiffeCertValidatorConfig, secret::Type,
            spiffe_cert_validator_config::TrustDomain,
        },
    },
};

/// Whom the mesh trusts: per trust domain the certificates of its authorities, as PEM.
pub(crate) fn trust_bundle(domains: &BTreeMap<String, String>) -> Secret {
    let trust_domains = domains
        .iter()
        .map(|(name, pem)| TrustDomain {
            name: name.clone(),
            trust_bundle: Some(DataSource {
                specifier: Some(Specifier::InlineBytes(pem.clone().into_bytes())),
                ..DataSource::default()
            }),
            ..TrustDomain::default()
        })
        .collect();
    let validator = SpiffeCertValidatorConfig { trust_domains, ..SpiffeCertValidatorConfig::default() };
    Secret {
        name: TRUST_BUNDLE.to_owned(),
        r#type: Some(Type::ValidationContext(CertificateValidationContext {
            custom_validator_config: Some(TypedExtensionConfig {
                name: "envoy.tls.cert_validator.spiffe".to_owned(),
                typed_config: Some(any(&validator)),
            }),
            ..CertificateValidationContext::default()
        })),
    }
}
