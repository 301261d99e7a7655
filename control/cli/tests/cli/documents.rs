//! `apply`, `get` and `delete`: what is sent, what is said, and how it ends.

use crate::support::{NOT_FOUND, Server, ursa, ursa_with};

const TWO: &str = "type: Mesh\nname: a\n---\ntype: Mesh\nname: b\n---\ntype: Mesh\nname: c\n";

#[test]
fn what_the_server_warns_of_is_printed_beside_the_result() {
    let server = Server::start(|_| {
        (201, "warning: 299 ursa \"spec.x is no field\"\r\n", "{\"warnings\":[\"unwise\"]}")
    });
    let done = server.ursa(&["apply", "-f", "-"], "type: Mesh\nname: a\n");
    assert_eq!(done.code, 0, "{}", done.stderr);
    assert_eq!(done.stdout, "resource type=\"Mesh\" mesh=\"\" name=\"a\" Created\n");
    assert_eq!(done.stderr, "Warning: spec.x is no field\nWarning: unwise\n");
}

#[test]
fn a_field_that_does_not_exist_is_warned_of() {
    let server = Server::start(|_| (201, "", "{}"));
    let done = server.ursa(&["apply", "-f", "-"], "type: Mesh\nname: a\nnonsense: 1\n");
    assert_eq!(done.code, 0);
    assert!(done.stderr.contains("Warning: resource[0]: nonsense is no field of Mesh"), "{}", done.stderr);
}

#[test]
fn a_kubernetes_manifest_is_recognised() {
    let done =
        ursa_with(&["apply", "-f", "-"], "apiVersion: kuma.io/v1alpha1\nkind: Mesh\nmetadata: {name: x}\n");
    assert!(done.code == 1 && done.stderr.contains("Kubernetes manifest"), "{}", done.stderr);
}

#[test]
fn one_broken_document_keeps_all_from_being_sent() {
    let server = Server::start(|_| (201, "", "{}"));
    let done =
        server.ursa(&["apply", "-f", "-"], "type: Mesh\nname: a\n---\ntype: Nonsense\nname: {{ who }}\n");
    assert_eq!((done.code, done.stdout.as_str()), (1, ""));
    assert!(done.stderr.contains("resource[1]: failed to parse resource"), "{}", done.stderr);
    assert!(done.stderr.contains("--var who="), "{}", done.stderr);
    assert!(done.stderr.contains("1 of 2; nothing was applied"), "{}", done.stderr);
    assert!(server.seen().is_empty(), "{:?}", server.seen());
}

#[test]
fn a_mesh_that_is_absent_is_found_before_the_first_write() {
    let server = Server::start(|line| match line {
        "GET /meshes/absent" => (404, "", NOT_FOUND),
        _ => (201, "", "{}"),
    });
    let text = "type: Mesh\nname: a\n---\ntype: Secret\nmesh: a\nname: s\ndata: eA==\n---\n\
                type: Secret\nmesh: absent\nname: s\ndata: eA==\n";
    let done = server.ursa(&["apply", "-f", "-"], text);
    assert_eq!(done.code, 1);
    assert!(done.stderr.contains("resource[2] is in mesh \"absent\""), "{}", done.stderr);
    assert_eq!(server.seen(), ["GET /meshes/absent"]);
}

#[test]
fn the_first_refusal_ends_it_and_says_how_far_it_came() {
    let server = Server::start(|line| match line {
        "PUT /meshes/b" => (403, "", r#"{"title":"Access Denied","detail":"user cannot"}"#),
        _ => (201, "", "{}"),
    });
    let done = server.ursa(&["apply", "-f", "-"], TWO);
    assert_eq!(done.code, 1);
    assert_eq!(done.stdout, "resource type=\"Mesh\" mesh=\"\" name=\"a\" Created\n");
    assert!(
        done.stderr.contains("resource[1]: of 3, 1 were applied, this one was refused, 1 were not tried"),
        "{}",
        done.stderr
    );
    assert!(done.stderr.contains("Mesh \"b\": Access Denied (user cannot)"), "{}", done.stderr);
    assert_eq!(server.seen(), ["PUT /meshes/a", "PUT /meshes/b"]);
}

#[test]
fn a_dry_run_sends_nothing_and_prints_what_it_would() {
    let done =
        ursa_with(&["apply", "--dry-run", "-v", "name=x", "-f", "-"], "type: Mesh\nname: {{ name }}\n");
    assert_eq!((done.code, done.stdout.contains("name: x")), (0, true), "{}{}", done.stdout, done.stderr);
}

#[test]
fn each_source_that_holds_nothing_is_explained() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().to_str().unwrap();
    let empty = dir.path().join("empty.yaml");
    let absent = dir.path().join("absent.yaml");
    std::fs::write(dir.path().join("readme.txt"), "type: Mesh\nname: x\n").unwrap();
    let said = |args: &[&str]| {
        let done = ursa(args);
        assert_eq!(done.code, 1, "{args:?}");
        done.stderr
    };
    assert!(said(&["apply"]).contains("-f FILE"));
    assert!(said(&["apply", "-f", folder]).contains(".yaml, .yml or .json"));
    assert!(said(&["apply", "-f", absent.to_str().unwrap()]).contains("absent.yaml"));
    std::fs::write(&empty, "# nothing\n").unwrap();
    assert!(said(&["apply", "-f", empty.to_str().unwrap()]).contains("holds no document"));
    assert!(said(&["apply", "-f", "-", "-v", "nonsense"]).contains("name=value"));
}

#[test]
fn a_folder_is_applied_by_name() {
    let dir = tempfile::tempdir().unwrap();
    for (file, name) in [("2.json", "b"), ("1.yaml", "a"), ("3.txt", "c")] {
        std::fs::write(dir.path().join(file), format!("{{\"type\": \"Mesh\", \"name\": \"{name}\"}}"))
            .unwrap();
    }
    let server = Server::start(|_| (200, "", "{}"));
    let done = server.ursa(&["apply", "-f", dir.path().to_str().unwrap()], "");
    assert_eq!(done.code, 0, "{}", done.stderr);
    assert_eq!(server.seen(), ["PUT /meshes/a", "PUT /meshes/b"]);
}

#[test]
fn a_document_comes_by_url_too() {
    let server = Server::start(|_| (200, "", "type: Mesh\nname: a\n"));
    let text = std::fs::read_to_string(server.config.path()).unwrap();
    let url = text.split('\'').nth(1).unwrap();
    let done = ursa(&["apply", "--dry-run", "-f", &format!("{url}/files/mesh.yaml?x=1")]);
    assert_eq!(done.code, 0, "{}", done.stderr);
    assert_eq!(server.seen(), ["GET /files/mesh.yaml?x=1"]);
}

#[test]
fn types_have_many_names() {
    let server = Server::start(|_| (200, "", "{\"items\":[],\"total\":0}"));
    for word in ["meshtimeouts", "MeshTimeouts", "mesh-timeouts", "mt"] {
        assert_eq!(server.ursa(&["get", word, "-m", "x"], "").code, 0, "{word}");
    }
    assert_eq!(server.seen(), ["GET /meshes/x/meshtimeouts"; 4]);
    let single = ["meshtimeout", "MeshTimeout", "mesh-timeout", "mt", "meshtimeouts"];
    for word in single {
        assert_eq!(server.ursa(&["get", word, "t", "-o", "yaml"], "").code, 0, "{word}");
    }
    assert_eq!(server.seen()[4..], ["GET /meshes/default/meshtimeouts/t"; 5]);
    let done = server.ursa(&["get", "meshtimeoutz"], "");
    assert!(done.code == 1 && done.stderr.contains("Did you mean \"meshtimeouts\"?"), "{}", done.stderr);
    let done = server.ursa(&["get", "meshtimeout"], "");
    assert!(done.code == 1 && done.stderr.contains("ursa get meshtimeouts"), "{}", done.stderr);
}

#[test]
fn what_is_not_there_is_named() {
    let server = Server::start(|_| (404, "", NOT_FOUND));
    for args in [["get", "meshtimeout", "t"], ["delete", "meshtimeout", "t"]] {
        let done = server.ursa(&args, "");
        assert_eq!(done.code, 1);
        assert!(done.stderr.contains("Not found: what was asked for"), "{}", done.stderr);
        assert!(done.stderr.contains("ursa get meshtimeouts"), "{}", done.stderr);
    }
}
