//! The main job: what `make demo` shows, and that it leaves no trace.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Command, Output};

use ursa_tests::lab::{Lab, Programs};

fn demo(envoy: &Path, args: &[&str]) -> Output {
    let programs = Programs::discover().unwrap();
    Command::new(programs.path("demo"))
        .arg("--bin-dir")
        .arg(&programs.bin_dir)
        .arg("--envoy")
        .arg(envoy)
        .args(args)
        .output()
        .unwrap()
}

fn said(output: &Output) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    text(&output.stdout) + &text(&output.stderr)
}

/// The word that follows `text`.
fn word_after<'a>(said: &'a str, text: &str) -> &'a str {
    let (_, rest) = said.split_once(text).unwrap_or_else(|| panic!("expected {text:?} in: {said}"));
    rest.split_whitespace().next().unwrap()
}

/// What the system still has of a lab.
fn left(prefix: &str) -> Vec<String> {
    let mut left = Vec::new();
    for folder in ["/run/netns", "/etc/netns", "/dev/shm", std::env::temp_dir().to_str().unwrap()] {
        for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with(prefix) && !name.ends_with("-logs") {
                left.push(format!("{folder}/{name}"));
            }
        }
    }
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        if line.contains(prefix) {
            left.push(line);
        }
    }
    left
}

/// Removes a lab even if the test fails.
struct Kept(String);

impl Drop for Kept {
    fn drop(&mut self) {
        Lab::remove(&self.0);
    }
}

#[test]
fn the_demo_holds() {
    let output = demo(&Programs::discover().unwrap().envoy, &[]);
    let said = said(&output);
    println!("{said}");
    assert!(output.status.success(), "{said}");
    assert!(said.contains("Every step held"));
}

#[test]
fn a_kept_demo_runs_until_it_is_removed() {
    let programs = Programs::discover().unwrap();
    let output = demo(&programs.envoy, &["--keep"]);
    let said = said(&output);
    let kept = Kept(word_after(&said, " --remove ").to_owned());
    assert!(output.status.success(), "{said}");

    // One of the commands that it says are worth trying.
    let list = Command::new(programs.path("ursa"))
        .args(["--socket", word_after(&said, "URSA_SOCKET="), "inspect", "dataplanes"])
        .output()
        .unwrap();
    let list = String::from_utf8_lossy(&list.stdout).into_owned();
    assert_eq!(list.matches("Online").count(), 2, "{list}");
    assert!(left(&kept.0).iter().any(|what| what.contains("envoy")), "{:?}", left(&kept.0));

    let removal = Command::new(programs.path("demo")).args(["--remove", &kept.0]).output().unwrap();
    assert!(removal.status.success(), "{removal:?}");
    assert_eq!(left(&kept.0), Vec::<String>::new());
}

#[test]
fn a_step_that_fails_says_what_and_where_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let envoy = dir.path().join("envoy");
    std::fs::write(&envoy, "#!/bin/sh\necho this Envoy does not start >&2\nexit 1\n").unwrap();
    std::fs::set_permissions(&envoy, std::fs::Permissions::from_mode(0o755)).unwrap();
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let output = demo(&envoy, &[]);
    let said = said(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    let failed = said.split_once("FAILED").unwrap_or_else(|| panic!("{said}")).1;
    for part in ["expected workload", "seen: ", "Envoy isn't running: exit status: 1"] {
        assert!(failed.contains(part), "{part}: {said}");
    }
    let logs = Path::new(word_after(failed, "look at the logs in "));
    assert!(logs.join("node-b.log").exists(), "{said}");
    let envoys = std::fs::read_to_string(logs.join("node-b.default.backend.log")).unwrap();
    assert!(envoys.contains("this Envoy does not start"), "{envoys}");
    let prefix = logs.file_name().unwrap().to_str().unwrap().strip_suffix("-logs").unwrap();
    assert_eq!(left(prefix), Vec::<String>::new());
    std::fs::remove_dir_all(logs).unwrap();
}
