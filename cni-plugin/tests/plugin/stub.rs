//! What an uninstalled plugin leaves in its place: any pod starts and stops with it, whatever it says.

use super::*;

/// The built plugin by the stub's name, as `ursa-cni uninstall` leaves it.
fn stub(dir: &Path) -> std::path::PathBuf {
    let path = dir.join("ursa-cni-stub");
    std::fs::copy(env!("CARGO_BIN_EXE_ursa-cni"), &path).unwrap();
    path
}

#[test]
fn a_stub_lets_every_pod_start_and_stop() {
    let (dir, pod) = (tempfile::tempdir().unwrap(), pod());
    let program = stub(dir.path());
    let call = |command: &str, config: &Value| {
        let vars = [
            ("CNI_COMMAND", command),
            ("CNI_CONTAINERID", "0a1b2c"),
            ("CNI_IFNAME", "eth0"),
            ("CNI_NETNS", path(&pod)),
        ];
        call_of(&program, &vars, &config.to_string())
    };
    let good = config("1.1.0", dir.path(), "enabled");
    let with = |key: &str, value: Value| {
        let mut config = good.clone();
        config[key] = value;
        config
    };
    std::fs::write(dir.path().join("decisions.json"), "{").unwrap();
    let begin = Instant::now();
    for config in [
        good.clone(),
        config("1.1.0", dir.path(), "disabled"),
        config("1.1.0", dir.path(), "perhaps"),
        with("excludeNamespaces", json!(7)),
        with("redirect", json!("nonsense")),
        with("runtimeConfig", json!({})),
        with("default", json!("whatever")),
    ] {
        let added = call("ADD", &config);
        assert_eq!(added.code, 0, "{}", added.stdout);
        assert_eq!(added.json(), previous("1.1.0"));
        assert_eq!(call("DEL", &config).code, 0);
    }
    for verb in ["CHECK", "STATUS"] {
        assert_eq!(call(verb, &config("1.1.0", dir.path(), "perhaps")).code, 0, "{verb}");
    }
    assert!(begin.elapsed() < Duration::from_secs(10), "no agent is waited for");
    assert!(rules(&pod).is_empty() && records(dir.path()).is_empty());
    // There is nothing to hand on; no pod has a network then.
    assert_eq!(call("ADD", &with("prevResult", Value::Null)).error().0, 7);
}

#[test]
fn a_stub_frees_what_the_plugin_did() {
    let (dir, pod) = (tempfile::tempdir().unwrap(), pod());
    let asked = agent(dir.path(), "{\"ok\":true}\n");
    let config = config("1.1.0", dir.path(), "enabled");
    assert_eq!(verb("ADD", path(&pod), &config).code, 0);
    let vars = [
        ("CNI_COMMAND", "DEL"),
        ("CNI_CONTAINERID", "0a1b2c"),
        ("CNI_IFNAME", "eth0"),
        ("CNI_NETNS", path(&pod)),
    ];
    assert_eq!(call_of(&stub(dir.path()), &vars, &config.to_string()).code, 0);
    let commands: Vec<_> = asked.try_iter().map(|request| request["cmd"].clone()).collect();
    assert_eq!(commands, ["cni-add", "cni-del"]);
    assert!(rules(&pod).is_empty() && records(dir.path()).is_empty());
}
