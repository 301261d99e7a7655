//! The rules of Dataplane, a row each.

use crate::table::faults;

#[rstest::rstest]
#[case::no_networking("{}", &["networking: must be defined"])]
#[case::probe(
    "{address: a.example, inbound: [{port: 80, serviceProbe: {interval: 0s, timeout: 0s, unhealthyThreshold: 0, healthyThreshold: 0}}]}",
    &[
        "networking.inbound[0].serviceProbe.interval: must have a positive value",
        "networking.inbound[0].serviceProbe.timeout: must have a positive value",
        "networking.inbound[0].serviceProbe.unhealthyThreshold: must have a positive value",
        "networking.inbound[0].serviceProbe.healthyThreshold: must have a positive value",
    ]
)]
#[case::outbound(
    "{address: a.example, outbound: [{port: 80, backendRef: {kind: Other}}, {port: 81, backendRef: {kind: MeshExternalService, name: a}}]}",
    &[
        "networking.outbound[0].backendRef.kind: invalid value. Available values are: MeshExternalService,MeshMultiZoneService,MeshService",
        "networking.outbound[0].backendRef: either 'name' or 'labels' should be specified",
        "networking.outbound[0].backendRef.port: port must be in the range [1, 65535]",
    ]
)]
#[case::tags(
    "{address: a.example, gateway: {tags: {kuma.io/protocol: http, 'a b': '', c: 'd e'}}}",
    &[
        "networking.gateway.tags[\"kuma.io/protocol\"]: other values than tcp are not allowed, provided value \"http\"",
        "networking.gateway.tags[\"a b\"]: tag name must consist of alphanumeric characters, dots, dashes, slashes and underscores",
        "networking.gateway.tags[\"a b\"]: tag value must be non-empty",
        "networking.gateway.tags[\"c\"]: tag value must consist of alphanumeric characters, dots, dashes and underscores",
        "networking.gateway.tags: mandatory tag \"kuma.io/service\" is missing",
    ]
)]
#[case::reachable_backends(
    "{address: a.example, transparentProxying: {reachableBackends: {refs: [{kind: Other, name: a}, {kind: MeshService}, {kind: MeshService, namespace: a},
      {kind: MeshService, name: A_b}, {kind: MeshService, name: a, labels: {a: b}}]}}}",
    &[
        "networking.transparentProxing.reachableBackends.refs[0].kind: invalid value. Available values are: MeshExternalService,MeshMultiZoneService,MeshService",
        "networking.transparentProxing.reachableBackends.refs[1].name: name or labels are required",
        "networking.transparentProxing.reachableBackends.refs[2].name: name is required, when namespace is defined",
        "networking.transparentProxing.reachableBackends.refs[3].name: invalid characters. A lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start and end with an alphanumeric character",
        "networking.transparentProxing.reachableBackends.refs[4].labels: labels cannot be defined when name is specified",
    ]
)]
#[case::listeners(
    "{address: 10.0.0.1, inbound: [{name: a, port: 80}], listeners: [{type: ZoneIngress, name: a, address: 10.0.0.1, port: 81}, {type: ZoneIngress, address: 10.0.0.1, port: 81}]}",
    &[
        "networking.listeners[0].name: name \"a\" must be unique across inbounds and listeners",
        "networking.listeners[1]: address:port 10.0.0.1:81 is already used by another listener",
    ]
)]
fn dataplanes(#[case] networking: &str, #[case] expected: &[&str]) {
    let spec = if networking == "{}" { networking.to_owned() } else { format!("networking: {networking}") };
    assert_eq!(faults("Dataplane", &spec), expected);
}
