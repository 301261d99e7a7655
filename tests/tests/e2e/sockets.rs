//! A workload's sockets give nothing to anybody else, tried by real connections.

use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ursa_tests::lab::mesh;
use ursa_tests::lab::net::Host;
use ursa_tests::lab::pair::{Pair, SOON};
use ursa_tests::lab::program::Client;

fn sockets(dir: &Path) -> Vec<PathBuf> {
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

/// What a connection to a socket gives to this user in this namespace.
fn intrude(pair: &Pair, host: &Host, uid: u32, path: &Path) -> String {
    let mut command = host.command(&pair.lab.programs.path("lab-app"));
    command.args(["connect", "--uid", &uid.to_string(), "--path"]).arg(path);
    mesh::run(&mut command, "").unwrap().trim().to_owned()
}

/// Another workload's proxy and program, where they live; an ordinary program beside the workload; and its own proxy's
/// user in another workload's place.
fn intruders(pair: &Pair) -> Vec<(&Host, u32)> {
    let other = pair.backend.uid + 1;
    vec![
        (&pair.web.host, other),
        (&pair.web.host, 65534),
        (&pair.backend.host, 65534),
        (&pair.node_b.host, other),
    ]
}

#[test]
fn no_other_workload_gets_into_a_workloads_sockets() {
    let pair = Pair::start().unwrap();
    let all = sockets(&pair.node_b.run_dir());
    for name in ["xds.sock", "control.sock", "admin.sock", "agent.sock"] {
        assert!(all.iter().any(|path| path.ends_with(name)), "no {name} among {all:?}");
    }
    // Envoy's own user gets in, so the tool below can tell a door from a wall.
    let xds = pair.node_b.socket_dir("backend").join("xds.sock");
    let own = intrude(&pair, &pair.backend.host, pair.backend.uid, &xds);
    assert!(own.starts_with("answered"), "{own}");

    let processes: Vec<i32> =
        ["envoy", "ursa-shim"].iter().flat_map(|program| pair.backend.host.running(program)).collect();
    assert!(processes.len() >= 2, "{processes:?}");
    for (host, uid) in intruders(&pair) {
        for path in &all {
            let got = intrude(&pair, host, uid, path);
            assert!(got.starts_with("refused: Permission denied"), "uid {uid}: {}: {got}", path.display());
            // The same file by the root and the working folder of the processes that may open it.
            for process in &processes {
                let by_process =
                    PathBuf::from(format!("/proc/{process}/root")).join(path.strip_prefix("/").unwrap());
                let got = intrude(&pair, host, uid, &by_process);
                assert!(got.starts_with("refused: Permission denied"), "{}: {got}", by_process.display());
            }
        }
    }
}

#[test]
fn nothing_is_bound_to_an_abstract_name_and_dns_only_to_loopback() {
    let pair = Pair::start().unwrap();
    for host in [&pair.web.host, &pair.backend.host] {
        for process in host.running("envoy") {
            let table = std::fs::read_to_string(format!("/proc/{process}/net/unix")).unwrap();
            let names: Vec<&str> = table
                .lines()
                .filter_map(|line| line.split_whitespace().nth(7))
                .filter(|name| name.starts_with('@'))
                .collect();
            // These have no owner and no mode, and whoever shares the namespace could connect.
            assert!(names.is_empty(), "{names:?}");
        }
    }

    // By the workload's address, from another workload and from outside: neither TCP nor UDP has an answer.
    let backend = &pair.backend.host;
    for host in [&pair.web.host, &pair.stranger] {
        let mut client = Client::start(&pair.lab, host).unwrap();
        for address in [backend.v4.clone(), format!("[{}]", backend.v6)] {
            let answer = client.get(&format!("http://{address}:15053/")).unwrap();
            assert_eq!(answer.status, None, "{}", answer.brief());
        }
    }
    let asked = |host: &Host, server: std::net::SocketAddr| {
        host.within(async || {
            // `backend.svc.mesh.local`, type A.
            let mut query = vec![0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
            for label in ["backend", "svc", "mesh", "local"] {
                query.push(u8::try_from(label.len())?);
                query.extend_from_slice(label.as_bytes());
            }
            query.extend_from_slice(&[0, 0, 1, 0, 1]);
            let any = if server.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
            let socket = tokio::net::UdpSocket::bind(any).await?;
            let mut answer = [0; 512];
            let exchange = async {
                socket.connect(server).await?;
                socket.send(&query).await?;
                socket.recv(&mut answer).await
            };
            Ok(matches!(tokio::time::timeout(Duration::from_secs(1), exchange).await, Ok(Ok(_))))
        })
        .unwrap()
    };
    for address in ["127.0.0.1:15053", "[::1]:15053"] {
        assert!(asked(backend, address.parse().unwrap()), "its own loopback {address} answers");
    }
    for address in [format!("{}:15053", backend.v4), format!("[{}]:15053", backend.v6)] {
        assert!(!asked(&pair.stranger, address.parse().unwrap()), "{address} answers a stranger");
    }
    assert!(
        !asked(&pair.stranger, "127.0.0.1:15053".parse().unwrap()),
        "somebody answers in the stranger's place"
    );
}

#[test]
fn a_socket_that_was_opened_to_everybody_still_asks_who_comes() {
    let pair = Pair::start().unwrap();
    let dir = pair.node_b.socket_dir("backend");
    let open = |path: &Path| std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o777)).unwrap();
    let agent = pair.node_b.run_dir().join("agent.sock");
    for path in [&dir, &dir.join("xds.sock"), &dir.join("control.sock"), &agent] {
        open(path);
    }
    let shim_log = pair.node_b.run_dir().join("log").join("default.backend.log");
    let other = pair.backend.uid + 1;

    let got = intrude(&pair, &pair.web.host, other, &dir.join("xds.sock"));
    assert_eq!(got, "closed");
    pair.node_b.agent.wait_said(&["WARN", "refused a client of xds.sock", &other.to_string()], SOON).unwrap();

    let got = intrude(&pair, &pair.web.host, other, &agent);
    assert_eq!(got, "closed");
    pair.node_b
        .agent
        .wait_said(&["WARN", "refused a client of agent.sock", &other.to_string()], SOON)
        .unwrap();

    // The proxy's own user too has no business with these two.
    for uid in [other, pair.backend.uid] {
        let got = intrude(&pair, &pair.web.host, uid, &dir.join("control.sock"));
        assert!(got.contains("only root and the agent may use this socket"), "{got}");
    }
    let got = intrude(&pair, &pair.backend.host, pair.backend.uid, &agent);
    assert_eq!(got, "closed");
    let log = std::fs::read_to_string(&shim_log).unwrap();
    assert!(log.contains("refused a client of control.sock") && log.contains(&other.to_string()), "{log}");
}

#[test]
fn keys_and_certificates_are_read_by_their_own_proxy_only() {
    let pair = Pair::start().unwrap();
    let dir = pair.node_b.identity_dir("backend");
    let mut files = Vec::new();
    collect(&pair.node_b.state_dir(), &mut files);
    assert!(files.iter().any(|path| path.starts_with(&dir)), "no key of backend among {files:?}");
    assert!(files.iter().any(|path| path.ends_with("node/key.pem")), "no node key among {files:?}");
    let reads = |uid: u32, path: &Path| {
        let mut command = std::process::Command::new("setpriv");
        command.args([
            format!("--reuid={uid}"),
            format!("--regid={uid}"),
            "--clear-groups".into(),
            "cat".into(),
        ]);
        command.arg(path).output().unwrap().status.success()
    };
    for path in &files {
        for uid in [pair.backend.uid + 1, 65534] {
            assert!(!reads(uid, path), "uid {uid} reads {}", path.display());
        }
        if path.to_string_lossy().contains("/node/") {
            assert!(!reads(pair.backend.uid, path), "a proxy reads {}", path.display());
        }
    }
    UnixStream::connect(pair.node_b.run_dir().join("agent.sock")).expect("root is welcome");
}

fn collect(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() { collect(&path, found) } else { found.push(path) }
    }
}
