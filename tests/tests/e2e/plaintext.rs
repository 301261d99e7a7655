//! Nothing leaves in plaintext, and nothing plain is let in, whatever is down.

use std::time::Duration;

use ursa_tests::lab::capture::{Capture, Packets};
use ursa_tests::lab::daemon::kill_pid;
use ursa_tests::lab::mesh::{Control, Node, PORT};
use ursa_tests::lab::pair::{PLAINTEXT, Pair, REQUEST, SOON, URL};
use ursa_tests::lab::program::{self, Client, Load};
use ursa_tests::lab::{Lab, Programs, wait};

#[track_caller]
fn assert_nothing_readable(packets: &Packets, lab: &Lab) {
    packets.save(&lab.log("wire").with_extension("pcap")).expect("a pcap file");
    assert!(!packets.is_empty(), "the capture saw nothing at all");
    assert_eq!(packets.containing(PLAINTEXT), 0, "an answer crossed the link in plaintext");
    assert_eq!(packets.containing(REQUEST), 0, "a request crossed the link in plaintext");
    assert_eq!(packets.to_network([241, 0, 0, 0], 8), 0, "a packet to a mesh address left its machine");
}

#[test]
fn nothing_is_readable_while_parts_are_down() {
    let mut pair = Pair::allowed().unwrap();
    let capture = Capture::start(&pair.lab.net.bridge()).unwrap();
    let load = Load::start(&pair.lab, &pair.web.host, URL, Duration::from_millis(2)).unwrap();
    let mut stranger = Client::start(&pair.lab, &pair.stranger).unwrap();
    let plain = format!("http://{}:{PORT}/orders", pair.backend.host.v4);

    for workload in [pair.web.clone(), pair.backend.clone()] {
        for envoy in workload.host.running("envoy") {
            kill_pid(envoy).unwrap();
        }
        // At once, while that Envoy is certainly down.
        let answer = stranger.get(&plain).unwrap();
        assert_eq!(answer.status, None, "{}", answer.brief());
        pair.until_served().unwrap();
    }
    pair.control.daemon.kill();
    pair.node_a.agent.kill();
    pair.node_b.agent.kill();
    let many = load.count() + 100;
    wait::until("traffic to flow", SOON, || match load.count() {
        now if now >= many => Ok(()),
        now => Err(format!("{now}")),
    })
    .unwrap();
    let answer = stranger.get(&plain).unwrap();
    assert_eq!(answer.status, None, "{}", answer.brief());
    drop(load);
    assert_nothing_readable(&capture.finish().unwrap(), &pair.lab);
}

#[test]
fn mesh_addresses_stay_on_the_machine_without_rules_and_by_passthrough() {
    let mut pair = Pair::allowed().unwrap();
    let vip = pair.client.resolve("backend.svc.mesh.local").unwrap().text;
    let vips: Vec<String> = vip
        .split_whitespace()
        .map(|ip| if ip.contains(':') { format!("[{ip}]") } else { ip.to_owned() })
        .collect();
    assert!(vips.iter().any(|ip| ip.starts_with("241.")), "{vips:?}");

    let capture = Capture::start(&pair.lab.net.bridge()).unwrap();
    // A mesh address that no service has.
    let answer = pair.client.get("http://241.255.255.1:8080/orders").unwrap();
    assert_eq!(answer.status, None, "{}", answer.brief());
    // The rules are gone, the agent is dead: addresses that were learnt earlier still lead nowhere.
    pair.node_a.agent.kill();
    ursa_init::in_netns(&pair.web.host.path(), ursa_init::nft::remove).unwrap().unwrap();
    for vip in &vips {
        let answer = pair.client.get(&format!("http://{vip}:8080/orders")).unwrap();
        assert_eq!(answer.status, None, "{}", answer.brief());
    }
    // Something must cross, or the capture proves nothing.
    let mut stranger = Client::start(&pair.lab, &pair.stranger).unwrap();
    let _ = stranger.get(&format!("http://{}:{PORT}/", pair.backend.host.v4)).unwrap();
    assert_nothing_readable(&capture.finish().unwrap(), &pair.lab);
}

#[test]
fn joining_closes_before_it_opens() {
    let mut lab = Lab::new(&Programs::discover().unwrap()).unwrap();
    let mut control = Control::start(&mut lab).unwrap();
    let (backend, stranger) = (lab.net.host("backend").unwrap(), lab.net.host("stranger").unwrap());
    let _server = program::serve(&lab, &backend, "backend", PORT).unwrap();
    let mut stranger = Client::start(&lab, &stranger).unwrap();
    let url = format!("http://{}:{PORT}/orders", backend.v4);
    wait::until("plaintext before the mesh", SOON, || match stranger.get(&url).unwrap() {
        answer if answer.ok() => Ok(()),
        answer => Err(answer.brief()),
    })
    .unwrap();
    let ticket = control.ticket(&["backend"]).unwrap();
    let mut node = Node::join(&mut lab, "node-b", &ticket).unwrap();
    // Without a control plane there is no identity, so the workload can't become ready: it is closed all the same.
    control.daemon.kill();
    node.add("backend", &backend).unwrap();
    wait::until("the workload to be closed", SOON, || match stranger.get(&url).unwrap() {
        answer if answer.status.is_none() => Ok(()),
        answer => Err(answer.brief()),
    })
    .unwrap();
    control.restart().unwrap();
    node.wait_ready("backend", SOON).unwrap();
    let answer = stranger.get(&url).unwrap();
    assert_eq!(answer.status, None, "{}", answer.brief());
}
