//! What goes in and out of a call, and what CHECK sees.

use super::*;

#[test]
fn the_previous_result_goes_on_byte_for_byte() {
    let dir = tempfile::tempdir().unwrap();
    let previous = r#"{ "cniVersion":"1.0.0", "ips":[{"address":"10.0.0.9/24"}], "odd":[18446744073709551616, 1.50, 1e400,"\u00e9"] }"#;
    let input = format!(
        r#"{{"cniVersion":"1.0.0","name":"pods","type":"ursa-cni","runDir":"{0}","stateDir":"{0}","prevResult":{previous},"later":[1e999]}}"#,
        dir.path().display()
    );
    let vars =
        [("CNI_COMMAND", "ADD"), ("CNI_CONTAINERID", "x"), ("CNI_IFNAME", "eth0"), ("CNI_NETNS", "/never")];
    let added = call(&vars, &input);
    assert_eq!((added.code, added.stdout.trim_end()), (0, previous));
}

#[test]
fn version_is_spoken_with_and_without_a_document() {
    let version = |input: &str| call(&[("CNI_COMMAND", "VERSION")], input);
    assert_eq!(version("").json()["cniVersion"], "1.1.0");
    assert_eq!(version(r#"{"cniVersion":"0.3.1"}"#).json()["cniVersion"], "0.3.1");
    assert_eq!(version("{").error().0, 6);
}

#[test]
fn another_pods_namespace_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let _asked = agent(dir.path(), "{\"ok\":true}\n");
    let stranger = Namespace::new();
    stranger.ip("link set lo up");
    stranger.ip("addr add 10.88.0.1/32 dev lo");
    let mut config = config("1.0.0", dir.path(), "enabled");
    let (code, text) = verb("ADD", path(&stranger), &config).error();
    assert_eq!(code, 8);
    assert!(
        text.contains("10.77.0.1") && text.contains("10.88.0.1") && text.contains("nothing was changed"),
        "{text}"
    );
    assert!(rules(&stranger).is_empty());
    config["prevResult"]["ips"] = json!([]);
    let (code, text) = verb("ADD", path(&stranger), &config).error();
    assert!(code == 7 && text.contains("ips"), "{text}");
}

#[test]
fn a_pod_with_users_of_its_own_is_refused_and_one_outside_the_mesh_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let asked = agent(dir.path(), "{\"ok\":true}\n");
    // As with `hostUsers: false`.
    let mut pod = Command::new("unshare")
        .args([
            "--user",
            "--map-root-user",
            "--net",
            "sh",
            "-c",
            "ip link set lo up; ip addr add 10.77.0.1/32 dev lo; echo ready; exec sleep 60",
        ])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut ready = String::new();
    BufReader::new(pod.stdout.take().unwrap()).read_line(&mut ready).unwrap();
    let netns = format!("/proc/{}/ns/net", pod.id());
    let (code, text) = verb("ADD", &netns, &config("1.0.0", dir.path(), "enabled")).error();
    let plain = verb("ADD", &netns, &config("1.0.0", dir.path(), "disabled"));
    let left = ursa_init::in_netns(Path::new(&netns), ursa_init::show).unwrap().unwrap();
    pod.kill().unwrap();
    pod.wait().unwrap();
    assert!(
        code == 8 && text.contains("hostUsers: false") && text.contains("hostUsers: true"),
        "{code} {text}"
    );
    assert!(
        left.is_empty() && records(dir.path()).is_empty() && asked.try_recv().is_err(),
        "nothing was done"
    );
    assert_eq!(plain.code, 0, "{}", plain.stdout);
}

#[test]
fn the_kubelets_probes_pass_where_the_operator_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let _asked = agent(dir.path(), "{\"ok\":true}\n");
    let (pod, node) = Namespace::pair();
    pod.listen(&[8080, 9090, 15006, 15001]);
    let mut config = config("1.0.0", dir.path(), "enabled");
    config["kubeletProbes"] = json!([8080]);
    // The plugin runs where the kubelet is, and so finds the node's addresses as the pod sees them.
    let added = node.run(|| verb("ADD", path(&pod), &config));
    assert_eq!(added.code, 0, "{}", added.stdout);
    for own in ["10.77.0.1", "[fd77::1]"] {
        assert_eq!(node.tcp(0, &format!("{own}:8080")), Ok(8080), "a probe");
        assert_eq!(node.tcp(0, &format!("{own}:9090")), Ok(15006), "nothing else of the node's");
    }
    node.ip("addr add 10.77.0.9/24 dev eth0");
    let other = node.run(|| {
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
        socket.bind(&std::net::SocketAddr::from(([10, 77, 0, 9], 0)).into()).unwrap();
        let to = std::net::SocketAddr::from(([10, 77, 0, 1], 8080));
        socket.connect_timeout(&to.into(), lab::PATIENCE).unwrap();
        lab::landed(Ok(socket.into()))
    });
    assert_eq!(other, Ok(15006), "not from another address");
    assert_eq!(node.run(|| verb("CHECK", path(&pod), &config)).code, 0, "CHECK expects the same");
}

#[test]
fn check_finds_one_rule_gone_two_exchanged_and_a_sidecar_gone() {
    let (dir, pod) = (tempfile::tempdir().unwrap(), pod());
    let config = config("1.0.0", dir.path(), "enabled");
    let asked = agent_that(dir.path(), |request| match request["cmd"].as_str() {
        Some("cni-check") => {
            "{\"ok\":false,\"error\":\"default.web is redirected: Envoy is dead\"}\n".to_owned()
        }
        _ => "{\"ok\":true}\n".to_owned(),
    });
    let nft = |command: &str| {
        pod.run(|| {
            let output = Command::new("nft").args(["-a", "-n"]).args(command.split(' ')).output().unwrap();
            assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
            String::from_utf8(output.stdout).unwrap()
        })
    };
    // The rules of a chain with their handles, in order.
    let chain = || -> Vec<(String, String)> {
        let list = nft("list chain inet ursa output");
        let rules = list.lines().filter_map(|line| line.trim().rsplit_once(" # handle "));
        let rules = rules.filter(|(rule, _)| !rule.starts_with("chain") && !rule.starts_with("table"));
        rules.map(|(rule, handle)| (rule.to_owned(), handle.to_owned())).collect()
    };
    let drifted = || verb("CHECK", path(&pod), &config).error();

    assert_eq!(verb("ADD", path(&pod), &config).code, 0);
    let (code, text) = drifted();
    assert!(code == 102 && text.contains("Envoy is dead"), "{text}");
    let (_, last) = chain().pop().unwrap();
    nft(&format!("delete rule inet ursa output handle {last}"));
    let (code, text) = drifted();
    assert!(code == 101 && text.contains("1 differences"), "{text}");

    assert_eq!(verb("ADD", path(&pod), &config).code, 0, "repeated, it mends");
    assert_eq!(drifted().0, 102);
    // The first comes last.
    let (_, first) = chain().remove(0);
    let (_, last) = chain().pop().unwrap();
    nft(&format!("delete rule inet ursa output handle {first}"));
    nft(&format!("add rule inet ursa output position {last} ip saddr 127.0.0.6 oifname \"lo\" return")
        .replace('"', ""));
    assert_eq!(drifted().0, 101);
    assert_eq!(verb("ADD", path(&pod), &config).code, 0);
    drop(asked);

    // Without an agent, the ports tell.
    std::fs::remove_file(dir.path().join("agent.sock")).unwrap();
    let (code, text) = drifted();
    assert!(code == 102 && text.contains("15006"), "{text}");
    pod.listen(&[15001, 15006]);
    assert_eq!(verb("CHECK", path(&pod), &config).code, 0);
}

#[test]
fn explain_works_as_its_help_says() {
    let dir = tempfile::tempdir().unwrap();
    let explain = |args: &[&str], input: &str| {
        let mut child = Command::new(env!("CARGO_BIN_EXE_ursa-cni"))
            .env_clear()
            .arg("explain")
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
        let output = child.wait_with_output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
    };
    let file = |name: &str, text: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let pod =
        file("pod.yaml", "kind: Pod\nmetadata: {name: web-0, namespace: shop}\nspec: {containers: []}\n");
    let namespace = file(
        "ns.yaml",
        "kind: Namespace\nmetadata: {name: shop, labels: {kuma.io/sidecar-injection: enabled, kuma.io/mesh: money}}\n",
    );
    let conf = json!({"cniVersion": "1.0.0", "name": "pods", "plugins": [{"type": "bridge"}, config("1.0.0", dir.path(), "x")]});
    let conf = file("10.conflist", &conf.to_string());

    let (code, out, _) = explain(&[&pod], "");
    assert!(code == 0 && out.contains("meshed: no") && out.contains("--namespace"), "{out}");
    let (code, out, _) = explain(&[&pod, "--namespace", &namespace, "--conf", &conf], "");
    assert_eq!(code, 0);
    for part in ["meshed: yes", "namespace's label", "mesh: money", "dataplane: web", "redirect to :15001"] {
        assert!(out.contains(part), "{part}: {out}");
    }
    let json =
        r#"{"kind":"Pod","metadata":{"name":"a","annotations":{"kuma.io/sidecar-injection":"disabled"}}}"#;
    let (code, out, _) = explain(&["-", "--json"], json);
    assert_eq!(code, 0);
    let found: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((&found["decision"], &found["source"]), (&json!("unmeshed"), &json!("pod-annotation")));
    for (args, expected) in [
        (vec!["/never/pod.yaml"], "can't read /never/pod.yaml"),
        (vec![namespace.as_str()], "a Namespace"),
        (vec![pod.as_str(), "--conf", namespace.as_str()], "no CNI configuration"),
    ] {
        let (code, _, err) = explain(&args, "");
        assert!(code == 1 && err.contains(expected), "{err}");
    }
    let (code, _, err) = explain(&["-"], "kind: [");
    assert!(code == 1 && err.contains("manifest"), "{err}");
}

#[test]
fn status_says_whether_only_new_pods_suffer_from_a_missing_agent() {
    let (dir, pod) = (tempfile::tempdir().unwrap(), pod());
    let asked = agent(dir.path(), "{\"ok\":true}\n");
    let config = config("1.1.0", dir.path(), "enabled");
    assert_eq!(verb("ADD", path(&pod), &config).code, 0);
    assert_eq!(verb("STATUS", "", &config).code, 0);
    drop(asked);
    std::fs::remove_file(dir.path().join("agent.sock")).unwrap();
    let (code, text) = verb("STATUS", "", &config).error();
    assert!(code == 51 && text.contains("shop/web-0") && text.contains("systemctl"), "{code} {text}");
    let mut other = config.clone();
    other["name"] = json!("others");
    assert_eq!(verb("STATUS", "", &other).error().0, 50, "another network's pods");
    pod.listen(&[15001, 15006]);
    let (code, text) = verb("STATUS", "", &config).error();
    assert!(code == 50 && text.contains("agent.sock"), "{code} {text}");
}
