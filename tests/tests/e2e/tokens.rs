//! Dataplane tokens: a wrong one gives an explanation on both sides and no certificate; the right one gives its own.

use std::path::{Path, PathBuf};
use std::time::Duration;

use base64::Engine as _;
use serde_json::{Value, json};
use ursa_tests::lab::mesh::{Control, Node};
use ursa_tests::lab::net::Host;
use ursa_tests::lab::pair::SOON;
use ursa_tests::lab::{Lab, Programs, wait};

use crate::identity::holds_pem;

/// Makes a token as an operator does.
fn token(control: &Control, args: &[&str]) -> anyhow::Result<String> {
    let all = [&["generate", "dataplane-token", "--valid-for", "1h"], args].concat();
    Ok(control.ursa(&all)?.trim().to_owned())
}

fn write(lab: &Lab, name: &str, token: &str) -> PathBuf {
    let path = lab.dir().join(format!("{name}.token"));
    std::fs::write(&path, token).unwrap();
    path
}

/// Adds a workload `name` that says it is `api`, with a token file.
fn add(node: &mut Node, name: &str, host: &Host, token: &Path) {
    node.add_with(name, host, |file| {
        file["labels"]["kuma.io/workload"] = "api".into();
        file["ursa"]["dataplaneTokenFile"] = json!(token);
    })
    .unwrap();
}

fn claims(token: &str) -> Value {
    let payload = token.split('.').nth(1).unwrap();
    let payload = base64::engine::general_purpose::URL_SAFE_NO_PAD.decode(payload).unwrap();
    serde_json::from_slice(&payload).unwrap()
}

fn revoke(control: &Control, token: &str) {
    let list = base64::engine::general_purpose::STANDARD.encode(claims(token)["jti"].as_str().unwrap());
    control
        .apply(&format!(
            "type: Secret\nmesh: default\nname: dataplane-token-revocations-default\ndata: {list}\n"
        ))
        .unwrap();
}

/// The mesh's signing key is made in the background.
fn signing_key(control: &Control, mesh: &str) {
    let made = || token(control, &["--mesh", mesh]).map(drop).map_err(|error| format!("{error:#}"));
    wait::until("the mesh's signing key", SOON, made).unwrap();
}

#[test]
fn a_wrong_token_gets_an_explanation_and_no_certificate() {
    let mut lab = Lab::new(&Programs::discover().unwrap()).unwrap();
    let mut control = Control::start(&mut lab).unwrap();
    control.apply("type: Mesh\nname: other\n").unwrap();
    signing_key(&control, "default");
    signing_key(&control, "other");
    let key = lab.dir().join("foreign.pem");
    std::fs::write(&key, control.ursa(&["generate", "signing-key", "--format", "pem"]).unwrap()).unwrap();
    let right = ["--mesh", "default", "--workload", "api"];
    let foreign = ["--signing-key-path", key.to_str().unwrap(), "--kid", "1"];
    let revoked = token(&control, &right).unwrap();
    revoke(&control, &revoked);
    let short =
        ["generate", "dataplane-token", "--valid-for", "1s", "--mesh", "default", "--workload", "api"];
    let good = token(&control, &right).unwrap();
    let cases: Vec<(&str, String, &str)> = vec![
        ("expired", control.ursa(&short).unwrap(), "token is expired"),
        ("othermesh", token(&control, &["--mesh", "other", "--workload", "api"]).unwrap(), "token"),
        ("otherload", token(&control, &["--mesh", "default", "--workload", "web"]).unwrap(), "not allowed"),
        ("othername", token(&control, &[&right[..], &["--name", "api-7"]].concat()).unwrap(), "api-7"),
        ("unbound", token(&control, &["--mesh", "default"]).unwrap(), "isn't bound to a workload"),
        ("revoked", revoked, "token is revoked"),
        ("foreign", token(&control, &[&right[..], &foreign[..]].concat()).unwrap(), "could not parse token"),
        ("tampered", good.replacen('.', ".e30", 1), "could not parse token"),
        ("nonsense", "abracadabra".to_owned(), "could not parse token"),
    ];
    let expires = claims(&cases[0].1)["exp"].as_i64().unwrap();
    let now = || time::OffsetDateTime::now_utc().unix_timestamp();
    wait::until(
        "the token to expire",
        SOON,
        || if now() > expires { Ok(()) } else { Err(now().to_string()) },
    )
    .unwrap();

    // The node's own ticket is good, but for another workload.
    let ticket = control.ticket(&["web"]).unwrap();
    let mut node = Node::join(&mut lab, "node", &ticket).unwrap();
    for (name, token, _) in &cases {
        let (host, file) = (lab.net.host(name).unwrap(), write(&lab, name, token));
        add(&mut node, name, &host, &file);
    }
    let (host, absent) = (lab.net.host("absent").unwrap(), lab.dir().join("absent.token"));
    add(&mut node, "absent", &host, &absent);
    for (name, token, why) in &cases {
        let refused = |one: &Value| one["registration"].as_str().is_some_and(|text| text.contains("refused"));
        let status = node.wait_status(name, "refused", SOON, refused).unwrap();
        let said = status["error"].as_str().unwrap_or_default();
        assert!(said.contains("dataplane token is refused") && said.contains(why), "{name}: {said}");
        assert!(said.contains("ursa generate dataplane-token"), "no remedy for {name}: {said}");
        assert!(said.contains("dataplaneTokenFile"), "no remedy for {name}: {said}");
        control.daemon.wait_said(&["refused a registration", name, why], SOON).unwrap();
        node.agent.wait_said(&["ERROR", "refused a Dataplane", name], SOON).unwrap();
        assert!(!holds_pem(&node.identity_dir(name)), "{name} got a certificate");
        assert!(control.get("dataplane", name).is_err(), "{name} was registered");
        // What a token is worth is its text: it stands in no log and no description.
        let log = std::fs::read_to_string(node.agent.log()).unwrap();
        let log = log + &std::fs::read_to_string(control.daemon.log()).unwrap() + &status.to_string();
        assert!(*name == "nonsense" || !log.contains(token.trim()), "{name}'s token is in a log");
    }
    let status = node.wait_status("absent", "told why", SOON, |one| one["error"].is_string()).unwrap();
    assert!(status["error"].as_str().unwrap().contains("absent.token"), "{status}");
    assert!(status["error"].as_str().unwrap().contains("No such file"), "{status}");

    // A replaced file needs no restart: the agent offers the Dataplane again, now with the right token.
    write(&lab, "unbound", &good);
    node.wait_ready("unbound", Duration::from_secs(40)).unwrap();
    assert!(holds_pem(&node.identity_dir("unbound")));
    let status = node.wait_status("unbound", "ready", SOON, |one| one["state"] == "ready").unwrap();
    assert_eq!(status["certificate"]["spiffeId"], "spiffe://default.lab.mesh.local/workload/api");
    control.daemon.check().unwrap();
}

#[test]
fn where_tokens_are_required_a_ticket_is_not_enough() {
    let mut lab = Lab::new(&Programs::discover().unwrap()).unwrap();
    let mut control = Control::start_with(&mut lab, |config| {
        config["dpServer"]["authn"] = json!({"dpProxy": {"type": "dpToken"}});
    })
    .unwrap();
    signing_key(&control, "default");
    let ticket = control.ticket(&["api"]).unwrap();
    let mut node = Node::join(&mut lab, "node", &ticket).unwrap();
    let host = lab.net.host("api").unwrap();
    node.add("api", &host).unwrap();
    let status = node
        .wait_status("api", "refused", SOON, |one| one["registration"].to_string().contains("refused"))
        .unwrap();
    let said = status["error"].as_str().unwrap_or_default();
    assert!(
        said.contains("requires a dataplane token") && said.contains("generate dataplane-token"),
        "{said}"
    );
    control.daemon.wait_said(&["refused a registration", "requires a dataplane token"], SOON).unwrap();
    assert!(!holds_pem(&node.identity_dir("api")));

    let good = token(&control, &["--mesh", "default", "--workload", "api"]).unwrap();
    let file = write(&lab, "api", &good);
    add(&mut node, "api", &host, &file);
    node.wait_ready("api", SOON).unwrap();

    // Revoked, it counts neither at the next registration nor for the next certificate.
    revoke(&control, &good);
    control.daemon.kill();
    control.restart().unwrap();
    let status = node
        .wait_status("api", "refused", SOON, |one| one["registration"].to_string().contains("revoked"))
        .unwrap();
    assert!(status["error"].is_null() || status["error"].to_string().contains("revoked"), "{status}");
}
