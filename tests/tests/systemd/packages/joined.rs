//! A service in the mesh, made by hand as `ursa join` makes it, with programs in the units that only say that they are ready:
//! what packages do to it is the same.

use ursa_tests::lab::vm::Vm;

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

/// Takes the stand-ins away again.
pub(super) fn leave_no_stub(vm: &Vm) {
    for unit in STAND_INS {
        vm.sh(&format!("rm -rf '/run/systemd/system/{unit}.d'")).unwrap();
    }
    vm.reload_units().unwrap();
}

/// Which of what joining makes is there.
pub(super) fn remains(vm: &Vm) -> Vec<&'static str> {
    FILES.into_iter().map(|(path, _)| path).filter(|path| vm.exists(path).unwrap()).collect()
}
