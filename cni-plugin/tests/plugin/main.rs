//! The built plugin as a runtime calls it: variables, JSON on standard input, JSON on standard output.

#![allow(clippy::unwrap_used, reason = "a test that can't go on has failed")]

#[path = "../../../init/tests/kernel/lab.rs"]
mod lab;

mod attachments;
mod calls;
mod decision;
mod departure;
mod stub;

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use lab::Namespace;
use rstest::rstest;
use serde_json::{Value, json};

/// What came back.
struct Outcome {
    code: i32,
    stdout: String,
}

impl Outcome {
    fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|e| unreachable!("{e}: {}", self.stdout))
    }

    #[track_caller]
    fn error(&self) -> (u64, String) {
        assert_ne!(self.code, 0, "{}", self.stdout);
        let error = self.json();
        assert!(error["cniVersion"].is_string(), "{error}");
        (error["code"].as_u64().unwrap(), format!("{}: {}", error["msg"], error["details"]))
    }
}

fn call(vars: &[(&str, &str)], input: &str) -> Outcome {
    call_of(Path::new(env!("CARGO_BIN_EXE_ursa-cni")), vars, input)
}

fn call_of(program: &Path, vars: &[(&str, &str)], input: &str) -> Outcome {
    let mut child = Command::new(program)
        .env_clear()
        .envs(vars.iter().copied())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // The plugin may refuse its variables without reading.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    let output = child.wait_with_output().unwrap();
    Outcome { code: output.status.code().unwrap(), stdout: String::from_utf8(output.stdout).unwrap() }
}

fn verb(command: &str, netns: &str, config: &Value) -> Outcome {
    verb_of("eth0", command, netns, config)
}

fn verb_of(ifname: &str, command: &str, netns: &str, config: &Value) -> Outcome {
    let vars = [
        ("CNI_COMMAND", command),
        ("CNI_CONTAINERID", "0a1b2c"),
        ("CNI_IFNAME", ifname),
        ("CNI_NETNS", netns),
        ("CNI_PATH", "/opt/cni/bin"),
        ("CNI_ARGS", "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;K8S_POD_UID=42"),
    ];
    call(&vars, &config.to_string())
}

/// A previous result with fields that nobody knows and numbers that must survive.
fn previous(version: &str) -> Value {
    json!({
        "cniVersion": version,
        "interfaces": [{"name": "eth0", "sandbox": "/run/netns/x", "mac": "02:00:00:00:00:01"}],
        "ips": [{"address": "10.77.0.1/24", "interface": 0}, {"address": "fd77::1/64", "interface": 0}],
        "dns": {"nameservers": ["10.96.0.10"]},
        "ursaUnknown": {"big": 9_007_199_254_740_993_u64, "deep": [1, null, {"x": -1.5}]}
    })
}

fn config(version: &str, run_dir: &Path, annotation: &str) -> Value {
    json!({
        "cniVersion": version, "name": "pods", "type": "ursa-cni", "runDir": run_dir, "stateDir": run_dir,
        "capabilities": {"io.kubernetes.cri.pod-annotations": true},
        "runtimeConfig": {"io.kubernetes.cri.pod-annotations": {"kuma.io/sidecar-injection": annotation}},
        "workload": {"name": "web"},
        "prevResult": previous(version)
    })
}

/// A pod's namespace, with its addresses.
fn pod() -> Namespace {
    let pod = Namespace::new();
    pod.ip("link set lo up");
    pod.ip("addr add 10.77.0.1/32 dev lo");
    pod.ip("addr add fd77::1/128 dev lo nodad");
    pod
}

/// An agent that answers every request with the same line, and tells the test what it was asked.
fn agent(dir: &Path, answer: &'static str) -> mpsc::Receiver<Value> {
    agent_that(dir, move |_| answer.to_owned())
}

/// An agent that answers as told.
fn agent_that(dir: &Path, answer: impl Fn(&Value) -> String + Send + 'static) -> mpsc::Receiver<Value> {
    let listener = UnixListener::bind(dir.join("agent.sock")).unwrap();
    let (tell, told) = mpsc::channel();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut line = String::new();
            if BufReader::new(&stream).read_line(&mut line).unwrap_or(0) > 0 {
                let request: Value = serde_json::from_str(&line).unwrap();
                let _ = tell.send(request.clone());
                let answer = answer(&request);
                let _ = stream.write_all(answer.as_bytes());
            }
        }
    });
    told
}

/// The attachments on record: container, network and interface.
fn records(dir: &Path) -> Vec<String> {
    let records = ursa_cni_protocol::Records::below(dir);
    let of = |container: String| records.of(&container).into_iter().map(|record| record.attachment);
    let all = records.containers().into_iter().flat_map(of);
    all.map(|one| format!("{} {} {}", one.container_id, one.network, one.ifname)).collect()
}

fn path(ns: &Namespace) -> &str {
    ns.path().to_str().unwrap()
}

fn rules(ns: &Namespace) -> Vec<String> {
    ns.run(ursa_init::show).unwrap()
}

#[rstest]
#[case("0.3.0")]
#[case("0.3.1")]
#[case("0.4.0")]
#[case("1.0.0")]
#[case("1.1.0")]
fn a_pod_comes_and_goes_in_every_version(#[case] version: &str) {
    let dir = tempfile::tempdir().unwrap();
    let asked = agent(dir.path(), "{\"ok\":true}\n");
    let pod = pod();
    let config = config(version, dir.path(), "enabled");

    let added = verb("ADD", path(&pod), &config);
    assert_eq!(added.code, 0, "{}", added.stdout);
    assert_eq!(added.json(), previous(version));
    assert!(rules(&pod).iter().any(|line| line.contains("redirect to :15001")));
    let request = asked.recv_timeout(lab::PATIENCE).unwrap();
    assert_eq!(request["cmd"], "cni-add");
    assert_eq!(request["netns"], path(&pod));
    assert_eq!(request["container_id"], "0a1b2c");
    assert_eq!(request["ips"], json!(["10.77.0.1", "fd77::1"]));
    assert_eq!(request["args"]["K8S_POD_NAME"], "web-0");
    assert_eq!(request["config"]["workload"]["name"], "web");
    assert_eq!(request["config"]["redirect"]["proxyGids"], json!([5678]), "each proxy has a user of its own");
    assert_eq!(request["annotations"]["kuma.io/sidecar-injection"], "enabled");

    assert_eq!(verb("CHECK", path(&pod), &config).code, 0);
    assert_eq!(asked.recv_timeout(lab::PATIENCE).unwrap()["cmd"], "cni-check");
    assert_eq!(verb("ADD", path(&pod), &config).code, 0, "repeatable");
    let _ = asked.recv_timeout(lab::PATIENCE).unwrap();

    let deleted = verb("DEL", path(&pod), &config);
    assert_eq!((deleted.code, deleted.stdout.as_str()), (0, ""));
    assert_eq!(asked.recv_timeout(lab::PATIENCE).unwrap()["cmd"], "cni-del");
    assert!(rules(&pod).is_empty());
    assert_eq!(verb("DEL", "", &config).code, 0, "again, without the namespace");
    let left: Vec<_> = std::fs::read_dir(dir.path().join("cni")).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn an_unmeshed_pod_costs_a_decision_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let pod = pod();
    let mut config = config("1.0.0", dir.path(), "disabled");
    // Not even a mistake in the redirect concerns it.
    config["redirect"] = json!({"proxyUids": "x"});
    let start = Instant::now();
    assert_eq!(verb("ADD", path(&pod), &config).json(), previous("1.0.0"));
    assert!(start.elapsed() < Duration::from_secs(2), "no waiting for an agent");
    assert_eq!(verb("CHECK", path(&pod), &config).code, 0);
    assert_eq!(verb("DEL", path(&pod), &config).code, 0);
    assert!(rules(&pod).is_empty());
}

#[test]
fn without_an_agent_the_runtime_shall_try_again() {
    let dir = tempfile::tempdir().unwrap();
    let pod = pod();
    let config = config("1.0.0", dir.path(), "enabled");
    let start = Instant::now();
    let (code, text) = verb("ADD", path(&pod), &config).error();
    assert_eq!(code, 11);
    assert!(text.contains("agent.sock") && text.contains("systemctl"), "{text}");
    let waited = start.elapsed();
    assert!(waited >= Duration::from_secs(2) && waited < Duration::from_secs(10), "{waited:?}");
    assert!(rules(&pod).is_empty(), "what was done is undone");
    assert_eq!(verb("DEL", path(&pod), &config).code, 0, "a pod can always go");
    assert_eq!(verb("STATUS", "", &config).error().0, 50);
}

#[rstest]
#[case::refusal("{\"error\":\"workload web is not granted\"}\n", "not granted")]
#[case::nonsense("what?\n", "can't be understood")]
#[case::silence("", "without an answer")]
fn an_agent_that_fails_undoes_the_redirect(#[case] answer: &'static str, #[case] why: &str) {
    let dir = tempfile::tempdir().unwrap();
    let asked = agent(dir.path(), answer);
    let pod = pod();
    let (code, text) = verb("ADD", path(&pod), &config("1.0.0", dir.path(), "enabled")).error();
    assert_eq!(code, 11);
    assert!(text.contains(why), "{text}");
    assert!(rules(&pod).is_empty());
    let commands: Vec<_> = asked.try_iter().map(|r| r["cmd"].as_str().unwrap().to_owned()).collect();
    assert_eq!(commands, ["cni-add", "cni-del"]);
}

/// An Envoy that never comes: the agent has the question, and no answer.
#[test]
fn a_sidecar_that_never_lives_is_given_up_and_undone() {
    let dir = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(dir.path().join("agent.sock")).unwrap();
    let (tell, told) = mpsc::channel();
    thread::spawn(move || {
        let mut open = Vec::new();
        while let Ok((stream, _)) = listener.accept() {
            let mut line = String::new();
            let _ = BufReader::new(&stream).read_line(&mut line);
            let request: Value = serde_json::from_str(&line).unwrap();
            let silent = request["cmd"] == "cni-add";
            let _ = tell.send(request);
            if silent {
                open.push(stream); // held, or the plugin would see that nobody is there any more
            } else {
                let _ = (&stream).write_all(b"{\"ok\":true}\n");
            }
        }
    });
    let pod = pod();
    let began = Instant::now();
    let (code, text) = verb("ADD", path(&pod), &config("1.0.0", dir.path(), "enabled")).error();
    let took = began.elapsed();
    assert_eq!(code, 11, "{text}");
    assert!(text.contains("20 s") && text.contains("ursa-agent status"), "{text}");
    assert!((Duration::from_secs(20)..Duration::from_secs(24)).contains(&took), "{took:?}");
    assert_eq!(rules(&pod), Vec::<String>::new(), "the pod is as it was");
    let asked: Vec<_> = told.try_iter().map(|request| request["cmd"].as_str().unwrap().to_owned()).collect();
    assert_eq!(asked, ["cni-add", "cni-del"], "the agent forgets it");
}

#[test]
fn check_finds_an_edited_rule() {
    let dir = tempfile::tempdir().unwrap();
    let _asked = agent(dir.path(), "{\"ok\":true}\n");
    let pod = pod();
    let config = config("1.0.0", dir.path(), "enabled");
    assert_eq!(verb("ADD", path(&pod), &config).code, 0);
    pod.run(ursa_init::nft::remove).unwrap();
    let (code, text) = verb("CHECK", path(&pod), &config).error();
    assert_eq!(code, 101);
    assert!(text.contains("redirect to :15001"), "{text}");
}

#[test]
fn the_machines_own_namespace_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let config = config("1.0.0", dir.path(), "enabled");
    let own = format!("/proc/{}/ns/net", std::process::id());
    assert_eq!(verb("ADD", &own, &config).error().0, 8);
    assert_eq!(verb("ADD", "/run/netns/ursa-never-was", &config).error().0, 8);
    assert_eq!(verb("DEL", &own, &config).code, 0, "and nothing is touched");
}

#[test]
fn mistakes_are_named_in_json_on_standard_output() {
    let dir = tempfile::tempdir().unwrap();
    let good = config("1.0.0", dir.path(), "enabled");
    let pod = pod();

    assert_eq!(call(&[], "").error().0, 4);
    assert_eq!(call(&[("CNI_COMMAND", "FROB")], "").error().0, 4);
    let (code, text) = call(&[("CNI_COMMAND", "ADD"), ("CNI_IFNAME", "eth0")], &good.to_string()).error();
    assert!(code == 4 && text.contains("CNI_CONTAINERID, CNI_NETNS"), "{text}");
    let vars =
        [("CNI_COMMAND", "ADD"), ("CNI_CONTAINERID", "x"), ("CNI_IFNAME", "eth0"), ("CNI_NETNS", path(&pod))];
    assert_eq!(call(&vars, "{").error().0, 6);

    let with = |key: &str, value: Value| {
        let mut config = good.clone();
        config[key] = value;
        verb("ADD", path(&pod), &config).error()
    };
    assert_eq!(with("cniVersion", json!("0.2.0")).0, 1);
    assert_eq!(with("cniVersion", json!("2.0.0")).0, 1);
    assert_eq!(with("prevResult", Value::Null).0, 7);
    assert_eq!(with("redirect", json!({"proxyUids": [0]})).0, 7);
    let annotation =
        json!({"kuma.io/sidecar-injection": "enabled", "traffic.kuma.io/exclude-inbound-ports": "x"});
    let (code, text) = with("runtimeConfig", json!({"io.kubernetes.cri.pod-annotations": annotation}));
    assert!(code == 7 && text.contains("exclude-inbound-ports"), "{text}");
    assert!(rules(&pod).is_empty());
}

#[test]
fn version_lists_what_is_spoken() {
    let answer = call(&[("CNI_COMMAND", "VERSION")], r#"{"cniVersion":"0.4.0"}"#);
    assert_eq!(answer.code, 0);
    assert_eq!(answer.json()["cniVersion"], "0.4.0");
    assert_eq!(answer.json()["supportedVersions"], json!(["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"]));
    assert_eq!(call(&[("CNI_COMMAND", "VERSION")], "").json()["cniVersion"], "1.1.0");
}

#[test]
fn status_and_gc_speak_to_the_agent() {
    let dir = tempfile::tempdir().unwrap();
    let asked = agent(dir.path(), "{\"ok\":true}\n");
    let mut config = config("1.1.0", dir.path(), "enabled");
    config["cni.dev/valid-attachments"] = json!([{"containerID": "a", "ifname": "eth0"}]);
    assert_eq!(verb("STATUS", "", &config).code, 0);
    assert_eq!(verb("GC", "", &config).code, 0);
    let requests: Vec<_> = asked.try_iter().collect();
    assert_eq!(requests[0]["cmd"], "status");
    assert_eq!(requests[1]["cmd"], "cni-gc");
}
