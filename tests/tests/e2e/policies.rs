//! Policies as an operator writes them, by what real traffic meets.

use std::time::Duration;

use ursa_tests::lab::capture::Capture;
use ursa_tests::lab::mesh::{Control, Node, PORT};
use ursa_tests::lab::pair::{PLAINTEXT, Pair, SOON, URL};
use ursa_tests::lab::program::{self, Answer, Client};
use ursa_tests::lab::wait;

use crate::plaintext::assert_nothing_readable;

/// How many requests in a row must meet a policy before it counts as in force: Envoy's workers hear of it one by one.
const STREAK: usize = 20;

/// Asks until [`STREAK`] answers in a row are as wanted.
#[track_caller]
fn steadily(what: &str, mut ask: impl FnMut() -> Answer, wanted: impl Fn(&Answer) -> bool) -> Answer {
    let mut streak = 0;
    let look = || {
        let answer = ask();
        streak = if wanted(&answer) { streak + 1 } else { 0 };
        if streak == STREAK { Ok(answer) } else { Err(format!("{streak} in a row, now {}", answer.brief())) }
    };
    wait::until(what, SOON, look).unwrap().0
}

fn status(wanted: u16) -> impl Fn(&Answer) -> bool {
    move |answer| answer.status == Some(wanted)
}

fn no_response(answer: &Answer) -> bool {
    answer.status.is_none()
}

/// What the server says that it saw.
#[track_caller]
fn seen(answer: &Answer) -> serde_json::Value {
    serde_json::from_str(&answer.text).unwrap_or_else(|error| panic!("{error}: {}", answer.brief()))
}

fn mesh_tls(control: &Control, mode: &str) {
    control
        .apply(&format!(
            "{{type: MeshTLS, mesh: default, name: mode, spec: {{
               targetRef: {{kind: Dataplane, labels: {{kuma.io/workload: backend}}}},
               rules: [{{default: {{mode: {mode}}}}}]}}}}"
        ))
        .unwrap();
}

/// A rule for the whole trust domain, which is the only kind that reaches callers without a certificate.
fn everybody(control: &Control, verb: &str) {
    control
        .apply(&format!(
            "{{type: MeshTrafficPermission, mesh: default, name: {verb}-everybody, spec: {{
               targetRef: {{kind: Dataplane, labels: {{kuma.io/workload: backend}}}},
               rules: [{{default: {{{verb}: [
                 {{spiffeID: {{type: Prefix, value: 'spiffe://default.lab.mesh.local'}}}}]}}}}]}}}}"
        ))
        .unwrap();
}

#[test]
fn permissive_takes_plaintext_only_as_far_as_permissions_go() {
    let mut pair = Pair::allowed().unwrap();
    let host = &pair.backend.host;
    let url = format!("http://{}:{PORT}/plain", host.v4);
    let unknown = format!("http://[{}]:{PORT}/plain", host.v6);
    let mut stranger = Client::start(&pair.lab, &pair.stranger).unwrap();
    let mut plain = |what: &str, wanted: &dyn Fn(&Answer) -> bool| {
        let answer = steadily(what, || stranger.get(&url).unwrap(), wanted);
        assert_eq!(answer.text.contains(PLAINTEXT), answer.ok(), "{}", answer.brief());
        // The Dataplane names the other address alone: a policy opens its port there, and none on this one.
        let answer = stranger.get(&unknown).unwrap();
        assert!(no_response(&answer), "{what}: {}", answer.brief());
    };
    plain("plaintext without an answer before any MeshTLS", &no_response);
    mesh_tls(&pair.control, "Strict");
    // To say what holds by default changes nothing.
    plain("plaintext without an answer in strict mode", &no_response);

    // Plaintext has no name that a rule for web could match.
    mesh_tls(&pair.control, "Permissive");
    plain("plaintext refused by permission", &status(403));
    pair.until_served().unwrap();
    everybody(&pair.control, "allow");
    plain("plaintext let in for everybody's sake", &status(200));
    pair.until_served().unwrap();
    everybody(&pair.control, "deny");
    plain("plaintext denied with everybody", &status(403));
    pair.until_status(403).unwrap();
    pair.control.ursa(&["delete", "meshtrafficpermission", "deny-everybody"]).unwrap();
    plain("plaintext let in again", &status(200));

    // Everybody may still, who has a name.
    mesh_tls(&pair.control, "Strict");
    plain("plaintext without an answer in strict mode again", &no_response);
    let Pair { client, .. } = &mut pair;
    steadily("web to be served in strict mode", || client.get(URL).unwrap(), Answer::ok);
}

const ROUTE: &str = "
type: MeshHTTPRoute
mesh: default
name: blue
spec:
  targetRef: {kind: Dataplane, labels: {kuma.io/workload: web}}
  to:
  - targetRef: {kind: MeshService, labels: {kuma.io/display-name: backend}}
    rules:
    - matches:
      - path: {type: PathPrefix, value: /api}
        headers: [{type: Exact, name: x-colour, value: blue}]
      default:
        filters:
        - type: URLRewrite
          urlRewrite: {path: {type: ReplacePrefixMatch, replacePrefixMatch: /v2}}
        - type: RequestHeaderModifier
          requestHeaderModifier: {add: [{name: x-routed-by, value: mesh}]}
";

#[test]
fn an_http_route_rewrites_what_it_matches_and_nothing_else() {
    let mut pair = Pair::allowed().unwrap();
    pair.control.apply(ROUTE).unwrap();
    let base = URL.strip_suffix("/orders").unwrap();
    let (api, other) = (format!("{base}/api/things"), format!("{base}/apis"));
    let client = &mut pair.client;
    let routed = steadily(
        "a request that matches to be rewritten",
        || client.get_with(&api, "x-colour", "blue").unwrap(),
        |answer| answer.ok() && seen(answer)["path"] == "/v2/things",
    );
    let routed = seen(&routed);
    assert_eq!(routed["headers"]["x-routed-by"], "mesh", "{routed}");
    assert_eq!(routed["headers"]["x-colour"], "blue", "{routed}");

    // Another header, none, and a path that has the prefix's letters and not its segment.
    for (url, path, header) in
        [(&api, "/api/things", Some("green")), (&api, "/api/things", None), (&other, "/apis", Some("blue"))]
    {
        let answer = match header {
            Some(colour) => client.get_with(url, "x-colour", colour),
            None => client.get(url),
        };
        let answer = answer.unwrap();
        assert!(answer.ok(), "{url} with {header:?}: {}", answer.brief());
        let got = seen(&answer);
        assert_eq!(got["path"], path, "{header:?}: {got}");
        assert!(got["headers"].get("x-routed-by").is_none(), "{header:?}: {got}");
    }

    pair.control.ursa(&["delete", "meshhttproute", "blue"]).unwrap();
    steadily(
        "requests as they are, without the route",
        || client.get_with(&api, "x-colour", "blue").unwrap(),
        |answer| answer.ok() && seen(answer)["path"] == "/api/things",
    );
}

const TO_REPLICA: &str = "
type: MeshTCPRoute
mesh: default
name: to-replica
spec:
  targetRef: {kind: Dataplane, labels: {kuma.io/workload: web}}
  to:
  - targetRef: {kind: MeshService, labels: {kuma.io/display-name: backend}}
    rules:
    - default:
        backendRefs: [{kind: MeshService, labels: {kuma.io/display-name: replica}, port: 8080}]
";

#[test]
fn bytes_are_permitted_encrypted_and_routed() {
    let mut pair = Pair::speaking("tcp").unwrap();
    let capture = Capture::start(&pair.lab.net.bridge()).unwrap();
    let client = &mut pair.client;
    // A refusal can't be told in HTTP here: the connection ends.
    steadily("no answer without a permission", || client.get(URL).unwrap(), no_response);
    pair.allow().unwrap();
    let client = &mut pair.client;
    let answer = steadily("an answer of backend", || client.get(URL).unwrap(), Answer::ok);
    let answer = seen(&answer);
    assert_eq!(answer["name"], "backend");
    assert!(answer["headers"].get("x-forwarded-client-cert").is_none(), "bytes were read as HTTP: {answer}");

    // A service of its own, whose permission is its own too.
    let host = pair.lab.net.host("replica").unwrap();
    let _server = program::serve(&pair.lab, &host, "replica", PORT).unwrap();
    let ticket = pair.control.ticket(&["replica"]).unwrap();
    let mut node = Node::join(&mut pair.lab, "node-c", &ticket).unwrap();
    node.add_with("replica", &host, |file| file["networking"]["inbound"][0]["protocol"] = "tcp".into())
        .unwrap();
    node.wait_ready("replica", SOON).unwrap();
    pair.control.apply(TO_REPLICA).unwrap();
    steadily("no answer of replica without a permission", || client.get(URL).unwrap(), no_response);
    pair.control.ursa(&["allow", "web", "replica"]).unwrap();
    let routed = |answer: &Answer| answer.ok() && seen(answer)["name"] == "replica";
    steadily("an answer of replica", || client.get(URL).unwrap(), routed);
    pair.control.ursa(&["delete", "meshtrafficpermission", "allow-web-to-replica"]).unwrap();
    steadily("no answer of replica once that is withdrawn", || client.get(URL).unwrap(), no_response);
    pair.control.ursa(&["delete", "meshtcproute", "to-replica"]).unwrap();
    steadily(
        "an answer of backend again",
        || client.get(URL).unwrap(),
        |answer| answer.ok() && seen(answer)["name"] == "backend",
    );
    assert_nothing_readable(&capture.finish().unwrap(), &pair.lab);
}

const TIMEOUT: &str = "
type: MeshTimeout
mesh: default
name: short
spec:
  targetRef: {kind: Dataplane, labels: {kuma.io/workload: web}}
  to:
  - targetRef: {kind: MeshService, labels: {kuma.io/display-name: backend}}
    default: {http: {requestTimeout: 400ms}}
";

#[test]
fn a_request_timeout_ends_what_is_slow_and_leaves_what_is_not() {
    let mut pair = Pair::allowed().unwrap();
    let (limit, slow) = (Duration::from_millis(400), Duration::from_millis(1500));
    let url = format!("{URL}?delay={}", slow.as_millis());
    let answer = pair.client.get(&url).unwrap();
    assert!(answer.ok() && answer.ms >= slow.as_secs_f64() * 1e3, "{} ms: {}", answer.ms, answer.brief());

    pair.control.apply(TIMEOUT).unwrap();
    let client = &mut pair.client;
    wait::until("a slow answer to be given up", SOON, || match client.get(&url).unwrap() {
        answer if answer.status == Some(504) => Ok(()),
        answer => Err(answer.brief()),
    })
    .unwrap();
    for _ in 0..5 {
        let answer = client.get(&url).unwrap();
        assert_eq!(answer.status, Some(504), "{}", answer.brief());
        // Not before its time, which Envoy's timers round, and before the answer would have come.
        let took = Duration::from_secs_f64(answer.ms / 1e3);
        assert!(took >= limit * 9 / 10 && took < slow, "{took:?}: {}", answer.brief());
    }
    pair.until_served().unwrap();

    pair.control.ursa(&["delete", "meshtimeout", "short"]).unwrap();
    wait::until("a slow answer to be waited for", SOON, || match pair.client.get(&url).unwrap() {
        answer if answer.ok() => Ok(()),
        answer => Err(answer.brief()),
    })
    .unwrap();
}
