//! A workload that is about to stop: first nobody calls it any more, then its connections end, and only then is it stopped.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::Value;
use ursa_tests::lab::mesh::PORT;
use ursa_tests::lab::pair::{Pair, SOON, URL};
use ursa_tests::lab::program::{self, Load};
use ursa_tests::lab::wait;

/// How long connections may take to end.
const DEADLINE: Duration = Duration::from_secs(10);

/// A shim, as root asks it.
struct Shim(BufReader<UnixStream>);

impl Shim {
    fn connect(dir: &Path) -> Self {
        let stream = UnixStream::connect(dir.join("control.sock")).unwrap();
        stream.set_read_timeout(Some(DEADLINE * 2)).unwrap();
        Self(BufReader::new(stream))
    }

    fn say(&mut self, request: &str) {
        writeln!(self.0.get_mut(), "{request}").unwrap();
    }

    /// Waits until it tells of an Envoy like that.
    fn hear(&mut self, wanted: impl Fn(&Value) -> bool) -> Value {
        loop {
            let mut line = String::new();
            self.0.read_line(&mut line).unwrap();
            let line: Value = serde_json::from_str(&line).unwrap();
            assert!(line.get("error").is_none(), "{line}");
            let envoy = line.pointer("/status/envoy").or_else(|| line.get("envoy")).unwrap_or(&line).clone();
            if wanted(&envoy) {
                return envoy;
            }
        }
    }
}

#[test]
fn instances_are_drained_in_turn_and_no_request_fails() {
    let mut pair = Pair::allowed().unwrap();
    let host = pair.lab.net.host("backend-2").unwrap();
    let _second = program::serve(&pair.lab, &host, "backend-2", PORT).unwrap();
    pair.node_b
        .add_with("backend-2", &host, |file| file["labels"]["kuma.io/workload"] = "backend".into())
        .unwrap();
    pair.node_b.wait_ready("backend-2", SOON).unwrap();
    // Who answers: each server says its name.
    let both = |pair: &mut Pair| {
        wait::until("both instances to answer", SOON, || {
            let all: Vec<String> = (0..20).map(|_| pair.client.get(URL).unwrap().text).collect();
            let of = |name: &str| all.iter().filter(|text| text.contains(name)).count();
            if of("backend-2") > 0 && of("backend-2") < 20 { Ok(()) } else { Err(all[0].clone()) }
        })
        .unwrap();
    };
    both(&mut pair);
    let load = Load::start(&pair.lab, &pair.web.host, URL, Duration::from_millis(1)).unwrap();
    let since = Instant::now();
    for name in ["backend", "backend-2", "backend", "backend-2"] {
        let mut shim = Shim::connect(&pair.node_b.socket_dir(name));
        let before = shim.hear(|_| true);
        shim.say(&format!(r#"{{"cmd":"drain","deadline_ms":{}}}"#, DEADLINE.as_millis()));
        let begun = Instant::now();
        let drained = shim.hear(|envoy| envoy["drained"] == true);
        eprintln!("{name} drained within {:?}", begun.elapsed());
        assert_eq!(drained["inbound"], 0, "the callers' connections ended by themselves: {drained}");
        assert!(begun.elapsed() < DEADLINE);
        // Its Envoy still runs, and it is the other one that answers.
        assert_eq!(drained["pid"], before["pid"]);
        let second = name == "backend";
        for _ in 0..20 {
            let answer = pair.client.get(URL).unwrap();
            assert!(answer.ok() && answer.text.contains("backend-2") == second, "{}", answer.brief());
        }
        shim.say(r#"{"cmd":"resume"}"#);
        shim.hear(|envoy| envoy["state"] == "live" && envoy["pid"] != before["pid"]);
        pair.node_b.wait_ready(name, SOON).unwrap();
        both(&mut pair);
    }
    let tally = load.tally(since);
    assert!(tally.bad.is_empty(), "{} of {} failed: {}", tally.bad.len(), tally.good, tally.bad[0].brief());
    assert!(tally.good > 200, "{} requests are no load", tally.good);
}

/// Statement 39: whatever the level, every line says whose it is, and none holds a key.
#[test]
fn no_key_is_logged_however_much_is() {
    let mut pair = Pair::allowed().unwrap();
    let dir = pair.node_b.socket_dir("backend");
    let mut shim = Shim::connect(&dir);
    let before = shim.hear(|_| true);
    shim.say(r#"{"cmd":"set-log-level","level":"trace"}"#);
    shim.hear(|_| true);
    // Envoy gets its key again, and says so at length.
    shim.say(r#"{"cmd":"restart-envoy"}"#);
    shim.hear(|envoy| envoy["state"] == "live" && envoy["pid"] != before["pid"]);
    pair.until_served().unwrap();
    let mut keys = Vec::new();
    for entry in walk(&pair.node_b.state_dir()) {
        let text = String::from_utf8_lossy(&std::fs::read(&entry).unwrap()).into_owned();
        let lines = text.lines().skip_while(|line| !line.contains("PRIVATE KEY")).skip(1);
        keys.extend(lines.take_while(|line| !line.contains("END")).map(str::to_owned));
    }
    assert!(!keys.is_empty(), "no key on disk to look for");
    let mut lines = 0;
    for log in walk(&pair.node_b.run_dir().join("log")) {
        let text = std::fs::read_to_string(&log).unwrap();
        assert!(!text.contains("PRIVATE KEY"), "{}", log.display());
        for key in &keys {
            assert!(!text.contains(key.as_str()), "a key is in {}", log.display());
        }
        for line in text.lines() {
            let line: Value = serde_json::from_str(line).unwrap();
            assert_eq!(
                (&line["span"]["mesh"], &line["span"]["workload"]),
                (&"default".into(), &"backend".into())
            );
            lines += 1;
        }
    }
    assert!(lines > 100, "{lines} lines aren't much");
}

fn walk(dir: &Path) -> Vec<std::path::PathBuf> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { files.extend(walk(&path)) } else { files.push(path) }
    }
    files
}
