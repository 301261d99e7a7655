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

#[test]
fn what_envoy_refuses_is_reported_and_the_old_configuration_serves() {
    let mut pair = Pair::allowed().unwrap();
    pair.control.apply(BROKEN).unwrap();
    wait::until("the refusal in `ursa inspect dataplane web`", SOON, || {
        match pair.control.ursa(&["inspect", "dataplane", "web"]) {
            Ok(text) if text.contains("Refused by Envoy") && text.contains("repetition") => Ok(()),
            Ok(text) => Err(text),
            Err(error) => Err(error.to_string()),
        }
    })
    .unwrap();
    for _ in 0..50 {
        let answer = pair.client.get(ursa_tests::lab::pair::URL).unwrap();
        assert!(answer.ok(), "{}", answer.brief());
    }
    // The next good configuration is taken.
    pair.control.ursa(&["delete", "meshhttproute", "broken"]).unwrap();
    wait::until("the refusal to be gone", SOON, || {
        match pair.control.ursa(&["inspect", "dataplane", "web"]) {
            Ok(text) if text.contains("Refused by Envoy") => Err(text),
            Ok(_) => Ok(()),
            Err(error) => Err(error.to_string()),
        }
    })
    .unwrap();
    pair.until_served().unwrap();
}
