//! Writes `src/envoy/descriptors.binpb`: descriptors of those Envoy messages that the engine uses, taken from the
//! complete set that the package `envoy-types` carries.
//!
//! Run after a new message type is used for the first time, or after an update of envoy-types:
//! `cargo run -p ursa-engine --example descriptors -- PATH_OF_ENVOY_TYPES/src/generated/types.bin`

use std::{
    collections::{BTreeMap, BTreeSet},
    process::ExitCode,
};

use prost_reflect::{
    prost::Message,
    prost_types::{FileDescriptorProto, FileDescriptorSet},
};

/// Files whose messages occur by name or inside an `Any`; what they import comes along.
const ROOTS: &[&str] = &[
    "envoy/config/bootstrap/v3/bootstrap.proto",
    "envoy/config/cluster/v3/cluster.proto",
    "envoy/config/endpoint/v3/endpoint.proto",
    "envoy/config/listener/v3/listener.proto",
    "envoy/config/rbac/v3/rbac.proto",
    "envoy/config/route/v3/route.proto",
    "envoy/extensions/filters/http/rbac/v3/rbac.proto",
    "envoy/extensions/filters/http/router/v3/router.proto",
    "envoy/extensions/filters/listener/original_src/v3/original_src.proto",
    "envoy/extensions/filters/listener/tls_inspector/v3/tls_inspector.proto",
    "envoy/extensions/filters/network/http_connection_manager/v3/http_connection_manager.proto",
    "envoy/extensions/filters/network/rbac/v3/rbac.proto",
    "envoy/extensions/filters/network/tcp_proxy/v3/tcp_proxy.proto",
    "envoy/extensions/matching/common_inputs/network/v3/network_inputs.proto",
    "envoy/extensions/matching/common_inputs/ssl/v3/ssl_inputs.proto",
    "envoy/extensions/transport_sockets/tls/v3/tls.proto",
    "envoy/extensions/transport_sockets/tls/v3/tls_spiffe_validator_config.proto",
    "envoy/extensions/upstreams/http/v3/http_protocol_options.proto",
];

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(reason) => {
            eprintln!("{reason}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), String> {
    let source = std::env::args().nth(1).ok_or("usage: descriptors PATH_OF_TYPES_BIN")?;
    let bytes = std::fs::read(&source).map_err(|e| format!("can't read {source}: {e}"))?;
    let all = FileDescriptorSet::decode(bytes.as_slice())
        .map_err(|e| format!("{source} is no descriptor set: {e}"))?;
    let by_name: BTreeMap<_, _> = all.file.iter().map(|file| (file.name().to_owned(), file)).collect();

    let mut wanted = BTreeSet::new();
    let mut open: Vec<String> = ROOTS.iter().map(|&root| root.to_owned()).collect();
    while let Some(name) = open.pop() {
        if wanted.insert(name.clone()) {
            let file = by_name.get(&name).ok_or_else(|| format!("{source} has no {name}"))?;
            open.extend(file.dependency.iter().cloned());
        }
    }
    let file = all
        .file
        .iter()
        .filter(|file| wanted.contains(file.name()))
        .map(|file| FileDescriptorProto { source_code_info: None, ..file.clone() })
        .collect();
    let target = concat!(env!("CARGO_MANIFEST_DIR"), "/src/envoy/descriptors.binpb");
    std::fs::write(target, FileDescriptorSet { file }.encode_to_vec())
        .map_err(|e| format!("can't write {target}: {e}"))
}
