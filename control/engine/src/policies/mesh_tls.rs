//! MeshTLS: whether a port takes plaintext too, and which versions and ciphers.

use ursa_model::{
    Resource,
    types::mesh_tls::{Conf, MeshTLS, Mode, TlsVersion, Version},
};

use super::{Effect, parse};
use crate::{
    envoy::types::tls::{TlsParameters, tls_parameters::TlsProtocol},
    policy::merge::{Item, defaults},
    xds::inbound::{self, Inbound},
};

pub(super) struct MeshTls;

impl Effect for MeshTls {
    fn kind(&self) -> &'static str {
        "MeshTLS"
    }

    fn check(&self, resource: &Resource) -> Result<(), String> {
        resource.spec_as::<MeshTLS>().map(drop).map_err(|e| e.to_string())
    }

    fn inbound(&self, rules: &[Item<'_>], port: &mut Inbound) -> Result<(), String> {
        let Some(conf) = defaults(rules) else { return Ok(()) };
        let conf: Conf = parse(&conf)?;
        // Only the explicit word opens the port; whatever else is said, it is strict.
        port.mode = if conf.mode == Some(Mode::Permissive) {
            inbound::Mode::Permissive
        } else {
            inbound::Mode::Strict
        };
        port.tls = parameters(conf.tls_version.as_ref(), conf.tls_ciphers.unwrap_or_default());
        Ok(())
    }
}

fn parameters(version: Option<&Version>, ciphers: Vec<String>) -> Option<TlsParameters> {
    if version.is_none() && ciphers.is_empty() {
        return None;
    }
    let bound = |choose: fn(&Version) -> Option<&TlsVersion>| version.and_then(choose).map_or(0, protocol);
    Some(TlsParameters {
        tls_minimum_protocol_version: bound(|version| version.min.as_ref()),
        tls_maximum_protocol_version: bound(|version| version.max.as_ref()),
        cipher_suites: ciphers,
        ..TlsParameters::default()
    })
}

fn protocol(version: &TlsVersion) -> i32 {
    let protocol = match version {
        TlsVersion::Tls10 => TlsProtocol::TlSv10,
        TlsVersion::Tls11 => TlsProtocol::TlSv11,
        TlsVersion::Tls12 => TlsProtocol::TlSv12,
        TlsVersion::Tls13 => TlsProtocol::TlSv13,
        TlsVersion::TlsAuto | TlsVersion::Unknown(_) => TlsProtocol::TlsAuto,
    };
    protocol as i32
}
