//! What the units may do.

use std::time::Duration;

use ursa_tests::lab::packages::{Format, Packages};
use ursa_tests::lab::vm::Vm;
use ursa_tests::lab::{Lab, Programs};

use super::joined;

const SOON: Duration = Duration::from_secs(30);

fn machine(lab: &mut Lab) -> Vm {
    let packages =
        Packages::build(lab, Format::Deb, "0.1.0", &["ursa", "ursa-agent", "ursa-control"]).unwrap();
    let vm = Vm::booted(lab, "web").unwrap();
    packages.install(&vm).unwrap();
    vm
}

#[test]
fn units_are_exposed_as_little_as_promised() {
    let mut lab = Lab::new(&Programs::discover().unwrap()).unwrap();
    let vm = machine(&mut lab);
    for (unit, most) in [
        ("ursa-agent.service", 20),
        ("ursa-sidecar@web.service", 20),
        ("ursa-control.service", 20),
        ("ursa-redirect.service", 35),
        ("ursa-redirect@web.service", 35),
    ] {
        let threshold = format!("--threshold={most}");
        let rated = vm.run(&["systemd-analyze", "security", "--no-pager", &threshold, unit]).unwrap();
        let overall = rated.stdout.lines().last().unwrap_or_default();
        eprintln!("{overall}");
        assert!(rated.ok() && overall.contains(unit), "{}", rated.brief());
    }
    let units = "ursa-agent.service ursa-agent.socket ursa-sidecar@web.service ursa-sidecar.slice ursa-redirect.service \
                 ursa-redirect@web.service ursa-control.service ursa-control.socket";
    let verified = vm.run(&["sh", "-c", &format!("systemd-analyze verify --man=no {units}")]).unwrap();
    assert!(verified.ok() && verified.stderr.is_empty(), "{}", verified.brief());
}

#[test]
fn the_agents_user_commands_sidecars_and_nothing_else() {
    let mut lab = Lab::new(&Programs::discover().unwrap()).unwrap();
    let vm = machine(&mut lab);
    joined::service(&vm);
    joined::join(&vm);
    let ask = |command: &[&str]| vm.run_unit(&["User=ursa-agent", "NoNewPrivileges=yes"], command).unwrap();
    let systemctl = |words: &[&str]| ask(&[&["systemctl", "--no-ask-password"], words].concat());
    for verb in ["reload", "restart", "start"] {
        let allowed = systemctl(&[verb, "ursa-sidecar@web.service"]);
        assert!(allowed.ok(), "{verb}: {}", allowed.brief());
    }
    vm.unit("ursa-sidecar@web.service").wait("active", SOON).unwrap();
    for refused in [
        &["stop", "web.service"] as &[&str],
        &["restart", "ursa-redirect.service"],
        &["start", "ursa-redirect@web.service"],
        &["stop", "ursa-agent.service"],
        &["start", "ursa-sidecar@../../x.service"],
        &["kill", "ursa-sidecar@web.service"],
        &["set-property", "--runtime", "ursa-sidecar@web.service", "MemoryMax=1G"],
        &["enable", "ursa-control.service"],
        &["daemon-reload"],
        &["poweroff"],
    ] {
        let answer = systemctl(refused);
        assert!(!answer.ok(), "{refused:?}: {}", answer.brief());
    }
    let transient = ask(&[
        "systemd-run",
        "--no-ask-password",
        "--unit=ursa-sidecar@evil.service",
        "-p",
        "User=root",
        "id",
    ]);
    assert!(!transient.ok(), "{}", transient.brief());
    vm.unit("web.service").wait("active", SOON).unwrap();
    let allowed = systemctl(&["stop", "ursa-sidecar@web.service"]);
    assert!(allowed.ok(), "{}", allowed.brief());
    assert_eq!(vm.unit("ursa-sidecar@web.service").state().unwrap().active, "inactive");
}

/// Without a user of its own a sidecar doesn't start, least of all as root.
#[test]
fn a_sidecar_without_a_user_or_a_namespace_of_its_own_fails_closed() {
    let mut lab = Lab::new(&Programs::discover().unwrap()).unwrap();
    let vm = machine(&mut lab);
    joined::service(&vm);
    joined::join(&vm);
    vm.write("/etc/systemd/system/other.service", "[Service]\nExecStart=/bin/sleep infinity\n").unwrap();
    vm.write(
        "/etc/systemd/system/other.service.d/50-ursa.conf",
        "[Unit]\nRequires=ursa-sidecar@other.service\n",
    )
    .unwrap();
    vm.reload_units().unwrap();
    let fails = |reason: &str| {
        vm.unit("other.service").begin_start().unwrap();
        vm.unit("ursa-sidecar@other.service").wait_said(reason, SOON).unwrap();
        assert_eq!(vm.running("ursa-shim"), Vec::<i32>::new());
        vm.sh("systemctl stop ursa-sidecar@other.service other.service").unwrap();
    };
    fails("217/USER");
    vm.write(
        "/etc/systemd/system/ursa-sidecar@other.service.d/10-ursa.conf",
        "[Service]\nUser=ursa-web\nNetworkNamespacePath=/run/netns/gone\n",
    )
    .unwrap();
    vm.reload_units().unwrap();
    fails("225/NETWORK");
}
