//! What a change costs, counted.

use ursa_engine::{Change, Counters, Engine, Outcome, ProxyKey, TypeUrl};

use crate::support::{delete, engine_with, new_engine, proxy, put, puts, read};

/// What `apply` computed, and what it said.
fn cost(engine: &mut Engine, changes: Vec<Change>) -> (Counters, Outcome) {
    let before = engine.counters();
    let outcome = engine.apply(changes);
    let after = engine.counters();
    let counters = Counters {
        unchanged_inputs: after.unchanged_inputs - before.unchanged_inputs,
        endpoints: after.endpoints - before.endpoints,
        outbounds: after.outbounds - before.outbounds,
        inbounds: after.inbounds - before.inbounds,
        permissions: after.permissions - before.permissions,
        secrets: after.secrets - before.secrets,
    };
    (counters, outcome)
}

fn dataplane(name: &str, workload: &str, address: &str) -> String {
    format!(
        "type: Dataplane\nmesh: default\nname: {name}\nlabels: {{kuma.io/workload: {workload}}}\n\
         networking: {{address: {address}, inbound: [{{port: 80, protocol: http}}]}}\n"
    )
}

fn service(name: &str) -> String {
    format!(
        "type: MeshService\nmesh: default\nname: {name}\nlabels: {{kuma.io/display-name: {name}}}\n\
         spec:\n  selector: {{dataplaneLabels: {{matchLabels: {{kuma.io/workload: {name}}}}}}}\n  \
         ports: [{{port: 80, appProtocol: http}}]\n  \
         identities: [{{type: SpiffeID, value: 'spiffe://default.default.mesh.local/workload/{name}'}}]\n\
         status: {{vips: [{{ip: 241.0.1.1}}]}}\n"
    )
}

/// Ten services with two proxies each, all connected.
fn ten_services() -> (Engine, Vec<ProxyKey>) {
    let mut engine = new_engine();
    let mut changes = puts(&read("base.yaml"));
    changes.push(delete("Dataplane", "web-1"));
    let mut proxies = Vec::new();
    for s in 0..10 {
        changes.extend(puts(&service(&format!("s{s}"))));
        for i in 0..2 {
            let name = format!("s{s}-{i}");
            changes.extend(puts(&dataplane(&name, &format!("s{s}"), &format!("10.1.{s}.{i}"))));
            proxies.push(proxy(&name));
        }
    }
    engine.apply(changes);
    for key in &proxies {
        engine.connect(key);
    }
    (engine, proxies)
}

#[test]
fn proxies_that_see_the_same_share_one_view() {
    let (engine, proxies) = ten_services();
    assert_eq!(engine.layout(), [20]);
    // Ten services and the two ports of the base's backend, each once for all twenty.
    assert_eq!(engine.counters().outbounds, 12);
    assert_eq!(engine.counters().endpoints, 12);
    let name = "kri_msvc_default___s3_80";
    let of = |key: &ProxyKey| engine.snapshot(key).expect("connected").get(TypeUrl::Cluster, name).cloned();
    let (a, b) = (of(&proxies[0]).expect("a cluster"), of(&proxies[9]).expect("a cluster"));
    assert!(std::sync::Arc::ptr_eq(&a, &b), "the same bytes in memory");
}

#[test]
fn one_endpoint_is_one_load_assignment() {
    let (mut engine, proxies) = ten_services();
    let (counters, outcome) = cost(&mut engine, puts(&dataplane("s4-2", "s4", "10.1.4.9")));
    assert_eq!(counters, Counters { endpoints: 1, ..Counters::default() });
    assert_eq!(outcome.dirty.len(), proxies.len());
    for (_, names) in &outcome.dirty {
        assert_eq!(names.as_slice(), [(TypeUrl::Endpoint, "kri_msvc_default___s4_80".into())]);
    }
}

#[test]
fn only_those_who_want_a_service_hear_of_it() {
    let (mut engine, _) = ten_services();
    let narrow = "type: Dataplane\nmesh: default\nname: narrow\nlabels: {kuma.io/workload: narrow}\n\
                  networking:\n  address: 10.2.0.1\n  transparentProxying:\n    \
                  reachableBackends: {refs: [{kind: MeshService, labels: {kuma.io/display-name: s4}}]}\n";
    engine.apply(puts(narrow));
    engine.connect(&proxy("narrow"));
    let heard = |outcome: &Outcome| outcome.dirty.iter().any(|(key, _)| key.name == "narrow");
    let (_, outcome) = cost(&mut engine, puts(&dataplane("s5-2", "s5", "10.1.5.9")));
    assert!(!heard(&outcome));
    let (_, outcome) = cost(&mut engine, puts(&dataplane("s4-2", "s4", "10.1.4.9")));
    assert!(heard(&outcome));
}

#[test]
fn an_equal_object_is_nothing() {
    let (mut engine, _) = ten_services();
    let (counters, outcome) = cost(&mut engine, puts(&service("s4")));
    assert_eq!(counters, Counters { unchanged_inputs: 1, ..Counters::default() });
    assert_eq!(outcome, Outcome::default());
}

#[test]
fn liveness_withdraws_endpoints() {
    let (mut engine, _) = ten_services();
    let gone = Change::Liveness { proxy: proxy("s4-1"), online: false };
    let (counters, outcome) = cost(&mut engine, vec![gone.clone()]);
    assert_eq!(counters, Counters { endpoints: 1, ..Counters::default() });
    assert_eq!(outcome.dirty.len(), 20);
    let (counters, outcome) = cost(&mut engine, vec![gone]);
    assert_eq!((counters, outcome), (Counters::default(), Outcome::default()));
}

#[test]
fn a_permission_touches_those_it_selects() {
    let (mut engine, _) = ten_services();
    let policy = "type: MeshTrafficPermission\nmesh: default\nname: p\nspec:\n  \
                  targetRef: {kind: Dataplane, labels: {kuma.io/workload: s4}}\n  \
                  rules: [{default: {allow: [{spiffeID: {type: Prefix, value: 'spiffe://a.local/'}}]}}]\n";
    let (counters, outcome) = cost(&mut engine, puts(policy));
    assert_eq!(counters, Counters { permissions: 1, ..Counters::default() });
    let names: Vec<&str> = outcome.dirty.iter().map(|(key, _)| key.name.as_str()).collect();
    assert_eq!(names, ["s4-0", "s4-1"]);
    for (_, resources) in &outcome.dirty {
        assert_eq!(resources.as_slice(), [(TypeUrl::Extension, "self_inbound_dp_80_rbac".into())]);
    }
}

#[test]
fn a_permission_for_a_mesh_of_two_thousand_is_made_once() {
    let mut engine = new_engine();
    let mut changes = puts(&read("base.yaml"));
    let names: Vec<String> = (0..2000).map(|n| format!("p{n}")).collect();
    for (n, name) in names.iter().enumerate() {
        changes.extend(puts(&dataplane(name, name, &format!("10.3.{}.{}", n / 250, n % 250 + 1))));
    }
    engine.apply(changes);
    for name in &names {
        engine.connect(&proxy(name));
    }
    // For everybody of the mesh: a rule that would reach plaintext too, where a port takes that.
    let policy = "type: MeshTrafficPermission\nmesh: default\nname: everybody\nspec:\n  \
                  rules: [{default: {allow: [{spiffeID: {type: Prefix, value: 'spiffe://default.default.mesh.local/'}}]}}]\n";
    let change = [(TypeUrl::Extension, "self_inbound_dp_80_rbac".into())];
    for changes in [puts(policy), vec![delete("MeshTrafficPermission", "everybody")]] {
        let (counters, outcome) = cost(&mut engine, changes);
        assert_eq!(counters, Counters { permissions: 1, ..Counters::default() });
        assert_eq!(outcome.dirty.len(), 2000);
        assert!(outcome.dirty.iter().all(|(_, names)| names.as_slice() == change));
    }
    let of = |name: &str| {
        let snapshot = engine.snapshot(&proxy(name)).expect("connected");
        std::sync::Arc::clone(
            snapshot.get(TypeUrl::Extension, "self_inbound_dp_80_rbac").expect("a permission"),
        )
    };
    assert!(std::sync::Arc::ptr_eq(&of("p0"), &of("p1999")), "the same bytes in memory");
}

#[test]
fn a_permission_touches_a_listener_only_where_that_holds_it() {
    let (mut engine, _) = engine_with("");
    let policy = |allowed: &str| {
        format!(
            "type: MeshTrafficPermission\nmesh: default\nname: p\nspec:\n  \
             targetRef: {{kind: Dataplane, labels: {{kuma.io/workload: backend}}}}\n  \
             rules: [{{default: {{allow: [{{spiffeID: {{type: Prefix, value: 'spiffe://{allowed}'}}}}]}}}}]\n"
        )
    };
    let http = (TypeUrl::Extension, "self_inbound_dp_main_rbac".into());
    let bytes = (TypeUrl::Listener, "self_inbound_dp_db".into());
    let (counters, outcome) = cost(&mut engine, puts(&policy("a.local/x")));
    assert_eq!(counters, Counters { inbounds: 1, permissions: 2, ..Counters::default() });
    assert_eq!(outcome.dirty, [(proxy("backend-1"), vec![http.clone(), bytes.clone()])]);

    // Permissive: plaintext has a resource of its own, and foreign TLS an answer in the listener.
    engine.apply(puts(
        "type: MeshTLS\nmesh: default\nname: t\nspec: {rules: [{default: {mode: Permissive}}]}\n",
    ));
    let (_, outcome) = cost(&mut engine, puts(&policy("a.local/y")));
    assert_eq!(outcome.dirty, [(proxy("backend-1"), vec![http.clone(), bytes.clone()])]);
    let (_, outcome) = cost(&mut engine, puts(&policy("a.local/")));
    let plain = (TypeUrl::Extension, "self_inbound_dp_main_rbac_plaintext".into());
    let listener = (TypeUrl::Listener, "self_inbound_dp_main".into());
    assert_eq!(outcome.dirty, [(proxy("backend-1"), vec![http, plain, bytes, listener])]);
}

#[test]
fn a_timeout_for_one_service_recomputes_one_pair() {
    let (mut engine, _) = ten_services();
    let policy = "type: MeshTimeout\nmesh: default\nname: t\nspec:\n  to:\n  \
                  - targetRef: {kind: MeshService, labels: {kuma.io/display-name: s4}}\n    \
                  default: {connectionTimeout: 1s}\n";
    let (counters, outcome) = cost(&mut engine, puts(policy));
    assert_eq!(counters, Counters { outbounds: 1, ..Counters::default() });
    for (_, names) in &outcome.dirty {
        assert_eq!(names.as_slice(), [(TypeUrl::Cluster, "kri_msvc_default___s4_80".into())]);
    }
    assert_eq!(outcome.dirty.len(), 20);
}

#[test]
fn a_bad_object_is_left_out_alone() {
    let (mut engine, _) = engine_with("");
    let before = engine.config_dump(&proxy("web-1"));
    let bad = "type: Dataplane\nmesh: default\nname: bad\nlabels: {kuma.io/workload: backend}\n\
               networking: {address: not-an-ip, inbound: [{port: 8080}]}\n";
    let (_, outcome) = cost(&mut engine, puts(bad));
    assert_eq!(outcome.dirty, []);
    let (key, reason) = &outcome.warnings[0];
    assert_eq!(key.name, "bad");
    assert!(reason.contains("networking.address: \"not-an-ip\" is no IP address"), "{reason}");
    assert_eq!(engine.config_dump(&proxy("web-1")), before);
}

#[test]
fn nobody_and_no_identity_are_refused() {
    let (mut engine, _) = engine_with("");
    let name = "kri_msvc_default_default__backend_main";
    let cluster = |engine: &Engine| {
        let dump = engine.config_dump(&proxy("web-1"));
        crate::support::kind(&dump, ".Cluster")[name].clone()
    };
    assert_eq!(cluster(&engine)["type"], "EDS");

    // A service without identities: nobody, not anybody.
    let mut backend = crate::support::objects(&read("base.yaml"))
        .into_iter()
        .find(|r| r.descriptor.name == "MeshService")
        .expect("it");
    backend.spec["identities"] = serde_json::json!([]);
    engine.apply(vec![put(backend)]);
    let closed = cluster(&engine);
    assert_eq!((&closed["type"], &closed["loadAssignment"]), (&"STATIC".into(), &serde_json::Value::Null));
    assert_eq!(closed["transportSocket"], serde_json::Value::Null);

    // A proxy without an identity: its port is there and refuses.
    engine.apply(vec![delete("MeshIdentity", "identity")]);
    let dump = engine.config_dump(&proxy("backend-1"));
    let listener = &crate::support::kind(&dump, ".Listener")["self_inbound_dp_main"];
    let filter = &listener["filterChains"][0]["filters"][0]["typedConfig"];
    assert_eq!(filter["cluster"], "self_transparentproxy_no_destination_inbound");
}
