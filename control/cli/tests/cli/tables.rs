//! What is printed for people: columns by type, paging, and the lines of single results.

use crate::support::{Server, ursa};

const TIME: &str = "0001-01-01T00:00:00Z";

/// The columns of a table, cell by cell.
fn cells(table: &str) -> Vec<Vec<&str>> {
    table
        .lines()
        .map(|line| line.split("   ").map(str::trim).filter(|cell| !cell.is_empty()).collect())
        .collect()
}

#[test]
fn each_type_has_the_columns_of_kumactl() {
    let of = |kind: &'static str, body: String, expected: &[&[&str]]| {
        let body: &'static str = body.leak();
        let server = Server::start(move |_| (200, "", body));
        let done = server.ursa(&["get", kind], "");
        assert_eq!((done.code, done.stderr.as_str()), (0, ""), "{kind}");
        assert_eq!(cells(&done.stdout), expected, "{kind}");
    };
    let global = format!(r#"{{"items":[{{"name":"one","modificationTime":"{TIME}"}}],"total":1}}"#);
    for kind in ["meshes", "zones", "globalsecrets", "hostnamegenerators"] {
        of(kind, global.clone(), &[&["NAME", "AGE"], &["one", "never"]]);
    }
    let meshed = global.replace("\"name\"", "\"mesh\":\"default\",\"name\"");
    for kind in ["secrets", "meshtimeouts", "meshservices", "meshtrafficpermissions"] {
        of(kind, meshed.clone(), &[&["MESH", "NAME", "AGE"], &["default", "one", "never"]]);
    }
    let dataplane = r#"{"items":[{"mesh":"default","name":"web-1","labels":{"a":"1","b":"2"},
        "networking":{"address":"192.0.2.1"}}],"total":1}"#;
    let expected: [&[&str]; 2] =
        [&["MESH", "NAME", "TAGS", "ADDRESS", "AGE"], &["default", "web-1", "a=1 b=2", "192.0.2.1", "never"]];
    of("dataplanes", dataplane.to_owned(), &expected);
}

#[test]
fn a_list_with_a_next_page_says_how_to_get_it() {
    let server = Server::start(|line| match line {
        "GET /meshes?size=1" => {
            (200, "", r#"{"items":[{"name":"a"}],"total":2,"next":"http://x/meshes?offset=1&size=1"}"#)
        }
        _ => (200, "", r#"{"items":[{"name":"b"}],"total":2,"next":null}"#),
    });
    let first = server.ursa(&["get", "meshes", "--size", "1"], "").stdout;
    assert!(
        first.ends_with("\n\nRerun command with --offset=1 argument to retrieve more resources\n"),
        "{first}"
    );
    let last = server.ursa(&["get", "meshes", "--size", "1", "--offset", "1"], "").stdout;
    assert!(last.contains("b ") && !last.contains("Rerun"), "{last}");
    // No footer in what programs read.
    assert!(!server.ursa(&["get", "meshes", "--size", "1", "-o", "json"], "").stdout.contains("Rerun"));
    assert_eq!(server.seen(), ["GET /meshes?size=1", "GET /meshes?offset=1&size=1", "GET /meshes?size=1"]);
}

#[test]
fn what_is_deleted_is_named_by_its_type() {
    let server = Server::start(|_| (200, "", "{}"));
    for (word, line, path) in [
        ("dataplane", "deleted Dataplane \"x\"\n", "DELETE /meshes/default/dataplanes/x"),
        ("mt", "deleted MeshTimeout \"x\"\n", "DELETE /meshes/default/meshtimeouts/x"),
        ("zone", "deleted Zone \"x\"\n", "DELETE /zones/x"),
    ] {
        let done = server.ursa(&["delete", word, "x"], "");
        assert_eq!((done.code, done.stdout.as_str()), (0, line), "{}", done.stderr);
        assert_eq!(server.seen().last().unwrap(), path);
    }
}

#[test]
fn zones_are_inspected_by_their_last_connection() {
    let body = r#"{"items":[{"name":"east","zoneInsight":{"subscriptions":[
        {"connectTime":"2020-01-01T00:00:00Z","disconnectTime":"2020-01-02T00:00:00Z",
         "status":{"total":{"responsesSent":"20","responsesRejected":"1"}}},
        {"connectTime":"2020-01-03T00:00:00Z","version":{"kumaCp":{"version":"1.2.3"}},
         "config":"{\"store\":{\"type\":\"embedded\"}}",
         "status":{"total":{"responsesSent":"22","responsesRejected":"2"}}}]}},{"name":"west"}]}"#;
    let server = Server::start(move |_| (200, "", body));
    let table = server.ursa(&["inspect", "zones"], "").stdout;
    let rows = cells(&table);
    assert_eq!(rows[0][..2], ["NAME", "STATUS"]);
    assert_eq!(rows[0][6..], ["ZONE-CP VERSION", "BACKEND"]);
    assert_eq!((&rows[1][..2], rows[1][3]), (&["east", "Online"][..], "never"));
    assert_eq!(rows[1][4..], ["42", "3", "1.2.3", "embedded"]);
    assert_eq!(rows[2], ["west", "Offline", "never", "never", "0", "0"]);
    assert_eq!(server.seen(), ["GET /zones/_overview"]);
}

#[test]
fn meshes_and_services_are_inspected_by_their_counts() {
    let server = Server::start(|line| match line {
        "GET /mesh-insights" => {
            (200, "", r#"{"items":[{"name":"default","dataplanes":{"total":10,"online":9}},{"name":"new"}]}"#)
        }
        _ => (
            200,
            "",
            r#"{"items":[{"mesh":"m","name":"backend","spec":{"state":"Available"},"status":{
            "dataplaneProxies":{"healthy":1,"total":2},"vips":[{"ip":"241.0.0.1"},{"ip":"fd00::1"}],
            "addresses":[{"hostname":"backend.svc.mesh.local"}]}}],"next":"/x?offset=7"}"#,
        ),
    });
    let meshes = server.ursa(&["inspect", "meshes"], "").stdout;
    assert_eq!(cells(&meshes), [["MESH", "DATAPLANES"], ["default", "9/10"], ["new", "0/0"]]);
    let services = server.ursa(&["inspect", "services", "-m", "m"], "").stdout;
    let rows = cells(&services);
    assert_eq!(rows[0], ["MESH", "NAME", "STATE", "HEALTHY", "VIPS", "HOSTNAMES"]);
    let row = ["m", "backend", "Available", "1/2", "241.0.0.1 fd00::1", "backend.svc.mesh.local"];
    assert_eq!(rows[1], row);
    assert!(services.contains("--offset=7"), "{services}");
    assert_eq!(server.seen(), ["GET /mesh-insights", "GET /meshes/m/meshservices"]);
}

#[test]
fn a_dry_allow_prints_the_policy_and_writes_nothing() {
    let server =
        Server::start(|_| (200, "", r#"{"items":[{"spec":{"trustDomain":"default.east.mesh.local"}}]}"#));
    let done = server.ursa(&["allow", "web", "backend", "--dry-run"], "");
    assert_eq!(done.code, 0, "{}", done.stderr);
    for part in [
        "type: MeshTrafficPermission",
        "name: allow-web-to-backend",
        "kuma.io/workload: backend",
        "type: Exact",
        "value: spiffe://default.east.mesh.local/workload/web",
    ] {
        assert!(done.stdout.contains(part), "{part}: {}", done.stdout);
    }
    assert_eq!(server.seen(), ["GET /meshes/default/meshtrusts"]);
}

#[test]
fn a_server_of_another_version_is_warned_of_once() {
    let server = Server::start(|line| match line {
        "GET /" => (200, "", r#"{"product":"Ursa","version":"9.8.7"}"#),
        _ => (200, "", r#"{"items":[],"total":0}"#),
    });
    let done = server.ursa(&["get", "meshes"], "");
    assert_eq!((done.code, done.stdout.as_str()), (0, "NAME   AGE\n"));
    assert_eq!(done.stderr.matches("the server is Ursa 9.8.7").count(), 1, "{}", done.stderr);
    assert!(done.stderr.starts_with("WARNING: You are using ursa version "), "{}", done.stderr);
    // What asks no server compares nothing.
    assert_eq!(server.ursa(&["generate", "signing-key"], "").stderr, "");
}

#[test]
fn the_version_in_detail_says_what_is_known() {
    let server = Server::start(|_| {
        (
            200,
            "",
            r#"{"product":"Ursa","version":"9.8.7","basedOnKuma":"3.0.0","instanceId":"i","clusterId":"c"}"#,
        )
    });
    let done = server.ursa(&["version", "-a"], "");
    let lines: Vec<&str> = done.stdout.lines().map(|line| line.trim().split(':').next().unwrap()).collect();
    let expected = [
        "Client",
        "git tag",
        "git commit",
        "build date",
        "target",
        "Server",
        "based on Kuma",
        "instance",
        "cluster",
    ];
    assert_eq!(lines, expected, "{}", done.stdout);
    assert_eq!(done.stderr, "");
}

/// An overview of a proxy, and no endpoint for more.
fn without_policies(line: &str) -> (u16, &'static str, &'static str) {
    match line {
        "GET /meshes/default/dataplanes/web/_overview" => (
            200,
            "",
            r#"{"name":"web","dataplaneInsight":{"mTLS":{"issuedBackend":"kri_mid_default_east__identity_",
            "certificateExpirationTime":"2030-01-01T00:00:00Z"},"subscriptions":[{"connectTime":"2020-01-01T00:00:00Z"}],
            "sync":[{"typeUrl":"x/envoy.config.cluster.v3.Cluster","total":3,"pending":1}],
            "rejections":[{"name":"bad","version":"1","message":"no such filter"}]}}"#,
        ),
        "GET /meshes/default/dataplanes/new/_overview" => (200, "", r#"{"name":"new"}"#),
        _ => (404, "", crate::support::NOT_FOUND),
    }
}

#[test]
fn a_proxy_is_inspected_without_its_policies() {
    let server = Server::start(without_policies);
    let done = server.ursa(&["inspect", "dataplane", "web"], "");
    assert_eq!(done.code, 0, "{}", done.stderr);
    for part in [
        "Online, ",
        "identity: kri_mid_default_east__identity_",
        "ends 2030-01-01",
        "Cluster",
        "no such filter",
    ] {
        assert!(done.stdout.contains(part), "{part}: {}", done.stdout);
    }
    let never = server.ursa(&["inspect", "dataplane", "new"], "");
    assert!(never.code == 0 && never.stdout.contains("Offline: no agent has ever"), "{}", never.stdout);
}

#[test]
fn what_is_not_served_yet_says_so() {
    let server = Server::start(without_policies);
    for kind in ["policies", "config"] {
        let done = server.ursa(&["inspect", "dataplane", "web", "--type", kind], "");
        assert!(done.code == 1 && done.stderr.contains("doesn't serve it yet"), "{kind}: {}", done.stderr);
        let absent = server.ursa(&["inspect", "dataplane", "absent", "--type", kind], "");
        assert!(absent.stderr.contains("Not found: what was asked for"), "{kind}: {}", absent.stderr);
    }
    assert!(ursa(&["inspect", "--help"]).stdout.contains("doesn't serve policies and config yet"));
}

#[test]
fn a_certificate_and_its_key_are_written_apart() {
    use std::os::unix::fs::PermissionsExt as _;
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (key, certificate) = (path("key.pem"), path("cert.pem"));
    let args = ["generate", "tls-certificate", "--type", "server", "--hostname", "control.example.com"];
    let done = ursa(&[&args[..], &["--key-file", &key, "--cert-file", &certificate]].concat());
    assert_eq!((done.code, done.stdout.as_str()), (0, ""), "{}", done.stderr);
    assert!(done.stderr.contains("Private key saved in") && done.stderr.contains("Certificate saved in"));
    assert!(std::fs::read_to_string(&key).unwrap().starts_with("-----BEGIN PRIVATE KEY-----"));
    assert_eq!(std::fs::metadata(&key).unwrap().permissions().mode() & 0o777, 0o600);
    assert!(std::fs::read_to_string(&certificate).unwrap().starts_with("-----BEGIN CERTIFICATE-----"));
    let done = ursa(&[&args[..], &["--key-file", "/nonexistent/key", "--cert-file", &certificate]].concat());
    assert!(done.code == 1 && done.stderr.contains("/nonexistent/key"), "{}", done.stderr);
    assert_eq!(ursa(&["generate", "tls-certificate", "--type", "server"]).code, 2);
}

#[test]
fn a_public_key_is_that_of_its_signing_key() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("key.pem");
    let path = file.to_str().unwrap();
    std::fs::write(&file, ursa(&["generate", "signing-key", "--format", "pem"]).stdout).unwrap();
    let public = |path: &str| ursa(&["generate", "public-key", "--signing-key-path", path]);
    let done = public(path);
    assert!(
        done.stdout.starts_with("-----BEGIN PUBLIC KEY-----\n")
            && done.stdout.ends_with("-----END PUBLIC KEY-----\n"),
        "{}{}",
        done.stdout,
        done.stderr
    );
    assert_eq!(public(path).stdout, done.stdout);
    std::fs::write(&file, "nonsense").unwrap();
    let done = public(path);
    assert!(done.code == 1 && done.stderr.contains("not a private key in PEM form"), "{}", done.stderr);
}
