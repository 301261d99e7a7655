//! A configuration that Envoy rejects leaves the old one serving, and the operator is told in Envoy's words.

use ursa_tests::lab::pair::{Pair, SOON};
use ursa_tests::lab::wait;

/// Passes our validation, and not RE2, which repeats at most a thousand times.
const BROKEN: &str = "
type: MeshHTTPRoute
mesh: default
name: broken
spec:
  targetRef: {kind: Mesh}
  to:
  - targetRef: {kind: MeshService, labels: {kuma.io/display-name: backend}}
    rules:
    - matches: [{path: {type: RegularExpression, value: '/orders{1001}'}}]
      default: {}
";

const GOOD: &str = "'/orders{10}'";

/// What `ursa inspect dataplane web` says, once it fits.
fn until_inspected(pair: &Pair, what: &str, fits: impl Fn(&str) -> bool) -> String {
    let look = || match pair.control.ursa(&["inspect", "dataplane", "web"]) {
        Ok(text) if fits(&text) => Ok(text),
        Ok(text) => Err(text),
        Err(error) => Err(error.to_string()),
    };
    wait::until(what, SOON, look).unwrap().0
}

/// The listener that a route of web's to backend is in.
const REFUSED: &str = "kri_msvc_default_lab__backend_http";

/// Whether the refusal's row begins with the resource and goes on with Envoy's words, which may name it too or not.
fn is_refused(text: &str) -> bool {
    let mut rows = text.lines().skip_while(|line| !line.starts_with("Refused by Envoy"));
    rows.any(|row| {
        let mut cells = row.split_whitespace();
        cells.next() == Some(REFUSED) && cells.any(|word| word == "repetition")
    })
}

/// The pid of `web`'s Envoy, once it is live and not `not`.
fn live_envoy(pair: &Pair, not: i64) -> i64 {
    let look = || {
        let status = pair.node_a.status().map_err(|error| format!("{error:#}"))?;
        let envoy = &status["workloads"][0]["envoy"];
        match envoy["pid"].as_i64() {
            Some(pid) if envoy["state"] == "live" && pid != not => Ok(pid),
            _ => Err(envoy.to_string()),
        }
    };
    wait::until("web's Envoy to be live", SOON, look).unwrap().0
}

#[test]
fn a_refusal_outlives_agent_and_envoy_and_ends_with_a_good_version() {
    let mut pair = Pair::allowed().unwrap();
    pair.control.apply(BROKEN).unwrap();
    until_inspected(&pair, "the refusal", is_refused);

    // The agent dies: its successor finds out again, and says so.
    let refusals = |pair: &Pair| {
        let log = std::fs::read_to_string(pair.control.daemon.log()).unwrap_or_default();
        let of_web = |line: &&str| line.contains(r#""dataplane":"web""#);
        log.lines().filter(|line| line.contains("Envoy refused a resource")).filter(of_web).count()
    };
    let before = refusals(&pair);
    pair.node_a.agent.kill();
    pair.node_a.agent.restart().unwrap();
    pair.node_a.wait_ready("web", SOON).unwrap();
    let known = || {
        let status = pair.node_a.status().map_err(|error| format!("{error:#}"))?;
        let refused = status["workloads"][0]["rejections"].as_array().map_or(0, Vec::len);
        if refused > 0 { Ok(()) } else { Err(status.to_string()) }
    };
    wait::until("the new agent to know of the refusal", SOON, known).unwrap();
    until_inspected(&pair, "the refusal after the agent's death", is_refused);
    assert_eq!(refusals(&pair), before, "it is the same refusal, and no news");

    // Envoy dies: the next one gets the last good version and serves.
    let envoy = live_envoy(&pair, 0);
    ursa_tests::lab::daemon::kill_pid(i32::try_from(envoy).unwrap()).unwrap();
    live_envoy(&pair, envoy);
    pair.until_served().unwrap();
    until_inspected(&pair, "the refusal after Envoy's death", |text| {
        is_refused(text) && !text.contains("No Envoy is connected")
    });

    // A good version takes its place.
    pair.control.apply(&BROKEN.replace("'/orders{1001}'", GOOD)).unwrap();
    until_inspected(&pair, "the refusal to be over", |text| !text.contains("Refused by Envoy"));
    pair.control.ursa(&["delete", "meshhttproute", "broken"]).unwrap();
    pair.until_served().unwrap();
    let rows = |text: &str| {
        let synced = |row: &str| {
            let cells: Vec<&str> = row.split_whitespace().collect();
            cells.len() >= 4 && cells[2] == "0" && cells[3] == "0"
        };
        ["Cluster", "ClusterLoadAssignment", "Listener", "Secret"]
            .iter()
            .all(|kind| text.lines().any(|row| row.split_whitespace().next() == Some(kind) && synced(row)))
    };
    let text = until_inspected(&pair, "everything in sync", rows);
    assert!(text.contains("Online") && !text.contains("responses: 0 sent"), "{text}");
    let table = pair.control.ursa(&["inspect", "dataplanes"]).unwrap();
    assert!(!table.contains("never"), "each proxy was connected and updated: {table}");
}

#[test]
fn what_envoy_refuses_is_reported_and_the_old_configuration_serves() {
    let mut pair = Pair::allowed().unwrap();
    pair.control.apply(BROKEN).unwrap();
    until_inspected(&pair, "the refusal in `ursa inspect dataplane web`", is_refused);
    for _ in 0..50 {
        let answer = pair.client.get(ursa_tests::lab::pair::URL).unwrap();
        assert!(answer.ok(), "{}", answer.brief());
    }
    // The next good configuration is taken.
    pair.control.ursa(&["delete", "meshhttproute", "broken"]).unwrap();
    until_inspected(&pair, "the refusal to be gone", |text| !text.contains("Refused by Envoy"));
    pair.until_served().unwrap();
}
