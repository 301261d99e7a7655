//! Very many, at once, and twice.

use std::process::Stdio;
use std::time::Duration;

use ursa_tests::lab::{flood, http};

use super::{differences, ground};

/// `make soak` does it with 100,000.
#[test]
fn ten_thousand_resources() {
    let ground = ground();
    let flood = flood::run(&ground.lab, &ground.control, 10_000).unwrap();
    println!("{flood:?}");
    assert!(flood.index.0 < Duration::from_millis(100), "GET / took {:?}", flood.index);
    assert!(flood.took < Duration::from_secs(120), "{:?}", flood.took);
}

#[test]
fn applied_twice_changes_nothing() {
    let ground = ground();
    let yaml: Vec<String> = (0..50).map(|n| flood::policy(&format!("twice-{n}"), 5)).collect();
    let yaml = yaml.join("---\n");
    let first = ground.control.apply(&yaml).unwrap();
    assert_eq!(first.matches("Created").count(), 50, "{first}");
    let before = ground.stored();
    let second = ground.control.apply(&yaml).unwrap();
    assert_eq!(second.matches("Updated").count(), 50, "{second}");
    // Times of modification among it.
    assert_eq!(differences(&before, &ground.stored()), "");
}

#[test]
fn two_applies_at_once_end_in_one_of_both() {
    let ground = ground();
    let count = 100;
    let texts: Vec<String> = [5, 6]
        .map(|seconds| {
            let all: Vec<String> = (0..count).map(|n| flood::policy(&format!("race-{n}"), seconds)).collect();
            all.join("---\n")
        })
        .into();
    for _ in 0..3 {
        std::thread::scope(|scope| {
            let both: Vec<_> = texts.iter().map(|text| scope.spawn(|| ground.control.apply(text))).collect();
            for one in both {
                one.join().unwrap().unwrap();
            }
        });
        let path = "/meshes/default/meshtimeouts?size=1000&name=race-";
        let reply = http::ask(&ground.control.socket, "GET", path, None, Duration::from_secs(30)).unwrap();
        let list = reply.json().unwrap();
        let items = list["items"].as_array().unwrap();
        assert_eq!(items.len(), count);
        for item in items {
            let timeout = item["spec"]["to"][0]["default"]["http"]["requestTimeout"].as_str().unwrap();
            assert!(["5s", "6s"].contains(&timeout), "{item}");
        }
    }
}

#[test]
fn a_crowd_of_readers() {
    const READERS: usize = 600;
    let ground = ground();
    let pid = ground.control.daemon.pid().unwrap();
    let open_files = || std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
    let before = open_files();
    // All at once: as many as the machine starts before the first is done.
    let mut children: Vec<_> = (0..READERS)
        .map(|_| {
            let mut command = ground.control.command();
            command.args(["get", "meshes", "-o", "json"]).stdout(Stdio::piped()).stderr(Stdio::piped());
            command.spawn().unwrap()
        })
        .collect();
    for child in children.drain(..) {
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
    // Connections that say nothing hold nobody up.
    let silent: Vec<_> =
        (0..1000).map(|_| std::os::unix::net::UnixStream::connect(&ground.control.socket).unwrap()).collect();
    ground.control.get("mesh", "default").unwrap();
    drop(silent);
    ursa_tests::lab::wait::until(
        "as many open files as before",
        Duration::from_secs(30),
        || match open_files() {
            // Reading connections of the store are kept, eight at most, with three files each.
            now if now <= before + 24 => Ok(()),
            now => Err(format!("{now} instead of {before}")),
        },
    )
    .unwrap();
}
