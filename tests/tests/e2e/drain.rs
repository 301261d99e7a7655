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
