//! Certificates: renewed at half of their life while traffic flows; refused by both sides when they can't be.

use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use ursa_tests::lab::capture::Capture;
use ursa_tests::lab::daemon::kill_pid;
use ursa_tests::lab::mesh::{Control, Node, PORT};
use ursa_tests::lab::pair::{Pair, SOON, URL};
use ursa_tests::lab::program::{Client, Load};
use ursa_tests::lab::wait;

use crate::plaintext::assert_nothing_readable;

/// Seconds that a leaf lives in these tests.
const LIFE: u64 = 12;
/// Connections between Envoys end after a second, so that handshakes never stop.
const SHORT_CONNECTIONS: &str = "
type: MeshTimeout
mesh: default
name: short-connections
spec:
  targetRef: {kind: Mesh}
  to:
  - targetRef: {kind: Mesh}
    default: {http: {maxConnectionDuration: 1s}}
";

/// An identity like the default one for the workloads with these labels, whose leaves live this long.
fn identity(control: &Control, name: &str, labels: &Value, seconds: u64) -> anyhow::Result<()> {
    let mut resource = control.get("meshidentity", "identity")?;
    for server_side in ["status", "creationTime", "modificationTime", "kri", "labels"] {
        resource.as_object_mut().unwrap().remove(server_side);
    }
    resource["name"] = name.into();
    resource["spec"]["selector"] = json!({"dataplane": {"matchLabels": labels}});
    resource["spec"]["provider"]["bundled"]["certificateParameters"] =
        json!({"expiry": format!("{seconds}s")});
    control.apply(&resource.to_string())?;
    wait::until("the identity to be ready", SOON, || {
        match control.get("meshidentity", name).map_err(|error| error.to_string())? {
            ready if ready["status"].to_string().contains("\"Ready\"") => Ok(()),
            other => Err(other.to_string()),
        }
    })?;
    Ok(())
}

fn certificate(node: &Node, name: &str) -> Value {
    node.wait_status(name, "with a certificate", SOON, |one| one["certificate"].is_object()).unwrap()
        ["certificate"]
        .clone()
}

fn now() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    i64::try_from(since.as_secs()).unwrap()
}

/// The sum of an Envoy's counters whose names end like this.
fn counter(node: &Node, name: &str, suffix: &str) -> u64 {
    let mut admin = UnixStream::connect(node.socket_dir(name).join("admin.sock")).unwrap();
    admin.write_all(b"GET /stats HTTP/1.1\r\nhost: admin\r\nconnection: close\r\n\r\n").unwrap();
    let mut text = String::new();
    admin.read_to_string(&mut text).unwrap();
    let counters = text.lines().filter_map(|line| line.split_once(": "));
    counters
        .filter(|(name, _)| name.ends_with(suffix))
        .filter_map(|(_, value)| value.parse::<u64>().ok())
        .sum()
}

#[test]
fn leaves_are_renewed_at_half_of_their_life_and_no_request_fails() {
    let mut pair = Pair::allowed_with(|control| {
        control.apply(SHORT_CONNECTIONS)?;
        identity(control, "identity", &json!({}), LIFE)
    })
    .unwrap();
    pair.node_a.wait_ready("web", SOON).unwrap();
    let first = certificate(&pair.node_a, "web");
    let left = first["notAfter"].as_i64().unwrap() - now();
    assert!((0..=12).contains(&left), "{first}");

    let issued = |node: &Node| node.agent.times_said("a new certificate");
    let before = (issued(&pair.node_a), issued(&pair.node_b));
    let since = Instant::now();
    let load = Load::start(&pair.lab, &pair.web.host, URL, Duration::from_millis(5)).unwrap();
    // Four half lives are two whole ones: the first leaves are long worth nothing.
    let mut seen = BTreeSet::new();
    wait::until("four renewals on both nodes", Duration::from_secs(6 * LIFE), || {
        seen.insert(certificate(&pair.node_a, "web")["notAfter"].as_i64());
        let renewed = (issued(&pair.node_a) - before.0, issued(&pair.node_b) - before.1);
        if renewed.0 >= 4 && renewed.1 >= 4 { Ok(()) } else { Err(format!("{renewed:?}")) }
    })
    .unwrap();
    let took = since.elapsed();
    let most = usize::try_from(took.as_secs() / (LIFE / 2 - 2)).unwrap() + 2;
    for (node, before) in [(&pair.node_a, before.0), (&pair.node_b, before.1)] {
        let renewed = issued(node) - before;
        assert!(renewed <= most, "{renewed} renewals in {took:?}: that isn't half of {LIFE} s");
    }
    assert!(seen.len() >= 4, "{seen:?}");
    let tally = load.tally(since);
    assert!(tally.good > 100 && tally.bad.is_empty(), "{} good, bad: {:?}", tally.good, tally.bad.first());
    // Envoy really shook hands with the new ones: connections live for a second.
    assert!(counter(&pair.node_b, "backend", ".ssl.handshake") > 8);
    assert_eq!(counter(&pair.node_b, "backend", ".ssl.fail_verify_error"), 0);
}

#[test]
fn the_server_refuses_a_callers_expired_leaf() {
    expired("web");
}

#[test]
fn the_caller_refuses_a_servers_expired_leaf() {
    expired("backend");
}

/// Control is away until the leaf of `who` has expired, while the other's has long to live; then it comes back.
fn expired(who: &str) {
    let mut pair = Pair::allowed_with(|control| {
        control.apply(SHORT_CONNECTIONS)?;
        identity(control, "short", &json!({"kuma.io/workload": who}), LIFE)
    })
    .unwrap();
    let mut stranger = Client::start(&pair.lab, &pair.stranger).unwrap();
    let plain = format!("http://{}:{PORT}/orders", pair.backend.host.v4);
    let capture = Capture::start(&pair.lab.net.bridge()).unwrap();
    pair.control.daemon.kill();
    let node = if who == "web" { &pair.node_a } else { &pair.node_b };
    let leaf = certificate(node, who);
    let not_after = leaf["notAfter"].as_i64().unwrap();
    assert!(not_after - now() <= 12, "{leaf}");

    // Long before the end: what, since when, until when, what to do. And requests go on.
    let long = Duration::from_secs(LIFE + 10);
    let overdue = node
        .wait_status(who, "whose renewal is overdue", long, |one| one["certificateError"].is_string())
        .unwrap();
    let said = overdue["certificateError"].as_str().unwrap();
    for part in ["overdue since", "valid until", "check that ursa-control"] {
        assert!(said.contains(part), "{said}");
    }
    let text = node.status_text().unwrap();
    assert!(text.contains("renewal due for") && text.contains("are refused after that"), "{text}");
    node.agent.wait_said(&["WARN", "the certificate isn't renewed", who], SOON).unwrap();
    if now() < not_after - 1 {
        let answer = pair.client.get(URL).unwrap();
        assert!(answer.ok() || now() >= not_after, "{}", answer.brief());
    }

    node.wait_status(who, "whose certificate has expired", long, |one| {
        one["certificateError"].as_str().is_some_and(|error| error.contains("expired at"))
    })
    .unwrap();
    assert!(now() >= not_after);
    wait::until("web's request to be refused", SOON, || match pair.client.get(URL).unwrap() {
        answer if answer.status.is_none() || answer.status == Some(503) => Ok(()),
        answer => Err(answer.brief()),
    })
    .unwrap();
    for _ in 0..50 {
        let answer = pair.client.get(URL).unwrap();
        assert!(answer.status.is_none() || answer.status == Some(503), "{}", answer.brief());
    }
    // The one with the good leaf is who refuses.
    let (refuser, name) = if who == "web" { (&pair.node_b, "backend") } else { (&pair.node_a, "web") };
    assert!(counter(refuser, name, ".ssl.fail_verify_error") > 0, "{name} refused no certificate");
    let answer = stranger.get(&plain).unwrap();
    assert_eq!(answer.status, None, "{}", answer.brief());

    let node = if who == "web" { &pair.node_a } else { &pair.node_b };
    let text = node.status_text().unwrap();
    assert!(text.contains("EXPIRED") && text.contains("new connections are refused"), "{text}");
    assert!(text.contains("not connected") && text.contains("check that ursa-control"), "{text}");
    node.agent.wait_said(&["ERROR", "the certificate has expired", who], SOON).unwrap();
    let metrics = node.metrics().unwrap();
    let sample = format!(
        "ursa_agent_certificate_not_after_seconds{{mesh=\"default\",dataplane=\"{who}\"}} {not_after}\n"
    );
    assert!(metrics.contains(&sample), "{metrics}");
    assert!(
        metrics.contains(&format!("certificate_error{{mesh=\"default\",dataplane=\"{who}\"}} 1\n")),
        "{metrics}"
    );

    // An Envoy that starts now has nothing to show, and is as closed.
    let host = if who == "web" { &pair.web.host } else { &pair.backend.host };
    for envoy in host.running("envoy") {
        kill_pid(envoy).unwrap();
    }
    wait::until("another Envoy", SOON, || match host.running("envoy") {
        pids if pids.is_empty() => Err("none".to_owned()),
        _ => Ok(()),
    })
    .unwrap();
    for _ in 0..50 {
        let answer = pair.client.get(URL).unwrap();
        assert!(!answer.ok(), "{}", answer.brief());
        let answer = stranger.get(&plain).unwrap();
        assert_eq!(answer.status, None, "{}", answer.brief());
    }

    pair.control.restart().unwrap();
    pair.until_served().unwrap();
    let node = if who == "web" { &mut pair.node_a } else { &mut pair.node_b };
    node.wait_ready(who, SOON).unwrap();
    node.wait_status(who, "without a complaint", SOON, |one| {
        one["certificateError"].is_null() && one["error"].is_null()
    })
    .unwrap();
    assert_nothing_readable(&capture.finish().unwrap(), &pair.lab);
}
