//! A container in several networks: attachments are counted by network, container and interface.

use super::*;

/// The pod's second network, with a redirect of its own.
fn second(dir: &Path) -> Value {
    let mut config = config("1.1.0", dir, "enabled");
    config["name"] = json!("storage");
    config["prevResult"]["ips"] = json!([{"address": "10.88.0.1/24"}]);
    config["redirect"] = json!({"outbound": {"excludePorts": [3260]}});
    config
}

fn two_networks() -> (tempfile::TempDir, Namespace, mpsc::Receiver<Value>, Value, Value) {
    let (dir, pod) = (tempfile::tempdir().unwrap(), pod());
    pod.ip("addr add 10.88.0.1/32 dev lo");
    let asked = agent(dir.path(), "{\"ok\":true}\n");
    let (first, second) = (config("1.1.0", dir.path(), "enabled"), second(dir.path()));
    (dir, pod, asked, first, second)
}

fn commands(asked: &mpsc::Receiver<Value>) -> Vec<String> {
    asked.try_iter().map(|request| request["cmd"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn rules_and_sidecar_stay_until_the_last_attachment_goes() {
    let (dir, pod, asked, first, second) = two_networks();
    assert_eq!(verb_of("eth0", "ADD", path(&pod), &first).code, 0);
    let before = rules(&pod);
    let told = asked.recv_timeout(lab::PATIENCE).unwrap();
    let added = verb_of("net1", "ADD", path(&pod), &second);
    assert_eq!(added.json(), second["prevResult"], "each network's own result");
    // One sidecar and one redirect, as the first attachment described them.
    assert_eq!(asked.recv_timeout(lab::PATIENCE).unwrap(), told);
    assert_eq!(rules(&pod), before);
    assert_eq!(records(dir.path()), ["0a1b2c pods eth0", "0a1b2c storage net1"]);
    for (ifname, config) in [("eth0", &first), ("net1", &second)] {
        let checked = verb_of(ifname, "CHECK", path(&pod), config);
        assert_eq!(checked.code, 0, "{ifname}: {}", checked.stdout);
    }
    assert_eq!(commands(&asked), ["cni-check", "cni-check"]);

    // Neither another network's DEL nor that of an interface that never was is this one's.
    let mut stranger = second.clone();
    stranger["name"] = json!("others");
    for (ifname, config) in [("net1", &stranger), ("net9", &second), ("net1", &second), ("net1", &second)] {
        assert_eq!(verb_of(ifname, "DEL", path(&pod), config).code, 0);
        assert_eq!(rules(&pod), before, "{ifname}");
    }
    assert_eq!(commands(&asked), [""; 0], "the sidecar stays");
    assert_eq!(records(dir.path()), ["0a1b2c pods eth0"]);
    assert_eq!(verb_of("eth0", "DEL", path(&pod), &first).code, 0);
    assert_eq!(commands(&asked), ["cni-del"]);
    assert!(rules(&pod).is_empty() && records(dir.path()).is_empty());
}

#[test]
fn when_the_first_goes_the_next_describes_the_pod() {
    let (dir, pod, asked, first, second) = two_networks();
    assert_eq!(verb_of("eth0", "ADD", path(&pod), &first).code, 0);
    assert_eq!(verb_of("net1", "ADD", path(&pod), &second).code, 0);
    assert_eq!(asked.try_iter().count(), 2);
    assert!(!rules(&pod).concat().contains("3260"));
    assert_eq!(verb_of("eth0", "DEL", path(&pod), &first).code, 0);
    let told = asked.recv_timeout(lab::PATIENCE).unwrap();
    assert_eq!((&told["cmd"], &told["ips"]), (&json!("cni-add"), &json!(["10.88.0.1"])));
    assert!(rules(&pod).concat().contains("3260"), "its redirect is the pod's now");
    assert_eq!(verb_of("net1", "CHECK", path(&pod), &second).code, 0);
    assert_eq!(asked.recv_timeout(lab::PATIENCE).unwrap()["cmd"], "cni-check");
    assert_eq!(records(dir.path()), ["0a1b2c storage net1"]);
    assert_eq!(verb_of("net1", "DEL", path(&pod), &second).code, 0);
    assert_eq!(commands(&asked), ["cni-del"]);
    assert!(rules(&pod).is_empty() && records(dir.path()).is_empty());
}

#[test]
fn a_second_network_that_fails_leaves_the_first_as_it_is() {
    let (dir, pod) = (tempfile::tempdir().unwrap(), pod());
    pod.ip("addr add 10.88.0.1/32 dev lo");
    let (tell, answers) = mpsc::channel::<&str>();
    let asked = agent_that(dir.path(), move |_| answers.recv().unwrap().to_owned());
    let (first, second) = (config("1.1.0", dir.path(), "enabled"), second(dir.path()));
    tell.send("{\"ok\":true}\n").unwrap();
    assert_eq!(verb_of("eth0", "ADD", path(&pod), &first).code, 0);
    let before = rules(&pod);
    tell.send("{\"error\":\"Envoy is dead\"}\n").unwrap();
    assert_eq!(verb_of("net1", "ADD", path(&pod), &second).error().0, 11);
    assert_eq!(rules(&pod), before, "the pod is redirected as before");
    assert_eq!(records(dir.path()), ["0a1b2c pods eth0"]);
    assert_eq!(commands(&asked), ["cni-add", "cni-add"], "nobody stops its sidecar");
    // A network that isn't meshed takes nothing along either.
    let mut plain = config("1.1.0", dir.path(), "disabled");
    plain["name"] = json!("plain");
    for command in ["ADD", "DEL"] {
        assert_eq!(verb_of("net2", command, path(&pod), &plain).code, 0);
        assert_eq!(rules(&pod), before);
    }
}

#[test]
fn gc_frees_what_is_not_listed_in_this_network() {
    let (dir, pod, asked, first, second) = two_networks();
    assert_eq!(verb_of("eth0", "ADD", path(&pod), &first).code, 0);
    assert_eq!(verb_of("eth1", "ADD", path(&pod), &first).code, 0);
    assert_eq!(verb_of("net1", "ADD", path(&pod), &second).code, 0);
    assert_eq!(asked.try_iter().count(), 3);

    let mut config = first.clone();
    let (code, text) = verb("GC", "", &config).error();
    assert!(code == 7 && text.contains("valid-attachments"), "an absent list isn't an empty one: {text}");
    let gc = |config: &Value| {
        assert_eq!(verb("GC", "", config).code, 0);
        (commands(&asked), records(dir.path()))
    };
    let all = ["0a1b2c pods eth0", "0a1b2c pods eth1", "0a1b2c storage net1"];
    let listed = |ifname: &str| json!({"containerID": "0a1b2c", "ifname": ifname});
    config["cni.dev/valid-attachments"] = json!([listed("eth0"), listed("eth1")]);
    assert_eq!(gc(&config), (vec!["cni-gc".to_owned()], all.map(str::to_owned).to_vec()));
    // The first one is gone: the next describes the pod.
    config["cni.dev/valid-attachments"] = json!([listed("eth1")]);
    let (asked_for, left) = gc(&config);
    assert_eq!(
        (asked_for, left),
        (
            vec!["cni-add".to_owned(), "cni-gc".to_owned()],
            all[1..].iter().map(|&one| one.to_owned()).collect()
        )
    );
    // The name that the specification's text had for a while.
    config.as_object_mut().unwrap().remove("cni.dev/valid-attachments");
    config["cni.dev/attachments"] = json!([]);
    assert_eq!(gc(&config).1, ["0a1b2c storage net1"], "another network's");
    assert!(!rules(&pod).is_empty());
}
