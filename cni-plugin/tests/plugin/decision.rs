//! Who decides whether a pod is meshed, in which order, and what is done when nobody can.

use std::process::Command;

use ursa_model::injection::{INJECTION, Injection, Knowledge, NamespaceFacts, PodFacts};

use super::*;

const CAPABILITY: &str = "io.kubernetes.cri.pod-annotations";

/// A configuration whose runtime delivers these annotations; `Null` is none at all.
fn delivering(dir: &Path, annotations: &Value) -> Value {
    let mut config = config("1.0.0", dir, "enabled");
    config["runtimeConfig"] =
        if annotations.is_null() { json!({}) } else { json!({CAPABILITY: annotations}) };
    config
}

/// The file that an agent leaves: namespace `shop` is meshed, and pod web-0 of UID 42 says `word`.
fn knows(dir: &Path, word: Option<&str>) {
    let mut knowledge = Knowledge::new(Some(Injection::Disabled));
    let labels = [(INJECTION.to_owned(), "enabled".to_owned())].into();
    knowledge.learn_namespace("shop", &NamespaceFacts { labels, ..NamespaceFacts::default() });
    if let Some(word) = word {
        let annotations = [(INJECTION.to_owned(), word.to_owned())].into();
        let facts = PodFacts { uid: "42".to_owned(), annotations, ..PodFacts::default() };
        knowledge.learn_pod("shop", "web-0", &facts);
    }
    std::fs::write(dir.join("decisions.json"), knowledge.content().text).unwrap();
}

fn unmeshed(pod: &Namespace, config: &Value) {
    let start = Instant::now();
    let added = verb("ADD", path(pod), config);
    assert_eq!(added.code, 0, "{}", added.stdout);
    assert_eq!(added.json(), previous("1.0.0"));
    assert!(start.elapsed() < Duration::from_secs(2), "nobody is waited for");
    assert!(rules(pod).is_empty());
    let records = std::fs::read_dir(Path::new(config["runDir"].as_str().unwrap()).join("cni"));
    assert_eq!(records.map_or(0, Iterator::count), 0, "nothing was done for it");
}

/// Wanted, but nothing does it: code 11 says that the redirect was tried, or that nobody decided.
fn refused(pod: &Namespace, config: &Value) -> String {
    let (code, text) = verb("ADD", path(pod), config).error();
    assert_eq!(code, 11, "{text}");
    assert!(rules(pod).is_empty());
    text
}

#[test]
fn without_an_agent_annotations_decide_and_empty_ones_do_too() {
    let (dir, pod) = (tempfile::tempdir().unwrap(), pod());
    unmeshed(&pod, &delivering(dir.path(), &json!({INJECTION: "false"})));
    unmeshed(&pod, &delivering(dir.path(), &json!({})));
    // What containerd writes for a pod without annotations.
    let mut null = delivering(dir.path(), &json!({}));
    null["runtimeConfig"] = json!({CAPABILITY: null});
    unmeshed(&pod, &null);
    let text = refused(&pod, &delivering(dir.path(), &json!({INJECTION: "true"})));
    assert!(text.contains("sidecar isn't ready"), "{text}");
}

#[test]
fn annotations_that_nobody_delivers_are_neither_yes_nor_no() {
    let (dir, pod) = (tempfile::tempdir().unwrap(), pod());
    let silent = delivering(dir.path(), &Value::Null);
    let start = Instant::now();
    let text = refused(&pod, &silent);
    assert!(text.contains("isn't decided") && text.contains("containerd 1.7"), "{text}");
    assert!(start.elapsed() < Duration::from_secs(8), "{:?}", start.elapsed());
    // An excluded namespace needs no word of the pod, and a network that wants none has pods without.
    let mut excluded = silent.clone();
    excluded["excludeNamespaces"] = json!(["shop"]);
    unmeshed(&pod, &excluded);
    let mut unwanted = silent.clone();
    unwanted["capabilities"] = json!({});
    unmeshed(&pod, &unwanted);
    // What the agent knows of this pod, by UID, and of no other of its name.
    knows(dir.path(), Some("disabled"));
    unmeshed(&pod, &silent);
    knows(dir.path(), None);
    assert!(refused(&pod, &silent).contains("isn't decided"));
}

#[test]
fn the_dead_agents_file_decides_for_silent_pods() {
    let (dir, pod) = (tempfile::tempdir().unwrap(), pod());
    knows(dir.path(), None);
    let silent = delivering(dir.path(), &json!({}));
    assert!(refused(&pod, &silent).contains("sidecar isn't ready"), "meshed by its namespace");
    unmeshed(&pod, &delivering(dir.path(), &json!({INJECTION: "disabled"})));
    // A file that can't be read is no word at all.
    std::fs::write(dir.path().join("decisions.json"), "{\"version\":1,").unwrap();
    assert!(refused(&pod, &silent).contains("damaged"));
    std::fs::write(dir.path().join("decisions.json"), "{\"version\":2}").unwrap();
    assert!(refused(&pod, &silent).contains("format is 2"));
}

#[test]
fn a_file_that_is_older_than_the_agents_configuration_decides_nothing() {
    let (dir, pod) = (tempfile::tempdir().unwrap(), pod());
    let mut silent = delivering(dir.path(), &json!({}));
    silent["runDir"] = json!(dir.path());
    let (file, stale) = (dir.path().join("decisions.json"), dir.path().join("decisions.stale"));
    std::fs::write(&file, Knowledge::new(Some(Injection::Disabled)).content().text).unwrap();
    unmeshed(&pod, &silent);
    std::fs::write(&stale, "").unwrap();
    let text = refused(&pod, &silent);
    assert!(text.contains("older than the agent's configuration"), "{text}");
    // Nor does a file that isn't there.
    std::fs::remove_file(&file).unwrap();
    refused(&pod, &silent);
    unmeshed(&pod, &delivering(dir.path(), &json!({INJECTION: "disabled"})));
    let verdict = json!({"decision": "unmeshed", "source": "default", "reason": "because"});
    agent_that(dir.path(), move |_| format!("{}\n", json!({"ok": true, "verdict": verdict})));
    unmeshed(&pod, &silent);
}

#[test]
fn a_network_may_leave_silent_pods_to_the_agent() {
    let (dir, pod) = (tempfile::tempdir().unwrap(), pod());
    let mut silent = delivering(dir.path(), &json!({}));
    silent["default"] = json!("ask");
    assert!(refused(&pod, &silent).contains("isn't decided"));
    let verdict = json!({"decision": "unmeshed", "source": "default", "reason": "because"});
    let asked = agent_that(dir.path(), move |_| format!("{}\n", json!({"ok": true, "verdict": verdict})));
    unmeshed(&pod, &silent);
    let request = asked.recv_timeout(lab::PATIENCE).unwrap();
    assert_eq!((&request["cmd"], &request["annotations"]), (&json!("cni-decide"), &json!({})));
    assert_eq!(request["args"]["K8S_POD_UID"], "42");
    silent["default"] = json!("enabled");
    assert_eq!(verb("ADD", path(&pod), &silent).code, 0);
    assert_eq!(asked.recv_timeout(lab::PATIENCE).unwrap()["cmd"], "cni-add");
    assert!(!rules(&pod).is_empty());
}

#[test]
fn an_unreadable_word_is_an_error_and_nothing_else() {
    let (dir, pod) = (tempfile::tempdir().unwrap(), pod());
    let asked = agent(dir.path(), "{\"ok\":true}\n");
    for value in ["yes", "", "Enabled"] {
        let config = delivering(dir.path(), &json!({INJECTION: value}));
        let (code, text) = verb("ADD", path(&pod), &config).error();
        assert_eq!(code, 7);
        assert!(text.contains(&format!("`{value}`")) && text.contains("write `enabled`"), "{text}");
    }
    assert!(rules(&pod).is_empty() && asked.try_recv().is_err());
}

/// What strace saw of a call, without the loader's own work.
fn traced(command: &str, netns: &str, config: &Value, calls: &str) -> Vec<String> {
    let dir = tempfile::tempdir().unwrap();
    let (log, input) = (dir.path().join("log"), dir.path().join("input"));
    std::fs::write(&input, config.to_string()).unwrap();
    let status = Command::new("strace")
        .args(["-f", "-qq", "-e", &format!("trace={calls}"), "-o"])
        .arg(&log)
        .arg(env!("CARGO_BIN_EXE_ursa-cni"))
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap())
        .envs([("CNI_COMMAND", command), ("CNI_CONTAINERID", "0a1b2c"), ("CNI_IFNAME", "eth0")])
        .env("CNI_NETNS", netns)
        .env("CNI_ARGS", "K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;K8S_POD_UID=42")
        .stdin(std::fs::File::open(&input).unwrap())
        .stdout(Stdio::null())
        .status()
        .unwrap_or_else(|e| unreachable!("strace: {e}; run scripts/need-tools.sh"));
    assert!(status.success());
    let log = std::fs::read_to_string(log).unwrap();
    log.lines().filter(|line| line.contains('(')).map(str::to_owned).collect()
}

#[test]
fn a_call_starts_no_program_and_speaks_to_no_network() {
    let (dir, pod) = (tempfile::tempdir().unwrap(), pod());
    // Not even an agent is asked about a pod that isn't meshed, nor is its namespace opened.
    let asked = agent(dir.path(), "{\"ok\":true}\n");
    let plain = delivering(dir.path(), &json!({}));
    let calls = "execve,execveat,socket,connect,setns,clone,clone3,fork,vfork";
    for command in ["ADD", "CHECK", "DEL"] {
        let seen = traced(command, path(&pod), &plain, calls);
        assert_eq!(seen.len(), 1, "{seen:#?}");
        assert!(seen[0].contains("execve("), "{seen:#?}");
    }
    assert!(asked.try_recv().is_err());
    let meshed = delivering(dir.path(), &json!({INJECTION: "enabled"}));
    for command in ["ADD", "CHECK", "DEL"] {
        let seen = traced(command, path(&pod), &meshed, "execve,execveat,socket,connect,setns");
        let count = |word: &str| seen.iter().filter(|line| line.contains(word)).count();
        assert_eq!(count("exec"), 1, "{seen:#?}");
        assert_eq!(count("AF_INET"), 0, "{seen:#?}");
        assert!(count("setns") > 0 && count("AF_NETLINK") > 0, "the tool sees what there is: {seen:#?}");
    }
}
