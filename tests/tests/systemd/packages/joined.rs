//! A service in the mesh, made by hand as `ursa join` makes it, with programs in the units that only say that they are ready:
//! what packages do to it is the same.

use std::time::Duration;

use ursa_tests::lab::vm::Vm;
use ursa_tests::lab::vm::units::State;

const SOON: Duration = Duration::from_secs(30);

/// Says that it is ready, keeps the watchdog quiet, and bears a reload.
const STUB: &str = "#!/bin/sh
trap : HUP
trap 'exit 0' TERM
systemd-notify --ready --status=stub
while :; do systemd-notify WATCHDOG=1; sleep 5 & wait $! || :; done
";
const STAND_IN: &str = "[Service]\nExecStart=\nExecStart=/usr/local/bin/stub\nNotifyAccess=all\n";
/// Where drop-ins of the units' stand-ins are: below `/run`, as they are none of what `ursa join` makes.
const STAND_INS: [&str; 3] = ["ursa-agent.service", "ursa-sidecar@.service", "ursa-redirect.service"];

/// Files that `ursa join web` makes, by the design that packages go by.
const FILES: [(&str, &str); 7] = [
    ("/etc/sysusers.d/ursa-web.conf", "u ursa-web -:ursa-proxy \"Sidecar of web.service\"\n"),
    (
        "/etc/systemd/system/web.service.d/50-ursa.conf",
        "[Unit]\nWants=ursa-sidecar@web.service\nAfter=ursa-sidecar@web.service\n[Service]\nSlice=ursa-web.slice\n",
    ),
    ("/etc/systemd/system/ursa-sidecar@web.service.d/10-ursa.conf", "[Service]\nUser=ursa-web\n"),
    ("/etc/systemd/system/ursa-web.slice", "[Slice]\n"),
    ("/etc/ursa/workloads.d/web.yaml", "type: Dataplane\n"),
    ("/etc/ursa/redirect.d/web.yaml", "{}\n"),
    ("/var/lib/ursa/join/web.json", "{\"files\": [\"/etc/systemd/system/ursa-web.slice\"]}\n"),
];

/// The service, before it joins.
pub(super) fn service(vm: &Vm) {
    vm.write("/etc/systemd/system/web.service", "[Service]\nExecStart=/bin/sleep infinity\nUser=daemon\n")
        .unwrap();
    vm.write_as("/usr/local/bin/stub", "root", 0o755, STUB.as_bytes()).unwrap();
    vm.sh("systemctl daemon-reload; systemctl start web.service; mkdir -p /etc/sysusers.d").unwrap();
}

/// Puts it into the mesh, and starts it again.
pub(super) fn join(vm: &Vm) {
    for unit in STAND_INS {
        vm.write(&format!("/run/systemd/system/{unit}.d/99-stub.conf"), STAND_IN).unwrap();
    }
    for (path, text) in FILES {
        vm.write(path, text).unwrap();
    }
    vm.sh("systemd-sysusers ursa-web.conf; systemctl daemon-reload; systemctl restart web.service").unwrap();
}

/// Another service that wants a sidecar, the real one: it waits for what only a control plane gives. The sidecar's pid.
pub(super) fn wait_for_another(vm: &Vm) -> i32 {
    for (path, text) in [
        (
            "/run/systemd/system/late.service",
            "[Unit]\nWants=ursa-sidecar@late.service\nAfter=ursa-sidecar@late.service\n[Service]\nExecStart=/bin/sleep infinity\n",
        ),
        // In place of the template's of this name.
        ("/run/systemd/system/ursa-sidecar@late.service.d/99-stub.conf", "[Service]\nUser=ursa-web\n"),
    ] {
        vm.write(path, text).unwrap();
    }
    vm.sh("systemctl daemon-reload; systemctl start --no-block late.service").unwrap();
    vm.unit("ursa-sidecar@late.service").wait_until("to wait", SOON, waits).unwrap().main_pid
}

fn waits(state: &State) -> bool {
    state.active == "activating" && state.status.starts_with("Waiting")
}

/// It still waits, as the same process.
pub(super) fn still_waits(vm: &Vm, pid: i32) {
    let state = vm.unit("ursa-sidecar@late.service").wait_until("to wait", SOON, waits).unwrap();
    assert_eq!((state.main_pid, state.restarts), (pid, 0));
}

/// Takes the stand-ins away again.
pub(super) fn leave_no_stub(vm: &Vm) {
    for unit in STAND_INS {
        vm.sh(&format!("rm -rf '/run/systemd/system/{unit}.d'")).unwrap();
    }
    vm.sh("rm -rf /run/systemd/system/*late.service*").unwrap();
    vm.reload_units().unwrap();
}

/// Which of what joining makes is there.
pub(super) fn remains(vm: &Vm) -> Vec<&'static str> {
    FILES.into_iter().map(|(path, _)| path).filter(|path| vm.exists(path).unwrap()).collect()
}
