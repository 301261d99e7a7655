//! Bad input gets an error that says what to do, and nothing is half done.

use std::process::Command;

use ursa_tests::lab::daemon;
use ursa_tests::lab::mesh::{self, Control, Node};
use ursa_tests::lab::pair::SOON;
use ursa_tests::lab::{Lab, Programs, wait};

#[test]
fn the_command_line_explains_and_writes_nothing() {
    let mut lab = Lab::new(&Programs::discover().unwrap()).unwrap();
    let control = Control::start(&mut lab).unwrap();
    let good = "type: Mesh\nname: good\n";
    let cases = [
        ("type: Nonsense\nname: x\n", "Nonsense"),
        ("type: [\n", "failed to parse"),
        ("type: MeshTimeout\nmesh: default\nname: t\nspec:\n  to: 7\n", "spec.to"),
        ("type: Mesh\nname: UPPER CASE\n", "name"),
        (
            "type: MeshTimeout\nmesh: nowhere\nname: t\nspec:\n  targetRef: {kind: Mesh}\n  to:\n  - targetRef: {kind: Mesh}\n    default: {idleTimeout: 5s}\n",
            "Failed to retrieve Mesh",
        ),
    ];
    for (bad, expected) in cases {
        let before = control.ursa(&["get", "meshes", "-o", "json"]).unwrap();
        let error = control.apply(bad).unwrap_err().to_string();
        assert!(error.contains(expected), "{bad:?}: {error}");
        assert!(!error.contains("panicked"), "{error}");
        assert_eq!(before, control.ursa(&["get", "meshes", "-o", "json"]).unwrap(), "{bad:?} left something");
    }
    // A document that doesn't parse keeps those before it from being applied.
    let error = control.apply(&format!("{good}---\ntype: [\n")).unwrap_err().to_string();
    assert!(error.contains("resource[1]"), "{error}");
    assert!(control.get("mesh", "good").is_err());

    let large = format!("type: Mesh\nname: large\nlabels:\n  note: {}\n", "x".repeat(11 << 20));
    let error = control.apply(&large).unwrap_err().to_string();
    assert!(!error.is_empty() && error.len() < 2000, "{} bytes of error", error.len());
    assert!(control.get("mesh", "large").is_err());
    control.get("mesh", "default").unwrap();
}

#[test]
fn daemons_explain_why_they_do_not_start() {
    let mut lab = Lab::new(&Programs::discover().unwrap()).unwrap();
    let control = Control::start(&mut lab).unwrap();

    // A second control plane of the same configuration: the port, or the store, is taken.
    let mut second = Command::new("nsenter");
    daemon::without_settings(&mut second);
    let second = second
        .arg(format!("--net={}", control.host.path().display()))
        .arg(lab.programs.path("ursa-control"))
        .args(["run", "--config"])
        .arg(lab.dir().join("control.yaml"))
        .env("URSA_STORE_EMBEDDED_PATH", lab.dir().join("second.db"))
        .env("URSA_API_SERVER_SOCKET", lab.dir().join("second.sock"))
        .output()
        .unwrap();
    let said =
        String::from_utf8_lossy(&second.stderr).into_owned() + &String::from_utf8_lossy(&second.stdout);
    assert!(!second.status.success());
    assert!(said.contains("in use") && (said.contains("5681") || said.contains("5678")), "{said}");
    control.get("mesh", "default").unwrap();

    let file = lab.dir().join("bad.yaml");
    std::fs::write(&file, "apiSever: {}\n").unwrap();
    for program in ["ursa-control", "ursa-agent"] {
        let error =
            mesh::run(Command::new(lab.programs.path(program)).args(["run", "--config"]).arg(&file), "")
                .unwrap_err()
                .to_string();
        assert!(error.contains("apiSever"), "{program}: {error}");
    }

    // An Envoy that isn't there is told of in the workload's status, and the workload stays closed.
    let host = lab.net.host("web").unwrap();
    let ticket = control.ticket(&["web"]).unwrap();
    lab.programs.envoy = "/nonexistent/envoy".into();
    let mut node = Node::join(&mut lab, "node", &ticket).unwrap();
    node.add("web", &host).unwrap();
    wait::until("the agent, or its log, to name the path", SOON, || {
        let status = node.status().map_or_else(|error| error.to_string(), |status| status.to_string());
        let log = std::fs::read_to_string(node.agent.log()).unwrap_or_default();
        if status.contains("/nonexistent/envoy") || log.contains("/nonexistent/envoy") {
            Ok(())
        } else {
            Err(status)
        }
    })
    .unwrap();
}
