//! What the agent's user may tell systemd: to start, stop, restart and reload sidecars, and nothing else.

use std::time::Duration;

use ursa_tests::lab::vm::Vm;
use ursa_tests::lab::vm::exec::Output;
use ursa_tests::lab::{Lab, Programs};

use crate::shipped;

const SIDECAR: &str = "ursa-sidecar@web.service";

#[test]
fn the_agents_user_may_start_sidecars_and_nothing_else() {
    let mut lab = Lab::new(&Programs::discover().unwrap()).unwrap();
    let mut vm = Vm::new(&mut lab, "town").unwrap();
    shipped::install(&vm);
    let sleeps = "[Service]\nType=exec\nExecStart=/bin/sleep infinity\nExecReload=/bin/true\n";
    for unit in [SIDECAR, "web.service", "ursa-sidecarx@web.service", "ursa-sidecar@web.timer"] {
        let timer = "[Timer]\nOnActiveSec=1d\nUnit=web.service\n";
        let text = if unit.ends_with("timer") { timer } else { sleeps };
        vm.write(&format!("/etc/systemd/system/{unit}"), text).unwrap();
    }
    vm.write("/etc/sysusers.d/citizen.conf", "u citizen -\n").unwrap();
    vm.boot().unwrap();
    let state = |unit: &str| vm.unit(unit).state().unwrap().active;
    let ask = |user: &str, args: &[&str]| -> Output {
        vm.run_as(user, &[&["systemctl", "--no-ask-password"], args].concat()).unwrap()
    };
    let refused = |output: &Output| {
        let said = ["authentication required", "Access denied", "Permission denied"];
        assert!(!output.ok() && said.iter().any(|said| output.stderr.contains(said)), "{}", output.brief());
    };

    for verb in ["start", "restart", "reload", "stop"] {
        refused(&ask("citizen", &[verb, SIDECAR]));
        let allowed = ask("ursa-agent", &[verb, SIDECAR]);
        assert!(allowed.ok(), "{verb}: {}", allowed.brief());
        assert_eq!(state(SIDECAR), if verb == "stop" { "inactive" } else { "active" });
    }
    // From a unit without privileges, which is how the agent asks.
    let start = ["systemctl", "--no-ask-password", "start", SIDECAR];
    refused(&vm.run_unit(&["User=citizen", "NoNewPrivileges=yes"], &start).unwrap());
    let allowed = vm.run_unit(&["User=ursa-agent", "NoNewPrivileges=yes"], &start).unwrap();
    assert!(allowed.ok(), "{}", allowed.brief());
    vm.unit(SIDECAR).wait("active", Duration::from_secs(10)).unwrap();

    for unit in
        ["web.service", "ursa-sidecarx@web.service", "ursa-sidecar@web.timer", "ursa-redirect.service"]
    {
        refused(&ask("ursa-agent", &["start", unit]));
        assert_eq!(state(unit), "inactive", "{unit}");
    }
    for args in [
        &["stop", "dbus.service"][..],
        &["kill", SIDECAR],
        &["set-property", "--runtime", SIDECAR, "MemoryMax=1G"],
        &["enable", SIDECAR],
        &["mask", SIDECAR],
        &["edit", "--full", "--runtime", "--stdin", SIDECAR],
        &["link", "/tmp/x.service"],
        &["daemon-reload"],
        &["daemon-reexec"],
        &["set-environment", "LD_PRELOAD=/tmp/x.so"],
        &["poweroff"],
        &["isolate", "rescue.target"],
    ] {
        let output = ask("ursa-agent", args);
        assert!(!output.ok(), "{args:?}: {}", output.brief());
    }
    assert_eq!(state(SIDECAR), "active");
    let transient = |unit: &str| {
        let unit = format!("--unit={unit}");
        vm.run_as("ursa-agent", &["systemd-run", "--no-ask-password", &unit, "/bin/touch", "/root/was-here"])
            .unwrap()
    };
    // A name whose template isn't installed: see below what newer systemd would make of it.
    refused(&ask("ursa-agent", &["start", "ursa-pod@mine.service"]));
    // The name of an instance is no way to become the control plane, or the agent out of its sandbox.
    for instance in ["control", "agent"] {
        let unit = format!("ursa-sidecar@{instance}.service");
        assert!(ask("ursa-agent", &["start", "--no-block", &unit]).ok());
        vm.unit(&unit).wait_said("status=217/USER", Duration::from_secs(10)).unwrap();
        vm.unit(&unit).stop().unwrap();
    }
    // Newer systemd asks polkit by the name of the transient unit: allowed, it would run what the agent likes, as root. Only
    // that a template of this name is installed prevents it.
    for unit in ["mine.service", "ursa-sidecar@mine.service", "ursa-pod@mine.service"] {
        let output = transient(unit);
        assert!(!output.ok(), "{unit}: {}", output.brief());
    }
    assert!(!vm.exists("/root/was-here").unwrap());
}
