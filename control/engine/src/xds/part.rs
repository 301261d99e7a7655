//! Small messages that occur everywhere.
#![allow(
    clippy::unnecessary_wraps,
    reason = "every field of a message is optional: this is the form they take"
)]

use std::{collections::BTreeMap, net::IpAddr};

use ursa_model::GoDuration;

use crate::envoy::types::{
    Any, BoolValue, Duration, Struct, UInt32Value, Value,
    core::{
        Address, AggregatedConfigSource, ApiVersion, CidrRange, ConfigSource, Metadata, SocketAddress,
        TransportSocket, address, config_source::ConfigSourceSpecifier, socket_address::PortSpecifier,
        transport_socket,
    },
    matching::{RegexMatcher, StringMatcher, string_matcher::MatchPattern},
    value,
};

pub(crate) fn yes() -> Option<BoolValue> {
    Some(BoolValue { value: true })
}

pub(crate) fn no() -> Option<BoolValue> {
    Some(BoolValue { value: false })
}

pub(crate) fn number(value: u32) -> Option<UInt32Value> {
    Some(UInt32Value { value })
}

/// Durations below zero don't pass validation; they read as zero.
pub(crate) fn duration(length: GoDuration) -> Option<Duration> {
    let length = length.to_std();
    let seconds = i64::try_from(length.as_secs()).unwrap_or(i64::MAX);
    let nanos = i32::try_from(length.subsec_nanos()).unwrap_or_default();
    Some(Duration { seconds, nanos })
}

pub(crate) fn address(ip: IpAddr, port: u16) -> Address {
    Address { address: Some(address::Address::SocketAddress(socket_address(ip, port))) }
}

pub(crate) fn socket_address(ip: IpAddr, port: u16) -> SocketAddress {
    SocketAddress {
        address: ip.to_string(),
        port_specifier: Some(PortSpecifier::PortValue(u32::from(port))),
        ..SocketAddress::default()
    }
}

pub(crate) fn cidr(base: IpAddr, prefix: u8) -> CidrRange {
    CidrRange { address_prefix: base.to_string(), prefix_len: number(u32::from(prefix)) }
}

/// Resources that arrive on the same discovery stream.
pub(crate) fn ads() -> Option<ConfigSource> {
    Some(ConfigSource {
        resource_api_version: ApiVersion::V3 as i32,
        config_source_specifier: Some(ConfigSourceSpecifier::Ads(AggregatedConfigSource {})),
        ..ConfigSource::default()
    })
}

pub(crate) fn transport_socket(context: Any) -> Option<TransportSocket> {
    Some(TransportSocket {
        name: "envoy.transport_sockets.tls".to_owned(),
        config_type: Some(transport_socket::ConfigType::TypedConfig(context)),
    })
}

/// Labels under one key of the filter metadata.
pub(crate) fn metadata(key: &str, labels: &BTreeMap<String, String>) -> Option<Metadata> {
    let fields = labels
        .iter()
        .map(|(name, text)| (name.clone(), Value { kind: Some(value::Kind::StringValue(text.clone())) }))
        .collect();
    Some(Metadata { filter_metadata: [(key.to_owned(), Struct { fields })].into(), ..Metadata::default() })
}

pub(crate) fn exact(text: impl Into<String>) -> StringMatcher {
    StringMatcher { match_pattern: Some(MatchPattern::Exact(text.into())), ..StringMatcher::default() }
}

pub(crate) fn prefix(text: impl Into<String>) -> StringMatcher {
    StringMatcher { match_pattern: Some(MatchPattern::Prefix(text.into())), ..StringMatcher::default() }
}

pub(crate) fn regex(text: impl Into<String>) -> RegexMatcher {
    RegexMatcher { regex: text.into(), ..RegexMatcher::default() }
}

pub(crate) fn expression(text: impl Into<String>) -> StringMatcher {
    StringMatcher { match_pattern: Some(MatchPattern::SafeRegex(regex(text))), ..StringMatcher::default() }
}
