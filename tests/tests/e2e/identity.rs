//! A workload obtains its own identity and no other; a node obtains only what it was granted.

use std::process::Command;

use ursa_tests::lab::mesh::{self, Control, Node};
use ursa_tests::lab::pair::SOON;
use ursa_tests::lab::{Lab, Programs, wait};

/// Whether a folder holds a certificate anywhere: as a file of its own, or within another.
pub(crate) fn holds_pem(dir: &std::path::Path) -> bool {
    std::fs::read_dir(dir).into_iter().flatten().flatten().any(|entry| {
        let path = entry.path();
        if path.is_dir() {
            holds_pem(&path)
        } else {
            let needle = b"-----BEGIN CERTIFICATE-----";
            std::fs::read(&path).is_ok_and(|text| text.windows(needle.len()).any(|part| part == needle))
        }
    })
}

#[test]
fn a_wrong_ticket_gets_an_explanation_and_no_certificate() {
    let mut lab = Lab::new(&Programs::discover().unwrap()).unwrap();
    let control = Control::start(&mut lab).unwrap();
    let good = control.ticket(&["web"]).unwrap();
    let forged = {
        use base64::Engine as _;
        let engine = base64::engine::general_purpose::URL_SAFE_NO_PAD;
        let (version, payload) = good.split_once('.').unwrap();
        let payload = engine.decode(payload.trim_end_matches('=')).unwrap();
        let mut fields: serde_json::Value = serde_json::from_slice(&payload).unwrap();
        fields["s"] = "guessed".into();
        format!("{version}.{}", engine.encode(fields.to_string()))
    };
    for (name, ticket) in [("nonsense", "ursa1.nonsense"), ("forged", forged.as_str())] {
        let error = format!("{:#}", Node::join(&mut lab, name, ticket).unwrap_err());
        assert!(error.contains("ticket"), "{error}");
        assert!(!holds_pem(&lab.dir().join(name).join("state")), "{name} got a certificate");
    }
    // The first is no ticket for any control plane, which the agent sees by itself; the other came to control's door.
    let refused = ["WARN", "refused a join", "ticket is not known here"];
    control.daemon.wait_said(&refused, SOON).unwrap();
    // The refusals cost the good one nothing.
    Node::join(&mut lab, "good", &good).unwrap();
    assert!(holds_pem(&lab.dir().join("good").join("state")), "a certificate isn't recognised");
}

#[test]
fn a_ticket_belongs_to_the_first_key_that_used_it() {
    let mut lab = Lab::new(&Programs::discover().unwrap()).unwrap();
    let control = Control::start(&mut lab).unwrap();
    let ticket = control.ticket(&["web"]).unwrap();
    let node = Node::join(&mut lab, "owner", &ticket).unwrap();
    let error = format!("{:#}", Node::join(&mut lab, "thief", &ticket).unwrap_err());
    assert!(error.contains("ticket"), "{error}");
    assert!(!holds_pem(&lab.dir().join("thief").join("state")), "the thief got a certificate");
    control.daemon.wait_said(&["WARN", "refused a join", "already used by another key"], SOON).unwrap();
    // A retry by the owner is no theft.
    mesh::run(
        Command::new("nsenter")
            .arg(format!("--net={}", node.host.path().display()))
            .arg(lab.programs.path("ursa-agent"))
            .args(["join", &ticket, "--config"])
            .arg(&node.config),
        "",
    )
    .unwrap();
}

#[test]
fn a_node_gets_no_workload_that_it_was_not_granted() {
    let mut lab = Lab::new(&Programs::discover().unwrap()).unwrap();
    let control = Control::start(&mut lab).unwrap();
    let (web, admin) = (lab.net.host("web").unwrap(), lab.net.host("admin").unwrap());
    let ticket = control.ticket(&["web"]).unwrap();
    let mut node = Node::join(&mut lab, "node", &ticket).unwrap();
    node.add("web", &web).unwrap();
    node.add("admin", &admin).unwrap();
    node.wait_ready("web", SOON).unwrap();
    let ((), _) = wait::until("the agent to tell of the refusal", SOON, || {
        let status = node.status().map_err(|error| error.to_string())?.to_string();
        if status.contains("admin") && (status.contains("grant") || status.contains("refuse")) {
            Ok(())
        } else {
            Err(status)
        }
    })
    .unwrap();
    assert!(holds_pem(&node.identity_dir("web")), "a certificate isn't recognised");
    assert!(!holds_pem(&node.identity_dir("admin")), "a certificate for admin");
    assert!(control.get("dataplane", "admin").is_err(), "admin was registered");
    let refused = ["WARN", "refused a registration", "\"admin\"", "is not granted to this node"];
    control.daemon.wait_said(&refused, SOON).unwrap();
}
