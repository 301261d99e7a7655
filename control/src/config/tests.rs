use serde_json::json;

use super::*;

fn vars(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
    pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

fn file(text: &str) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), text).unwrap();
    file
}

#[test]
fn defaults_load_without_a_file() {
    let config = load(None, [], &[]).unwrap();
    assert_eq!(config, Config::default());
    assert!(!config.api_server.authn.localhost_is_admin);
}

#[test]
fn layers_win_in_order() {
    let file =
        file("apiServer:\n  http:\n    port: 1\n  https:\n    port: 2\nmultizone: {zone: {name: east}}\n");
    let config = load(
        Some(file.path()),
        vars(&[("URSA_API_SERVER_HTTPS_PORT", "3"), ("HOME", "/root"), ("URSA_STORE_UNSAFE_DELETE", "true")]),
        &vars(&[("apiServer.http.port", "4")]),
    )
    .unwrap();
    assert_eq!(config.api_server.http.port, 4);
    assert_eq!(config.api_server.https.port, 3);
    assert_eq!(config.zone(), "east");
    assert!(config.store.unsafe_delete);
}

#[test]
fn an_unknown_key_is_named_with_the_nearest() {
    let file = file("apiServer:\n  htttp:\n    port: 1\n");
    let error = load(Some(file.path()), [], &[]).unwrap_err().to_string();
    assert!(error.contains("\"apiServer.htttp\""), "{error}");
    assert!(error.contains("did you mean \"apiServer.http\"?"), "{error}");
}

#[test]
fn a_flag_with_a_typo_in_the_middle_is_understood() {
    let error = load(None, [], &vars(&[("apiServer.htp.port", "1")])).unwrap_err().to_string();
    assert!(error.contains("did you mean \"apiServer.http\"?"), "{error}");
}

#[test]
fn variables_of_others_set_nothing_and_typos_are_named() {
    let set = [
        "URSA_API_SERVER_HTTP_PROT",
        "URSA_SOCKET",
        "URSA_ENVOY",
        "URSA_NODE",
        "URSA_LOG_LEVEL",
        "URSA_EXCLUDE_OUTBOUND_UIDS",
        "URSA_SOMETHING_ELSE",
        "URSA_MODE",
        "HOME",
    ];
    let config = load(None, set.map(|name| (name.to_owned(), "zone".to_owned())), &[]).unwrap();
    assert_eq!(config, Config::default());
    let found: Vec<String> = misspelled(set.map(str::to_owned)).iter().map(ToString::to_string).collect();
    assert_eq!(
        found,
        ["the variable URSA_API_SERVER_HTTP_PROT is no setting and is ignored; did you mean \
          URSA_API_SERVER_HTTP_PORT?"]
    );
}

#[test]
fn a_wrong_value_names_its_key() {
    let error = load(None, vars(&[("URSA_API_SERVER_HTTP_PORT", "x")]), &[]).unwrap_err().to_string();
    assert!(error.contains("apiServer.http.port"), "{error}");
    let file = file("apiServer: {http: {port: 70000}}");
    let error = load(Some(file.path()), [], &[]).unwrap_err().to_string();
    assert!(error.contains("apiServer.http.port"), "{error}");
}

#[test]
fn plain_http_stays_on_loopback() {
    let error =
        load(None, vars(&[("URSA_API_SERVER_HTTP_INTERFACE", "0.0.0.0")]), &[]).unwrap_err().to_string();
    assert!(error.contains("apiServer.https"), "{error}");
}

#[test]
fn service_addresses_are_a_part_of_the_meshs_own() {
    let config = load(None, vars(&[("URSA_IPAM_MESH_SERVICE_CIDR", "241.7.0.0/16")]), &[]).unwrap();
    assert_eq!(config.ipam.mesh_service_range().to_string(), "241.7.0.0/16");
    for wrong in ["10.0.0.0/8", "240.0.0.0/4", "241.0.0.0/31", "fd00::/64", "241.0.0.0"] {
        let error = load(None, vars(&[("URSA_IPAM_MESH_SERVICE_CIDR", wrong)]), &[]).unwrap_err().to_string();
        assert!(error.contains("ipam.meshService.cidr"), "{wrong}: {error}");
    }
}

#[test]
fn lists_come_from_commas() {
    let config = load(None, vars(&[("URSA_ACCESS_STATIC_ADMIN_RESOURCES_USERS", "a, b")]), &[]).unwrap();
    assert_eq!(config.access.r#static.admin_resources.users, ["a", "b"]);
}

#[test]
fn dataplanes_prove_themselves_by_one_of_the_known_ways() {
    let of = |kind: &str| load(None, vars(&[("URSA_DP_SERVER_AUTHN_DP_PROXY_TYPE", kind)]), &[]);
    assert!(of("dpToken").unwrap().token_required());
    assert!(!load(None, [], &[]).unwrap().token_required());
    let error = of("none").unwrap_err().to_string();
    assert!(error.contains("dpServer.authn.dpProxy.type") && error.contains("dpToken"), "{error}");
}

#[test]
fn standalone_is_zone() {
    let file = file("mode: standalone\n");
    assert_eq!(load(Some(file.path()), [], &[]).unwrap().mode, Mode::Zone);
}

#[test]
fn secrets_are_hidden() {
    let mut value =
        json!({"postgres": {"password": "x", "user": "y"}, "list": [{"clientSecret": "z"}], "password": ""});
    overlay::redact(&mut value);
    assert_eq!(
        value,
        json!({"postgres": {"password": "*****", "user": "y"}, "list": [{"clientSecret": "*****"}], "password": ""})
    );
}

#[test]
fn settings_that_nothing_acts_on_are_named() {
    assert_eq!(Config::default().without_effect(), []);
    for (key, value) in [
        ("mode", json!("global")),
        ("multizone.zone.globalAddress", json!("grpcs://global:5685")),
        ("apiServer.gui.basePath", json!("/ui")),
        ("diagnostics.debugEndpoints", json!(true)),
        ("defaults.skipTenantResources", json!(true)),
    ] {
        let config = Config::default().with(&[(key.to_owned(), value)]).unwrap();
        let named: Vec<_> = config.without_effect().into_iter().map(|(key, _)| key).collect();
        assert_eq!(named, [key]);
    }
}

#[test]
fn the_packaged_file_names_every_key_with_its_default() {
    let text = include_str!("../../../packaging/etc/control.yaml");
    assert_eq!(
        ursa_model::yaml::from_str::<Option<serde_json::Value>>(text).unwrap(),
        None,
        "it sets nothing"
    );
    // A remark has one space behind its #, a key none, or as many as its section's depth asks for.
    let is_key = |line: &&str| {
        line.strip_prefix('#').is_some_and(|rest| !rest.starts_with(' ') || rest.starts_with("  "))
    };
    let keys: Vec<_> = text.lines().filter(is_key).map(|line| &line[1..]).collect();
    let value: serde_json::Value = ursa_model::yaml::from_str(&keys.join("\n")).unwrap();
    pretty_same(&value, &overlay::defaults(), "");
}

/// Compares section by section, so that the failure names the key.
fn pretty_same(packaged: &serde_json::Value, default: &serde_json::Value, path: &str) {
    let (Some(ours), Some(theirs)) = (packaged.as_object(), default.as_object()) else {
        assert_eq!(packaged, default, "packaging/etc/control.yaml says otherwise of {path}");
        return;
    };
    for key in theirs.keys().chain(ours.keys()) {
        let (Some(ours), Some(theirs)) = (ours.get(key), theirs.get(key)) else {
            panic!("packaging/etc/control.yaml and the configuration don't both have {path}{key}");
        };
        pretty_same(ours, theirs, &format!("{path}{key}."));
    }
}
