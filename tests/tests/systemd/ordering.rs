//! What a service and its sidecar do to each other, by the units and drop-ins alone: a stub is the shim.

use std::time::Duration;

use ursa_tests::lab::vm::Vm;
use ursa_tests::lab::vm::units::State;
use ursa_tests::lab::{Lab, Programs};

use crate::shipped;

const SOON: Duration = Duration::from_secs(20);
const SIDECAR: &str = "ursa-sidecar@web.service";

/// Ready as soon as somebody has written into `/run/control`; and as long as it runs, nobody else sees it otherwise.
const STUB: &str = r#"#!/usr/bin/python3
import os, signal, socket, time
bus = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
say = lambda text: bus.sendto(text, os.environ["NOTIFY_SOCKET"])
signal.signal(signal.SIGHUP, lambda *_: say(b"STATUS=reloaded"))
say(b"STATUS=waiting for the control plane")
open("/run/control").read()
say(b"READY=1\nSTATUS=live")
while True:
    say(b"WATCHDOG=1")
    time.sleep(5)
"#;

/// Its main process ends when it is told to, and its last one says in what state it left its sidecar.
const WEB: &str = "[Service]
ExecStart=/bin/sleep infinity
ExecStopPost=/bin/sh -c 'systemctl show -P ActiveState ursa-sidecar@web.service >/run/left'
Restart=on-failure
RestartSec=100ms
";

fn machine(lab: &mut Lab) -> Vm {
    let mut vm = Vm::new(lab, "web").unwrap();
    shipped::install(&vm);
    vm.write_as("/usr/libexec/ursa/ursa-shim", "root", 0o755, STUB.as_bytes()).unwrap();
    for (path, text) in [
        ("/etc/sysusers.d/ursa-web.conf", "u ursa-web -:ursa-proxy\n"),
        ("/etc/tmpfiles.d/control.conf", "p /run/control 0644 root root\n"),
        ("/etc/systemd/system/web.service", WEB),
        (
            "/etc/systemd/system/web.service.d/50-ursa.conf",
            "[Unit]\nWants=ursa-sidecar@web.service\nAfter=ursa-sidecar@web.service\n",
        ),
        ("/etc/systemd/system/ursa-sidecar@web.service.d/10-ursa.conf", "[Service]\nUser=ursa-web\n"),
    ] {
        vm.write(path, text).unwrap();
    }
    vm.boot().unwrap();
    vm
}

/// Lets the stub go on; waits until it reads.
fn connect(vm: &Vm) {
    vm.sh("echo >/run/control").unwrap();
}

#[test]
fn a_service_waits_for_its_sidecar_and_takes_it_along_only_when_it_stops() {
    let mut lab = Lab::new(&Programs::discover().unwrap()).unwrap();
    let vm = machine(&mut lab);
    let (web, sidecar) = (vm.unit("web.service"), vm.unit(SIDECAR));
    web.begin_start().unwrap();
    let waiting = sidecar
        .wait_until("to say what it waits for", SOON, |state| state.status == "waiting for the control plane")
        .unwrap();
    assert_eq!((waiting.active.as_str(), web.state().unwrap().active.as_str()), ("activating", "inactive"));
    assert_eq!(sidecar.property("TimeoutStartUSec").unwrap(), "infinity");
    connect(&vm);
    let first = web.wait("active", SOON).unwrap();
    let parent = sidecar.state().unwrap();
    assert_eq!((parent.active.as_str(), parent.main_pid), ("active", waiting.main_pid));
    let same = |state: &State| state.main_pid == parent.main_pid && state.active == "active";

    web.restart().unwrap();
    assert!(same(&sidecar.state().unwrap()) && web.state().unwrap().main_pid != first.main_pid);
    web.kill("main", "KILL").unwrap();
    web.wait_until("to come back", SOON, |state| state.restarts == 1 && state.active == "active").unwrap();
    assert!(same(&sidecar.state().unwrap()));
    sidecar.reload().unwrap();
    sidecar.wait_until("to have reloaded", SOON, |state| state.status == "reloaded").unwrap();
    assert!(same(&sidecar.state().unwrap()));

    // The sidecar's end leaves the service alone, and systemd brings it back.
    let running = web.state().unwrap();
    sidecar.kill("main", "KILL").unwrap();
    sidecar
        .wait_until("to be started again", SOON, |state| state.restarts == 1 && state.main_pid != 0)
        .unwrap();
    connect(&vm);
    sidecar.wait("active", SOON).unwrap();
    assert_eq!(web.state().unwrap().invocation, running.invocation);

    web.stop().unwrap();
    sidecar.wait("inactive", SOON).unwrap();
    assert_eq!(vm.read("/run/left").unwrap().trim(), "active");
}

#[test]
fn a_sidecar_whose_namespace_is_missing_runs_nowhere() {
    let mut lab = Lab::new(&Programs::discover().unwrap()).unwrap();
    let vm = machine(&mut lab);
    let drop_in = "/etc/systemd/system/ursa-sidecar@web.service.d/20-own.conf";
    vm.write(drop_in, "[Service]\nNetworkNamespacePath=/run/netns/own\n").unwrap();
    vm.reload_units().unwrap();
    vm.unit("web.service").begin_start().unwrap();
    vm.unit(SIDECAR).wait_said("status=225/NETWORK", SOON).unwrap();
    vm.unit(SIDECAR).wait_until("to be tried again", SOON, |state| state.restarts > 0).unwrap();
    let web = vm.unit("web.service").wait("active", SOON).unwrap();
    let own = vm.running("python3").into_iter().map(|pid| format!("/proc/{pid}/ns/net"));
    assert_eq!(own.collect::<Vec<_>>(), Vec::<String>::new());

    vm.sh("ip netns add own").unwrap();
    connect(&vm);
    let pid = vm.unit(SIDECAR).wait("active", SOON).unwrap().main_pid;
    assert_eq!(vm.unit("web.service").state().unwrap().invocation, web.invocation);
    let compared = vm.sh(&format!("stat -Lc %i /proc/{pid}/ns/net /run/netns/own /proc/1/ns/net")).unwrap();
    let inodes: Vec<&str> = compared.lines().collect();
    assert!(inodes[0] == inodes[1] && inodes[0] != inodes[2], "{compared}");
}
