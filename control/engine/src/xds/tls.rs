//! Mutual TLS between proxies: certificates by the name of the identity, trust by bundles per trust domain.

use super::part;
use crate::envoy::types::matching::StringMatcher;
use crate::envoy::{
    encode::any,
    types::{
        core::TransportSocket,
        tls::{
            CertificateValidationContext, CommonTlsContext, DownstreamTlsContext, SdsSecretConfig,
            SubjectAltNameMatcher, TlsParameters, UpstreamTlsContext,
            common_tls_context::{CombinedCertificateValidationContext, ValidationContextType},
            downstream_tls_context::SessionTicketKeysType,
            subject_alt_name_matcher::SanType,
        },
    },
};

/// The SDS name of the mesh's trust bundles.
pub(crate) const TRUST_BUNDLE: &str = "system_trust_bundle";
/// The application protocol that tells mesh connections from the applications' own TLS.
pub(crate) const ALPN: &str = "kuma";

/// TLS towards a service: our certificate, and exactly these SPIFFE ids on the other side.
///
/// The caller makes sure that `peers` is not empty: Envoy takes no matcher for "anybody".
pub(crate) fn upstream(identity: &str, sni: &str, peers: &[String]) -> Option<TransportSocket> {
    let mut common = common(identity, peers.iter().map(part::exact).collect());
    common.alpn_protocols = vec![ALPN.to_owned()];
    part::transport_socket(any(&UpstreamTlsContext {
        common_tls_context: Some(common),
        sni: sni.to_owned(),
        ..UpstreamTlsContext::default()
    }))
}

/// TLS of those who connect to us: a certificate with one of these ids is required. `peers` must not be empty.
///
/// Sessions aren't resumed: a server that resumes one (BoringSSL reverifies on clients only) doesn't look at the
/// caller's certificate again, so one that has expired would be accepted for as long as the session's ticket lives.
pub(crate) fn downstream(
    identity: &str,
    peers: Vec<StringMatcher>,
    params: Option<TlsParameters>,
) -> Option<TransportSocket> {
    let mut common = common(identity, peers);
    common.tls_params = params;
    part::transport_socket(any(&DownstreamTlsContext {
        common_tls_context: Some(common),
        require_client_certificate: part::yes(),
        session_ticket_keys_type: Some(SessionTicketKeysType::DisableStatelessSessionResumption(true)),
        disable_stateful_session_resumption: true,
        ..DownstreamTlsContext::default()
    }))
}

fn common(identity: &str, sans: Vec<StringMatcher>) -> CommonTlsContext {
    let matchers = sans
        .into_iter()
        .map(|matcher| SubjectAltNameMatcher {
            san_type: SanType::Uri as i32,
            matcher: Some(matcher),
            ..SubjectAltNameMatcher::default()
        })
        .collect();
    CommonTlsContext {
        tls_certificate_sds_secret_configs: vec![by_name(identity)],
        validation_context_type: Some(ValidationContextType::CombinedValidationContext(
            CombinedCertificateValidationContext {
                default_validation_context: Some(CertificateValidationContext {
                    match_typed_subject_alt_names: matchers,
                    ..CertificateValidationContext::default()
                }),
                validation_context_sds_secret_config: Some(by_name(TRUST_BUNDLE)),
                ..CombinedCertificateValidationContext::default()
            },
        )),
        ..CommonTlsContext::default()
    }
}

fn by_name(name: &str) -> SdsSecretConfig {
    SdsSecretConfig { name: name.to_owned(), sds_config: part::ads() }
}
