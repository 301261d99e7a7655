//! That polkit decides on a virtual machine as it does on a real one: the ground under what the agent may start.

use std::time::Duration;

use ursa_tests::lab::vm::Vm;
use ursa_tests::lab::{Lab, Programs};

const RULE: &str = r#"polkit.addRule(function(action, subject) {
    if (action.id == "org.freedesktop.systemd1.manage-units" && subject.user == "mayor" &&
        action.lookup("unit") == "hall.service" && action.lookup("verb") == "start") {
        return polkit.Result.YES;
    }
});
"#;

#[test]
fn a_user_without_privileges_starts_what_a_rule_allows_and_nothing_else() {
    let mut lab = Lab::new(&Programs::discover().unwrap()).unwrap();
    let mut vm = Vm::new(&mut lab, "town").unwrap();
    vm.write("/etc/sysusers.d/town.conf", "u mayor - - -\nu citizen - - -\n").unwrap();
    vm.write("/etc/polkit-1/rules.d/50-town.rules", RULE).unwrap();
    for unit in ["hall", "bank"] {
        vm.write(
            &format!("/etc/systemd/system/{unit}.service"),
            "[Service]\nExecStart=/bin/sleep infinity\n",
        )
        .unwrap();
    }
    vm.boot().unwrap();
    let ask = |user: &str, verb: &str, unit: &str| {
        vm.run_as(user, &["systemctl", "--no-ask-password", verb, unit]).unwrap()
    };
    for (user, verb, unit) in [
        ("citizen", "start", "hall.service"),
        ("mayor", "start", "bank.service"),
        ("mayor", "restart", "hall.service"),
    ] {
        let refused = ask(user, verb, unit);
        assert!(!refused.ok() && refused.stderr.contains("authentication required"), "{}", refused.brief());
    }
    assert_eq!(vm.unit("hall.service").state().unwrap().active, "inactive");
    let allowed = ask("mayor", "start", "hall.service");
    assert!(allowed.ok(), "{}", allowed.brief());
    vm.unit("hall.service").wait("active", Duration::from_secs(10)).unwrap();
    assert!(!ask("mayor", "stop", "hall.service").ok());
    // The same from a unit, which is how the agent asks.
    vm.unit("hall.service").stop().unwrap();
    let command = ["systemctl", "--no-ask-password", "start", "hall.service"];
    assert!(!vm.run_unit(&["User=citizen", "NoNewPrivileges=yes"], &command).unwrap().ok());
    let allowed = vm.run_unit(&["User=mayor", "NoNewPrivileges=yes"], &command).unwrap();
    assert!(allowed.ok(), "{}", allowed.brief());
}
