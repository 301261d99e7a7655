//! The shim and its launcher with the real Envoy, each test in a network namespace of its own.
//!
//! They need root, and `URSA_ENVOY` must name an Envoy binary: a test that can't run fails.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::Ipv4Addr;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use hickory_proto::op::ResponseCode;
use hickory_proto::rr::RecordType;
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::time::timeout;
use ursa_agent::launcher::{Launcher, Origin, ShimSpec};
use ursa_agent::relay;
use ursa_agent::shim::client::{ClientError, ShimClient};
use ursa_agent::shim::protocol::{EnvoyState, XdsRole};

use crate::lab::{Lab, PATIENCE, UID, gone, is_zombie, live, running, status_line};

#[tokio::test]
async fn shim_and_envoy_hold_no_right_and_come_back_from_kill_9() {
    let lab = Lab::new("kill");
    let launcher = lab.launcher();
    let mut state = launcher.ensure(lab.spec()).await.unwrap();
    let (shim, origin) = running(&mut state, 0).await;
    assert_eq!(origin, Origin::Started);
    let client = ShimClient::connect(&lab.shim_dir()).await.unwrap();
    let first = live(&client, None).await;
    let envoy = first.pid.unwrap();
    for pid in [shim, envoy] {
        assert_eq!(status_line(pid, "Uid:"), format!("{UID}\t{UID}\t{UID}\t{UID}"));
        assert_eq!(status_line(pid, "Gid:"), format!("{UID}\t{UID}\t{UID}\t{UID}"));
        assert_eq!(status_line(pid, "Groups:"), "");
        assert_eq!(status_line(pid, "NoNewPrivs:"), "1");
        for set in ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"] {
            assert_eq!(status_line(pid, set), "0000000000000000", "{set}");
        }
        let namespace = |path: String| fs::metadata(path).unwrap();
        let (theirs, lab_s) =
            (namespace(format!("/proc/{pid}/ns/net")), namespace(format!("/run/netns/{}", lab.name)));
        assert_eq!(std::os::unix::fs::MetadataExt::ino(&theirs), std::os::unix::fs::MetadataExt::ino(&lab_s));
    }

    kill(Pid::from_raw(envoy), Signal::SIGKILL).unwrap();
    let second = live(&client, Some(envoy)).await;
    assert_eq!((second.epoch, second.restarts), (1, 1));
    assert!(second.last_exit.unwrap().contains("SIGKILL"));
    assert_eq!(client.status().await.unwrap().pid, shim, "the shim is the same");

    kill(Pid::from_raw(shim), Signal::SIGKILL).unwrap();
    gone(second.pid.unwrap()).await;
    let (next, _) = running(&mut state, shim).await;
    let client = ShimClient::connect(&lab.shim_dir()).await.unwrap();
    assert_eq!(client.hello().pid, next);
    let third = live(&client, None).await;

    launcher.stop("web", Duration::ZERO).await.unwrap();
    for pid in [next, third.pid.unwrap()] {
        assert!(!fs::exists(format!("/proc/{pid}")).unwrap(), "pid {pid} is left");
    }
    assert!(!lab.shim_dir().exists());
    assert!(launcher.list().await.unwrap().is_empty());
    launcher.stop("web", Duration::ZERO).await.unwrap();
}

#[tokio::test]
async fn nothing_piles_up_when_shim_and_envoy_die_again_and_again() {
    let lab = Lab::new("loop");
    let launcher = lab.launcher();
    let mut state = launcher.ensure(lab.spec()).await.unwrap();
    let mut shim = 0;
    for round in 0..12 {
        shim = running(&mut state, shim).await.0;
        let client = ShimClient::connect(&lab.shim_dir()).await.unwrap();
        // Sometimes while it starts, sometimes while it serves.
        let envoy = if round % 2 == 0 { live(&client, None).await } else { client.hello().envoy.clone() };
        if let (Some(envoy), 0 | 3) = (envoy.pid, round % 4) {
            kill(Pid::from_raw(envoy), Signal::SIGKILL).unwrap();
        }
        kill(Pid::from_raw(shim), Signal::SIGKILL).unwrap();
        if let Some(envoy) = envoy.pid {
            gone(envoy).await;
        }
    }
    running(&mut state, shim).await;
    let client = ShimClient::connect(&lab.shim_dir()).await.unwrap();
    live(&client, None).await;
    let pids = Command::new("ip").args(["netns", "pids", &lab.name]).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&pids.stdout).lines().count(), 2, "one shim and one Envoy");
    launcher.stop("web", Duration::ZERO).await.unwrap();
}

#[tokio::test]
async fn a_shim_outlives_its_launcher_and_is_adopted_by_the_next() {
    let lab = Lab::new("adopt");
    let first = lab.launcher();
    let mut state = first.ensure(lab.spec()).await.unwrap();
    let (shim, _) = running(&mut state, 0).await;
    let client = ShimClient::connect(&lab.shim_dir()).await.unwrap();
    let envoy = live(&client, None).await.pid;
    drop((first, state, client));

    let second = lab.launcher();
    let found = second.list().await.unwrap();
    assert_eq!((found.len(), found[0].id.as_str(), found[0].pid), (1, "web", Some(shim)));
    let mut state = second.ensure(lab.spec()).await.unwrap();
    assert_eq!(running(&mut state, 0).await, (shim, Origin::Adopted));
    let client = ShimClient::connect(&lab.shim_dir()).await.unwrap();
    assert_eq!(client.hello().envoy.pid, envoy);
    // Once adopted, it is restarted like one that was started.
    kill(Pid::from_raw(shim), Signal::SIGKILL).unwrap();
    let (next, origin) = running(&mut state, shim).await;
    assert!(next != shim && origin == Origin::Started);
    second.stop("web", Duration::ZERO).await.unwrap();
}

#[tokio::test]
async fn the_xds_socket_passes_to_the_agent_and_back() {
    let lab = Lab::new("xds");
    let launcher = lab.launcher();
    launcher.ensure(lab.spec()).await.unwrap();
    let client = ShimClient::connect(&lab.shim_dir()).await.unwrap();
    assert_eq!(client.status().await.unwrap().xds, XdsRole::LastGood);
    let listener = client.take_xds().await.unwrap();
    assert_eq!(client.status().await.unwrap().xds, XdsRole::Agent);
    let listener = tokio::net::UnixListener::from_std(listener).unwrap();
    let path = lab.shim_dir().join("xds.sock");
    let _envoy = tokio::net::UnixStream::connect(&path).await.unwrap();
    timeout(PATIENCE, listener.accept()).await.unwrap().unwrap();

    // Another agent takes the role: this one is hung up.
    let other = ShimClient::connect(&lab.shim_dir()).await.unwrap();
    other.take_xds().await.unwrap();
    timeout(PATIENCE, client.closed()).await.unwrap();
    assert!(matches!(client.status().await, Err(ClientError::Lost { .. })));

    // Nobody holds it any more: the shim answers its Envoy, and refuses everybody else, even root.
    drop((client, other, listener));
    let third = ShimClient::connect(&lab.shim_dir()).await.unwrap();
    let mut stranger = tokio::net::UnixStream::connect(&path).await.unwrap();
    let mut nothing = Vec::new();
    let read = tokio::io::AsyncReadExt::read_to_end(&mut stranger, &mut nothing);
    let ended = timeout(PATIENCE, read).await.expect("the shim does not answer on xds.sock");
    assert!(ended.map_or_else(|error| error.kind() == std::io::ErrorKind::ConnectionReset, |read| read == 0));
    assert_eq!(third.status().await.unwrap().xds, XdsRole::LastGood);
    third.take_xds().await.unwrap();
    assert_eq!(third.status().await.unwrap().xds, XdsRole::Agent);
    launcher.stop("web", Duration::ZERO).await.unwrap();
}

/// A bootstrap that asks for everything on xds.sock.
fn dynamic_bootstrap(w: &Path) -> String {
    let ads = serde_json::json!({ "ads": {}, "resource_api_version": "V3" });
    serde_json::json!({
        "node": { "id": "default.web", "cluster": "web" },
        "admin": { "address": { "pipe": { "path": w.join("admin.sock") } } },
        "dynamic_resources": {
            "ads_config": {
                "api_type": "DELTA_GRPC", "transport_api_version": "V3",
                "grpc_services": [{ "envoy_grpc": { "cluster_name": "ads" } }]
            },
            "cds_config": ads, "lds_config": ads
        },
        "static_resources": { "clusters": [{
            "name": "ads",
            "typed_extension_protocol_options": {
                "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                    "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
                    "explicit_http_config": { "http2_protocol_options": {} }
                }
            },
            "load_assignment": { "cluster_name": "ads", "endpoints": [{ "lb_endpoints": [{ "endpoint": {
                "address": { "pipe": { "path": w.join("xds.sock") } }
            } }] }] }
        }] }
    })
    .to_string()
}

fn clusters(w: &Path) -> String {
    let mut admin = std::os::unix::net::UnixStream::connect(w.join("admin.sock")).unwrap();
    admin.write_all(b"GET /clusters HTTP/1.1\r\nhost: envoy\r\nconnection: close\r\n\r\n").unwrap();
    let mut response = String::new();
    admin.read_to_string(&mut response).unwrap();
    response
}

#[tokio::test]
async fn envoy_comes_back_with_its_last_configuration_while_the_agent_is_dead() {
    let lab = Lab::new("last");
    let resource = ursa_wire::discovery::Resource {
        version: "1".into(),
        resource: Some(ursa_wire::discovery::Any {
            type_url: "type.googleapis.com/envoy.config.cluster.v3.Cluster".into(),
            // Its name and nothing else.
            value: b"\x0a\x0aremembered".to_vec().into(),
        }),
        name: "remembered".into(),
    };
    let bytes = prost::Message::encode_to_vec(&resource).into();
    let (name, item) = relay::item_from_encoded(bytes).unwrap();
    let reader = Some(relay::Reader { uid: UID, gid: UID });
    relay::LastGood::new(lab.dir.path().join("last-good/xds"))
        .readable_by(reader)
        .store(&[(relay::Kind::Cluster, name, item)])
        .unwrap();
    fs::write(lab.shim_dir().join("bootstrap.json"), dynamic_bootstrap(&lab.shim_dir())).unwrap();

    let launcher = lab.launcher();
    launcher.ensure(lab.spec()).await.unwrap();
    let client = ShimClient::connect(&lab.shim_dir()).await.unwrap();
    let first = live(&client, None).await;
    assert!(clusters(&lab.shim_dir()).contains("remembered::"));
    kill(Pid::from_raw(first.pid.unwrap()), Signal::SIGKILL).unwrap();
    live(&client, first.pid).await;
    assert!(clusters(&lab.shim_dir()).contains("remembered::"));
    launcher.stop("web", Duration::ZERO).await.unwrap();
}

#[tokio::test]
async fn names_resolve_without_an_agent() {
    let lab = Lab::new("dns");
    let launcher = lab.launcher();
    launcher.ensure(lab.spec()).await.unwrap();
    let backend = "backend.svc.mesh.local.";
    assert_eq!(lab.resolve(backend, RecordType::A), (ResponseCode::NoError, vec![[241, 0, 0, 1].into()]));
    assert_eq!(lab.resolve("nobody.mesh.local.", RecordType::A).0, ResponseCode::NXDomain);
    assert_eq!(lab.resolve_over_tcp(backend), [Ipv4Addr::new(241, 0, 0, 1)]);
    // There is no resolv.conf, so there is nobody to ask.
    assert_eq!(lab.resolve("debian.org.", RecordType::A).0, ResponseCode::ServFail);

    // A bad table changes nothing, and says why.
    lab.write_table(r#"{"names":{"a..b":["241.0.0.9"]},"domains":["mesh.local"]}"#);
    let client = ShimClient::connect(&lab.shim_dir()).await.unwrap();
    let refused = client.reload_dns().await.unwrap_err().to_string();
    assert!(refused.contains("a..b"), "{refused}");
    assert!(client.status().await.unwrap().dns.error.is_some());
    assert_eq!(lab.resolve(backend, RecordType::A).1, [Ipv4Addr::new(241, 0, 0, 1)]);

    lab.write_table(r#"{"names":{"backend.svc.mesh.local":["241.0.0.2"]},"domains":["mesh.local"]}"#);
    client.reload_dns().await.unwrap();
    assert_eq!(lab.resolve(backend, RecordType::A).1, [Ipv4Addr::new(241, 0, 0, 2)]);

    // A resolver appears: what isn't ours is forwarded, with the id that was asked with.
    let (ready, started) = std::sync::mpsc::channel();
    let upstream = std::thread::spawn({
        let namespace = fs::File::open(Path::new("/run/netns").join(&lab.name)).unwrap();
        move || {
            setns(namespace, CloneFlags::CLONE_NEWNET).unwrap();
            let socket = std::net::UdpSocket::bind("127.0.0.53:53").unwrap();
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
            ready.send(()).unwrap();
            let mut query = [0; 512];
            let (length, client) = socket.recv_from(&mut query).unwrap();
            query[2] |= 0x80;
            // A forged answer first: it must be ignored.
            let mut forged = query[..length].to_vec();
            forged[0] ^= 1;
            socket.send_to(&forged, client).unwrap();
            query[3] = 5;
            socket.send_to(&query[..length], client).unwrap();
        }
    });
    started.recv().unwrap();
    fs::write(lab.dir.path().join("resolv.conf"), "nameserver 127.0.0.53\n").unwrap();
    // The list of servers is believed for a second.
    tokio::time::sleep(Duration::from_millis(1100)).await;
    assert_eq!(lab.resolve("debian.org.", RecordType::A).0, ResponseCode::Refused);
    upstream.join().unwrap();
    launcher.stop("web", Duration::ZERO).await.unwrap();
}

#[tokio::test]
async fn sigterm_drains_and_leaves_nothing() {
    let lab = Lab::new("term");
    let launcher = lab.launcher();
    launcher.ensure(lab.spec()).await.unwrap();
    let client = ShimClient::connect(&lab.shim_dir()).await.unwrap();
    let envoy = live(&client, None).await.pid.unwrap();
    client.drain(None).await.unwrap();
    let mut states = client.envoy();
    timeout(PATIENCE, states.wait_for(|envoy| envoy.state == EnvoyState::Draining)).await.unwrap().unwrap();
    // Without a connection to wait for, stopping does not use up its time to drain.
    let begun = tokio::time::Instant::now();
    launcher.stop("web", Duration::from_secs(15)).await.unwrap();
    assert!(begun.elapsed() < Duration::from_secs(10), "took {:?}", begun.elapsed());
    assert!(!fs::exists(format!("/proc/{envoy}")).unwrap());
    let owned = |entry: &fs::DirEntry| std::os::unix::fs::MetadataExt::uid(&entry.metadata().unwrap()) == UID;
    assert_eq!(fs::read_dir("/dev/shm").unwrap().map(Result::unwrap).filter(owned).count(), 0);
}

#[tokio::test]
async fn a_hung_shim_is_not_replaced_but_can_be_removed() {
    let lab = Lab::new("hung");
    let first = lab.launcher();
    let mut state = first.ensure(lab.spec()).await.unwrap();
    let (shim, _) = running(&mut state, 0).await;
    let client = ShimClient::connect(&lab.shim_dir()).await.unwrap();
    let envoy = live(&client, None).await.pid.unwrap();
    drop((first, client));
    kill(Pid::from_raw(shim), Signal::SIGSTOP).unwrap();
    let second = lab.launcher();
    let error = second.ensure(lab.spec()).await.unwrap_err().to_string();
    assert!(error.contains("neither adopted nor replaced"), "{error}");
    assert!(!is_zombie(envoy), "Envoy serves on");
    second.stop("web", Duration::from_secs(60)).await.unwrap();
    gone(shim).await;
    gone(envoy).await;
}

#[tokio::test]
async fn nobody_else_is_stopped_in_a_shims_place() {
    let lab = Lab::new("place");
    let launcher = lab.launcher();
    let mut state = launcher.ensure(lab.spec()).await.unwrap();
    let (shim, _) = running(&mut state, 0).await;
    // What the sidecar's user may do: its directory is its own. The other socket is root's, bound by this process.
    let control = lab.shim_dir().join("control.sock");
    let other = lab.dir.path().join("other.sock");
    let _bound = std::os::unix::net::UnixListener::bind(&other).unwrap();
    fs::remove_file(&control).unwrap();
    std::os::unix::fs::symlink(&other, &control).unwrap();
    let error = lab.launcher().stop("web", Duration::ZERO).await.unwrap_err().to_string();
    assert!(error.contains("no socket"), "{error}");
    fs::rename(&other, &control).unwrap();
    let error = lab.launcher().stop("web", Duration::ZERO).await.unwrap_err().to_string();
    assert!(error.contains("left alone"), "{error}");
    assert!(control.exists() && !is_zombie(shim), "what isn't stopped keeps its directory");
    // Who started it needs no socket to find it.
    launcher.stop("web", Duration::ZERO).await.unwrap();
    gone(shim).await;
    assert!(!lab.shim_dir().exists());
}

#[tokio::test]
async fn a_shim_ends_by_sigterm_as_by_a_service_manager() {
    let lab = Lab::new("sig");
    let launcher = lab.launcher();
    let mut state = launcher.ensure(lab.spec()).await.unwrap();
    let (shim, _) = running(&mut state, 0).await;
    let client = ShimClient::connect(&lab.shim_dir()).await.unwrap();
    let envoy = live(&client, None).await.pid.unwrap();
    // Nobody starts it again.
    drop(launcher);
    kill(Pid::from_raw(shim), Signal::SIGTERM).unwrap();
    timeout(PATIENCE, client.closed()).await.unwrap();
    gone(shim).await;
    gone(envoy).await;
    assert_eq!(client.envoy().borrow().state, EnvoyState::Draining);
    let next = lab.launcher();
    assert_eq!(next.list().await.unwrap()[0].pid, None);
    next.stop("web", Duration::ZERO).await.unwrap();
    assert!(!lab.shim_dir().exists());
}

#[tokio::test]
async fn others_have_no_word_on_the_control_socket() {
    let lab = Lab::new("peer");
    let launcher = lab.launcher();
    launcher.ensure(lab.spec()).await.unwrap();
    for id in [UID, 65_534] {
        let script = "import socket,sys; s=socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); print(s.recv(999).decode())";
        let output = Command::new("setpriv")
            .args([
                &format!("--reuid={id}"),
                &format!("--regid={id}"),
                "--clear-groups",
                "/usr/bin/python3",
                "-c",
                script,
            ])
            .arg(lab.shim_dir().join("control.sock"))
            .output()
            .unwrap();
        let said =
            String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        assert!(said.contains("Permission denied"), "uid {id}: {said}");
    }
    launcher.stop("web", Duration::ZERO).await.unwrap();
}

#[tokio::test]
async fn what_cannot_start_says_why() {
    let lab = Lab::new("wrong");
    let launcher = lab.launcher();
    let missing = ShimSpec { envoy: "/nonexistent/envoy".into(), ..lab.spec() };
    let error = launcher.ensure(missing).await.unwrap_err().to_string();
    assert!(error.contains("Envoy is not at /nonexistent/envoy"), "{error}");
    let root = ShimSpec { uid: 0, ..lab.spec() };
    let error = launcher.ensure(root).await.unwrap_err().to_string();
    assert!(error.contains("as root"), "{error}");
    let nowhere = ShimSpec { netns: Some("/run/netns/none".into()), ..lab.spec() };
    let error = launcher.ensure(nowhere).await.unwrap_err().to_string();
    assert!(error.contains("cannot enter the network namespace /run/netns/none"), "{error}");
    launcher.stop("web", Duration::ZERO).await.unwrap();
}

#[tokio::test]
async fn a_taken_dns_port_and_a_bad_bootstrap_are_named() {
    let lab = Lab::new("port");
    let launcher = lab.launcher();
    let taken = lab.inside(|| std::net::UdpSocket::bind("127.0.0.1:15053").unwrap());
    let error = launcher.ensure(lab.spec()).await.unwrap_err().to_string();
    assert!(error.contains("127.0.0.1:15053"), "{error}");
    drop(taken);
    // The keeper tries again by itself.
    let mut state = timeout(PATIENCE, async {
        loop {
            if let Ok(state) = launcher.ensure(lab.spec()).await {
                break state;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await
    .unwrap();
    fs::write(lab.shim_dir().join("bootstrap.json"), r#"{"nonsense":1}"#).unwrap();
    running(&mut state, 0).await;
    let client = ShimClient::connect(&lab.shim_dir()).await.unwrap();
    client.restart_envoy().await.unwrap();
    let mut envoy = client.envoy();
    let complained =
        envoy.wait_for(|envoy| envoy.last_exit.as_ref().is_some_and(|why| why.contains("nonsense")));
    timeout(PATIENCE, complained).await.expect("Envoy's words are missing").unwrap();
    launcher.stop("web", Duration::ZERO).await.unwrap();
}
