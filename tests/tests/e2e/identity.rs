//! A workload obtains its own identity and no other; a node obtains only what it was granted.

use std::os::unix::net::UnixStream;
use std::process::Command;

use ursa_tests::lab::mesh::{self, Control, Node};
use ursa_tests::lab::pair::{Pair, SOON};
use ursa_tests::lab::{Lab, Programs, wait};

/// Whether a folder holds a private key or a certificate anywhere.
fn holds_pem(dir: &std::path::Path) -> bool {
    std::fs::read_dir(dir).into_iter().flatten().flatten().any(|entry| {
        let path = entry.path();
        if path.is_dir() {
            holds_pem(&path)
        } else {
            std::fs::read(&path).is_ok_and(|text| text.starts_with(b"-----BEGIN CERTIFICATE"))
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
    // The refusals cost the good one nothing.
    Node::join(&mut lab, "good", &good).unwrap();
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
    assert!(!holds_pem(&node.state_dir().join("default.admin")), "a certificate for admin");
    assert!(control.get("dataplane", "admin").is_err(), "admin was registered");
}

#[test]
fn a_workload_reaches_no_other_workloads_sockets() {
    let pair = Pair::start().unwrap();
    let sockets = sockets(&pair.node_b.run_dir());
    assert!(sockets.iter().any(|path| path.ends_with("xds.sock")), "{sockets:?}");
    for socket in sockets {
        // Another workload's proxy, and an ordinary program.
        for uid in [pair.backend.uid + 1, 65534] {
            let refused = as_user(uid, &socket);
            assert!(refused, "uid {uid} may open {}", socket.display());
        }
        assert!(
            UnixStream::connect(&socket).is_ok() || !socket.exists(),
            "root may not open {}",
            socket.display()
        );
    }
    for uid in [pair.backend.uid, pair.web.uid + 7, 65534] {
        let cat = Command::new("setpriv")
            .args([format!("--reuid={uid}"), format!("--regid={uid}"), "--clear-groups".into()])
            .args(["find".into(), pair.node_b.state_dir().join("default.backend/identity")])
            .output()
            .unwrap();
        assert!(!cat.status.success(), "uid {uid} lists the identity of backend");
    }
}

fn sockets(dir: &std::path::Path) -> Vec<std::path::PathBuf> {
    use std::os::unix::fs::FileTypeExt as _;
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => found.extend(sockets(&entry.path())),
            Ok(kind) if kind.is_socket() => found.push(entry.path()),
            _ => {}
        }
    }
    found
}

/// Whether a user of this id can't write to a socket, which is what connecting asks for.
fn as_user(uid: u32, socket: &std::path::Path) -> bool {
    let status = Command::new("setpriv")
        .args([format!("--reuid={uid}"), format!("--regid={uid}"), "--clear-groups".into()])
        .args(["test", "-w"])
        .arg(socket)
        .status()
        .expect("setpriv runs");
    !status.success()
}
