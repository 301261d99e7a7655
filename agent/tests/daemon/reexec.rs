//! A shim replaces itself in place: same process, same Envoy, same sockets, and nobody notices.

use hickory_proto::op::ResponseCode;
use hickory_proto::rr::RecordType;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::time::timeout;
use ursa_agent::launcher::Launcher;
use ursa_agent::shim::client::ShimClient;
use ursa_agent::shim::protocol::{EnvoyState, XdsRole};

use crate::lab::{Lab, PATIENCE, gone, live};
use crate::sidecar::{Load, Sidecar};

#[tokio::test]
async fn twenty_replacements_under_load_cost_no_request_and_no_name() {
    let mut sidecar = Sidecar::new("reexec");
    sidecar.leave_settings();
    sidecar.start(&[]);
    sidecar.hears_line("READY=1").await;
    let mut client = sidecar.client().await;
    let envoy = live(&client, None).await;
    let load = Load::start(&sidecar.lab);
    for round in 1..=20 {
        // By request, and as `systemctl reload` does.
        if round % 2 == 0 {
            client.re_exec().await.unwrap();
        } else {
            sidecar.signal(Signal::SIGHUP);
        }
        timeout(PATIENCE, client.closed()).await.expect("it isn't replaced");
        // An agent attaches again, and meanwhile names resolve.
        let name = sidecar.lab.resolve("backend.svc.mesh.local.", RecordType::A);
        assert_eq!(name.0, ResponseCode::NoError);
        client = sidecar.client().await;
        let hello = client.hello();
        assert_eq!((hello.pid, hello.reexecs), (sidecar.pid(), round), "the same process");
        assert_eq!(hello.envoy, envoy, "nothing about Envoy has changed");
        assert_eq!((hello.workload.as_str(), hello.dns.names), ("default.web-1", 1));
        client.take_xds().await.unwrap();
        let told = |heard: &[String]| heard.iter().filter(|text| text.contains("RELOADING=1")).count();
        let ready = |heard: &[String]| heard.iter().filter(|text| text.contains("READY=1")).count();
        let rounds = usize::try_from(round).unwrap();
        sidecar
            .hears("the end of the reload", |heard| told(heard) == rounds && ready(heard) == rounds + 1)
            .await;
    }
    let served = load.finish();
    // One descriptor more per round would be seen here.
    let open = std::fs::read_dir(format!("/proc/{}/fd", sidecar.pid())).unwrap().count();
    assert!(open < 40, "{open} descriptors are open");
    assert!(served > 100, "{served} requests are no load");
    let monotonic = |text: &String| text.contains("RELOADING=1") && text.contains("MONOTONIC_USEC=");
    assert!(sidecar.heard.borrow().iter().any(monotonic));
    assert_eq!(client.status().await.unwrap().xds, XdsRole::Agent);

    // It still is Envoy's parent, in every respect.
    kill(Pid::from_raw(envoy.pid.unwrap()), Signal::SIGKILL).unwrap();
    let next = live(&client, envoy.pid).await;
    assert_eq!((next.epoch, next.restarts), (1, 1));
    assert!(next.last_exit.unwrap().contains("SIGKILL"));
    client.re_exec().await.unwrap();
    timeout(PATIENCE, client.closed()).await.unwrap();
    sidecar.client().await;
    sidecar.signal(Signal::SIGKILL);
    gone(next.pid.unwrap()).await;
}

#[tokio::test]
async fn a_binary_that_cannot_take_over_changes_nothing() {
    let mut sidecar = Sidecar::new("broken");
    sidecar.leave_settings();
    sidecar.start(&[]);
    sidecar.hears_line("READY=1").await;
    let client = sidecar.client().await;
    let envoy = live(&client, None).await;
    let load = Load::start(&sidecar.lab);
    for (script, words) in [
        ("#!/bin/sh\nexit 0\n", "does not say that it takes over"),
        (
            "#!/bin/sh\necho 'the state has version 1, this binary knows version 2' >&2; exit 1\n",
            "knows version 2",
        ),
        ("not even a program", "cannot be started"),
    ] {
        sidecar.install(script);
        let refused = client.re_exec().await.unwrap_err().to_string();
        assert!(refused.contains(words) && refused.contains("goes on"), "{refused}");
        assert_eq!(client.status().await.unwrap().envoy.pid, envoy.pid);
    }
    sidecar.signal(Signal::SIGHUP);
    sidecar.hears_status("cannot replace this shim, which goes on").await;
    assert_eq!(client.status().await.unwrap().reexecs, 0);

    one_serves(sidecar.pid()).await;
    // One that is gone when it matters: everything was let go of already, and is taken up again.
    sidecar.install("#!/bin/sh\nrm \"$0\"; echo '{\"takes_over\":1,\"version\":\"9\"}'\n");
    client.re_exec().await.unwrap();
    timeout(PATIENCE, client.closed()).await.unwrap();
    let client = sidecar.client().await;
    let status = client.status().await.unwrap();
    assert_eq!((status.pid, status.reexecs, status.envoy.pid), (sidecar.pid(), 0, envoy.pid));
    assert_eq!(status.envoy.state, EnvoyState::Live);
    sidecar.hears_status("cannot be executed").await;
    // Nothing of the program that gave up is left beside itself.
    one_serves(status.pid).await;
    // A second one would come after half a second without an agent.
    tokio::time::sleep(std::time::Duration::from_secs(1)).await;
    one_serves(status.pid).await;
    assert_eq!(sidecar.lab.resolve("backend.svc.mesh.local.", RecordType::A).0, ResponseCode::NoError);
    load.finish();

    // And the next version can.
    let new = sidecar.binary().with_extension("dpkg-new");
    std::fs::copy(env!("CARGO_BIN_EXE_ursa-shim"), &new).unwrap();
    std::fs::rename(new, sidecar.binary()).unwrap();
    client.re_exec().await.unwrap();
    timeout(PATIENCE, client.closed()).await.unwrap();
    assert_eq!(sidecar.client().await.hello().reexecs, 1);
}

#[tokio::test]
async fn one_that_waits_or_backs_off_or_drains_is_replaced_too() {
    let mut sidecar = Sidecar::new("states");
    sidecar.start(&[]);
    let client = sidecar.client().await;
    client.waiting("a certificate").await.unwrap();
    client.re_exec().await.unwrap();
    timeout(PATIENCE, client.closed()).await.unwrap();
    let client = sidecar.client().await;
    assert_eq!(client.hello().envoy.state, EnvoyState::Waiting);
    assert_eq!(client.hello().envoy.waiting.as_deref(), Some("a certificate"));

    let mut missing = sidecar.settings();
    missing.envoy = "/nonexistent/envoy".into();
    client.configure(missing).await.unwrap();
    let mut states = client.envoy();
    let failing = states.wait_for(|envoy| envoy.state == EnvoyState::Backoff && envoy.restarts >= 3);
    timeout(PATIENCE, failing).await.unwrap().unwrap();
    client.re_exec().await.unwrap();
    timeout(PATIENCE, client.closed()).await.unwrap();
    let client = sidecar.client().await;
    assert!(client.hello().envoy.restarts >= 3);
    assert!(client.hello().envoy.last_exit.as_ref().unwrap().contains("/nonexistent/envoy"));
    assert!(!sidecar.heard.borrow().iter().any(|text| text.contains("RELOADING=1")), "it was never ready");

    client.configure(sidecar.settings()).await.unwrap();
    client.restart_envoy().await.ok();
    live(&client, None).await;
    client.drain(Some(PATIENCE)).await.unwrap();
    client.re_exec().await.unwrap();
    timeout(PATIENCE, client.closed()).await.unwrap();
    let client = sidecar.client().await;
    let mut states = client.envoy();
    let drained = states.wait_for(|envoy| envoy.state == EnvoyState::Draining && envoy.drained);
    timeout(PATIENCE, drained).await.expect("the drain was forgotten").unwrap();
}

/// Waits until one thread of the shim serves the last good configuration.
async fn one_serves(pid: i32) {
    let servers = || {
        let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
        let names = tasks.filter_map(|task| std::fs::read_to_string(task.unwrap().path().join("comm")).ok());
        names.filter(|name| name.trim() == "last-good").count()
    };
    let one = async {
        while servers() != 1 {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    };
    timeout(PATIENCE, one).await.expect("none or several threads serve the last good configuration");
}

/// Whenever the order to stop comes, it is heard.
#[tokio::test]
async fn one_that_is_told_to_stop_while_it_is_replaced_stops() {
    for wait in [0, 1, 2, 3, 5, 8, 13, 21, 34] {
        let mut sidecar = Sidecar::new("late");
        sidecar.leave_settings();
        sidecar.start(&[]);
        sidecar.hears_line("READY=1").await;
        let client = sidecar.client().await;
        let envoy = live(&client, None).await;
        client.re_exec().await.unwrap();
        tokio::time::sleep(std::time::Duration::from_millis(wait)).await;
        sidecar.signal(Signal::SIGTERM);
        sidecar.hears_line("STOPPING=1").await;
        gone(sidecar.pid()).await;
        gone(envoy.pid.unwrap()).await;
        assert!(
            sidecar.child.as_mut().unwrap().wait().unwrap().success(),
            "after {wait} ms: {}",
            sidecar.log()
        );
    }
}

#[tokio::test]
async fn a_launchers_shim_is_replaced_and_stays_its_own() {
    let lab = Lab::new("forkexec");
    let launcher = lab.launcher();
    launcher.ensure(lab.spec()).await.unwrap();
    let client = ShimClient::connect(&lab.shim_dir()).await.unwrap();
    let envoy = live(&client, None).await;
    let first = client.hello().clone();
    client.set_log_level("debug").await.unwrap();
    client.re_exec().await.unwrap();
    timeout(PATIENCE, client.closed()).await.unwrap();
    let client = ShimClient::connect(&lab.shim_dir()).await.unwrap();
    assert_eq!(client.hello().envoy.pid, envoy.pid);
    assert_eq!((client.hello().pid, client.hello().start_time), (first.pid, first.start_time));
    assert_eq!((client.peer().uid, client.peer().pid), (0, first.pid), "as the launcher made it");
    let second = lab.launcher();
    second.ensure(lab.spec()).await.unwrap();
    // The level is kept: half a line on control.sock is worth a word at `debug` only.
    let mut half = std::os::unix::net::UnixStream::connect(lab.shim_dir().join("control.sock")).unwrap();
    std::io::Write::write_all(&mut half, b"x").unwrap();
    drop(half);
    let said = async {
        while !lab.log().contains("a control connection ended") {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    };
    timeout(PATIENCE, said).await.expect("the log level was forgotten");
    second.stop("web", std::time::Duration::ZERO).await.unwrap();
    gone(first.pid).await;
    gone(envoy.pid.unwrap()).await;
}
