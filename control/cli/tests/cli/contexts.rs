//! Which control plane is meant, and what is said when it can't be reached.

use crate::support::{Server, ursa, ursa_with};

#[test]
fn contexts_are_added_switched_and_removed() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("config");
    let with = |args: &[&str], input: &str| {
        let done = ursa_with(&[&["--config-file", file.to_str().unwrap(), "config"], args].concat(), input);
        assert_eq!(done.code, 0, "{args:?}: {}", done.stderr);
        done.stdout
    };
    std::fs::write(&file, "").unwrap();
    let add = ["control-planes", "add", "--skip-check", "--address", "https://east:5682", "--name"];
    with(&[&add[..], &["east"]].concat(), "");
    let login = ["west", "--auth-type", "tokens", "--auth-conf", "token=-"];
    assert!(
        with(&[&add[..], &login].concat(), "the token\n")
            .contains("switched active Control Plane to \"west\"")
    );
    assert!(with(&["view"], "").contains("token: the token"));
    with(&["control-planes", "switch", "--name", "east"], "");
    let list = with(&["control-planes", "list"], "");
    assert_eq!(
        list.lines().nth(1).unwrap().split_whitespace().collect::<Vec<_>>(),
        ["*", "east", "https://east:5682"]
    );
    with(&["control-planes", "remove", "--name", "east"], "");
    assert!(!with(&["view"], "").contains("name: east"));

    let failed = |args: &[&str]| {
        let done = ursa(&[&["--config-file", file.to_str().unwrap()], args].concat());
        assert_eq!(done.code, 1, "{args:?}");
        done.stderr
    };
    assert!(failed(&["config", "control-planes", "switch", "--name", "east"]).contains("known are: west"));
    assert!(failed(&[&["config"], &add[..], &["west"]].concat()).contains("--overwrite"));
    assert!(failed(&["--context", "east", "get", "meshes"]).contains("\"east\""));
    assert!(failed(&["config", "control-planes", "add"]).contains("address"));
}

#[test]
fn a_server_that_is_not_there_is_named_with_what_to_do() {
    // A port that was just free; nobody else is given it at once.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("config");
    let address = format!("http://127.0.0.1:{port}");
    let config = ["--config-file", file.to_str().unwrap()];
    std::fs::write(&file, "").unwrap();
    let add = ["config", "control-planes", "add", "--name", "x", "--address", &address];
    let done = ursa(&[&config[..], &add].concat());
    assert!(done.code == 1 && done.stderr.contains(&address), "{}", done.stderr);
    assert_eq!(ursa(&[&config[..], &add, &["--skip-check"]].concat()).code, 0);
    let done = ursa(&[&config[..], &["get", "meshes"]].concat());
    assert!(
        done.code == 1 && done.stderr.contains(&address) && done.stderr.contains("--socket"),
        "{}",
        done.stderr
    );
    let done = ursa(&["--socket", "/nonexistent/control.sock", "get", "meshes"]);
    assert!(done.code == 1 && done.stderr.contains("/nonexistent/control.sock"), "{}", done.stderr);
    // The version of the program itself needs no server.
    let done = ursa(&[&config[..], &["version"]].concat());
    assert_eq!(done.code, 0);
    assert!(
        done.stdout.starts_with("Client: Ursa ") && done.stdout.ends_with("Server: unavailable\n"),
        "{}",
        done.stdout
    );
}

#[test]
fn the_version_of_the_server_is_shown() {
    let server = Server::start(|_| (200, "", r#"{"product":"Ursa","version":"9.8.7","instanceId":"i"}"#));
    let done = server.ursa(&["version"], "");
    assert!(done.stdout.ends_with("Server: Ursa 9.8.7\n"), "{}", done.stdout);
}

#[test]
fn a_token_is_tried_when_it_is_added() {
    let server = Server::start(|line| match line {
        "GET /" => (200, "", r#"{"product":"Ursa"}"#),
        _ => (401, "", r#"{"title":"Invalid authentication data","detail":"token is revoked"}"#),
    });
    let text = std::fs::read_to_string(server.config.path()).unwrap();
    let url = text.split('\'').nth(1).unwrap();
    let add = ["config", "control-planes", "add", "--name", "b", "--address", url];
    let done = server.ursa(&[&add[..], &["--auth-type", "tokens", "--auth-conf", "token=x"]].concat(), "");
    assert!(done.code == 1 && done.stderr.contains("refuses the token"), "{}", done.stderr);
    assert_eq!(server.ursa(&add, "").code, 0);
}

#[test]
fn without_credentials_it_says_how_to_get_them() {
    let body = r#"{"title":"Invalid authentication data","detail":"Unauthenticated"}"#;
    let server = Server::start(move |_| (401, "", body));
    let done = server.ursa(&["get", "meshes"], "");
    assert!(done.code == 1 && done.stderr.contains("--auth-conf token=-"), "{}", done.stderr);
}
