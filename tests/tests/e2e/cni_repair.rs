//! Pods that started before plugin and agent were there, under a real containerd: found, put into the mesh where they
//! are, and let go.

use serde_json::json;
use ursa_tests::lab::machine::Machine;
use ursa_tests::lab::mesh::{Control, Node, PORT};
use ursa_tests::lab::pair::{SOON, until};
use ursa_tests::lab::program::{self, Answer};
use ursa_tests::lab::runtime::containerd::{Containerd, SOCKET};
use ursa_tests::lab::runtime::ground::{Ground, OUTSIDE, PODS_NETWORK};
use ursa_tests::lab::runtime::network::Networks;
use ursa_tests::lab::runtime::{PodSpec, Runtime as _};
use ursa_tests::lab::{Lab, Programs, wait};

use crate::cni_runtimes::assert_nothing_left;

#[test]
fn early_pods_are_put_into_the_mesh_where_they_are() {
    let mut lab = Lab::new(&Programs::discover().unwrap()).unwrap();
    let control = Control::start(&mut lab).unwrap();
    let machine = Machine::boot(&mut lab, "node").unwrap();
    let networks = Networks::new(&lab, &lab.dir().join("node/run"), false).unwrap();
    networks.write("10-pods.conflist", &networks.conflist(PODS_NETWORK, 0, None)).unwrap();
    let mut runtime = Containerd::start(&lab, &machine, &networks).unwrap();
    runtime.annotations = vec![("kuma.io/sidecar-injection".to_owned(), "enabled".to_owned())];
    let web = runtime.start(&machine, &PodSpec::meshed("web")).unwrap();
    let backend = runtime.start(&machine, &PodSpec::meshed("backend")).unwrap();
    let plain = runtime.start(&machine, &PodSpec::plain("plain")).unwrap();
    assert!(web.rules(&machine).unwrap().is_empty(), "no plugin was there");

    let ticket = control.ticket(&["web-shop", "backend-shop"]).unwrap();
    let edit = |config: &mut serde_json::Value| {
        config["cri"] = json!(SOCKET);
        config["cni"] = json!({"workload": {"ports": format!("{PORT}/http")}});
    };
    let node = Node::join_on(&lab, &machine, "node", &ticket, edit).unwrap();
    let outside = program::serve(&lab, &lab.net.bridge_host(), "outside", OUTSIDE).unwrap();
    let mut ground = Ground { runtime, node, control, outside, machine, networks, lab };
    let machine = &ground.machine;

    let live = |pod: &ursa_tests::lab::runtime::Pod| match (pod.envoys(machine).len(), pod.rules(machine)) {
        (1, Ok(rules)) if !rules.is_empty() => Ok(()),
        found => Err(format!("{found:?}")),
    };
    for pod in [&web, &backend] {
        wait::until("an early pod to be in the mesh", SOON, || live(pod)).unwrap();
    }
    let report = wait::until("the report", SOON, || {
        let status = ground.node.status().map_err(|error| format!("{error:#}"))?;
        let pods = &status["pods"];
        if pods["repaired"] == 2 && pods["meshed"] == 2 { Ok(()) } else { Err(pods.to_string()) }
    });
    report.unwrap();
    let text = ground.node.status_text().unwrap();
    assert!(text.contains("3 run at") && text.contains("2 put there after their start"), "{text}");
    assert!(plain.rules(machine).unwrap().is_empty() && plain.envoys(machine).is_empty());
    // Both were closed before either sidecar was started.
    let log = std::fs::read_to_string(ground.lab.log("node")).unwrap();
    let lines = |words: &str| -> Vec<_> {
        log.lines().enumerate().filter(|(_, line)| line.contains(words)).map(|(number, _)| number).collect()
    };
    let (closed, started) = (lines("traffic is closed until"), lines("the shim is started"));
    assert_eq!((closed.len(), started.len()), (2, 2), "{log}");
    assert!(closed.iter().max() < started.iter().min(), "{log}");

    // And they stay closed.
    let rules = || crate::kept::rules(&machine.file(&web.netns));
    let wanted = rules();
    let enter = format!("--net={}", machine.file(&web.netns).display());
    let mut flush = std::process::Command::new("nsenter");
    ursa_tests::lab::mesh::run(flush.args([&enter, "nft", "flush", "ruleset"]), "").unwrap();
    wait::until("the pod's rules to be back", SOON, || match rules() {
        found if found == wanted => Ok(()),
        found => Err(format!("{} lines", found.len())),
    })
    .unwrap();

    // It is the real thing: a name of the mesh, denied and then allowed.
    let url = format!("http://backend-shop.svc.mesh.local:{PORT}/orders");
    let mut client = ground.client(&web).unwrap();
    until(&mut client, &url, "a request that no policy allows to be denied", |answer| {
        answer.status == Some(403)
    })
    .unwrap();
    ground.control.ursa(&["allow", "web-shop", "backend-shop"]).unwrap();
    until(&mut client, &url, "an allowed request to succeed", Answer::ok).unwrap();
    drop(client);

    // No plugin tells of their end either; one goes while the agent is dead.
    ground.runtime.stop(machine, &web).unwrap();
    ground.node.agent.kill();
    ground.runtime.stop(&ground.machine, &backend).unwrap();
    ground.node.agent.restart().unwrap();
    for pod in [&web, &backend, &plain] {
        ground.runtime.remove(&ground.machine, pod).unwrap();
    }
    assert_nothing_left(&ground);
    let records = std::fs::read_dir(ground.node.run_dir().join("cni")).unwrap().count();
    assert_eq!(records, 0, "records of pods that are gone");
}
