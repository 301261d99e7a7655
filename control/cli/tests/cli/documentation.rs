//! Help, manual pages, completion and exit codes.

use std::process::{Command, Stdio};

use crate::support::{Server, ursa};

#[test]
fn every_command_explains_itself_with_examples() {
    let commands =
        ["apply", "get", "delete", "inspect", "generate", "config", "ticket", "node", "allow", "up", "join"];
    for command in commands {
        let done = ursa(&[command, "--help"]);
        assert_eq!(done.code, 0);
        assert!(done.stdout.contains("Examples:\n"), "{command}: {}", done.stdout);
    }
    assert!(ursa(&["--help"]).stdout.contains("Exit codes: 0 done, 1"));
}

#[test]
fn wrong_usage_has_a_code_of_its_own() {
    for args in [
        &[][..],
        &["nonsense"],
        &["get"],
        &["get", "meshes", "-o", "wide"],
        &["get", "meshes", "--nonsense"],
        &["--api-timeout", "soon", "get", "meshes"],
    ] {
        let done = ursa(args);
        assert_eq!((done.code, done.stdout.as_str()), (2, ""), "{args:?}: {}", done.stderr);
        assert!(
            done.stderr.contains("Usage:") || done.stderr.contains("--help"),
            "{args:?}: {}",
            done.stderr
        );
    }
    assert!(ursa(&["get", "meshes", "-o", "wide"]).stderr.contains("table, yaml, json"));
}

#[test]
fn there_are_manual_pages_and_completion_for_all_commands() {
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(ursa(&["man", dir.path().to_str().unwrap()]).code, 0);
    for page in ["ursa.1", "ursa-apply.1", "ursa-generate-user-token.1", "ursa-config-control-planes-add.1"] {
        let text = std::fs::read_to_string(dir.path().join(page)).unwrap();
        assert!(text.contains(".TH"), "{page}");
    }
    for shell in ["bash", "zsh", "fish"] {
        let done = ursa(&["completion", shell]);
        assert!(done.code == 0 && done.stdout.contains("control-planes"), "{shell}");
    }
    assert_eq!(ursa(&["man", "/nonexistent/folder"]).code, 1);
}

#[test]
fn a_reader_may_stop_early() {
    let server = Server::start(|_| (200, "", r#"{"items":[{"name":"a"}],"total":1}"#));
    let mut child = Command::new(env!("CARGO_BIN_EXE_ursa"))
        .args(["--config-file", server.config.path().to_str().unwrap(), "get", "meshes"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
}
