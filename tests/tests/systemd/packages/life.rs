//! Install, upgrade, downgrade, remove, purge.

use std::time::Duration;

use ursa_tests::lab::packages::{Format, Packages};
use ursa_tests::lab::vm::Vm;
use ursa_tests::lab::{Lab, Programs};

use super::joined;

const SOON: Duration = Duration::from_secs(30);
const NAMES: [&str; 4] = ["ursa", "ursa-agent", "ursa-control", "ursa-cni"];

fn lab() -> Lab {
    Lab::new(&Programs::discover().unwrap()).unwrap()
}

/// Everything that a package could leave: files, users, units that are known, rules.
fn traces(vm: &Vm) -> String {
    vm.sh(
        r"find / -xdev \( -path /proc -o -path /sys -o -path /dev -o -path /tmp -o -path /run/systemd -o -path /run/udev \
              -o -path '/var/lib/dpkg' -o -path '/var/lib/rpm' -o -path /var/log -o -path /var/cache -o -path /run/log -o -path /root/.rpmdb \
              -o -path '/var/lib/systemd' -o -path /opt/lab -o -name '.pwd.lock' -o -path '/etc/*-' \) -prune -o -print |
              sort
          cat /etc/passwd /etc/group /etc/shadow /etc/gshadow
          systemctl list-units --all --plain --no-legend 'ursa*'
          systemctl list-unit-files --plain --no-legend 'ursa*' || true
          nft --stateless list ruleset",
    )
    .unwrap()
}

/// Folders that some package of every Fedora owns, and no package of Debian's smallest installation.
const OF_THE_SYSTEM: [&str; 6] = [
    "+ /usr/share/fish",
    "+ /usr/share/fish/vendor_completions.d",
    "+ /usr/share/licenses",
    "+ /usr/share/man/man1",
    "+ /usr/share/man/man8",
    "+ /usr/share/zsh/site-functions",
];

/// What one has and the other hasn't.
fn differences(before: &str, after: &str) -> Vec<String> {
    let lacks = |text: &str, sign: char, other: &str| {
        let known: std::collections::HashSet<_> = other.lines().collect();
        text.lines()
            .filter(|line| !known.contains(line))
            .map(|line| format!("{sign} {line}"))
            .collect::<Vec<_>>()
    };
    let mut all = [lacks(before, '-', after), lacks(after, '+', before)].concat();
    all.retain(|line| !OF_THE_SYSTEM.contains(&line.as_str()));
    all
}

fn main_pid(vm: &Vm, unit: &str) -> i32 {
    let state = vm.unit(unit).wait("active", SOON).unwrap();
    assert_eq!(state.restarts, 0, "{unit}");
    state.main_pid
}

/// Rules and processes that must not notice.
fn undisturbed(vm: &Vm) -> (i32, i32, i32, String) {
    let of = |unit| main_pid(vm, unit);
    let rules = vm.sh("nft --stateless list ruleset").unwrap();
    (of("web.service"), of("ursa-sidecar@web.service"), of("ursa-redirect.service"), rules)
}

fn life(format: Format) {
    let mut lab = lab();
    let (old, new) = ("0.1.0", "0.2.0");
    let first = Packages::build(&lab, format, old, &NAMES).unwrap();
    let second = Packages::build(&lab, format, new, &NAMES).unwrap();
    let vm = Vm::booted(&mut lab, "web").unwrap();
    joined::service(&vm);
    let before = traces(&vm);

    // Installed: users, folders and a socket; no process.
    first.install(&vm).unwrap();
    assert_eq!(vm.failed_units().unwrap(), Vec::<String>::new());
    for (unit, active) in [
        ("ursa-agent.socket", "active"),
        ("ursa-agent.service", "inactive"),
        ("ursa-redirect.service", "inactive"),
        ("ursa-control.service", "inactive"),
        ("ursa-control.socket", "inactive"),
    ] {
        assert_eq!(vm.unit(unit).state().unwrap().active, active, "{unit}");
    }
    let enabled = vm.sh("systemctl list-unit-files --plain --no-legend --state=enabled 'ursa*'").unwrap();
    let enabled: Vec<_> = enabled.lines().filter_map(|line| line.split_whitespace().next()).collect();
    assert_eq!(enabled, ["ursa-redirect.service", "ursa-agent.socket"]);
    assert_eq!(
        vm.sh("stat -c '%U %G %a' /run/ursa /run/ursa/agent.sock").unwrap(),
        "root root 755\nroot root 600\n"
    );
    let again =
        vm.sh("systemctl start ursa-redirect.service; systemctl is-active ursa-redirect.service || true");
    assert_eq!(again.unwrap(), "inactive\n", "there is nothing to redirect");

    // Upgraded and downgraded: the agent starts again, and nobody else does. What was edited stays.
    joined::join(&vm);
    vm.sh("ursa-init apply --host --proxy-uid $(id -u ursa-web); echo 'controlPlane: control:5678' >> /etc/ursa/agent.yaml")
        .unwrap();
    let late = joined::wait_for_another(&vm);
    let before_upgrade = undisturbed(&vm);
    assert!(before_upgrade.3.contains("ursa"), "{}", before_upgrade.3);
    let mut agent = main_pid(&vm, "ursa-agent.service");
    for packages in [&second, &first] {
        let done = packages.install(&vm).unwrap();
        assert_eq!(undisturbed(&vm), before_upgrade, "{}", done.brief());
        joined::still_waits(&vm, late);
        let next = main_pid(&vm, "ursa-agent.service");
        assert_ne!(next, agent);
        agent = next;
        assert!(vm.read("/etc/ursa/agent.yaml").unwrap().ends_with("controlPlane: control:5678\n"));
        assert_eq!(vm.sh("ls /etc/ursa").unwrap(), "agent.yaml\ncontrol.yaml\nredirect.d\nworkloads.d\n");
    }
    let reloads = vm.journal(&["--unit=ursa-sidecar@web.service"]).unwrap();
    let reloads = reloads.iter().filter(|entry| entry.message.starts_with("Reloading")).count();
    assert_eq!(reloads, 2, "sidecars execute themselves anew");

    // Removed only when no service needs it, or when told to take them out.
    let refused = format.remove(&vm, &[], &["ursa-agent"]).unwrap();
    assert!(!refused.ok() && refused.stderr.contains("ursa leave --all"), "{}", refused.brief());
    assert!(refused.stderr.contains("in the mesh: web"), "{}", refused.brief());
    assert!(format.installed(&vm, "ursa-agent").unwrap());
    assert_eq!(undisturbed(&vm), before_upgrade);
    let removed = format.remove(&vm, &["URSA_LEAVE=1"], &["ursa-agent"]).unwrap();
    assert!(removed.ok(), "{}", removed.brief());
    assert_eq!(main_pid(&vm, "web.service"), before_upgrade.0, "the service goes on");
    assert_eq!(joined::remains(&vm), Vec::<&str>::new());
    assert_eq!(vm.run(&["pgrep", "-f", "ursa|stub"]).unwrap().stdout, "");
    assert_eq!(vm.sh("getent passwd ursa-web || echo gone").unwrap(), "gone\n");
    let kept = if format == Format::Deb { "/etc/ursa/agent.yaml" } else { "/etc/ursa/agent.yaml.rpmsave" };
    assert!(vm.read(kept).unwrap().ends_with("controlPlane: control:5678\n"), "what was edited stays");
    assert!(!vm.sh("nft --stateless list ruleset").unwrap().contains("ursa"));
    // The service can start again without it, and leaves its slice.
    vm.unit("web.service").restart().unwrap();
    vm.sh("systemctl stop ursa.slice").unwrap();

    // Purged, from the midst of life.
    first.install(&vm).unwrap();
    joined::join(&vm);
    vm.sh("ursa-init apply --host --proxy-uid $(id -u ursa-web)").unwrap();
    let running = main_pid(&vm, "web.service");
    let purged = format.purge(&vm, &["URSA_LEAVE=1"], &NAMES).unwrap();
    assert!(purged.ok(), "{}", purged.brief());
    assert_eq!(main_pid(&vm, "web.service"), running);
    joined::leave_no_stub(&vm);
    vm.unit("web.service").restart().unwrap();
    vm.sh("systemctl stop ursa.slice").unwrap();
    assert_eq!(differences(&before, &traces(&vm)), Vec::<String>::new(), "{}", purged.brief());
    assert_eq!(vm.failed_units().unwrap(), Vec::<String>::new());
}

#[test]
fn a_deb_restarts_the_agent_only_and_leaves_nothing() {
    life(Format::Deb);
}

#[test]
fn an_rpm_restarts_the_agent_only_and_leaves_nothing() {
    life(Format::Rpm);
}

/// As in an image that is being built: the machine is off, its disk is there.
fn without_systemd(format: Format) {
    let mut lab = lab();
    let packages = Packages::build(&lab, format, "0.1.0", &NAMES).unwrap();
    let mut vm = Vm::new(&mut lab, "image").unwrap();
    let traces = |vm: &Vm| {
        vm.sh(r"find /etc /usr /var/lib -xdev \( -path /var/lib/dpkg -o -path /var/lib/rpm -o -path '/etc/*-' \
                 -o -path /var/lib/systemd -o -name .pwd.lock \) -prune -o -print | sort; cat /etc/passwd /etc/group")
            .unwrap()
    };
    let before = traces(&vm);
    packages.install(&vm).unwrap();
    for enabled in ["sockets.target.wants/ursa-agent.socket", "multi-user.target.wants/ursa-redirect.service"]
    {
        assert!(
            vm.run(&["test", "-h", &format!("/etc/systemd/system/{enabled}")]).unwrap().ok(),
            "{enabled}"
        );
    }
    let purged = format.purge(&vm, &[], &NAMES).unwrap();
    assert!(purged.ok(), "{}", purged.brief());
    assert_eq!(differences(&before, &traces(&vm)), Vec::<String>::new(), "{}", purged.brief());
    // And what was installed so works when the machine boots.
    packages.install(&vm).unwrap();
    vm.boot().unwrap();
    assert_eq!(vm.failed_units().unwrap(), Vec::<String>::new());
    assert_eq!(vm.unit("ursa-agent.socket").state().unwrap().active, "active");
    assert_eq!(vm.unit("ursa-agent.service").state().unwrap().active, "inactive");
}

#[test]
fn a_deb_is_installed_and_purged_where_no_systemd_runs() {
    without_systemd(Format::Deb);
}

#[test]
fn an_rpm_is_installed_and_purged_where_no_systemd_runs() {
    without_systemd(Format::Rpm);
}

/// Somebody threw the package away by force; its purge still finds what joining made.
#[test]
fn a_purge_after_a_forced_removal_leaves_nothing() {
    let mut lab = lab();
    let packages = Packages::build(&lab, Format::Deb, "0.1.0", &["ursa", "ursa-agent"]).unwrap();
    let vm = Vm::booted(&mut lab, "web").unwrap();
    joined::service(&vm);
    let before = traces(&vm);
    packages.install(&vm).unwrap();
    joined::join(&vm);
    vm.sh("rm /var/lib/dpkg/info/ursa-agent.prerm; dpkg --remove ursa-agent ursa").unwrap();
    assert!(!joined::remains(&vm).is_empty());
    let purged = Format::Deb.purge(&vm, &[], &["ursa-agent"]).unwrap();
    assert!(purged.ok(), "{}", purged.brief());
    joined::leave_no_stub(&vm);
    vm.unit("web.service").restart().unwrap();
    vm.sh("systemctl stop ursa.slice").unwrap();
    assert_eq!(differences(&before, &traces(&vm)), Vec::<String>::new(), "{}", purged.brief());
}
