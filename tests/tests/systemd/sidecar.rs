//! The real shim and the real Envoy in the unit that we ship, with no agent: what systemd sees, and does to them.

use std::time::Duration;

use serde_json::{Value, json};
use ursa_tests::lab::program::Client;
use ursa_tests::lab::vm::units::State;
use ursa_tests::lab::vm::{self, Vm};
use ursa_tests::lab::{Lab, Programs};

use crate::shipped;

const SOON: Duration = Duration::from_secs(30);
const SIDECAR: &str = "ursa-sidecar@web.service";
const SHIM: &str = "/usr/libexec/ursa/ursa-shim";
const STATE: &str = "/var/lib/ursa/agent/w/web";

/// Asks the shim as an agent does; prints the first line from it of which the second argument is a part.
const ASK: &str = "
import socket, sys
stream = socket.socket(socket.AF_UNIX); stream.connect('/run/ursa-sidecar/web/control.sock')
stream.sendall((sys.argv[1] + '\\n').encode())
for line in stream.makefile():
    if sys.argv[2] in line: print(line, end=''); break
";

/// What an agent would say or leave on disk.
fn settings() -> Value {
    let private = "/run/ursa-sidecar/web/private";
    json!({
        "workload": "default.web-1",
        "envoy": vm::ENVOY,
        "last_good": STATE,
        "dns_table": format!("{STATE}/dns.json"),
        "concurrency": 1,
        "drain_time_s": 2,
        "bootstrap": {
            "node": {"id": "default.web-1", "cluster": "web"},
            "admin": {"address": {"pipe": {"path": format!("{private}/admin.sock"), "mode": 0o600}}},
            "static_resources": {"listeners": [{
                "name": "self_inbound_dp_8080",
                "stat_prefix": "self_inbound_dp_8080",
                "traffic_direction": "INBOUND",
                "address": {"socket_address": {"address": "::", "port_value": 8080, "ipv4_compat": true}},
                "filter_chains": [{"filters": [{
                    "name": "http",
                    "typed_config": {
                        "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
                        "stat_prefix": "inbound",
                        "route_config": {"virtual_hosts": [{"name": "any", "domains": ["*"], "routes": [{
                            "match": {"prefix": "/"},
                            "direct_response": {"status": 200, "body": {"inline_string": "pong"}}
                        }]}]},
                        "http_filters": [{"name": "router", "typed_config": {
                            "@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"
                        }}]
                    }
                }]}]
            }]}
        }
    })
}

/// A machine with the units, the real shim, and a service that wants its sidecar.
fn machine(lab: &mut Lab, drop_in: &str) -> Vm {
    let vm = Vm::new(lab, "web").unwrap();
    shipped::install(&vm);
    vm.copy_in(&lab.programs.path("ursa-shim"), SHIM, 0o755).unwrap();
    for (path, text) in [
        ("/etc/sysusers.d/ursa-web.conf", "u ursa-web -:ursa-proxy\n".to_owned()),
        (
            "/etc/systemd/system/web.service",
            format!("[Service]\nExecStart={} serve --name web --port 8081\n", vm::APP),
        ),
        (
            "/etc/systemd/system/web.service.d/50-ursa.conf",
            format!(
                "[Unit]\nWants={SIDECAR}\nAfter={SIDECAR}\n[Service]\nExecStartPre=+-{SHIM} resume --service web\n\
                 ExecStop=+-{SHIM} drain --service web --deadline 20\nRestart=always\nRestartSec=100ms\n"
            ),
        ),
        (
            "/etc/systemd/system/ursa-sidecar@web.service.d/10-ursa.conf",
            format!("[Service]\nUser=ursa-web\n{drop_in}"),
        ),
        (&format!("{STATE}/dns.json"), r#"{"names":{},"domains":["mesh.local"]}"#.to_owned()),
    ] {
        vm.write(path, &text).unwrap();
    }
    vm
}

fn ask(vm: &Vm, request: &str, part: &str) -> Value {
    let output = vm.run(&["python3", "-c", ASK, request, part]).unwrap();
    serde_json::from_str(&output.stdout).unwrap_or_else(|error| panic!("{error}: {}", output.brief()))
}

fn envoy(vm: &Vm) -> i32 {
    let all = vm.running("envoy");
    assert_eq!(all.len(), 1, "{all:?}");
    all[0]
}

#[test]
fn systemd_sees_what_a_sidecar_waits_for_reloads_it_in_place_and_ends_one_that_hangs() {
    let mut lab = Lab::new(&Programs::discover().unwrap()).unwrap();
    let mut vm = machine(&mut lab, "WatchdogSec=4\n");
    vm.boot().unwrap();
    let (web, sidecar) = (vm.unit("web.service"), vm.unit(SIDECAR));
    web.begin_start().unwrap();
    let says = |words: &'static str| move |state: &State| state.status.contains(words);
    sidecar.wait_until("to wait", SOON, says("Waiting for its settings")).unwrap();
    ask(&vm, r#"{"cmd":"waiting","text":"the control plane 10.99.0.9:5678"}"#, "\"ok\":true");
    let waiting = sidecar.wait_until("to say so", SOON, says("the control plane 10.99.0.9:5678")).unwrap();
    assert_eq!((waiting.active.as_str(), web.state().unwrap().active.as_str()), ("activating", "inactive"));

    ask(&vm, &json!({"cmd": "configure", "settings": settings()}).to_string(), "\"ok\":true");
    let ready = sidecar.wait("active", SOON).unwrap();
    assert_eq!(ready.main_pid, waiting.main_pid);
    assert!(ready.status.starts_with("Envoy 1.40.0 is live"), "{ready:?}");
    web.wait("active", SOON).unwrap();
    let first = envoy(&vm);
    for pid in sidecar.pids().unwrap() {
        let status = vm.read(&format!("/proc/{pid}/status")).unwrap();
        for line in ["CapEff:\t0000000000000000", "CapBnd:\t0000000000000000", "NoNewPrivs:\t1"] {
            assert!(status.lines().any(|found| found == line), "{line}: {status}");
        }
    }
    // What it says has fields by which it is found, and Envoy's words are among it.
    let entries = vm.journal(&["--unit", SIDECAR, "MESH=default", "WORKLOAD=web-1", "EPOCH=0"]).unwrap();
    assert!(entries.iter().any(|entry| entry.message.contains("Envoy is live")), "{entries:?}");
    assert!(entries.iter().any(|entry| entry.field("TARGET") == "envoy" && entry.field("PRIORITY") == "4"));
    assert!(entries.iter().all(|entry| !entry.message.starts_with('{')), "JSON in the journal");

    // Reloaded under a kept connection, from another file that a package has put there.
    let other = lab.net.host("other").unwrap();
    let mut client = Client::start(&lab, &other).unwrap();
    let url = format!("http://[{}]:8080/", vm.host.v6);
    assert!(client.get_kept(&url).unwrap().ok());
    for round in 1..=3 {
        vm.copy_in(&lab.programs.path("ursa-shim"), SHIM, 0o755).unwrap();
        assert_eq!(ask(&vm, r#"{"cmd":"status"}"#, "\"ok\"")["status"]["outdated"], true);
        sidecar.reload().unwrap();
        let replaced = format!("\"reexecs\":{round}");
        let status = || vm.run(&["python3", "-c", ASK, r#"{"cmd":"status"}"#, &replaced]).unwrap();
        ursa_tests::lab::wait::until("the shim to be replaced", SOON, || match status() {
            said if said.stdout.contains(&replaced) => Ok(()),
            said => Err(said.brief()),
        })
        .unwrap();
        let answer = client.get_kept(&url).unwrap();
        assert!(answer.ok() && answer.kept, "{}", answer.brief());
        let state = sidecar.wait("active", SOON).unwrap();
        assert_eq!((state.main_pid, state.restarts, envoy(&vm)), (ready.main_pid, 0, first));
        assert!(state.status.contains("is live"), "{state:?}");
    }
    // A broken one stays where it is.
    vm.write_as(SHIM, "root", 0o755, b"#!/bin/sh\nexit 0\n").unwrap();
    sidecar.reload().unwrap();
    let state = sidecar.wait_until("to say why not", SOON, says("cannot replace this shim")).unwrap();
    assert_eq!((state.main_pid, envoy(&vm)), (ready.main_pid, first));
    vm.copy_in(&lab.programs.path("ursa-shim"), SHIM, 0o755).unwrap();

    // Envoy's death is the shim's to mend, and nobody else's.
    vm.sh("pkill -KILL envoy").unwrap();
    sidecar.wait_until("to have another Envoy", SOON, says("is live, epoch 1")).unwrap();
    assert!(client.get(&url).unwrap().ok());
    assert_eq!(sidecar.state().unwrap().restarts, 0);

    // One that hangs is ended and started again; the service runs on.
    let service = web.state().unwrap();
    vm.sh(&format!("kill -STOP {}", ready.main_pid)).unwrap();
    let again = sidecar
        .wait_until("to be started again", SOON, |state| state.restarts == 1 && state.main_pid != 0)
        .unwrap();
    assert_ne!(again.main_pid, ready.main_pid);
    assert!(sidecar.wait_said("watchdog", SOON).is_ok());
    assert_eq!(web.state().unwrap().invocation, service.invocation);
    // Its settings were sent, and not left on disk.
    sidecar.wait_until("to wait again", SOON, says("Waiting for its settings")).unwrap();
}

#[test]
fn a_boot_without_an_agent_serves_what_was_left_within_its_memory_and_a_stop_drains() {
    let mut lab = Lab::new(&Programs::discover().unwrap()).unwrap();
    let mut vm = machine(&mut lab, "MemoryMax=300M\n").with_limits();
    vm.write(&format!("{STATE}/shim.json"), &settings().to_string()).unwrap();
    vm.boot().unwrap();
    let (web, sidecar) = (vm.unit("web.service"), vm.unit(SIDECAR));
    web.start().unwrap();
    let state = sidecar.state().unwrap();
    assert!(
        state.active == "active" && state.status.contains("the last good configuration is served"),
        "{state:?}"
    );
    let status = ask(&vm, r#"{"cmd":"status"}"#, "\"ok\"");
    assert_eq!(status["status"]["memory_limit"], 300 << 20);
    let heap = ((300 - 32) / 2) << 20;
    let line = vm.sh("tr '\\0' '\\n' </proc/$(pidof envoy)/cmdline").unwrap();
    assert!(line.contains(&format!("\"max_heap_size_bytes\":\"{heap}\"")), "{line}");

    // The service's own stop drains first: who is connected is asked to go, and meanwhile everything works.
    let other = lab.net.host("other").unwrap();
    let mut client = Client::start(&lab, &other).unwrap();
    let url = format!("http://[{}]:8080/", vm.host.v6);
    assert!(client.get_kept(&url).unwrap().ok());
    let first = envoy(&vm);
    vm.sh("systemctl restart --no-block web.service").unwrap();
    let draining = |state: &State| state.status.contains("Draining; 1 inbound");
    sidecar.wait_until("to drain", SOON, draining).unwrap();
    assert_eq!(web.state().unwrap().active, "deactivating");
    let answer = client.get_kept(&url).unwrap();
    assert!(answer.ok() && answer.kept, "{}", answer.brief());
    web.wait("active", SOON).unwrap();
    // Restarted without its sidecar, whose new Envoy takes connections again.
    let after = sidecar.state().unwrap();
    assert_eq!((after.main_pid, after.restarts), (state.main_pid, 0));
    assert!(after.status.contains("is live, epoch 1"), "{after:?}");
    assert_ne!(envoy(&vm), first);
    let mut fresh = Client::start(&lab, &other).unwrap();
    assert!(fresh.get_kept(&url).unwrap().ok());
    assert!(fresh.get_kept(&url).unwrap().kept, "it asks nobody to go any more");

    // A service that dies has nothing to be drained: it is back at once, and its sidecar's connections are as they were.
    let running = envoy(&vm);
    web.kill("main", "KILL").unwrap();
    let soon = Duration::from_secs(10);
    web.wait_until("to come back", soon, |state| state.restarts == 1 && state.active == "active").unwrap();
    assert!(fresh.get_kept(&url).unwrap().kept);
    assert_eq!(envoy(&vm), running);
    drop((client, fresh));

    web.stop().unwrap();
    sidecar.wait("inactive", SOON).unwrap();
    assert!(vm.running("envoy").is_empty());
    let said = sidecar.journal().unwrap();
    assert!(said.iter().any(|entry| entry.message.contains("Envoy is stopped")), "stopped in order");
}
