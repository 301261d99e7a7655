//! Files, disks and neighbours that are against it.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};
use std::thread;

use rstest::rstest;
use serde_json::Value;

use crate::scratch::{BASE, CONFLIST, Node, fake};

#[rstest]
#[case::comments(
    "{\n  // the base network\n  \"name\": \"n\", \"plugins\": [{\"type\": \"bridge\"}]\n}",
    "comments"
)]
#[case::cut_off(&BASE[..BASE.len() / 2], "no JSON")]
#[case::empty("", "no JSON")]
#[case::no_plugins("{\"name\":\"n\",\"cniVersion\":\"1.0.0\",\"plugins\":[]}", "empty")]
#[case::deep(&"[".repeat(1 << 16), "no JSON")]
fn a_broken_list_is_left_as_it_is(#[case] text: &str, #[case] why: &str) {
    let node = Node::with(CONFLIST, text);
    let before = node.files();
    node.install(&[]).refused(&[CONFLIST, why]);
    node.install(&["--conf-name", CONFLIST]).refused(&[CONFLIST, why]);
    node.uninstall().ok();
    assert_eq!(node.run(&["status"]).code, Some(3));
    assert_eq!(node.files(), before);
}

#[test]
fn text_that_is_no_text_is_left_as_it_is() {
    let node = Node::bare();
    fs::write(node.net().join(CONFLIST), b"{\"name\":\"\xff\",\"plugins\":[{\"type\":\"bridge\"}]}").unwrap();
    let before = node.files();
    node.install(&[]).refused(&["UTF-8"]);
    assert_eq!(node.files(), before);
}

#[test]
fn a_megabyte_is_only_a_longer_list() {
    let filler = "\u{e4}\\n ".repeat(1 << 18);
    let text = BASE.replacen("{\r\n", &format!("{{\"note\": \"{filler}\",\r\n"), 1);
    assert!(text.len() > 1 << 20);
    let node = Node::with(CONFLIST, &text);
    node.install(&[]).ok();
    assert_eq!(node.chain().last().unwrap(), "ursa-cni");
    node.uninstall().ok();
    assert_eq!(node.list(), text);
}

#[test]
fn the_file_by_name_must_be_there() {
    let node = Node::with(CONFLIST, BASE);
    node.install(&["--conf-name", "20-other.conflist"]).refused(&["20-other.conflist", CONFLIST]);
    Node::bare().install(&[]).refused(&["no network configuration", "--watch"]);
}

#[test]
fn a_wrong_plugin_configuration_changes_nothing() {
    let node = Node::with(CONFLIST, BASE);
    let before = node.files();
    let file = node.root().join("plugin.json");
    for (text, why) in [
        ("{", "no JSON"),
        ("[]", "no JSON object"),
        (r#"{"type": "bridge"}"#, "type"),
        (r#"{"redirect": {"outbound": {"excludePorts": ["x"]}}}"#, "redirect"),
        (r#"{"labels": {"node": "__URSA_TEST_UNSET__"}}"#, "URSA_TEST_UNSET"),
    ] {
        fs::write(&file, text).unwrap();
        node.install(&["--plugin-config", file.to_str().unwrap()]).refused(&["plugin.json", why]);
    }
    assert_eq!(node.files(), before);
}

/// Runs a command where a directory of the node is a file system of its own.
fn mounted(node: &Node, mount: &str, then: &str) -> (i32, String) {
    let output = Command::new("unshare")
        .args(["-m", "sh", "-c", &format!("set -e; {mount}\n set +e; {then}")])
        .env("NET", node.net())
        .env("BIN", node.bin())
        .env("ROOT", node.root())
        .env("URSA_CNI", env!("CARGO_BIN_EXE_ursa-cni"))
        .env("FAKE", fake("ursa-cni"))
        .env("LIST", CONFLIST)
        .output()
        .unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.code().unwrap(), String::from_utf8_lossy(&text).into_owned())
}

#[test]
fn a_full_disk_loses_nothing() {
    // A list that fits once and not twice.
    let text = BASE.replacen("{\r\n", &format!("{{\"note\": \"{}\",\r\n", "x".repeat(40_000)), 1);
    let node = Node::with(CONFLIST, &text);
    let (code, said) = mounted(
        &node,
        "cp -a \"$NET\" \"$ROOT/copy\"; mount -t tmpfs -o size=64k full \"$NET\"; cp -a \"$ROOT/copy/$LIST\" \"$NET/\"",
        "\"$URSA_CNI\" install --root \"$ROOT\" --binary \"$FAKE\"; code=$?; ls -A \"$NET\"; cmp \"$NET/$LIST\" \"$ROOT/copy/$LIST\" || code=99; exit $code",
    );
    assert_eq!(code, 1, "{said}");
    assert!(said.contains("free some space") && !said.contains("unfinished"), "{said}");
    // The programs' disk is full: the list must not name what isn't there.
    let (code, said) = mounted(
        &node,
        "mount -t tmpfs -o size=16k full \"$BIN\"; for p in bridge portmap; do ln -s /bin/true \"$BIN/$p\"; done",
        "\"$URSA_CNI\" install --root \"$ROOT\"; code=$?; ls -A \"$BIN\"; grep -c ursa-cni \"$NET/$LIST\" && code=99; exit $code",
    );
    assert_eq!(code, 1, "{said}");
    assert!(said.contains("free some space") && !said.contains("unfinished"), "{said}");
}

#[test]
fn a_read_only_directory_is_named() {
    let node = Node::with(CONFLIST, BASE);
    let before = node.files();
    let (code, said) = mounted(
        &node,
        "mount --bind \"$NET\" \"$NET\"; mount -o remount,ro,bind \"$NET\"",
        "\"$URSA_CNI\" install --root \"$ROOT\" --binary \"$FAKE\"",
    );
    assert_eq!(code, 1, "{said}");
    assert!(
        said.contains("net.d") && said.contains("Read-only") && said.contains("mount it writable"),
        "{said}"
    );
    // The program is there already, which harms nobody.
    node.uninstall().ok();
    assert_eq!(node.files(), before);
}

#[test]
fn nobody_else_can_keep_the_installer_waiting() {
    let node = Node::with(CONFLIST, BASE);
    let before = node.files();
    let run_dir = node.root().join("run/ursa");
    fs::set_permissions(node.root(), fs::Permissions::from_mode(0o755)).unwrap();
    node.install(&[]).ok();
    // Whoever may read the configuration may lock what it is read from.
    let dirs = [node.net(), node.bin(), run_dir.clone(), run_dir.join("cni-install.lock")];
    let mut holders: Vec<_> = dirs
        .iter()
        .map(|dir| {
            let mut command = Command::new("flock");
            command.arg(dir).args(["sh", "-c", "echo held; exec sleep 300"]).uid(65534).gid(65534);
            command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap()
        })
        .collect();
    let held = holders.iter_mut().map(|holder| {
        let mut line = String::new();
        BufReader::new(holder.stdout.take().unwrap()).read_line(&mut line).unwrap();
        line == "held\n"
    });
    assert_eq!(held.collect::<Vec<_>>(), [true, true, true, false], "the lock itself is root's");
    let done = [node.install(&[]), node.run(&["status"]), node.uninstall()];
    for mut holder in holders {
        holder.kill().unwrap();
        holder.wait().unwrap();
    }
    for done in done {
        done.ok();
    }
    assert_eq!(node.files(), before);
    assert_eq!(fs::read_dir(&run_dir).unwrap().count(), 0, "nor does a lock stay");
}

#[test]
fn many_at_once_agree() {
    let node = Node::with(CONFLIST, BASE);
    let before = node.files();
    for round in 0..5 {
        thread::scope(|scope| {
            let node = &node;
            let all: Vec<_> = (0..8)
                .map(|i| {
                    scope.spawn(
                        move || if (i + round) % 4 == 3 { node.uninstall() } else { node.install(&[]) },
                    )
                })
                .collect();
            for done in all {
                done.join().unwrap().ok();
            }
        });
        node.chain();
        // Whoever was last: it is whole.
        node.install(&[]).ok();
        node.serves();
        let list: Value = serde_json::from_str(&node.list()).unwrap();
        let types: Vec<_> =
            list["plugins"].as_array().unwrap().iter().map(|p| p["type"].as_str().unwrap()).collect();
        assert_eq!(types, ["bridge", "portmap", "ursa-cni"]);
    }
    node.uninstall().ok();
    assert_eq!(node.files(), before);
}
