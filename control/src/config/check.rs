//! What the types of the sections can't say.

use std::net::IpAddr;

use ursa_model::vip;

use super::{Config, ConfigError, Mode, sections::DP_TOKEN};

impl Config {
    /// Checks what the types can't say.
    pub(super) fn check(&self) -> Result<(), ConfigError> {
        let wrong = |key: &str, reason: String| {
            Err(ConfigError::Value { key: key.into(), origin: "the configuration".into(), reason })
        };
        for (key, interface) in [
            ("apiServer.http.interface", &self.api_server.http.interface),
            ("apiServer.https.interface", &self.api_server.https.interface),
            ("dpServer.interface", &self.dp_server.interface),
            ("diagnostics.interface", &self.diagnostics.interface),
        ] {
            if interface.parse::<IpAddr>().is_err() {
                return wrong(key, format!("expected an IP address, found {interface:?}"));
            }
        }
        let http = &self.api_server.http;
        if http.enabled && !http.interface.parse::<IpAddr>().is_ok_and(|address| address.is_loopback()) {
            return wrong(
                "apiServer.http.interface",
                format!(
                    "{} isn't a loopback address, and beyond loopback the API is always TLS; use apiServer.https",
                    http.interface
                ),
            );
        }
        let proxies = self.dp_server.authn.dp_proxy.r#type.as_str();
        if !matches!(proxies, "" | DP_TOKEN) {
            return wrong(
                "dpServer.authn.dpProxy.type",
                format!(
                    "{proxies:?} isn't known; leave it empty (the node's grant, or a dataplane token, decides) or use {DP_TOKEN:?} (a token is required). There is no way without proof"
                ),
            );
        }
        let zone = &self.multizone.zone.name;
        if self.mode == Mode::Zone && !is_label(zone) {
            return wrong(
                "multizone.zone.name",
                format!("{zone:?} isn't an RFC 1035 label of at most 63 characters"),
            );
        }
        let https = &self.api_server.https;
        if https.require_client_cert && https.tls_ca_file.is_empty() {
            return wrong(
                "apiServer.https.requireClientCert",
                "client certificates can't be checked without apiServer.https.tlsCaFile".into(),
            );
        }
        if let Err(error) = crate::api::Origins::parse(&self.api_server.cors_allowed_domains) {
            return wrong("apiServer.corsAllowedDomains", error.to_string());
        }
        for (key, range, whole) in [
            ("ipam.meshService.cidr", &self.ipam.mesh_service, vip::MESH_SERVICE),
            ("ipam.meshExternalService.cidr", &self.ipam.mesh_external_service, vip::MESH_EXTERNAL_SERVICE),
            (
                "ipam.meshMultiZoneService.cidr",
                &self.ipam.mesh_multi_zone_service,
                vip::MESH_MULTI_ZONE_SERVICE,
            ),
        ] {
            match range.cidr.parse::<vip::Range>() {
                Err(error) => return wrong(key, error.to_string()),
                Ok(range) if !whole.covers(range) || range.prefix > 30 => {
                    return wrong(
                        key,
                        format!(
                            "{range} isn't a part of {whole} with four addresses or more; nodes keep only the mesh's \
                             own ranges from leaving in plaintext"
                        ),
                    );
                }
                Ok(_) => {}
            }
        }
        let pairs = [
            ("general.tlsCertFile", &self.general.tls_cert_file, &self.general.tls_key_file),
            (
                "apiServer.https.tlsCertFile",
                &self.api_server.https.tls_cert_file,
                &self.api_server.https.tls_key_file,
            ),
        ];
        for (key, cert, private) in pairs {
            if cert.is_empty() != private.is_empty() {
                return wrong(key, "the certificate and its key must be given together".into());
            }
        }
        Ok(())
    }
}

/// Settings that are accepted and that nothing acts on yet, of those that are not at their default.
pub(super) fn without_effect(config: &Config) -> Vec<(&'static str, &'static str)> {
    let default = Config::default();
    let told = [
        (
            config.mode == Mode::Global,
            "mode",
            "no zone connects to a global control plane, and it configures no proxy",
        ),
        (
            config.is_federated(),
            "multizone.zone.globalAddress",
            "nothing is exchanged with the global control plane; this zone only refuses writes of what would be the global one's",
        ),
        (
            config.api_server.gui.base_path != default.api_server.gui.base_path,
            "apiServer.gui.basePath",
            "no page is served",
        ),
        (
            config.diagnostics.debug_endpoints != default.diagnostics.debug_endpoints,
            "diagnostics.debugEndpoints",
            "there are no debugging endpoints",
        ),
        (
            config.defaults.skip_tenant_resources != default.defaults.skip_tenant_resources,
            "defaults.skipTenantResources",
            "there are no tenant resources to skip",
        ),
    ];
    told.into_iter().filter(|(set, ..)| *set).map(|(_, key, what)| (key, what)).collect()
}

fn is_label(name: &str) -> bool {
    let inner = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    name.len() <= 63
        && name.starts_with(|c: char| c.is_ascii_lowercase())
        && !name.ends_with('-')
        && name.chars().all(inner)
}
