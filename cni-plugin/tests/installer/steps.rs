//! Installing, upgrading and removing, step by step.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::fs::{PermissionsExt as _, chown, symlink};
use std::os::unix::net::UnixListener;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use rstest::rstest;
use serde_json::{Value, json};

use crate::scratch::{BASE, CONFLIST, Node, fake};

#[test]
fn only_ours_changes_and_all_of_it_goes() {
    let node = Node::with(CONFLIST, BASE);
    let file = node.net().join(CONFLIST);
    fs::set_permissions(&file, fs::Permissions::from_mode(0o640)).unwrap();
    chown(&file, Some(65534), Some(65534)).unwrap();
    let before = node.files();
    node.install(&[]).ok();
    assert_eq!(node.chain(), ["bridge", "portmap", "ursa-cni"]);
    let at = BASE.find("\r\n\t]").unwrap();
    assert!(node.list().starts_with(&BASE[..at]) && node.list().ends_with(&BASE[at..]), "{}", node.list());
    let (mode, uid, _) = node.files()[&file];
    assert_eq!((mode & 0o777, uid), (0o640, 65534));
    node.run(&["status"]).ok();
    let installed = node.files();
    node.install(&[]).ok();
    assert_eq!(node.files(), installed, "a second time changes nothing");
    node.uninstall().ok();
    assert_eq!(node.files(), before);
    node.uninstall().ok();
    assert_eq!(node.run(&["status"]).code, Some(3));
}

#[test]
fn a_single_plugin_steps_aside_and_comes_back() {
    let conf = "{\"name\": \"kubenet\",\n  \"type\": \"flannel\"}";
    let node = Node::with("10-flannel.conf", conf);
    let before = node.files();
    node.install(&[]).ok();
    assert_eq!(node.chain(), ["flannel", "ursa-cni"]);
    let list: Value =
        serde_json::from_slice(&fs::read(node.net().join("10-flannel.conflist")).unwrap()).unwrap();
    assert_eq!((&list["name"], &list["cniVersion"]), (&Value::from("kubenet"), &Value::from("0.3.0")));
    // The base CNI writes its file again.
    fs::write(node.net().join("10-flannel.conf"), conf).unwrap();
    assert_eq!(node.run(&["status"]).code, Some(3));
    node.install(&[]).ok();
    assert_eq!(node.chain(), ["flannel", "ursa-cni"]);
    node.uninstall().ok();
    assert_eq!(node.files().keys().collect::<Vec<_>>(), before.keys().collect::<Vec<_>>());
    assert_eq!(fs::read_to_string(node.net().join("10-flannel.conf")).unwrap(), conf);
}

#[test]
fn a_drop_in_leaves_the_list_alone() {
    let node = Node::with(CONFLIST, BASE);
    let before = node.files();
    node.install(&["--mode", "drop-in"]).ok();
    assert_eq!(node.list(), BASE);
    let drop_in = fs::read(node.net().join("k8s-pod-network/ursa-cni.conf")).unwrap();
    assert_eq!(serde_json::from_slice::<Value>(&drop_in).unwrap()["type"], "ursa-cni");
    node.run(&["status"]).ok();
    // To and fro, and never twice.
    node.install(&["--mode", "edit"]).ok();
    assert!(!node.net().join("k8s-pod-network").exists());
    assert_eq!(node.chain(), ["bridge", "portmap", "ursa-cni"]);
    node.install(&["--mode", "drop-in"]).ok();
    assert_eq!(node.list(), BASE);
    node.uninstall().ok();
    assert_eq!(node.files(), before);
    let inlined = BASE.replacen("{\r\n", "{\"loadOnlyInlinedPlugins\": true,\r\n", 1);
    let node = Node::with(CONFLIST, &inlined);
    node.install(&["--mode", "drop-in"]).refused(&["loadOnlyInlinedPlugins", "--mode edit"]);
}

#[rstest]
#[case::unknown(None, false)]
#[case::old("containerd github.com/containerd/containerd 1.6.20~ds1 x", false)]
#[case::new("containerd github.com/containerd/containerd/v2 v2.2.0 x", true)]
fn by_itself_a_drop_in_is_taken_only_where_it_is_surely_read(
    #[case] version: impl Into<Option<&'static str>>,
    #[case] drop_in: bool,
) {
    let node = Node::with(CONFLIST, BASE);
    if let Some(version) = version.into() {
        let bin = node.root().join("usr/bin");
        fs::create_dir_all(&bin).unwrap();
        // Through a shell of its own, so that no other test's child holds it open for writing.
        let script = format!("printf '#!/bin/sh\\necho \"{version}\"\\n' > \"$0\" && chmod 755 \"$0\"");
        let status = Command::new("sh").arg("-c").arg(script).arg(bin.join("containerd")).status().unwrap();
        assert!(status.success());
    }
    node.install(&[]).ok();
    assert_eq!(node.list() == BASE, drop_in);
}

#[test]
fn a_plugin_that_cannot_the_version_is_named() {
    let text = BASE.replace("1.0.0", "1.1.0");
    let node = Node::with(CONFLIST, &text);
    let before = node.files();
    node.install(&[]).refused(&["plugin bridge", "1.1.0", "outside the mesh", "--skip-version-check"]);
    assert_eq!(node.files(), before);
    node.install(&["--skip-version-check"]).ok();
    let node = Node::with(CONFLIST, &BASE.replace("1.0.0", "2.0.0"));
    node.install(&["--skip-version-check"]).refused(&["ursa-cni doesn't support cniVersion 2.0.0"]);
    let node = Node::with(CONFLIST, &BASE.replace("cniVersion", "cniVersjon"));
    node.install(&[]).refused(&["no cniVersion"]);
}

#[test]
fn never_in_front_of_the_base() {
    let node = Node::with(CONFLIST, BASE);
    node.install(&["--standalone", "05-ursa.conf"]).refused(&["before 10-base.conflist", "no address"]);
    node.install(&["--standalone"]).ok();
    assert_eq!(node.chain(), ["bridge", "portmap"]);
    node.run(&["status"]).ok();
    node.uninstall().ok();
    assert_eq!(Node::bare().install(&["--standalone"]).code, Some(1), "alone it would be the pods' network");
}

#[test]
fn the_stub_stays_until_the_last_pod_has_gone() {
    let node = Node::with(CONFLIST, BASE);
    let before = node.files();
    // The real program, for the calls below.
    node.run(&["install"]).ok();
    let attached = node.attach("c1");
    let done = node.uninstall().ok();
    assert!(done.stdout.contains("stub") && done.stdout.contains("c1"), "{done:?}");
    assert_eq!(node.list(), BASE);
    assert!(node.run(&["status"]).stdout.contains("stub"));
    let call = |verb: &str| {
        let mut child = Command::new(node.program())
            .env_clear()
            .envs([
                ("CNI_COMMAND", verb),
                ("CNI_CONTAINERID", "c1"),
                ("CNI_IFNAME", "eth0"),
                ("CNI_NETNS", "/nowhere"),
            ])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        // Meshed, by the list that the runtime remembers.
        let config = json!({
            "cniVersion": "1.0.0", "name": "n", "type": "ursa-cni", "runDir": node.root().join("run/ursa"),
            "labels": {"kuma.io/sidecar-injection": "enabled"}, "prevResult": {"cniVersion": "1.0.0", "x": 1}
        });
        let _ = child.stdin.take().unwrap().write_all(config.to_string().as_bytes());
        let output = child.wait_with_output().unwrap();
        (output.status.success(), String::from_utf8(output.stdout).unwrap())
    };
    let (added, result) = call("ADD");
    assert!(added, "{result}");
    assert_eq!(serde_json::from_str::<Value>(&result).unwrap()["x"], 1);
    assert!(call("DEL").0 && call("VERSION").0);
    // Again while it is needed, and installed anew over it.
    node.uninstall().ok();
    assert!(call("DEL").0);
    node.run(&["install"]).ok();
    assert!(!node.bin().join("ursa-cni-stub").exists());
    assert!(!call("ADD").0, "the plugin itself refuses a pod that it can't mesh");
    node.uninstall().ok();
    fs::remove_file(attached).unwrap();
    node.uninstall().ok();
    assert_eq!(node.files(), before);
}

#[test]
fn uninstall_ends_when_the_last_pod_does() {
    let node = Node::with(CONFLIST, BASE);
    node.install(&[]).ok();
    let attached = node.attach("c1");
    let mut child =
        node.command(&["uninstall", "--drain-timeout", "60"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.next().unwrap().unwrap().contains("waiting until 1 pods"));
    assert_eq!(node.chain(), ["bridge", "portmap"]);
    node.serves();
    fs::remove_file(attached).unwrap();
    assert!(child.wait().unwrap().success());
    assert!(!node.program().exists());
}

/// containerd calls no plugin that has left the list, so the agent would keep the sidecar.
#[test]
fn the_agent_hears_of_pods_that_ended_without_the_plugin() {
    let node = Node::with(CONFLIST, BASE);
    node.install(&[]).ok();
    let attached = node.attach("c1");
    let agent = UnixListener::bind(node.root().join("run/ursa/agent.sock")).unwrap();
    let (tell, asked) = mpsc::channel();
    thread::spawn(move || {
        let mut sidecars = vec!["c1".to_owned(), "starting".to_owned()];
        for stream in agent.incoming() {
            let mut stream = stream.unwrap();
            let mut line = String::new();
            BufReader::new(&stream).read_line(&mut line).unwrap();
            let request: Value = serde_json::from_str(&line).unwrap();
            if request["cmd"] == "cni-del" {
                sidecars.retain(|c| request["container_id"] != c.as_str());
                let _ = tell.send(sidecars.clone());
            }
            let workloads: Vec<_> =
                sidecars.iter().map(|c| json!({"origin": format!("CNI container {c}")})).collect();
            writeln!(stream, "{}", json!({"ok": true, "status": {"workloads": workloads}})).unwrap();
        }
    });
    let mut child =
        node.command(&["uninstall", "--drain-timeout", "5"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.next().unwrap().unwrap().contains("(2 with a sidecar)"));
    fs::remove_file(attached).unwrap();
    let left = asked.recv_timeout(Duration::from_secs(60)).unwrap();
    assert_eq!(left, ["starting"], "one that nobody has seen alive may be about to start");
    let said: Vec<_> = lines.map_while(Result::ok).collect();
    assert!(
        said.iter().any(|line| line.contains("keep their sidecar") && line.contains("starting")),
        "{said:?}"
    );
    assert!(child.wait().unwrap().success());
    node.run(&["node", "remove"]).refused(&["starting", "--force"]);
}

#[test]
fn an_upgrade_leaves_no_gap() {
    let node = Node::with(CONFLIST, BASE);
    node.install(&[]).ok();
    let stop = std::sync::atomic::AtomicBool::new(false);
    thread::scope(|scope| {
        let watcher = scope.spawn(|| {
            let mut looks = 0;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                node.serves();
                assert_eq!(node.chain(), ["bridge", "portmap", "ursa-cni"]);
                looks += 1;
            }
            looks
        });
        for _ in 0..10 {
            assert_eq!(node.run(&["status", "--same-program"]).code, Some(3), "it is the former one");
            node.run(&["install", "--exclude-namespace", "a"]).ok();
            node.run(&["status", "--same-program"]).ok();
            node.install(&[]).ok();
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        assert!(watcher.join().unwrap() > 10);
    });
}

#[test]
fn a_link_is_not_replaced_by_a_file() {
    let node = Node::bare();
    fs::write(node.root().join("base"), BASE).unwrap();
    symlink(node.root().join("base"), node.net().join(CONFLIST)).unwrap();
    node.install(&[]).refused(&["symbolic link"]);
    node.install(&["--mode", "drop-in"]).refused(&["symbolic link"]);
}

#[test]
fn a_program_that_does_not_run_here_is_not_installed() {
    let node = Node::with(CONFLIST, BASE);
    node.install(&[]).ok();
    let before = node.files();
    let other = node.root().join("other");
    fs::write(&other, "\u{7f}ELF of another machine").unwrap();
    node.run(&["install", "--binary", other.to_str().unwrap()]).refused(&["doesn't work on this machine"]);
    node.run(&["install", "--binary", fake("bridge").to_str().unwrap()]).refused(&["supports only"]);
    assert_eq!(node.files(), before);
}
