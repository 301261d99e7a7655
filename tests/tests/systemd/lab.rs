//! The virtual machines themselves: what the other tests rely on.

use std::io::{BufRead as _, BufReader};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use ursa_tests::lab::capture::Capture;
use ursa_tests::lab::net;
use ursa_tests::lab::program::Client;
use ursa_tests::lab::vm::{self, Vm};
use ursa_tests::lab::{Lab, Programs, wait};

const SOON: Duration = Duration::from_secs(30);

fn lab() -> Lab {
    Lab::new(&Programs::discover().unwrap()).unwrap()
}

#[test]
fn a_machine_boots_runs_envoy_in_a_unit_and_keeps_its_disk_over_a_reboot_and_a_power_cut() {
    let mut lab = lab();
    let mut vm = Vm::new(&mut lab, "web").unwrap();
    // Off: a disk, and commands without systemd.
    vm.write("/etc/before", "boot").unwrap();
    assert_eq!(vm.run(&["sh", "-c", "cat /etc/before; exit 3"]).unwrap().brief(), "status 3: boot");
    let took = vm.boot().unwrap();
    eprintln!("booted in {took:?}");
    assert!(took < SOON);
    assert_eq!(vm.failed_units().unwrap(), Vec::<String>::new());
    assert_eq!(vm.sh("cat /etc/before; hostname").unwrap(), "bootweb\n");

    vm.copy_in(&lab.programs.envoy, "/usr/local/bin/envoy", 0o755).unwrap();
    let config = "admin: {address: {socket_address: {address: '::', port_value: 9901}}}\n";
    vm.write("/etc/envoy.yaml", config).unwrap();
    let unit = "[Service]\nExecStart=/usr/local/bin/envoy -c /etc/envoy.yaml --concurrency 1\nDynamicUser=yes\n\
                Restart=always\nRestartSec=100ms\n\n[Install]\nWantedBy=multi-user.target\n";
    vm.write("/etc/systemd/system/proxy.service", unit).unwrap();
    vm.sh("systemctl enable --now proxy.service").unwrap();
    let state = vm.unit("proxy.service").wait("active", SOON).unwrap();
    assert_eq!(vm.unit("proxy.service").pids().unwrap(), [state.main_pid]);
    assert_eq!(vm.running("envoy"), [vm.lab_pid(state.main_pid).unwrap()]);
    let other = lab.net.host("other").unwrap();
    let mut client = Client::start(&lab, &other).unwrap();
    let url = format!("http://[{}]:9901/ready", vm.host.v6);
    let ready = |client: &mut Client| {
        wait::until("Envoy to be ready", SOON, || match client.get(&url).unwrap() {
            answer if answer.ok() => Ok(()),
            answer => Err(answer.brief()),
        })
        .unwrap();
    };
    ready(&mut client);

    vm.unit("proxy.service").kill("main", "KILL").unwrap();
    let restarted = |state: &vm::units::State| state.restarts == 1 && state.active == "active";
    vm.unit("proxy.service").wait_until("to be restarted", SOON, restarted).unwrap();
    let said = vm.unit("proxy.service").wait_said("starting main dispatch loop", SOON).unwrap();
    assert_eq!(said.field("_COMM"), "envoy");

    let boot_id = |vm: &Vm| vm.read("/proc/sys/kernel/random/boot_id").unwrap();
    let first = boot_id(&vm);
    vm.write("/run/gone", "").unwrap();
    vm.reboot().unwrap();
    ready(&mut client);
    assert!(boot_id(&vm) != first && !vm.exists("/run/gone").unwrap());
    assert_eq!(vm.read("/etc/before").unwrap(), "boot");

    vm.power_cut();
    assert!(vm.running("").is_empty() && !vm.is_on());
    vm.boot().unwrap();
    ready(&mut client);
    let boots = vm.sh("journalctl --list-boots --quiet | wc -l").unwrap();
    assert_eq!(boots.trim(), "3");
}

#[test]
fn machines_and_hosts_reach_each_other_and_a_capture_sees_the_first_packet() {
    let mut lab = lab();
    let capture = Capture::start(&lab.net.bridge()).unwrap();
    let mut one = Vm::new(&mut lab, "one").unwrap();
    let mut two = Vm::new(&mut lab, "two").unwrap();
    let early = "[Unit]\nDefaultDependencies=no\nBefore=network-pre.target\nWants=network-pre.target\n[Service]\nType=oneshot\n\
                 ExecStart=/bin/sh -c 'ip -o address show eth0 >/early; cat /sys/class/net/eth0/operstate >>/early'\n\
                 [Install]\nWantedBy=sysinit.target\n";
    one.write("/etc/systemd/system/early.service", early).unwrap();
    one.run(&["systemctl", "enable", "early.service"]).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| one.boot().unwrap());
        scope.spawn(|| two.boot().unwrap());
    });
    // Before network-pre.target there is no network.
    assert_eq!(one.read("/early").unwrap().trim(), "down");
    two.sh("systemctl is-active network-online.target || systemctl start network-online.target").unwrap();
    let bridge = lab.net.bridge_host();
    let addresses = [&one.host.v4, &one.host.v6, &bridge.v4, &bridge.v6];
    let mut asking = Client::spawn(two.command(vm::APP).arg("client")).unwrap();
    one.write(
        "/etc/systemd/system/web.service",
        &format!("[Service]\nExecStart={} serve --name web --port 8080\n", vm::APP),
    )
    .unwrap();
    one.unit("web.service").start().unwrap();
    for address in &addresses[..2] {
        let host = if address.contains(':') { format!("[{address}]") } else { (*address).clone() };
        wait::until("an answer", SOON, || match asking.get(&format!("http://{host}:8080/")).unwrap() {
            answer if answer.ok() => Ok(()),
            answer => Err(answer.brief()),
        })
        .unwrap();
    }
    let packets = capture.finish().unwrap();
    let (a, b) = (one.host.v4.parse().unwrap(), two.host.v4.parse().unwrap());
    assert!(packets.between(a, b) > 4);
    assert!(packets.containing("which nobody on the way may read") >= 2);
    // Both have announced themselves at boot: a MAC address of theirs is in packets to a multicast group.
    assert!(packets.to_network6("ff02::".parse().unwrap(), 16) >= 2);
}

/// Not a test, but whom the next one kills.
#[test]
#[ignore = "it never ends"]
fn victim() {
    let mut lab = lab();
    let mut vm = Vm::booted(&mut lab, "web").unwrap();
    println!("up: {}", lab.prefix);
    let _ = std::io::stdin().read_line(&mut String::new());
    vm.power_cut();
}

#[test]
fn nothing_of_a_killed_test_remains() {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "lab::victim", "--ignored", "--nocapture"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
    let prefix = lines.filter_map(|line| Some(line.split_once("up: ")?.1.to_owned())).next().unwrap();
    let remains = || {
        let processes = net::processes().into_iter().filter(|pid| {
            let read = |file: &str| std::fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
            let text = [read("cmdline"), read("cgroup")].concat();
            String::from_utf8_lossy(&text).contains(&prefix)
        });
        let mut all: Vec<String> = processes.map(|pid| format!("process {pid}")).collect();
        let folders =
            [std::env::temp_dir(), "/run/netns".into(), "/etc/netns".into(), "/run/systemd/nspawn".into()];
        let groups = std::fs::read_dir("/sys/fs/cgroup").unwrap().flatten().map(|entry| entry.path());
        for folder in folders.into_iter().chain(groups).chain(["/sys/fs/cgroup".into()]) {
            let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
            let named = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(&prefix));
            all.extend(named.map(|entry| entry.path().display().to_string()));
        }
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
        all.extend(mounts.lines().filter(|line| line.contains(&prefix)).map(str::to_owned));
        all
    };
    assert!(remains().len() > 5, "{:?}", remains());
    child.kill().unwrap();
    child.wait().unwrap();
    wait::until("nothing to remain", SOON, || match remains() {
        none if none.is_empty() => Ok(()),
        some => Err(format!("{some:?}")),
    })
    .unwrap();
}

#[test]
fn limits_hold_where_they_are_asked_for() {
    let mut lab = lab();
    let mut vm = Vm::new(&mut lab, "small").unwrap().with_limits();
    vm.boot().unwrap();
    let greedy = ["sh", "-c", "head -c 200M /dev/zero | tail -c 150M | wc -c"];
    let free = vm.run_unit(&[], &greedy).unwrap();
    assert_eq!(free.stdout.trim(), "157286400", "{}", free.brief());
    let tight = vm.run_unit(&["MemoryMax=30M"], &greedy).unwrap();
    assert!(!tight.stdout.contains("157286400"), "{}", tight.brief());
    let forks =
        vm.run_unit(&["TasksMax=3"], &["sh", "-c", "sleep 1 & sleep 1 & sleep 1 & sleep 1 & wait"]).unwrap();
    assert!(!forks.ok(), "{}", forks.brief());
    // Systemd hears when a unit's last process ends; where it doesn't, a stop takes a minute and a half.
    let left = Instant::now();
    vm.run_unit(&[], &["sh", "-c", "(sleep 0.2; sleep 1) & exit 1"]).unwrap();
    assert!(left.elapsed() < SOON, "{:?}", left.elapsed());
    assert_eq!(vm.unit("dbus.service").pids().unwrap().len(), 1);
}

#[test]
fn a_machine_boots_with_control_groups_of_version_1_too() {
    let mut lab = lab();
    let mut vm = Vm::new(&mut lab, "old").unwrap().with_old_cgroups();
    vm.boot().unwrap();
    assert_eq!(vm.failed_units().unwrap(), Vec::<String>::new());
    assert_eq!(vm.unit("dbus.service").pids().unwrap().len(), 1);
}
