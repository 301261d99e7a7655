//! What the engine makes, judged by the real Envoy.

use std::{path::Path, process::Command};

use serde_json::{Value, json};

use crate::support::{engine_with, kind, proxy, read, testdata};

/// All that a proxy has as a static configuration.
fn bootstrap(dump: &Value) -> Value {
    let list = |short: &str| -> Vec<Value> {
        kind(dump, short).as_object().map(|map| map.values().cloned().collect()).unwrap_or_default()
    };
    let mut clusters = list(".Cluster");
    clusters.push(json!({
        "name": "system_ads",
        "type": "STATIC",
        "typedExtensionProtocolOptions": {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
            "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
            "explicitHttpConfig": {"http2ProtocolOptions": {}},
        }},
        "loadAssignment": {"clusterName": "system_ads", "endpoints": [
            {"lbEndpoints": [{"endpoint": {"address": {"pipe": {"path": "xds.sock"}}}}]},
        ]},
    }));
    json!({
        "node": {"id": "default.web-1", "cluster": "web"},
        "dynamicResources": {"adsConfig": {
            "apiType": "DELTA_GRPC",
            "transportApiVersion": "V3",
            "grpcServices": [{"envoyGrpc": {"clusterName": "system_ads"}}],
        }},
        "staticResources": {
            "listeners": list(".Listener"),
            "clusters": clusters,
            "secrets": list(".Secret"),
        },
    })
}

/// Puts what filters ask for in their places: Envoy looks at discovered configurations only when they arrive.
fn inline(part: &mut Value, extensions: &Value) -> usize {
    let mut count = 0;
    if part.get("configDiscovery").is_some() {
        let name = part["name"].as_str().expect("a name").to_owned();
        let object = part.as_object_mut().expect("a filter");
        object.remove("configDiscovery");
        assert_eq!(extensions[&name]["name"], Value::from(name.as_str()), "the resource is there");
        object.insert("typedConfig".to_owned(), extensions[&name]["typedConfig"].clone());
        count += 1;
    }
    let children: Vec<&mut Value> = match part {
        Value::Object(fields) => fields.values_mut().collect(),
        Value::Array(items) => items.iter_mut().collect(),
        _ => Vec::new(),
    };
    for child in children {
        count += inline(child, extensions);
    }
    count
}

fn validate(envoy: &Path, name: &str, dump: &Value) {
    let file = std::env::temp_dir().join(format!("ursa-engine-{}-{name}.json", std::process::id()));
    std::fs::write(&file, bootstrap(dump).to_string()).expect("write the bootstrap");
    let output = Command::new(envoy)
        .args(["--mode", "validate", "--log-level", "warn", "--disable-hot-restart", "-c"])
        .arg(&file)
        .output()
        .unwrap_or_else(|e| panic!("can't run {}: {e}", envoy.display()));
    let words = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{name}: Envoy refuses {}:\n{words}", file.display());
    std::fs::remove_file(&file).expect("remove the bootstrap");
}

#[test]
fn envoy_accepts_every_case() {
    let Some(envoy) = std::env::var_os("URSA_ENVOY") else {
        assert!(
            std::env::var_os("URSA_SKIP_ENVOY").is_some(),
            "set URSA_ENVOY to the path of an Envoy, or URSA_SKIP_ENVOY=1 to do without"
        );
        return;
    };
    let mut cases = 0;
    for entry in std::fs::read_dir(testdata()).expect("testdata") {
        let name = entry.expect("entry").file_name().into_string().expect("name");
        let Some(case) = name.strip_suffix(".input.yaml") else { continue };
        let (engine, _) = engine_with(&read(&name));
        for of in ["web-1", "backend-1"] {
            let mut dump = engine.config_dump(&proxy(of));
            validate(Path::new(&envoy), &format!("{case}-{of}"), &dump);
            let extensions = kind(&dump, ".TypedExtensionConfig").clone();
            let asked_for = inline(&mut dump, &extensions);
            // As many as there are: none is missing, and none is there that nobody asks for.
            assert_eq!(Some(asked_for), extensions.as_object().map(serde_json::Map::len), "{case}: {of}");
            validate(Path::new(&envoy), &format!("{case}-{of}-inline"), &dump);
        }
        cases += 1;
    }
    assert!(cases > 0, "there are no cases in {}", testdata().display());
}
