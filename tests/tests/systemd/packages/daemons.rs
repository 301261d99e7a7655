//! The real programs in their packages' units.

use std::time::Duration;

use ursa_tests::lab::packages::{Format, Packages};
use ursa_tests::lab::vm::Vm;
use ursa_tests::lab::vm::units::State;
use ursa_tests::lab::{Lab, Programs, wait};

const SOON: Duration = Duration::from_secs(30);

fn install(lab: &Lab, vm: &Vm, version: &str, names: &[&str]) {
    Packages::build(lab, Format::Deb, version, names).unwrap().install(vm).unwrap();
}

/// Neither capabilities nor a way to gain any, and nobody but the unit's user.
fn powerless(vm: &Vm, unit: &str, user: &str) -> i32 {
    let pid = vm.unit(unit).wait("active", SOON).unwrap().main_pid;
    let status = vm.read(&format!("/proc/{pid}/status")).unwrap();
    for none in ["CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert!(status.contains(&format!("{none}:\t0000000000000000")), "{unit}: {status}");
    }
    assert!(status.contains("NoNewPrivs:\t1") && status.contains("Seccomp:\t2"), "{unit}: {status}");
    assert_eq!(vm.sh(&format!("ps -o user:32= -p {pid}")).unwrap().trim(), user);
    pid
}

#[test]
fn the_control_plane_serves_by_systemds_socket_and_an_upgrade_restarts_it() {
    let mut lab = Lab::new(&Programs::discover().unwrap()).unwrap();
    let vm = Vm::booted(&mut lab, "control").unwrap();
    let names = ["ursa", "ursa-control"];
    install(&lab, &vm, "0.1.0", &names);
    let meshes = || vm.run(&["ursa", "get", "meshes"]).unwrap();
    assert!(!meshes().ok(), "nobody has started it, and asking doesn't");
    assert_eq!(vm.unit("ursa-control.service").state().unwrap().active, "inactive");

    // Started means that it serves.
    vm.sh("systemctl enable --now ursa-control.service").unwrap();
    let answer = meshes();
    assert!(answer.ok() && answer.stdout.contains("default"), "{}", answer.brief());
    let first = powerless(&vm, "ursa-control.service", "ursa-control");
    assert_eq!(
        vm.sh("stat -c '%U %a' /run/ursa/control.sock /var/lib/ursa/control").unwrap(),
        "root 666\nursa-control 700\n"
    );
    // Somebody else may connect, and is nobody.
    let other = vm.run_as("daemon", &["ursa", "get", "meshes"]).unwrap();
    assert!(!other.ok() && other.brief().contains("Unauthenticated"), "{}", other.brief());

    install(&lab, &vm, "0.2.0", &names);
    assert_ne!(powerless(&vm, "ursa-control.service", "ursa-control"), first);
    assert!(meshes().ok());
    assert_eq!(vm.sh("systemctl is-enabled ursa-control.service").unwrap(), "enabled\n");

    // Stopped is stopped, whoever asks.
    vm.unit("ursa-control.service").stop().unwrap();
    assert!(!meshes().ok());
    assert_eq!(vm.unit("ursa-control.service").state().unwrap().active, "inactive");
    install(&lab, &vm, "0.3.0", &names);
    assert_eq!(
        vm.unit("ursa-control.service").state().unwrap().active,
        "inactive",
        "nor does an upgrade start it"
    );

    // A wrong configuration is said once.
    vm.write("/etc/ursa/control.yaml", "mode: sideways\n").unwrap();
    assert!(!vm.run(&["systemctl", "start", "ursa-control.service"]).unwrap().ok());
    let state = vm.unit("ursa-control.service").wait("failed", SOON).unwrap();
    assert_eq!(state.restarts, 0);
    vm.unit("ursa-control.service").wait_said("sideways", SOON).unwrap();
}

#[test]
fn the_agent_starts_with_the_first_question() {
    let mut lab = Lab::new(&Programs::discover().unwrap()).unwrap();
    let mut vm = Vm::booted(&mut lab, "node").unwrap();
    install(&lab, &vm, "0.1.0", &["ursa", "ursa-agent"]);
    assert_eq!(vm.unit("ursa-agent.service").state().unwrap().active, "inactive");
    let status = vm.run(&["ursa-agent", "status"]).unwrap();
    eprintln!("{}", status.brief());
    assert!(!status.stderr.contains("can't"), "{}", status.brief());
    let first = powerless(&vm, "ursa-agent.service", "ursa-agent");
    assert!(vm.unit("ursa-agent.service").state().unwrap().status.contains("ursa join"));
    vm.unit("ursa-agent.service").reload().unwrap();
    assert_eq!(vm.unit("ursa-agent.service").state().unwrap().main_pid, first);
    assert_eq!(vm.sh("stat -c '%U %a' /var/lib/ursa/agent").unwrap(), "ursa-agent 711\n");

    // Nothing has enabled it; the next question after a boot starts it again.
    vm.reboot().unwrap();
    assert_eq!(vm.unit("ursa-agent.service").state().unwrap().active, "inactive");
    vm.run(&["ursa-agent", "status"]).unwrap();
    powerless(&vm, "ursa-agent.service", "ursa-agent");
}

/// As often as it ends untold, so long it waits before it tries again; whoever stops it ends that.
#[test]
fn a_sidecar_that_ends_again_and_again_is_started_more_and_more_rarely() {
    let mut lab = Lab::new(&Programs::discover().unwrap()).unwrap();
    let vm = Vm::booted(&mut lab, "node").unwrap();
    install(&lab, &vm, "0.1.0", &["ursa", "ursa-agent"]);
    let name = "ursa-sidecar@web.service";
    for (path, text) in [
        ("/etc/sysusers.d/ursa-web.conf", "u ursa-web -:ursa-proxy\n"),
        ("/etc/systemd/system/ursa-sidecar@web.service.d/10-ursa.conf", "[Service]\nUser=ursa-web\n"),
        // It needs it, or it would be stopped again.
        (
            "/etc/systemd/system/web.service",
            "[Unit]\nWants=ursa-sidecar@web.service\n[Service]\nExecStart=/bin/sleep infinity\n",
        ),
    ] {
        vm.write(path, text).unwrap();
    }
    // The agent would stop a sidecar of which it knows no workload.
    vm.sh("systemctl mask --quiet --now ursa-agent.service; systemd-sysusers ursa-web.conf; systemctl daemon-reload; \
           systemctl start --no-block web.service")
        .unwrap();
    let sidecar = vm.unit(name);
    let waits = |state: &State| state.main_pid != 0 && state.status.starts_with("Waiting");
    for ends in 0..4 {
        let running = sidecar.wait_until("to serve", SOON, waits).unwrap();
        assert_eq!(running.restarts, ends, "{}", running.status);
        sidecar.kill("main", "KILL").unwrap();
        sidecar.wait_until("to notice", SOON, |state| state.main_pid != running.main_pid).unwrap();
    }
    let held =
        sidecar.wait_until("to hold back", SOON, |state| state.status.starts_with("ended 4 times")).unwrap();
    assert!(held.status.contains("waits 4 s"), "{}", held.status);
    let stopped = std::time::Instant::now();
    sidecar.stop().unwrap();
    assert!(stopped.elapsed() < Duration::from_secs(3), "{:?}", stopped.elapsed());
    // Told to end, it forgets.
    sidecar.begin_start().unwrap();
    sidecar.wait_until("to serve", Duration::from_secs(3), waits).unwrap();
}

#[test]
fn the_redirect_stands_before_the_network_and_goes_with_the_package() {
    let mut lab = Lab::new(&Programs::discover().unwrap()).unwrap();
    let mut vm = Vm::booted(&mut lab, "node").unwrap();
    install(&lab, &vm, "0.1.0", &["ursa", "ursa-agent"]);
    let rules = |vm: &Vm| vm.sh("nft --stateless list ruleset").unwrap();
    vm.write("/etc/ursa/redirect.yaml", "proxyUids: [5678]\n").unwrap();
    vm.unit("ursa-redirect.service").start().unwrap();
    assert!(rules(&vm).contains("5678"), "{}", rules(&vm));
    let status: serde_json::Value =
        serde_json::from_str(&vm.read("/run/ursa/redirect.json").unwrap()).unwrap();
    eprintln!("{status}");
    let state = vm.unit("ursa-redirect.service").state().unwrap();
    let caps = vm.read(&format!("/proc/{}/status", state.main_pid)).unwrap();
    eprintln!("{}", caps.lines().filter(|line| line.starts_with("Cap")).collect::<Vec<_>>().join(" "));
    assert!(caps.contains("NoNewPrivs:\t1"));
    vm.sh("nft flush ruleset").unwrap();
    wait::until("the rules to be back", SOON, || match rules(&vm) {
        text if text.contains("5678") => Ok(()),
        text => Err(text),
    })
    .unwrap();
    vm.write("/etc/ursa/redirect.yaml", "proxyUids: [5679]\n").unwrap();
    vm.unit("ursa-redirect.service").reload().unwrap();
    wait::until("the new rules", SOON, || match rules(&vm) {
        text if text.contains("5679") => Ok(()),
        text => Err(text),
    })
    .unwrap();

    vm.reboot().unwrap();
    assert!(rules(&vm).contains("5679"), "{}", rules(&vm));
    let earlier = vm
        .sh("systemctl show --property=ActiveEnterTimestampMonotonic --value ursa-redirect.service; \
         systemctl show --property=ActiveEnterTimestampMonotonic --value network-pre.target");
    let times: Vec<u64> = earlier.unwrap().lines().map(|line| line.parse().unwrap()).collect();
    assert!(times[0] > 0 && times[0] <= times[1], "{times:?}");
    // Stopped, it leaves them: closed is better than open.
    vm.unit("ursa-redirect.service").stop().unwrap();
    assert!(rules(&vm).contains("5679"));
    let removed = Format::Deb.remove(&vm, &[], &["ursa-agent"]).unwrap();
    assert!(removed.ok(), "{}", removed.brief());
    assert_eq!(rules(&vm), "");
    assert!(vm.exists("/etc/ursa/redirect.yaml").unwrap());
}
