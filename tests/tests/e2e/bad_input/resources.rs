//! Resources that can't be: each is refused before anything is written.

use ursa_tests::lab::mesh;

use super::{complains, ground};

const TIMEOUT: &str = "type: MeshTimeout\nmesh: default\nname: t\nspec:\n  targetRef: {kind: Mesh}\n  to:\n  \
                       - targetRef: {kind: Mesh}\n    default: {idleTimeout: 5s}\n";

#[test]
fn an_unknown_type() {
    let ground = ground();
    ground.refuses(
        "type: Nonsense\nname: x\n",
        &["resource[0]", "unknown type \"Nonsense\"", "ursa get --help"],
    );
    // What the hint names does help.
    let help = ground.control.ursa(&["get", "--help"]).unwrap();
    assert!(help.contains("meshtimeout"), "{help}");
    // The good one beside it isn't written either.
    ground.refuses(
        &format!("{TIMEOUT}---\ntype: Nonsense\nname: x\n"),
        &["resource[1]", "nothing was applied"],
    );
    ground.api_refuses("/meshes/default/nonsenses/x", "{}", 404, &["nonsenses", "/_resources"]);
    ground.api_refuses(
        "/meshes/default/meshtimeouts/x",
        r#"{"type": "Nonsense", "mesh": "default", "name": "x"}"#,
        400,
        &["type in body should be one of [MeshTimeout]"],
    );
}

#[test]
fn broken_yaml() {
    let ground = ground();
    ground.refuses("type: [\n", &["resource[0]", "failed to parse", "line", "nothing was applied"]);
    ground.refuses(&format!("{TIMEOUT}---\ntype: [\n"), &["resource[1]", "nothing was applied"]);
    ground.refuses("just a text\n", &["resource[0]"]);
    ground.refuses("type: Mesh\nname: a\nname: b\n", &["resource[0]", "name", "duplicate"]);
    ground.refuses("", &["no resource(s) passed to apply"]);
    ground.api_refuses("/meshes/x", "{\"type\": ", 400, &["invalid Mesh object"]);
}

#[test]
fn a_wrong_field() {
    let ground = ground();
    ground.refuses("type: MeshTimeout\nmesh: default\nname: t\nspec:\n  to: 7\n", &["spec.to"]);
    ground.refuses("type: Mesh\nname: UPPER CASE\n", &["resource[0]", "name"]);
    // Without the field that was misspelled nothing is left to be set.
    ground.refuses(
        &TIMEOUT.replace("idleTimeout", "idelTimeout"),
        &["spec.to[0].default", "at least one timeout"],
    );
    ground.refuses(
        &TIMEOUT.replace("mesh: default", "mesh: nowhere"),
        &["mesh \"nowhere\"", "doesn't exist", "nothing was applied", "ursa get meshes"],
    );
    // One that doesn't exist beside one that does is told of, as the control plane ignores it.
    let beside = TIMEOUT.replace("{idleTimeout: 5s}", "{idleTimeout: 5s, idelTimeout: 6s}");
    let said = mesh::outcome(ground.control.command().args(["apply", "-f", "-"]), &beside).unwrap();
    assert!(said.err.contains("spec.to[0].default.idelTimeout is no field of MeshTimeout"), "{said:?}");
    ground.api_refuses(
        "/meshes/default/meshtimeouts/t",
        r#"{"type": "MeshTimeout", "mesh": "default", "name": "t", "spec": {"targetRef": {"kind": "Mesh"}, "to": 7}}"#,
        400,
        &["spec.to"],
    );
    // What is written by `ursa get` can be applied again: computed fields are no wrong ones.
    ground.control.apply(TIMEOUT).unwrap();
    for (kind, name) in [("meshtimeout", "t"), ("mesh", "default")] {
        let yaml = ground.control.ursa(&["get", kind, name, "-o", "yaml"]).unwrap();
        ground.control.apply(&yaml).unwrap();
    }
}

#[test]
fn a_duplicate_name() {
    let mut ground = ground();
    ground.refuses(
        &format!("{TIMEOUT}---\n{}", TIMEOUT.replace("5s", "6s")),
        &["resource[1]", "MeshTimeout \"t\" in mesh \"default\"", "resource[0]", "rename or remove"],
    );
    // Two files of one Dataplane on a node: the first lives, the second is told of.
    let host = ground.lab.net.host("web").unwrap();
    let mut node = ground.node("node", &["web"]);
    node.add("web", &host).unwrap();
    node.wait_ready("web", ursa_tests::lab::pair::SOON).unwrap();
    let workloads = node.run_dir().with_file_name("workloads.d");
    std::fs::copy(workloads.join("web.yaml"), workloads.join("web-again.yaml")).unwrap();
    complains(&node, &["web-again.yaml", "already described by", "rename or remove"]);
    assert_eq!(host.running("envoy").len(), 1);
    // A Dataplane of the same name on another node: that node is refused, the first goes on.
    let other_host = ground.lab.net.host("other").unwrap();
    let mut other = ground.node("node2", &["web"]);
    other.add("web", &other_host).unwrap();
    complains(&other, &["has registered a Dataplane of this name", "give this one another name"]);
    assert!(other_host.running("envoy").is_empty(), "it has an Envoy without being registered");
    let stored = ground.control.get("dataplane", "web").unwrap();
    assert_eq!(stored["networking"]["address"], host.v4.as_str());
}

#[test]
fn a_body_of_10_mb() {
    let ground = ground();
    let large = format!("type: Mesh\nname: large\nlabels:\n  note: {}\n", "x".repeat(11 << 20));
    ground.refuses(&large, &["10485760 bytes", "apiServer.maxBodyBytes"]);
    let data = format!("type: Secret\nmesh: default\nname: large\ndata: {}\n", "QUFB".repeat(11 << 18));
    ground.refuses(&data, &["10485760 bytes", "apiServer.maxBodyBytes"]);
    let body = format!(r#"{{"type": "Mesh", "name": "large", "x": "{}"}}"#, "x".repeat(11 << 20));
    ground.api_refuses("/meshes/large", &body, 413, &["10485760 bytes", "raise apiServer.maxBodyBytes"]);
}
