//! The shim as the main process of a unit: what it waits for, what it tells, who may ask it.

use std::process::Stdio;
use std::time::Duration;

use hickory_proto::rr::RecordType;
use nix::sys::signal::Signal;
use tokio::time::timeout;
use ursa_agent::shim::protocol::{EnvoyState, XdsRole};

use crate::lab::{PATIENCE, UID, gone, live, status_line};
use crate::sidecar::{AGENT, Http, Sidecar};

#[tokio::test]
async fn it_waits_for_its_settings_and_is_ready_when_envoy_is_live() {
    let mut sidecar = Sidecar::new("unit");
    sidecar.start(&[]);
    sidecar.hears_status("Waiting for its settings").await;
    let client = sidecar.client().await;
    let hello = client.hello();
    assert_eq!((hello.workload.as_str(), hello.service.as_deref()), ("", Some("web")));
    assert_eq!((hello.envoy.state, hello.pid), (EnvoyState::Waiting, sidecar.pid()));
    client.waiting("the control plane 10.0.0.1:5678: connection refused").await.unwrap();
    sidecar.hears_status("Waiting for the control plane 10.0.0.1:5678").await;
    // A shim that waits works, too.
    sidecar.hears_line("WATCHDOG=1").await;

    // Settings that can't be used change nothing.
    let mut wrong = sidecar.settings();
    wrong.concurrency = 0;
    let refused = client.configure(wrong).await.unwrap_err().to_string();
    assert!(refused.contains("concurrency"), "{refused}");
    let taken = sidecar.lab.inside(|| std::net::UdpSocket::bind("127.0.0.1:15053").unwrap());
    let refused = client.configure(sidecar.settings()).await.unwrap_err().to_string();
    assert!(refused.contains("127.0.0.1:15053"), "{refused}");
    drop(taken);
    assert_eq!(client.status().await.unwrap().envoy.state, EnvoyState::Waiting);
    assert!(!sidecar.heard.borrow().iter().any(|text| text.contains("READY=1")));

    client.configure(sidecar.settings()).await.unwrap();
    let envoy = live(&client, None).await;
    sidecar.hears_line("READY=1").await;
    sidecar.hears_status("Envoy 1.40.0 is live").await;
    let status = client.status().await.unwrap();
    assert_eq!((status.workload.as_str(), status.dns.names), ("default.web-1", 1));
    assert_eq!(sidecar.lab.resolve("backend.svc.mesh.local.", RecordType::A).1.len(), 1);
    for pid in [sidecar.pid(), envoy.pid.unwrap()] {
        assert_eq!(status_line(pid, "NoNewPrivs:"), "1");
        assert_eq!(status_line(pid, "CapEff:"), "0000000000000000");
        assert_eq!(status_line(pid, "Uid:"), format!("{UID}\t{UID}\t{UID}\t{UID}"));
    }
    // The same again, and another port for names: Envoy notices neither.
    client.configure(sidecar.settings()).await.unwrap();
    let mut moved = sidecar.settings();
    moved.dns_port = 15054;
    client.configure(moved).await.unwrap();
    assert_eq!(client.status().await.unwrap().envoy.pid, envoy.pid);
    let former = async {
        while sidecar.lab.inside(|| std::net::UdpSocket::bind("127.0.0.1:15053").is_err()) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(PATIENCE, former).await.expect("the former port is kept");

    // Another Envoy is started within a second, and systemd needn't know.
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(envoy.pid.unwrap()), Signal::SIGKILL).unwrap();
    let begun = tokio::time::Instant::now();
    let mut states = client.envoy();
    let next = states.wait_for(|now| now.pid.is_some() && now.pid != envoy.pid);
    timeout(PATIENCE, next).await.unwrap().unwrap();
    assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
    live(&client, envoy.pid).await;

    sidecar.signal(Signal::SIGTERM);
    sidecar.hears_line("STOPPING=1").await;
    gone(sidecar.pid()).await;
    assert!(sidecar.child.as_mut().unwrap().wait().unwrap().success());
    let ready = sidecar.heard.borrow().iter().filter(|text| text.contains("READY=1")).count();
    assert_eq!(ready, 1);
}

#[tokio::test]
async fn after_a_reboot_it_starts_from_what_is_on_disk() {
    let mut sidecar = Sidecar::new("boot");
    sidecar.leave_settings();
    // A neighbour has the port for a moment: it is tried again.
    let taken = sidecar.lab.inside(|| std::net::UdpSocket::bind("127.0.0.1:15053").unwrap());
    sidecar.start(&[("URSA_MEMORY_MAX", "400M")]);
    sidecar.hears_status("127.0.0.1:15053").await;
    drop(taken);
    sidecar.hears_line("READY=1").await;
    sidecar.hears_status("the last good configuration is served").await;
    let client = sidecar.client().await;
    let status = client.status().await.unwrap();
    assert_eq!((status.xds, status.memory_limit), (XdsRole::LastGood, Some(400 << 20)));
    // The limit went over the bootstrap.
    let mut admin = client.connect_admin().await.unwrap();
    admin.set_nonblocking(false).unwrap();
    let text = tokio::task::spawn_blocking(move || {
        use std::io::{Read as _, Write as _};
        admin.write_all(b"GET /config_dump HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").unwrap();
        let mut text = String::new();
        admin.read_to_string(&mut text).unwrap();
        text
    });
    let text = text.await.unwrap();
    assert!(text.contains(&format!("\"max_heap_size_bytes\": \"{}\"", ((400 - 32) / 2) << 20)), "{text}");
    assert!(text.contains("self_inbound_dp_8080"), "beside what the agent wrote");
    client.take_xds().await.unwrap();
    sidecar.hears_status("configured by the agent").await;
    // What it logs says whose it is.
    for line in sidecar.log().lines().skip_while(|line| !line.contains("\"configured\"")).skip(1) {
        let line: serde_json::Value = serde_json::from_str(line).unwrap();
        assert_eq!(line["span"]["mesh"], "default", "{line}");
        assert_eq!(line["span"]["workload"], "web-1", "{line}");
    }
}

#[tokio::test]
async fn each_user_may_ask_what_is_his_to_ask() {
    let mut sidecar = Sidecar::new("asks");
    sidecar.leave_settings();
    sidecar.start(&[]);
    sidecar.hears_line("READY=1").await;
    let restart = r#"{"cmd":"restart-envoy"}"#;
    let status = r#"{"cmd":"status"}"#;
    let agent = sidecar.ask_as(AGENT, status);
    assert!(agent.matches("\"shim\":").count() == 2, "{agent}");
    let own = sidecar.ask_as(UID, status);
    assert!(own.matches("\"shim\":").count() == 2, "{own}");
    let own = sidecar.ask_as(UID, restart);
    assert!(own.contains("only root and the agent may ask for that"), "{own}");
    let other = sidecar.ask_as(65_534, status);
    assert!(
        other.contains("only root and the agent may use this socket") && !other.contains("pid"),
        "{other}"
    );
    // Nobody else gets at Envoy's own sockets.
    let look = std::process::Command::new("setpriv")
        .args(["--reuid=65534", "--regid=65534", "--clear-groups", "ls"])
        .arg(sidecar.dir().join("private"))
        .stderr(Stdio::null())
        .status()
        .unwrap();
    assert!(!look.success());
}

#[tokio::test]
async fn a_drain_waits_for_connections_and_a_new_envoy_takes_them_again() {
    let mut sidecar = Sidecar::new("drain");
    sidecar.leave_settings();
    sidecar.start(&[]);
    sidecar.hears_line("READY=1").await;
    let drain = |seconds: &str, uid: u32| {
        let mut command = sidecar.command(uid);
        command.args(["drain", "--service", "web", "--deadline", seconds, "--dir"]).arg(sidecar.dir());
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let client = sidecar.client().await;
    let envoy = live(&client, None).await;
    // One connection that has asked something before, and one that goes when it is asked to.
    let mut connection = sidecar.lab.inside(|| {
        let mut connection = Http::connect().unwrap();
        connection.get().unwrap();
        connection
    });
    let draining = drain("60", UID);
    let mut states = client.envoy();
    let left = states.wait_for(|envoy| envoy.state == EnvoyState::Draining && envoy.inbound == Some(1));
    timeout(PATIENCE, left).await.expect("the connection isn't counted").unwrap();
    assert!(!states.borrow().drained);
    let head = connection.get().unwrap();
    assert!(head.contains("connection: close"), "{head}");
    let output = tokio::task::spawn_blocking(move || draining.wait_with_output().unwrap()).await.unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success() && said.contains("no inbound connection is left"), "{output:?}");
    timeout(PATIENCE, states.wait_for(|envoy| envoy.drained)).await.unwrap().unwrap();

    // The application is started again: so is Envoy, and only that.
    let resumed =
        sidecar.command(0).args(["resume", "--service", "web", "--dir"]).arg(sidecar.dir()).output().unwrap();
    assert!(resumed.status.success(), "{resumed:?}");
    let next = client.status().await.unwrap().envoy;
    assert_eq!((next.state, next.epoch), (EnvoyState::Live, envoy.epoch + 1));
    let head = sidecar.lab.inside(|| Http::connect().unwrap().get().unwrap());
    assert!(!head.contains("connection: close"), "{head}");

    // A connection that stays is waited for until the deadline, by root as by the sidecar's own user.
    let mut kept = sidecar.lab.inside(|| {
        let mut connection = Http::connect().unwrap();
        connection.get().unwrap();
        connection
    });
    let draining = drain("1", 0);
    let output = tokio::task::spawn_blocking(move || draining.wait_with_output().unwrap()).await.unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success() && said.contains("1 inbound connections did not end in time"), "{said}");
    kept.get().unwrap();
    // Drained is drained: stopping doesn't wait again.
    let begun = tokio::time::Instant::now();
    sidecar.signal(Signal::SIGTERM);
    gone(sidecar.pid()).await;
    assert!(begun.elapsed() < Duration::from_millis(1500), "{:?}", begun.elapsed());
    let nothing =
        sidecar.command(0).args(["drain", "--service", "web", "--dir"]).arg(sidecar.dir()).output().unwrap();
    assert!(nothing.status.success(), "{nothing:?}");
    assert!(String::from_utf8_lossy(&nothing.stdout).contains("nothing to drain"), "{nothing:?}");
}

#[tokio::test]
async fn it_refuses_to_be_root() {
    let sidecar = Sidecar::new("root");
    let output = sidecar
        .command(0)
        .args(["--service", "web"])
        .env("RUNTIME_DIRECTORY", sidecar.dir())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains("10-ursa.conf"), "{said}");
    let output =
        sidecar.command(UID).args(["--service", "web"]).env_remove("RUNTIME_DIRECTORY").output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains("RUNTIME_DIRECTORY"), "{said}");
}
