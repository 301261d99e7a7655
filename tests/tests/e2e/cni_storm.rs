//! Many pods at once under each runtime; agent and plugin killed while pods come and go; a power failure.

use std::time::Duration;

use ursa_tests::lab::machine::Machine;
use ursa_tests::lab::runtime::containerd::Containerd;
use ursa_tests::lab::runtime::driver::Driver;
use ursa_tests::lab::runtime::ground::Ground;
use ursa_tests::lab::runtime::network::Networks;
use ursa_tests::lab::runtime::podman::Podman;
use ursa_tests::lab::runtime::storm::Storm;
use ursa_tests::lab::runtime::{Pod, PodSpec, Runtime};
use ursa_tests::lab::{Lab, pair, wait};

use crate::cni_runtimes::assert_nothing_left;

/// The whole of a `make soak` has a hundred pods.
const CROWD: Storm = Storm { pods: 20, meshed: 5, lives: 1, kills: false, seed: 0 };
const KILLS: Storm = Storm { pods: 8, meshed: 4, lives: 3, kills: true, seed: 1 };

fn pass<R: Runtime>(storm: Storm, start: impl FnOnce(&Lab, &Machine, &Networks) -> anyhow::Result<R>) {
    let (ground, sum) = storm.on(start).unwrap();
    println!("{sum:?}");
    if storm.kills {
        assert!(sum.agents > 0 && sum.plugins > 0, "nothing was killed: {sum:?}");
        ground.wait_gone_after_kills(Duration::from_secs(30)).unwrap();
    } else {
        assert_nothing_left(&ground);
    }
}

#[test]
fn many_pods_start_at_once() {
    pass(CROWD, Containerd::start);
}

#[test]
fn many_pods_start_at_once_under_podman() {
    pass(CROWD, Podman::start);
}

#[test]
fn many_pods_start_at_once_under_a_bare_driver() {
    pass(CROWD, Driver::start);
}

#[test]
fn no_pod_suffers_when_agent_and_plugin_die() {
    pass(KILLS, Containerd::start);
}

/// Podman doesn't repeat a DEL that failed: `podman rm --force` says so and forgets the container. A chain whose last
/// plugin (ours, killed) is called first then never reaches the others, so addresses of `host-local` and rules of `bridge` and `portmap`
/// may stay, as after any plugin's death there. They alone aren't looked at: no process, namespace (and so no rule),
/// record or file of ours stays.
#[test]
fn no_podman_pod_suffers_when_agent_and_plugin_die() {
    pass(KILLS, Podman::start);
}

#[test]
fn no_pod_of_a_bare_driver_suffers_when_agent_and_plugin_die() {
    pass(KILLS, Driver::start);
}

/// Power is cut; after the boot the runtime knows its dead sandboxes, kubelet removes them and starts each pod again.
#[test]
fn a_power_failure_leaves_nothing_that_stops_a_pod() {
    let mut ground = Ground::start(&["web-shop"], Containerd::start).unwrap();
    let (plain, web) = (PodSpec::plain("plain").sandbox(), PodSpec::meshed("web").sandbox());
    ground.run(&plain).unwrap();
    ground.run(&web).unwrap();

    ground.node.agent.kill();
    ground.machine.power_off();
    // What is on tmpfs everywhere else.
    std::fs::remove_dir_all(ground.node.run_dir()).unwrap();
    ground.machine.power_on().unwrap();
    ground.runtime.restart(&ground.machine).unwrap();

    // The agent is late: pods outside the mesh don't wait for it, and a meshed one is refused, not started open.
    for sandbox in ground.runtime.sandboxes().unwrap() {
        ground.runtime.remove_sandbox(&sandbox.id).unwrap();
    }
    let again = |spec: &PodSpec| PodSpec { attempt: spec.attempt + 1, ..spec.clone() };
    let plain: Pod = ground.run(&again(&plain)).unwrap();
    assert!(plain.rules(&ground.machine).unwrap().is_empty());
    let refused = format!("{:#}", ground.run(&again(&web)).unwrap_err());
    assert!(refused.contains("no agent answers"), "{refused}");

    ground.node.agent.restart().unwrap();
    let web = again(&again(&web));
    let (web, _) = wait::until("the meshed pod to start again", Duration::from_secs(60), || {
        ground.run(&web).map_err(|error| format!("{error:#}"))
    })
    .unwrap();
    assert_eq!(web.envoys(&ground.machine).len(), 1);
    assert!(!web.rules(&ground.machine).unwrap().is_empty());
    ground.node.wait_ready("web.shop", pair::SOON).unwrap();

    for pod in [&plain, &web] {
        ground.runtime.remove(&ground.machine, pod).unwrap();
    }
    assert_nothing_left(&ground);
}
