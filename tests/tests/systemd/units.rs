//! The units that we ship, as systemd judges them before it runs any.

use ursa_tests::lab::vm::Vm;
use ursa_tests::lab::{Lab, Programs};

use crate::shipped;

/// Statement 34, and the control plane like the agent: the worst exposure, times ten.
const EXPOSURE: [(&str, u32); 5] = [
    ("ursa-agent.service", 20),
    ("ursa-sidecar@.service", 20),
    ("ursa-control.service", 20),
    ("ursa-redirect.service", 35),
    ("ursa-redirect@.service", 35),
];

#[test]
fn units_are_sound_and_expose_little() {
    let mut lab = Lab::new(&Programs::discover().unwrap()).unwrap();
    let vm = Vm::new(&mut lab, "judge").unwrap();
    let units = shipped::install(&vm);
    let verified = vm.run(&[&["systemd-analyze", "verify", "--man=no"], &*strs(&units)].concat()).unwrap();
    assert!(verified.ok() && verified.stderr.is_empty(), "{}", verified.brief());
    // It is of those that complain.
    vm.write("/usr/lib/systemd/system/wrong.service", "[Service]\nExecStart=/nowhere\nProtectSytem=strict\n")
        .unwrap();
    let wrong = vm.run(&["systemd-analyze", "verify", "--man=no", "wrong.service"]).unwrap();
    assert!(!wrong.ok() && wrong.stderr.contains("ProtectSytem"), "{}", wrong.brief());

    for (unit, most) in EXPOSURE {
        let path = format!("/usr/lib/systemd/system/{unit}");
        let judge = |most: u32| {
            let threshold = format!("--threshold={most}");
            vm.run(&["systemd-analyze", "security", "--offline=true", "--no-pager", &threshold, &path])
                .unwrap()
        };
        let output = judge(most);
        let verdict = output.stdout.lines().last().unwrap_or_default();
        eprintln!("{verdict}");
        assert!(output.ok() && verdict.contains("exposure level"), "{}", output.brief());
        assert!(!judge(5).ok(), "{unit}: every exposure is below the threshold");
    }
}

#[test]
fn presets_enable_what_costs_nothing_and_a_boot_without_configuration_fails_nothing() {
    let mut lab = Lab::new(&Programs::discover().unwrap()).unwrap();
    let mut vm = Vm::new(&mut lab, "fresh").unwrap();
    let units = shipped::install(&vm);
    vm.sh("systemctl preset ursa-agent.socket ursa-agent.service ursa-redirect.service ursa-control.service")
        .unwrap();
    let enabled = |unit: &str| vm.run(&["systemctl", "is-enabled", unit]).unwrap().stdout.trim().to_owned();
    let all = ["ursa-agent.socket", "ursa-agent.service", "ursa-redirect.service", "ursa-control.service"];
    assert_eq!(all.map(enabled), ["enabled", "disabled", "enabled", "disabled"]);
    vm.boot().unwrap();
    assert_eq!(vm.failed_units().unwrap(), Vec::<String>::new());
    for unit in units.iter().filter(|unit| unit.ends_with(".service") && !unit.contains('@')) {
        let state = vm.unit(unit).state().unwrap();
        assert_eq!((state.active.as_str(), state.result.as_str()), ("inactive", "success"), "{unit}");
    }
    let users = vm.sh("getent passwd ursa-agent ursa-control; getent group ursa-proxy").unwrap();
    assert_eq!(users.lines().count(), 3, "{users}");
    let listed =
        vm.sh("stat -c '%a %U %n' /run/ursa /run/ursa/agent.sock /var/lib/ursa /var/lib/ursa/join").unwrap();
    let expected = "755 root /run/ursa\n600 root /run/ursa/agent.sock\n755 root /var/lib/ursa\n700 root /var/lib/ursa/join\n";
    assert_eq!(listed, expected);
    // An ordering cycle would be broken by leaving out a job, and said so.
    let said = vm.journal(&["--boot", "--grep", "ordering cycle"]).unwrap_or_default();
    assert!(said.is_empty(), "{said:?}");
}

fn strs(all: &[String]) -> Vec<&str> {
    all.iter().map(String::as_str).collect()
}
