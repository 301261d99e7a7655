//! One case per policy: `<case>.input.yaml` on top of `base.yaml`; the snapshot holds what the case is about.

use serde_json::{Value, json};

use crate::support::{engine_with, kind, proxy, read};

/// What two proxies have of one resource.
fn case(name: &str, of: &str, wanted: &[(&str, &str)]) -> Value {
    let (engine, outcome) = engine_with(&read(&format!("{name}.input.yaml")));
    assert_eq!(outcome.warnings, []);
    let dump = engine.config_dump(&proxy(of));
    let picked = wanted.iter().map(|(short, resource)| {
        let found = kind(&dump, short)[*resource].clone();
        assert_ne!(found, Value::Null, "{of} has no {short} {resource}");
        (format!("{short} {resource}"), found)
    });
    picked.collect::<serde_json::Map<_, _>>().into()
}

macro_rules! snapshot {
    ($value:expr) => {{
        let mut settings = insta::Settings::clone_current();
        settings.set_snapshot_path("../testdata/snapshots");
        settings.set_prepend_module_to_snapshot(false);
        settings.set_omit_expression(true);
        settings.bind(|| insta::assert_yaml_snapshot!($value));
    }};
}

const EXTENSION: &str = ".TypedExtensionConfig";
const HTTP_PORT: &str = "kri_msvc_default_default__backend_main";
const TCP_PORT: &str = "kri_msvc_default_default__backend_db";

#[test]
fn plain_outbound() {
    let wanted = [
        (".Cluster", HTTP_PORT),
        (".ClusterLoadAssignment", HTTP_PORT),
        (".Listener", HTTP_PORT),
        (".Listener", TCP_PORT),
    ];
    snapshot!(case("plain", "web-1", &wanted));
}

#[test]
fn plain_inbound() {
    let wanted = [
        (".Cluster", "self_inbound_dp_main"),
        (".Listener", "self_inbound_dp_main"),
        (EXTENSION, "self_inbound_dp_main_rbac"),
    ];
    snapshot!(case("plain", "backend-1", &wanted));
}

#[test]
fn redirect() {
    let wanted = [
        (".Listener", "self_transparentproxy_passthrough_outbound_ipv4"),
        (".Listener", "self_transparentproxy_passthrough_inbound_ipv6"),
    ];
    snapshot!(case("plain", "web-1", &wanted));
}

/// Takes out what says how connections come in and go on, by resource and field.
fn take_transport(dump: &mut Value) -> Value {
    let mut taken = serde_json::Map::new();
    let resources = dump.as_object_mut().expect("a dump").values_mut().filter_map(Value::as_object_mut);
    for (name, resource) in resources.flatten() {
        for field in ["transparent", "listenerFilters", "upstreamBindConfig"] {
            if let Some(value) = resource.as_object_mut().and_then(|object| object.remove(field)) {
                taken.insert(format!("{name} {field}"), value);
            }
        }
    }
    taken.into()
}

/// Whoever comes by TPROXY meets the same filters.
#[test]
fn tproxy() {
    let input = read("tproxy.input.yaml");
    let rewritten = input.replace("tproxyMark: 1337", "");
    let [mut kept, mut rewritten] = [input, rewritten].map(|input| {
        let (engine, outcome) = engine_with(&input);
        assert_eq!(outcome.warnings, []);
        engine.config_dump(&proxy("backend-1"))
    });
    assert_ne!(kept, rewritten);
    snapshot!(json!({"tproxy": take_transport(&mut kept), "redirect": take_transport(&mut rewritten)}));
    assert_eq!(kept, rewritten);
}

#[test]
fn permission() {
    let wanted = [
        (EXTENSION, "self_inbound_dp_main_rbac"),
        (".Listener", "self_inbound_dp_main"),
        (".Listener", "self_inbound_dp_db"),
    ];
    snapshot!(case("permission", "backend-1", &wanted));
}

#[test]
fn permissive() {
    let wanted = [
        (EXTENSION, "self_inbound_dp_main_rbac"),
        (EXTENSION, "self_inbound_dp_main_rbac_plaintext"),
        (".Listener", "self_inbound_dp_main"),
    ];
    snapshot!(case("permissive", "backend-1", &wanted));
}

#[test]
fn timeout() {
    let wanted = [(".Cluster", HTTP_PORT), (".Listener", HTTP_PORT), (".Listener", TCP_PORT)];
    snapshot!(case("timeout", "web-1", &wanted));
}

#[test]
fn http_route() {
    snapshot!(case("http-route", "web-1", &[(".Listener", HTTP_PORT)]));
}

#[test]
fn tcp_route() {
    snapshot!(case("tcp-route", "web-1", &[(".Listener", TCP_PORT)]));
}

#[test]
fn names_and_identity_are_there() {
    let (engine, _) = engine_with(&read("plain.input.yaml"));
    let snapshot = engine.snapshot(&proxy("web-1")).expect("connected");
    let name = snapshot.get(ursa_engine::TypeUrl::Name, "backend.svc.mesh.local").expect("the name");
    let name = <ursa_engine::Name as prost::Message>::decode(name.any_value.clone()).expect("a Name");
    let seen = json!({"hostname": name.hostname, "addresses": name.addresses, "listener": name.listener});
    let wanted = json!({
        "hostname": "backend.svc.mesh.local",
        "addresses": ["241.0.0.1", "fd75:7273:6100::f100:1"],
        "listener": HTTP_PORT,
    });
    assert_eq!(seen, wanted);

    let secret = "kri_mid_default_default__identity_";
    let identity = snapshot.get(ursa_engine::TypeUrl::Identity, secret).expect("the identity");
    let identity = <ursa_engine::WorkloadIdentity as prost::Message>::decode(identity.any_value.clone());
    let identity = identity.expect("a WorkloadIdentity");
    assert_eq!(identity.secret_name, secret);
    assert_eq!(identity.spiffe_id, "spiffe://default.default.mesh.local/workload/web");
    assert_eq!(identity.trust_domain, "default.default.mesh.local");
}
