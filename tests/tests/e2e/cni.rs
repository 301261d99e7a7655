//! A pod enters the mesh by CNI ADD and leaves it by CNI DEL, with the real agent and the real Envoy.

use std::io::Write as _;
use std::os::unix::fs::MetadataExt as _;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use ursa_tests::lab::daemon::kill_pid;
use ursa_tests::lab::mesh::{Control, Node, PORT};
use ursa_tests::lab::net::Host;
use ursa_tests::lab::pair::{SOON, URL, until};
use ursa_tests::lab::program::{self, Answer, Client};
use ursa_tests::lab::{Lab, Programs, wait};

/// A container runtime's call; what the plugin printed.
fn call(lab: &Lab, node: &Node, pod: &Host, verb: &str, injection: &str) -> Result<String, String> {
    call_for(lab, node, pod, verb, ("web", json!({"kuma.io/sidecar-injection": injection})))
}

/// As [`call`], for a pod of this name with these annotations.
pub(crate) fn call_for(
    lab: &Lab,
    node: &Node,
    pod: &Host,
    verb: &str,
    (name, annotations): (&str, Value),
) -> Result<String, String> {
    let previous = json!({
        "cniVersion": "1.0.0",
        "ips": [{"address": format!("{}/24", pod.v4)}],
        "unknown": {"kept": true}
    });
    let config = json!({
        "cniVersion": "1.0.0", "name": "pods", "type": "ursa-cni", "runDir": node.run_dir(),
        "workload": {"name": name},
        "runtimeConfig": {"io.kubernetes.cri.pod-annotations": annotations},
        "prevResult": previous,
    });
    let mut child = Command::new(lab.programs.path("ursa-cni"))
        .env_clear()
        .env("CNI_COMMAND", verb)
        .env("CNI_CONTAINERID", format!("{name}-0a1b2c"))
        .env("CNI_NETNS", pod.path())
        .env("CNI_IFNAME", "eth0")
        .env("CNI_ARGS", format!("IgnoreUnknown=1;K8S_POD_NAME={name};K8S_POD_NAMESPACE=shop"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(config.to_string().as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    if !output.status.success() {
        return Err(text);
    }
    if verb == "ADD" {
        assert_eq!(serde_json::from_str::<Value>(&text).unwrap(), previous);
    }
    Ok(text)
}

fn rules(pod: &Host) -> Vec<String> {
    ursa_init::in_netns(&pod.path(), ursa_init::show).unwrap().unwrap()
}

#[test]
fn a_pod_appears_by_add_and_disappears_by_del() {
    let mut lab = Lab::new(&Programs::discover().unwrap()).unwrap();
    let control = Control::start(&mut lab).unwrap();
    let backend = lab.net.host("backend").unwrap();
    let _server = program::serve(&lab, &backend, "backend", PORT).unwrap();
    let tickets = (control.ticket(&["web"]).unwrap(), control.ticket(&["backend"]).unwrap());
    let mut node = Node::join(&mut lab, "node-a", &tickets.0).unwrap();
    let mut far = Node::join(&mut lab, "node-b", &tickets.1).unwrap();
    far.add("backend", &backend).unwrap();
    far.wait_ready("backend", SOON).unwrap();
    control.ursa(&["allow", "web", "backend"]).unwrap();

    // A pod without the annotation is left alone.
    let plain = lab.net.host("plain").unwrap();
    call(&lab, &node, &plain, "ADD", "disabled").unwrap();
    assert!(rules(&plain).is_empty() && plain.running("envoy").is_empty());

    let pod = lab.net.host("web").unwrap();
    call(&lab, &node, &pod, "ADD", "enabled").unwrap();
    let envoys = pod.running("envoy");
    assert_eq!(envoys.len(), 1, "ADD returns with a live Envoy in the pod");
    let owner = std::fs::metadata(format!("/proc/{}", envoys[0])).unwrap().uid();
    assert!(owner >= 1_900_000_000, "uid {owner} is shared with other pods' proxies");
    call(&lab, &node, &pod, "CHECK", "enabled").unwrap();
    let mut client = Client::start(&lab, &pod).unwrap();
    until(&mut client, URL, "the pod's request to succeed", Answer::ok).unwrap();
    drop(client);

    // The rules that the plugin has made are kept in place by the agent, as long as the pod is there.
    let wanted = crate::kept::rules(&pod.path());
    let flush =
        || ursa_tests::lab::mesh::run(pod.command("nft".as_ref()).args(["flush", "ruleset"]), "").unwrap();
    flush();
    let back = || match crate::kept::rules(&pod.path()) {
        found if found == wanted => Ok(()),
        found => Err(format!("{} lines", found.len())),
    };
    let ((), took) = wait::until("the pod's rules to be back", SOON, back).unwrap();
    assert!(took < std::time::Duration::from_secs(1), "{took:?}");
    // The next agent knows them as well.
    node.agent.kill();
    flush();
    node.agent.restart().unwrap();
    wait::until("the pod's rules to be back by the next agent", SOON, back).unwrap();

    call(&lab, &node, &pod, "DEL", "enabled").unwrap();
    call(&lab, &node, &pod, "DEL", "enabled").unwrap();
    assert_eq!(rules(&pod), Vec::<String>::new());
    wait::until("the pod's Envoy to end", SOON, || match pod.running("envoy") {
        pids if pids.is_empty() => Ok(()),
        pids => Err(format!("{pids:?}")),
    })
    .unwrap();

    call(&lab, &node, &pod, "ADD", "enabled").unwrap();
    call(&lab, &node, &pod, "CHECK", "enabled").unwrap();

    // Its pod goes while the agent is dead: the next agent finds that out by itself.
    node.agent.kill();
    call(&lab, &node, &pod, "CHECK", "enabled").unwrap();
    call(&lab, &node, &pod, "DEL", "enabled").unwrap();
    assert_eq!(rules(&pod), Vec::<String>::new());
    assert_eq!(pod.running("envoy").len(), 1, "nobody was there to stop it");
    let error = call(&lab, &node, &pod, "CHECK", "enabled").unwrap_err();
    assert_eq!(serde_json::from_str::<Value>(&error).unwrap()["code"], 101, "{error}");
    node.agent.restart().unwrap();
    wait::until("the sidecar of the pod that went to end", SOON, || match pod.running("envoy") {
        pids if pids.is_empty() => Ok(()),
        pids => Err(format!("{pids:?}")),
    })
    .unwrap();
    wait::until("its files to be gone", SOON, || {
        match std::fs::read_dir(node.state_dir().join("w")).unwrap().count() {
            0 => Ok(()),
            left => Err(format!("{left} left")),
        }
    })
    .unwrap();

    // Without its agent a meshed pod doesn't start, and leaves nothing behind.
    node.agent.kill();
    let error = call(&lab, &node, &pod, "ADD", "enabled").unwrap_err();
    assert_eq!(serde_json::from_str::<Value>(&error).unwrap()["code"], 11, "{error}");
    assert!(rules(&pod).is_empty());
}

/// A workload whose identity is cached starts, any other one is told to try again later and leaves nothing behind.
#[test]
fn while_the_control_plane_is_away_only_what_is_cached_starts() {
    let mut lab = Lab::new(&Programs::discover().unwrap()).unwrap();
    let mut control = Control::start(&mut lab).unwrap();
    let ticket = control.ticket(&["web", "late"]).unwrap();
    let mut node = Node::join(&mut lab, "node-a", &ticket).unwrap();
    let (pod, late) = (lab.net.host("web").unwrap(), lab.net.host("late").unwrap());
    call(&lab, &node, &pod, "ADD", "enabled").unwrap();
    node.wait_ready("web", SOON).unwrap();
    control.daemon.kill();

    let start_late = |node: &Node| {
        let annotations = json!({"kuma.io/sidecar-injection": "enabled"});
        call_for(&lab, node, &late, "ADD", ("late", annotations))
    };
    let begin = Instant::now();
    let error = start_late(&node).unwrap_err();
    let took = begin.elapsed();
    let error: Value = serde_json::from_str(&error).unwrap();
    assert_eq!(error["code"], 11, "{error}");
    assert!(error["msg"].as_str().unwrap().contains("control"), "it says what is missing: {error}");
    // Before the plugin's own limit: the agent's words say more than its silence.
    assert!(took < Duration::from_secs(22), "{took:?}");
    assert_eq!(rules(&late), Vec::<String>::new());
    assert_eq!(late.running("envoy"), [] as [i32; 0]);
    let records = std::fs::read_dir(node.run_dir().join("cni")).unwrap();
    let records: Vec<_> = records.map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(records, ["web-0a1b2c"]);
    let known = |node: &Node| {
        let status = node.status().unwrap();
        let all = status["workloads"].as_array().unwrap().clone();
        all.iter().map(|one| one["name"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    wait::until("the agent to forget it", SOON, || match known(&node) {
        all if all == ["web"] => Ok(()),
        all => Err(format!("{all:?}")),
    })
    .unwrap();

    // The other one, with nothing but what is on disk: neither agent, nor Envoy, nor rules.
    node.agent.kill();
    for program in ["ursa-shim", "envoy"] {
        for pid in pod.running(program) {
            let _ = kill_pid(pid);
        }
    }
    wait::until("its proxy to be dead", SOON, || match pod.running("envoy") {
        pids if pids.is_empty() => Ok(()),
        pids => Err(format!("{pids:?}")),
    })
    .unwrap();
    ursa_init::in_netns(&pod.path(), ursa_init::remove).unwrap().unwrap();
    node.agent.restart().unwrap();
    call(&lab, &node, &pod, "ADD", "enabled").unwrap();
    assert!(!rules(&pod).is_empty() && pod.running("envoy").len() == 1);
    call(&lab, &node, &pod, "CHECK", "enabled").unwrap();

    control.restart().unwrap();
    start_late(&node).unwrap();
    assert!(!rules(&late).is_empty() && late.running("envoy").len() == 1);
}
