//! What holds for every type: forms, round trips, and that no input makes the model panic.

use proptest::prelude::*;
use serde_json::{Value, json};
use ursa_model::{
    Form, Kri, Resource, Scope, by_name, by_path, by_short_name,
    labels::{self, Context},
    registry, yaml,
};

#[test]
fn the_registry_is_sorted_and_unambiguous() {
    let names: Vec<&str> = registry().iter().map(|descriptor| descriptor.name).collect();
    let mut sorted = names.clone();
    sorted.sort_unstable();
    sorted.dedup();
    assert_eq!(names, sorted);
    for descriptor in registry() {
        assert_eq!(by_name(descriptor.name), Some(*descriptor));
        assert_eq!(by_path(descriptor.path), Some(*descriptor));
        for alias in descriptor.aliases {
            assert_eq!(by_path(alias), Some(*descriptor));
        }
        if !descriptor.short_name.is_empty() {
            assert_eq!(by_short_name(descriptor.short_name), Some(*descriptor));
        }
    }
}

#[test]
fn a_written_resource_reads_back_the_same() {
    let text = "
type: MeshTimeout
mesh: default
name: t1
labels: {team: web}
spec:
  targetRef: {kind: Mesh}
  to:
  - targetRef: {kind: MeshService, labels: {kuma.io/display-name: backend}}
    default: {connectionTimeout: 10s, http: {requestTimeout: 1500ms}}
";
    let resource = Resource::from_yaml(text).expect("resource");
    assert!(resource.validate().is_empty());
    assert_eq!(resource.spec["to"][0]["default"]["http"]["requestTimeout"], "1.5s");
    let written = resource.to_yaml().expect("yaml");
    assert_eq!(Resource::from_yaml(&written).expect("read back"), resource);
}

#[test]
fn inlined_types_have_their_fields_at_the_top() {
    let text = "{type: Dataplane, mesh: default, name: web-1, networking: {address: 10.0.0.1, inbound: [{port: 80}]}}";
    let resource = Resource::from_yaml(text).expect("resource");
    assert_eq!(resource.spec["networking"]["address"], "10.0.0.1");
    assert_eq!(resource.to_json()["networking"]["inbound"][0]["port"], 80);
    assert_eq!(resource.to_json()["kri"], "kri_dp_default___web-1_");
}

#[test]
fn a_wrong_field_is_told_and_a_wrong_form_refused() {
    let text = "{type: MeshTimeout, mesh: default, name: t1, spec: {to: [], timeout: 3s}}";
    let resource = Resource::from_yaml(text).expect("resource");
    assert_eq!(resource.warnings(), ["spec.timeout is no field of MeshTimeout and was ignored"]);
    let text = "{type: MeshTimeout, mesh: default, name: t1, spec: {to: [{default: {idleTimeout: soon}}]}}";
    let faults = Resource::from_yaml(text).expect_err("refused").violations();
    assert_eq!(faults.0[0].field, "spec.to[0].default.idleTimeout");
    let faults = Resource::from_yaml("{type: MeshTimeuot, mesh: default, name: t1}").expect_err("refused");
    assert!(faults.to_string().contains("MeshTimeuot"));
}

#[test]
fn every_fault_is_reported_not_the_first() {
    let text = "{type: Dataplane, mesh: default, name: A, networking: {address: 0.0.0.0, inbound: [{port: 0}, {port: 70000}]}}";
    let faults = Resource::from_yaml(text).expect("resource").validate();
    let fields: Vec<&str> = faults.iter().map(|fault| fault.field.as_str()).collect();
    assert_eq!(
        fields,
        ["name", "networking.address", "networking.inbound[0].port", "networking.inbound[1].port"]
    );
}

#[test]
fn a_write_that_changes_no_configuration_has_an_equal_projection() {
    let text = "{type: MeshService, mesh: default, name: web, spec: {ports: [{port: 80}]}, status: {vips: [{ip: 241.0.0.1}]}}";
    let mut resource = Resource::from_yaml(text).expect("resource");
    let before = resource.projection();
    resource.status = Some(json!({ "vips": [{ "ip": "241.0.0.1" }], "dataplaneProxies": { "total": 3 } }));
    assert_eq!(resource.projection(), before);
    resource.status = Some(json!({ "vips": [{ "ip": "241.0.0.2" }] }));
    assert_ne!(resource.projection(), before);
}

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        "[a-zA-Z0-9 :./_{}|*%-]{0,12}".prop_map(Value::from),
    ];
    let field = prop_oneof![
        Just("spec".to_owned()),
        Just("networking".to_owned()),
        Just("targetRef".to_owned()),
        Just("to".to_owned()),
        Just("rules".to_owned()),
        Just("default".to_owned()),
        Just("kind".to_owned()),
        Just("labels".to_owned()),
        Just("ports".to_owned()),
        Just("template".to_owned()),
        "[a-z]{1,6}",
    ];
    leaf.prop_recursive(4, 48, 6, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map(field.clone(), inner, 0..6)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

proptest! {
    #[test]
    fn no_json_makes_the_model_panic(value in any_json(), spec in any_json(), kind in 0..registry().len()) {
        let _ = Resource::from_json(&value);
        let descriptor = registry()[kind];
        let mut object = json!({ "type": descriptor.name, "mesh": "default", "name": "a" });
        match (descriptor.form, spec) {
            (Form::Spec, spec) => object["spec"] = spec,
            (Form::Inline, Value::Object(fields)) => {
                for (name, value) in fields {
                    object[name] = value;
                }
            }
            (Form::Inline, _) => {}
        }
        if let Ok(resource) = Resource::from_json(&object) {
            let _ = (resource.validate(), resource.warnings(), resource.projection());
            let _ = labels::compute(&resource, &Context::zone("east"));
            let again = Resource::from_json(&resource.to_json()).expect("what was written can be read");
            prop_assert_eq!(again.spec, resource.spec);
        }
    }

    #[test]
    fn json_survives_yaml(value in any_json()) {
        let text = yaml::to_string(&value).expect("written");
        let back: Value = yaml::from_str(&text).expect("read");
        prop_assert_eq!(back, value);
    }

    #[test]
    fn no_text_makes_parsers_panic(text in "\\PC{0,40}") {
        let _ = Resource::from_yaml(&text);
        let _ = text.parse::<Kri>();
        let _ = text.parse::<ursa_model::GoDuration>();
        let _ = text.parse::<ursa_model::spiffe::SpiffeId>();
        let _ = ursa_model::template::Template::parse(&text);
        let _ = ursa_model::sni::decode(&text);
        let _ = ursa_model::names::label_key(&text);
    }
}

#[test]
fn global_types_have_no_mesh() {
    for descriptor in registry().iter().filter(|descriptor| descriptor.scope == Scope::Global) {
        let text = format!("{{type: {}, mesh: default, name: a}}", descriptor.name);
        if let Ok(resource) = Resource::from_yaml(&text) {
            assert_eq!(resource.meta.mesh, "");
            assert!(resource.to_json().get("mesh").is_none());
        }
    }
}
