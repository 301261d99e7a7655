//! `kill -9` at every system call that changes something.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::process::ExitStatusExt as _;
use std::process::Command;

use crate::scratch::{BASE, CONFLIST, Node, fake};

/// What changes a file system, or comes between two such calls.
const CALLS: &str =
    "openat,write,rename,unlink,rmdir,mkdir,link,symlink,fchmod,fchown,fsync,flock,close,exit_group";

fn strace(node: &Node, rules: &[&str], arguments: &[&str]) -> std::process::Output {
    let mut command = Command::new("strace");
    command.args(["-qq", "-o"]).arg(node.root().join("trace")).args(rules);
    command
        .arg(env!("CARGO_BIN_EXE_ursa-cni"))
        .arg(arguments[0])
        .arg("--root")
        .arg(node.root())
        .args(&arguments[1..]);
    command.output().unwrap_or_else(|e| panic!("strace: {e}; apt-get install strace"))
}

/// How often each call is made.
fn counts(node: &Node, arguments: &[&str]) -> BTreeMap<String, usize> {
    let output = strace(node, &["-e", &format!("trace={CALLS}")], arguments);
    assert!(output.status.success(), "{output:?}");
    let mut counts = BTreeMap::new();
    for line in fs::read_to_string(node.root().join("trace")).unwrap().lines() {
        if let Some((call, _)) = line.split_once('(') {
            *counts.entry(call.to_owned()).or_default() += 1;
        }
    }
    counts
}

/// Kills the command everywhere; `node` makes the state before, `check` looks at what is left.
fn kill_everywhere(arguments: &[&str], node: impl Fn() -> Node, check: impl Fn(&Node)) -> usize {
    let counted = counts(&node(), arguments);
    assert!(counted.get("rename").is_some_and(|n| *n > 0), "{counted:?}");
    let mut killed = 0;
    for (call, count) in counted {
        for n in 1..=count {
            let node = node();
            let rule = format!("inject={call}:signal=KILL:when={n}");
            let output = strace(&node, &["-e", &format!("trace={call}"), "-e", &rule], arguments);
            // strace ends as its child did.
            killed += usize::from(output.status.signal() == Some(9));
            check(&node);
        }
    }
    killed
}

fn program() -> String {
    fake("ursa-cni").to_str().unwrap().to_owned()
}

#[test]
fn install_is_whole_or_not_at_all() {
    let program = program();
    let arguments = ["install", "--binary", &program];
    let node = || Node::with(CONFLIST, BASE);
    let killed = kill_everywhere(&arguments, node, |node| {
        node.serves();
        let list = node.list();
        assert!(list == BASE || node.chain() == ["bridge", "portmap", "ursa-cni"], "{list}");
        node.install(&[]).ok();
        node.run(&["status"]).ok();
        node.uninstall().ok();
        assert_eq!(node.list(), BASE);
        assert_eq!(node.files().len(), Node::with(CONFLIST, BASE).files().len(), "{:?}", node.files().keys());
    });
    assert!(killed > 20, "{killed}");
}

#[test]
fn a_single_plugin_is_converted_whole_or_not_at_all() {
    const CONF: &str = "{\"type\":\"flannel\",\"name\":\"kubenet\"}";
    let program = program();
    let node = || Node::with("10-flannel.conf", CONF);
    let check = |node: &Node| {
        node.serves();
        node.install(&[]).ok();
        node.serves();
        assert_eq!(node.chain(), ["flannel", "ursa-cni"]);
        node.uninstall().ok();
        assert_eq!(node.files().len(), Node::bare().files().len() + 1, "{:?}", node.files().keys());
        assert_eq!(fs::read_to_string(node.net().join("10-flannel.conf")).unwrap(), CONF);
    };
    kill_everywhere(&["install", "--binary", &program], node, check);
    let installed = || {
        let node = node();
        node.install(&[]).ok();
        node
    };
    kill_everywhere(&["uninstall", "--drain-timeout", "0"], installed, |node| {
        node.serves();
        node.uninstall().ok();
        assert_eq!(node.chain(), ["flannel"]);
        assert_eq!(node.files().len(), Node::bare().files().len() + 1, "{:?}", node.files().keys());
    });
}

#[test]
fn a_drop_in_is_whole_or_not_at_all() {
    let program = program();
    let arguments = ["install", "--mode", "drop-in", "--binary", &program];
    let node = || {
        let node = Node::with(CONFLIST, BASE);
        node.install(&["--mode", "edit"]).ok();
        node
    };
    kill_everywhere(&arguments, node, |node| {
        node.serves();
        let drop_in = node.net().join("k8s-pod-network/ursa-cni.conf").exists();
        assert!(
            drop_in || node.chain().contains(&"ursa-cni".to_owned()),
            "pods would start outside the mesh"
        );
        node.install(&["--mode", "drop-in"]).ok();
        assert_eq!(node.list(), BASE);
        node.uninstall().ok();
        assert_eq!(node.files().len(), Node::with(CONFLIST, BASE).files().len(), "{:?}", node.files().keys());
    });
}

#[test]
fn uninstall_strands_no_pod() {
    for attached in [false, true] {
        let node = || {
            let node = Node::with(CONFLIST, BASE);
            node.install(&[]).ok();
            if attached {
                node.attach("c1");
            }
            node
        };
        kill_everywhere(&["uninstall", "--drain-timeout", "0"], node, |node| {
            node.serves();
            node.uninstall().ok();
            node.serves();
            assert_eq!(node.list(), BASE);
            fs::remove_dir_all(node.results()).unwrap();
            node.uninstall().ok();
            assert_eq!(
                node.files().len(),
                Node::with(CONFLIST, BASE).files().len(),
                "{:?}",
                node.files().keys()
            );
        });
    }
}
