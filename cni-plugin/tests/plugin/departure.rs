//! What was done for a pod is undone, whoever died meanwhile and whatever the pod says by then.

use super::*;

#[test]
fn a_plugin_killed_in_the_middle_leaves_nothing_after_del() {
    let (dir, pod) = (tempfile::tempdir().unwrap(), pod());
    let (tell, told) = mpsc::channel::<()>();
    // It answers the first question never.
    let asked = agent_that(dir.path(), move |request| {
        if request["cmd"] == "cni-add" {
            let _ = told.recv();
        }
        "{\"ok\":true}\n".to_owned()
    });
    let config = config("1.0.0", dir.path(), "enabled");
    let mut child = Command::new(env!("CARGO_BIN_EXE_ursa-cni"))
        .env_clear()
        .envs([("CNI_COMMAND", "ADD"), ("CNI_CONTAINERID", "0a1b2c"), ("CNI_IFNAME", "eth0")])
        .env("CNI_NETNS", path(&pod))
        .env("CNI_ARGS", "K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;K8S_POD_UID=42")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(config.to_string().as_bytes()).unwrap();
    assert_eq!(asked.recv_timeout(lab::PATIENCE).unwrap()["cmd"], "cni-add");
    assert!(!rules(&pod).is_empty(), "ADD puts its rules in place before it asks for the sidecar");
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(records(dir.path()), ["0a1b2c pods eth0"], "what was done is on record");
    drop(tell);

    // Its annotation says something else by now, and so may the configuration.
    let mut later = config.clone();
    later["runtimeConfig"] =
        json!({"io.kubernetes.cri.pod-annotations": {"kuma.io/sidecar-injection": "disabled"}});
    later["redirect"] = json!("nonsense");
    assert_eq!(verb("DEL", path(&pod), &later).code, 0);
    assert_eq!(asked.recv_timeout(lab::PATIENCE).unwrap()["cmd"], "cni-del");
    assert!(rules(&pod).is_empty() && records(dir.path()).is_empty());
}

#[test]
fn a_pod_can_go_whatever_is_missing() {
    let (dir, pod) = (tempfile::tempdir().unwrap(), pod());
    let socket = dir.path().join("agent.sock");
    let asked = agent(dir.path(), "{\"ok\":true}\n");
    let config = config("1.0.0", dir.path(), "enabled");
    assert_eq!(verb("ADD", path(&pod), &config).code, 0);
    assert_eq!(asked.try_iter().count(), 1);
    // Without an agent, without the previous result, with a configuration that can't be read.
    std::fs::remove_file(&socket).unwrap();
    let mut broken = config.clone();
    broken["prevResult"] = Value::Null;
    broken["excludeNamespaces"] = json!(7);
    assert_eq!(verb("ADD", path(&pod), &broken).error().0, 7, "the same document is an error elsewhere");
    let start = Instant::now();
    assert_eq!(verb("DEL", path(&pod), &broken).code, 0);
    assert!(start.elapsed() < Duration::from_secs(2), "nobody is waited for");
    assert!(
        rules(&pod).is_empty() && records(dir.path()).is_empty(),
        "by its record the agent sees who has gone"
    );
    for netns in ["", "/run/netns/ursa-never-was", path(&pod)] {
        assert_eq!(verb("DEL", netns, &broken).code, 0, "{netns}");
    }
}
