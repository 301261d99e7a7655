//! The same pods under each container runtime: chained after Debian's plugins, dual stack, with the real agent and the
//! real Envoy.

use std::process::Command;

use ursa_tests::lab::capture::Capture;
use ursa_tests::lab::machine::Machine;
use ursa_tests::lab::mesh::{self, PORT};
use ursa_tests::lab::net::runs;
use ursa_tests::lab::pair::{SOON, until};
use ursa_tests::lab::program::{Answer, Client};
use ursa_tests::lab::runtime::containerd::Containerd;
use ursa_tests::lab::runtime::driver::Driver;
use ursa_tests::lab::runtime::ground::{Ground, OUTSIDE};
use ursa_tests::lab::runtime::podman::Podman;
use ursa_tests::lab::runtime::{Pod, PodSpec, Runtime};
use ursa_tests::lab::wait;

use crate::plaintext::assert_nothing_readable;

/// A port of the machine that `portmap` leads to the pod outside the mesh.
const HOST_PORT: u16 = 30080;

#[test]
fn containerd_pods_are_meshed() {
    let names = ["web-shop", "backend-shop"];
    let ground = Ground::start(&names, Containerd::start).unwrap();
    two_pods(&ground, |pod| {
        // As a probe of kubelet's: containers of a pod reach each other directly.
        let url = format!("http://127.0.0.1:{PORT}/");
        let seen = ground.runtime.exec_sync(pod, &["/busybox", "wget", "-q", "-O", "-", &url]).unwrap();
        assert!(seen.contains(&pod.spec.name), "{seen}");
    });
    assert_eq!(ground.runtime.sandboxes().unwrap(), []);
}

#[test]
fn podman_pods_are_meshed() {
    let ground = Ground::start(&["web", "backend"], Podman::start).unwrap();
    two_pods(&ground, |_| {});
}

#[test]
fn pods_of_a_bare_driver_are_meshed() {
    let names = ["web-shop", "backend-shop"];
    let ground = Ground::start(&names, Driver::start).unwrap();
    two_pods(&ground, |pod| {
        // The CHECK of portmap 1.1.1 looks for the rules of IPv4 among those of IPv6.
        if pod.spec.host_port.is_some() {
            return;
        }
        let attachment = Driver::attachment(&pod.spec, &pod.id, Some(pod.netns.clone()));
        ground.runtime.check(&ground.machine, Driver::network(&pod.spec), &attachment).unwrap();
    });
}

/// libcni 1.3 and newer read drop-ins, of which Debian has no runtime.
#[test]
fn a_drop_in_puts_pods_into_the_mesh_and_leaves_the_networks_file_alone() {
    let ground = Ground::bare(&["web-shop"], Driver::start).unwrap();
    let (machine, networks) = (&ground.machine, &ground.networks);
    let (list, plugin) = (networks.conf_dir.join("10-pods.conflist"), ground.lab.dir().join("plugin.json"));
    std::fs::write(&plugin, networks.ursa().to_string()).unwrap();
    let ursa_cni = |args: &[&str]| {
        let mut command = Command::new(ground.lab.programs.path("ursa-cni"));
        command.args(args).arg("--root").arg(&networks.root);
        let said = mesh::run(&mut command, "").unwrap();
        ground.runtime.read_again().unwrap();
        said
    };
    let before = std::fs::read(&list).unwrap();
    let said = ursa_cni(&["install", "--mode", "drop-in", "--plugin-config", plugin.to_str().unwrap()]);
    assert!(said.contains("pods/ursa-cni.conf"), "{said}");
    assert_eq!(std::fs::read(&list).unwrap(), before);
    ursa_cni(&["status"]);
    let web = ground.run(&PodSpec::meshed("web")).unwrap();
    assert!(web.envoys(machine).len() == 1 && !web.rules(machine).unwrap().is_empty());
    ground.runtime.remove(machine, &web).unwrap();
    ursa_cni(&["uninstall"]);
    assert!(std::fs::read(&list).unwrap() == before && !networks.conf_dir.join("pods").exists());
    let plain = ground.run(&PodSpec::meshed("web")).unwrap();
    assert_untouched(machine, &plain);
    ground.runtime.remove(machine, &plain).unwrap();
    assert_nothing_left(&ground);
}

#[track_caller]
fn get(client: &mut Client, url: &str) -> Answer {
    client.get(url).unwrap()
}

/// Two pods with mutual TLS between them by name, which policy denies and then allows, beside one outside the mesh;
/// then all three are gone. `inspect` is called with each pod while it runs.
fn two_pods<R: Runtime>(ground: &Ground<R>, inspect: impl Fn(&Pod)) {
    let machine = &ground.machine;
    let plain = PodSpec { host_port: Some(HOST_PORT), ..PodSpec::plain("plain") };
    let plain = ground.run(&plain).unwrap();
    assert_untouched(machine, &plain);
    let backend = ground.run(&PodSpec::meshed("backend")).unwrap();
    let web = ground.run(&PodSpec::meshed("web")).unwrap();
    for pod in [&web, &backend] {
        assert_eq!(pod.envoys(machine).len(), 1, "{} starts with its Envoy live", pod.spec.name);
        assert!(!pod.rules(machine).unwrap().is_empty(), "{} is redirected", pod.spec.name);
    }
    [&plain, &web, &backend].into_iter().for_each(&inspect);

    let (service, caller) = (ground.runtime.service("backend"), ground.runtime.service("web"));
    let url = format!("http://{service}.svc.mesh.local:{PORT}/orders");
    let mut client = ground.client(&web).unwrap();
    until(&mut client, &url, "a request that no policy allows to be denied", |answer| {
        answer.status == Some(403)
    })
    .unwrap();
    ground.control.ursa(&["allow", &caller, &service]).unwrap();
    let capture = Capture::start(&machine.host.path()).unwrap();
    until(&mut client, &url, "an allowed request to succeed", Answer::ok).unwrap();
    let name = format!("{service}.svc.mesh.local");
    let addresses = client.resolve(&name).unwrap().text;
    assert!(addresses.contains(':') && addresses.contains('.'), "both families: {addresses}");
    for address in addresses.split_whitespace() {
        let host = if address.contains(':') { format!("[{address}]") } else { address.to_owned() };
        let answer = get(&mut client, &format!("http://{host}:{PORT}/orders"));
        assert!(answer.ok(), "{host}: {}", answer.brief());
    }
    assert_nothing_readable(&capture.finish().unwrap(), &ground.lab);

    outside_is_as_without_a_mesh(ground, &plain, &backend);
    drop(client);

    for pod in [&web, &backend, &plain] {
        let envoys = pod.envoys(machine);
        ground.runtime.stop(machine, pod).unwrap();
        wait::until("its proxy to end", SOON, || match envoys.iter().find(|&&pid| runs(pid, "envoy")) {
            None => Ok(()),
            Some(pid) => Err(format!("process {pid} of {}", pod.spec.name)),
        })
        .unwrap();
        ground.runtime.remove(machine, pod).unwrap();
    }
    assert_nothing_left(ground);
}

/// The pod outside the mesh reaches the world and is reached by it, over both families; and a meshed pod's port is
/// closed to it.
fn outside_is_as_without_a_mesh<R: Runtime>(ground: &Ground<R>, plain: &Pod, backend: &Pod) {
    let bridge = ground.lab.net.bridge_host();
    let mut client = ground.client(plain).unwrap();
    for url in [format!("http://{}:{OUTSIDE}/", bridge.v4), format!("http://[{}]:{OUTSIDE}/", bridge.v6)] {
        let answer = get(&mut client, &url);
        assert!(answer.ok(), "{url}: {}", answer.brief());
    }
    for url in [format!("http://{}:{PORT}/", backend.v4), format!("http://[{}]:{PORT}/", backend.v6)] {
        let answer = get(&mut client, &url);
        assert!(answer.status.is_none(), "{url}: {}", answer.brief());
    }
    let node = &ground.machine.host;
    let answer =
        get(&mut Client::start(&ground.lab, &bridge).unwrap(), &format!("http://{}:{HOST_PORT}/", node.v4));
    assert!(answer.ok() && answer.text.contains("plain"), "the mapped port: {}", answer.brief());
    assert_untouched(&ground.machine, plain);
}

#[track_caller]
fn assert_untouched(machine: &Machine, pod: &Pod) {
    assert_eq!(pod.rules(machine).unwrap(), Vec::<String>::new(), "{} has rules", pod.spec.name);
    assert_eq!(pod.envoys(machine), Vec::<i32>::new(), "{} has a proxy", pod.spec.name);
}

#[track_caller]
pub(crate) fn assert_nothing_left<R: Runtime>(ground: &Ground<R>) {
    ground.wait_empty(SOON).unwrap();
}
