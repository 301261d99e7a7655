//! A permission that changes is in force on connections that are open.

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use ursa_tests::lab::daemon::kill_pid;
use ursa_tests::lab::mesh::{Control, Node, PORT, Workload};
use ursa_tests::lab::pair::{Pair, SOON, URL};
use ursa_tests::lab::program::{self, Client};
use ursa_tests::lab::{Lab, Programs, wait};

/// How many answers must be as the new policy says, after the first.
const ENOUGH: usize = 200;

/// The files in which `backend`'s agent keeps the permissions that Envoy has acknowledged.
fn files(node: &Node) -> Vec<PathBuf> {
    let dir = node.state_dir().join("w/default.backend/xds/extensions");
    let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
    entries
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == "pb"))
        .collect()
}

/// The permission that Envoy has acknowledged, as it is on disk.
fn acknowledged(node: &Node) -> Vec<u8> {
    let files = files(node);
    assert_eq!(files.len(), 1, "one port, one permission: {files:?}");
    fs::read(&files[0]).unwrap()
}

/// Numbers that an Envoy counts, by name.
fn stats(node: &Node, workload: &Workload, filter: &str) -> String {
    let socket = node.run_dir().join("w").join(format!("default.{}", workload.name)).join("admin.sock");
    let mut stream = UnixStream::connect(socket).unwrap();
    write!(stream, "GET /stats?filter={filter} HTTP/1.1\r\nhost: envoy\r\nconnection: close\r\n\r\n")
        .unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let lines: Vec<&str> = text.lines().filter(|line| line.contains(": ") && line.contains('.')).collect();
    lines.join("\n")
}

/// What must not change: connections between the Envoys, and the called one's listeners.
fn connections(pair: &Pair) -> [String; 2] {
    [
        stats(&pair.node_a, &pair.web, "kri_msvc.*upstream_cx_total$"),
        stats(&pair.node_b, &pair.backend, "^listener_manager.listener_(added|modified|in_place_updated)$"),
    ]
}

/// When a change was in force, counted from the start of the command that makes it.
#[derive(Debug)]
struct Effect {
    /// The command had ended.
    written: Duration,
    /// The first answer under the new policy had come.
    answered: Duration,
    /// The acknowledged permission was on disk.
    acknowledged: Duration,
}

/// Changes the policy while requests go over one kept connection, which `from` and then `to` must be the answers to.
fn change(pair: &mut Pair, command: &[&str], from: u16, to: u16) -> Effect {
    let Pair { control, client, node_b, .. } = pair;
    let before = acknowledged(node_b);
    let begin = Instant::now();
    std::thread::scope(|scope| {
        let writing = scope.spawn(|| {
            control.ursa(command).unwrap();
            begin.elapsed()
        });
        let (mut answered, mut acknowledged_at, mut since) = (None, None, 0);
        while since < ENOUGH || acknowledged_at.is_none() {
            assert!(begin.elapsed() < SOON, "{command:?}: {answered:?}, {acknowledged_at:?}, {since} since");
            // Before the request is sent: whatever it meets then is the new policy.
            if acknowledged_at.is_none() && acknowledged(node_b) != before {
                acknowledged_at = Some(begin.elapsed());
            }
            let answer = client.get_kept(URL).unwrap();
            assert!(answer.kept, "{command:?}: the connection was dropped: {}", answer.brief());
            match answer.status {
                Some(status) if status == to => {
                    answered.get_or_insert_with(|| begin.elapsed());
                    since += 1;
                }
                Some(status) if status == from => {
                    assert!(
                        answered.is_none(),
                        "{command:?}: the old policy again, {since} answers after it"
                    );
                    assert!(
                        acknowledged_at.is_none(),
                        "{command:?}: the old policy, after the new one's ACK"
                    );
                }
                _ => panic!("{command:?}: {}", answer.brief()),
            }
        }
        Effect {
            written: writing.join().unwrap(),
            answered: answered.unwrap(),
            acknowledged: acknowledged_at.unwrap(),
        }
    })
}

#[test]
fn a_permission_acts_on_the_next_request_of_an_open_connection() {
    let mut pair = Pair::start().unwrap();
    pair.until_status(403).unwrap();
    // Opens the connection that is kept from now on.
    assert_eq!(pair.client.get_kept(URL).unwrap().status, Some(403));
    let connected = connections(&pair);
    assert!(connected.iter().all(|numbers| !numbers.is_empty()), "{connected:?}");
    let allow = ["allow", "web", "backend"];
    let deny = ["delete", "meshtrafficpermission", "allow-web-to-backend"];
    let mut effects = Vec::new();
    for _ in 0..10 {
        effects.push(change(&mut pair, &allow, 403, 200));
        effects.push(change(&mut pair, &deny, 200, 403));
    }
    assert_eq!(connections(&pair), connected, "a connection between the Envoys or a listener was replaced");
    let median = |of: fn(&Effect) -> Duration| {
        let mut all: Vec<Duration> = effects.iter().map(of).collect();
        all.sort_unstable();
        (all[all.len() / 2], all[all.len() - 1])
    };
    println!("from the start of the command, median and longest of {}:", effects.len());
    println!("  the command has ended        {:?}", median(|effect| effect.written));
    println!("  first answer under it        {:?}", median(|effect| effect.answered));
    println!("  acknowledged and on disk     {:?}", median(|effect| effect.acknowledged));
}

/// Asks until this status, and insists that nothing was let through meanwhile.
fn closed_until(pair: &mut Pair, status: u16, deadline: Duration) -> Duration {
    let what = format!("HTTP {status}");
    let (let_through, took) = wait::until(&what, deadline, || match pair.client.get(URL).unwrap() {
        answer if answer.ok() => Ok(true),
        answer if answer.status == Some(status) => Ok(false),
        answer => Err(answer.brief()),
    })
    .unwrap();
    assert!(!let_through, "a request was let through");
    took
}

fn kill_envoy(pair: &Pair) {
    let envoys = pair.backend.host.running("envoy");
    assert!(!envoys.is_empty());
    for envoy in envoys {
        kill_pid(envoy).unwrap();
    }
}

#[test]
fn a_restarted_envoy_has_the_permission_in_force_or_is_closed() {
    let mut pair = Pair::allowed().unwrap();
    let allowed = acknowledged(&pair.node_b);

    // The listener is there and its permission isn't, nor anybody who has it: Envoy waits its 15 s for it, and then
    // nobody passes.
    fs::remove_file(&files(&pair.node_b)[0]).unwrap();
    pair.control.daemon.kill();
    pair.node_b.agent.kill();
    kill_envoy(&pair);
    println!("without its permission closed until {:?}", closed_until(&mut pair, 403, SOON * 3));
    for _ in 0..20 {
        assert_eq!(pair.client.get(URL).unwrap().status, Some(403));
    }
    pair.control.restart().unwrap();
    pair.node_b.agent.restart().unwrap();
    println!("it arrives after {:?}", pair.until_served().unwrap());
    wait::until("the permission on disk again", SOON, || match files(&pair.node_b).len() {
        1 if acknowledged(&pair.node_b) == allowed => Ok(()),
        other => Err(format!("{other} files")),
    })
    .unwrap();

    // Nobody but the shim is there to say what is allowed.
    pair.control.daemon.kill();
    pair.node_b.agent.kill();
    kill_envoy(&pair);
    println!("allowed again by the shim after {:?}", pair.until_served().unwrap());
    pair.control.restart().unwrap();
    pair.node_b.agent.restart().unwrap();
    pair.node_b.wait_ready("backend", SOON).unwrap();

    // Withdrawn, acknowledged; then agent and Envoy die at once.
    pair.control.ursa(&["delete", "meshtrafficpermission", "allow-web-to-backend"]).unwrap();
    wait::until("the new permission on disk", SOON, || match acknowledged(&pair.node_b) {
        now if now == allowed => Err("the old one".to_owned()),
        _ => Ok(()),
    })
    .unwrap();
    pair.node_b.agent.kill();
    kill_envoy(&pair);
    println!("denied again by the shim after {:?}", closed_until(&mut pair, 403, SOON));
    pair.node_b.agent.restart().unwrap();
    pair.node_b.wait_ready("backend", SOON).unwrap();
    assert_eq!(pair.client.get(URL).unwrap().status, Some(403));
}

/// Bytes know no next request: what was open goes on until Envoy has drained it.
#[test]
fn a_permission_that_is_withdrawn_drains_open_connections_of_bytes() {
    let mut lab = Lab::new(&Programs::discover().unwrap()).unwrap();
    let control = Control::start(&mut lab).unwrap();
    let (web, backend) = (lab.net.host("web").unwrap(), lab.net.host("backend").unwrap());
    let _server = program::serve(&lab, &backend, "backend", PORT).unwrap();
    let mut node = Node::join(&mut lab, "node", &control.ticket(&["web", "backend"]).unwrap()).unwrap();
    let web = node.add("web", &web).unwrap();
    node.add_with("backend", &backend, |file| file["networking"]["inbound"][0]["protocol"] = "tcp".into())
        .unwrap();
    for workload in ["web", "backend"] {
        node.wait_ready(workload, SOON).unwrap();
    }
    let (mut open, mut new) =
        (Client::start(&lab, &web.host).unwrap(), Client::start(&lab, &web.host).unwrap());
    control.ursa(&["allow", "web", "backend"]).unwrap();
    wait::until("an open connection", SOON, || match open.get_kept(URL).unwrap() {
        answer if answer.ok() => Ok(()),
        answer => Err(answer.brief()),
    })
    .unwrap();

    control.ursa(&["delete", "meshtrafficpermission", "allow-web-to-backend"]).unwrap();
    let withdrawn = Instant::now();
    wait::until("new connections to be refused", SOON, || match new.get(URL).unwrap() {
        answer if answer.ok() => Err(answer.brief()),
        _ => Ok(()),
    })
    .unwrap();
    let refused = withdrawn.elapsed();
    let mut served = 0;
    wait::until("the open connection to be closed", SOON, || match open.get_kept(URL).unwrap() {
        answer if answer.ok() => {
            assert!(answer.kept);
            served += 1;
            Err(format!("{served} answers"))
        }
        _ => Ok(()),
    })
    .unwrap();
    let closed = withdrawn.elapsed();
    println!("new connections refused after {refused:?}; the open one closed after {closed:?}");
    // docs/concepts.md says at once, and 5 s; a loaded machine has the rest.
    assert!(refused < Duration::from_secs(2), "new connections were let through for {refused:?}");
    assert!(closed < Duration::from_secs(10), "an open connection was served for {closed:?}");
}
