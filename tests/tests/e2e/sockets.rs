//! A workload's sockets give nothing to anybody else, tried by real connections.

use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ursa_tests::lab::mesh::{self, Control, Node};
use ursa_tests::lab::net::Host;
use ursa_tests::lab::pair::{Pair, SOON};
use ursa_tests::lab::program::Client;
use ursa_tests::lab::{Lab, Programs};

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
fn intrude(lab: &Lab, host: &Host, uid: u32, path: &Path) -> String {
    let mut command = host.command(&lab.programs.path("lab-app"));
    command.args(["connect", "--uid", &uid.to_string(), "--path"]).arg(path);
    mesh::run(&mut command, "").unwrap().trim().to_owned()
}

/// Another workload's proxy and program, where they live; an ordinary program beside the workload; and its own proxy's
/// user in another workload's place.
fn intruders(pair: &Pair) -> Vec<(&Host, u32)> {
    let other = pair.web.uid;
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
    // Envoy's own user gets in, though nobody but Envoy is answered, so the tool below can tell a door from a wall.
    let xds = pair.node_b.socket_dir("backend").join("xds.sock");
    let own = intrude(&pair.lab, &pair.backend.host, pair.backend.uid, &xds);
    assert_eq!(own, "closed");

    let processes: Vec<i32> =
        ["envoy", "ursa-shim"].iter().flat_map(|program| pair.backend.host.running(program)).collect();
    assert!(processes.len() >= 2, "{processes:?}");
    for (host, uid) in intruders(&pair) {
        for path in &all {
            let got = intrude(&pair.lab, host, uid, path);
            assert!(got.starts_with("refused: Permission denied"), "uid {uid}: {}: {got}", path.display());
            // The same file by the root and the working folder of the processes that may open it.
            for process in &processes {
                let by_process =
                    PathBuf::from(format!("/proc/{process}/root")).join(path.strip_prefix("/").unwrap());
                let got = intrude(&pair.lab, host, uid, &by_process);
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
    let other = pair.web.uid;

    let got = intrude(&pair.lab, &pair.web.host, other, &dir.join("xds.sock"));
    assert_eq!(got, "closed");
    pair.node_b.agent.wait_said(&["WARN", "refused a client of xds.sock", &other.to_string()], SOON).unwrap();

    let got = intrude(&pair.lab, &pair.web.host, other, &agent);
    assert_eq!(got, "closed");
    pair.node_b
        .agent
        .wait_said(&["WARN", "refused a client of agent.sock", &other.to_string()], SOON)
        .unwrap();

    // The proxy's own user too has no business with these two.
    for uid in [other, pair.backend.uid] {
        let got = intrude(&pair.lab, &pair.web.host, uid, &dir.join("control.sock"));
        assert!(got.contains("only root and the agent may use this socket"), "{got}");
    }
    let got = intrude(&pair.lab, &pair.backend.host, pair.backend.uid, &agent);
    assert_eq!(got, "closed");
    let log = std::fs::read_to_string(&shim_log).unwrap();
    let told =
        |line: &str| line.contains("refused a client of control.sock") && line.contains(&other.to_string());
    assert!(log.lines().any(told), "{log}");
}

#[test]
fn keys_and_certificates_are_read_by_their_own_proxy_only() {
    let pair = Pair::start().unwrap();
    let dir = pair.node_b.identity_dir("backend");
    let mut files = Vec::new();
    collect(&pair.node_b.state_dir(), &mut files);
    assert!(files.iter().any(|path| path.starts_with(&dir)), "no key of backend among {files:?}");
    assert!(files.iter().any(|path| path.ends_with("node/key.pem")), "no node key among {files:?}");
    for path in &files {
        for uid in [pair.web.uid, 65534] {
            assert!(!reads(uid, path), "uid {uid} reads {}", path.display());
        }
        if path.to_string_lossy().contains("/node/") {
            assert!(!reads(pair.backend.uid, path), "a proxy reads {}", path.display());
        }
    }
    UnixStream::connect(pair.node_b.run_dir().join("agent.sock")).expect("root is welcome");
}

/// Whether this user can read a file.
fn reads(uid: u32, path: &Path) -> bool {
    let mut command = std::process::Command::new("setpriv");
    command.args([format!("--reuid={uid}"), format!("--regid={uid}"), "--clear-groups".into(), "cat".into()]);
    command.arg(path).output().unwrap().status.success()
}

/// The narrowest place: one agent, one folder, and nothing between the two but their users.
#[test]
fn two_workloads_of_one_node_keep_out_of_each_others_place() {
    let mut lab = Lab::new(&Programs::discover().unwrap()).unwrap();
    let control = Control::start(&mut lab).unwrap();
    let hosts = [lab.net.host("web").unwrap(), lab.net.host("backend").unwrap()];
    let mut node = Node::join(&mut lab, "node", &control.ticket(&["web", "backend"]).unwrap()).unwrap();
    let web = node.add("web", &hosts[0]).unwrap();
    let backend = node.add("backend", &hosts[1]).unwrap();
    for workload in [&web, &backend] {
        node.wait_ready(&workload.name, SOON).unwrap();
    }
    for (thief, victim) in [(&web, &backend), (&backend, &web)] {
        for envoy in thief.host.running("envoy") {
            let owner = std::fs::metadata(format!("/proc/{envoy}")).unwrap().uid();
            assert_eq!(owner, thief.uid, "{}'s Envoy has another user than is tried below", thief.name);
        }
        // Its own doors open to it, though nobody but its Envoy is answered there.
        let own = node.socket_dir(&thief.name).join("xds.sock");
        assert_eq!(intrude(&lab, &thief.host, thief.uid, &own), "closed", "{}", thief.name);

        let doors = sockets(&node.socket_dir(&victim.name));
        for name in ["xds.sock", "control.sock", "admin.sock"] {
            assert!(doors.iter().any(|path| path.ends_with(name)), "no {name} among {doors:?}");
        }
        let processes = [victim.host.running("envoy"), victim.host.running("ursa-shim")].concat();
        assert!(processes.len() >= 2, "{processes:?}");
        for door in doors.iter().chain([&node.run_dir().join("agent.sock")]) {
            let within = door.strip_prefix("/").unwrap();
            let ways =
                processes.iter().map(|process| PathBuf::from(format!("/proc/{process}/root")).join(within));
            for way in ways.chain([door.clone()]) {
                for host in [&thief.host, &victim.host] {
                    let got = intrude(&lab, host, thief.uid, &way);
                    assert!(got.starts_with("refused: Permission denied"), "{}: {got}", way.display());
                }
            }
        }

        let mut files = Vec::new();
        collect(&node.state_dir().join("w").join(format!("default.{}", victim.name)), &mut files);
        collect(&node.state_dir().join("node"), &mut files);
        for dir in [node.identity_dir(&victim.name), node.state_dir().join("node")] {
            assert!(files.iter().any(|path| path.starts_with(&dir)), "nothing in {}", dir.display());
        }
        for path in &files {
            assert!(!reads(thief.uid, path), "{}'s proxy reads {}", thief.name, path.display());
        }
        // Were it unreadable to everybody, this would prove nothing.
        assert!(
            files.iter().any(|path| reads(victim.uid, path)),
            "{} reads none of its own files",
            victim.name
        );
    }
}

fn collect(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() { collect(&path, found) } else { found.push(path) }
    }
}
