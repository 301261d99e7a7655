//! Nothing leaves in plaintext, and nothing plain is let in, whatever is down.

use std::time::{Duration, Instant};

use ursa_tests::lab::capture::{Capture, Packets};
use ursa_tests::lab::daemon::{Daemon, kill_pid};
use ursa_tests::lab::mesh::{Control, Node, PORT};
use ursa_tests::lab::net::Host;
use ursa_tests::lab::pair::{PLAINTEXT, Pair, REQUEST, SOON, URL, until};
use ursa_tests::lab::program::{self, Answer, Client, Load};
use ursa_tests::lab::{Lab, Programs, wait};

#[track_caller]
pub(crate) fn assert_nothing_readable(packets: &Packets, lab: &Lab) {
    packets.save(&lab.log("wire").with_extension("pcap")).expect("a pcap file");
    assert!(!packets.is_empty(), "the capture saw nothing at all");
    assert_eq!(packets.containing(PLAINTEXT), 0, "an answer crossed the link in plaintext");
    assert_eq!(packets.containing(REQUEST), 0, "a request crossed the link in plaintext");
    // What proxies say to each other is HTTP/2, whose compressed headers no text is found in; its first words are.
    assert_eq!(packets.containing("PRI * HTTP/2.0"), 0, "proxies spoke to each other in plaintext");
    assert_eq!(packets.to_network([241, 0, 0, 0], 8), 0, "a packet to a mesh address left its machine");
    let v6 = packets.to_network6(ursa_model::vip::V6_PREFIX, 64);
    assert_eq!(v6, 0, "a packet to a mesh address left its machine over IPv6");
}

/// An HTTP server outside of the mesh, which answers without a secret: what the mesh's clients reach by passthrough.
fn outside(lab: &Lab, host: &Host) -> Daemon {
    program::serve(lab, host, "outside", OUTSIDE).unwrap()
}

/// The port of [`outside`].
const OUTSIDE: u16 = 9090;

/// What web reaches by passthrough, over both families.
fn outside_urls(host: &Host) -> [String; 2] {
    [format!("http://{}:{OUTSIDE}/other", host.v4), format!("http://[{}]:{OUTSIDE}/other", host.v6)]
}

/// Every address of the name, as it stands in a URL.
fn addresses(client: &mut Client, name: &str) -> Vec<String> {
    let found = client.resolve(name).unwrap().text;
    found
        .split_whitespace()
        .map(|ip| if ip.contains(':') { format!("[{ip}]") } else { ip.to_owned() })
        .collect()
}

#[test]
fn nothing_is_readable_while_parts_are_down() {
    nothing_is_readable_without("http");
}

/// Bytes take other filters, and their permission is in the listener.
#[test]
fn nothing_is_readable_while_parts_are_down_of_a_port_of_bytes() {
    nothing_is_readable_without("tcp");
}

/// Parts die in turn while `web` calls a port of this protocol.
fn nothing_is_readable_without(protocol: &str) {
    let mut pair = Pair::speaking(protocol).unwrap();
    pair.allow().unwrap();
    let service = pair.control.get("meshservice", "backend").unwrap();
    assert_eq!(service["spec"]["ports"][0]["appProtocol"], protocol, "{service}");
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
fn nothing_is_readable_while_envoys_restart_all_the_time() {
    let mut pair = Pair::allowed().unwrap();
    let capture = Capture::start(&pair.lab.net.bridge()).unwrap();
    let since = Instant::now();
    let load = Load::start(&pair.lab, &pair.web.host, URL, Duration::from_millis(1)).unwrap();
    // All the time, because an Envoy that starts has its ports' listeners a little later than its first.
    let strangers = [pair.backend.host.v4.clone(), format!("[{}]", pair.backend.host.v6)].map(|address| {
        let url = format!("http://{address}:{PORT}/plain");
        Load::start(&pair.lab, &pair.stranger, &url, Duration::from_millis(1)).unwrap()
    });
    for round in 0..12 {
        // Now one of them, now both; some while they still start.
        let hosts = [&pair.web.host, &pair.backend.host];
        let dying = match round % 3 {
            0 => &hosts[..1],
            1 => &hosts[1..],
            _ => &hosts[..],
        };
        for host in dying {
            let (running, _) = wait::until("an Envoy", SOON, || match host.running("envoy") {
                pids if pids.is_empty() => Err("none".to_owned()),
                pids => Ok(pids),
            })
            .unwrap();
            for envoy in running {
                let _ = kill_pid(envoy);
            }
        }
        if round % 4 == 3 {
            pair.until_served().unwrap();
        }
    }
    pair.until_served().unwrap();
    drop(load);
    for stranger in strangers {
        let tally = stranger.tally(since);
        assert!(tally.bad.len() > 100, "only {} attempts", tally.bad.len());
        assert_eq!(tally.good, 0, "a stranger was let in");
        assert!(tally.bad.iter().all(|answer| answer.status.is_none()), "a stranger had an answer");
    }
    assert_nothing_readable(&capture.finish().unwrap(), &pair.lab);
}

#[test]
fn mesh_addresses_stay_on_the_machine_without_rules_and_by_passthrough() {
    let mut pair = Pair::allowed().unwrap();
    let vips = addresses(&mut pair.client, "backend.svc.mesh.local");
    assert!(vips.iter().any(|ip| ip.starts_with("241.")), "{vips:?}");
    assert!(vips.iter().any(|ip| ip.starts_with("[fd75:7273:6100:")), "{vips:?}");
    // Passthrough works over both families, so what is refused below is refused for its address.
    let _outside = outside(&pair.lab, &pair.stranger);
    for url in outside_urls(&pair.stranger) {
        until(&mut pair.client, &url, "an answer by passthrough", Answer::ok).unwrap();
    }
    for vip in &vips {
        let answer = pair.client.get(&format!("http://{vip}:8080/orders")).unwrap();
        assert!(answer.ok(), "{vip}: {}", answer.brief());
    }

    let capture = Capture::start(&pair.lab.net.bridge()).unwrap();
    // Mesh addresses that no service has, and a port that this one hasn't.
    let mut urls: Vec<String> =
        ["241.255.255.1", "242.0.0.1", "243.0.0.1", "[fd75:7273:6100::f1ff:ff01]", "[fd75:7273:6100::7]"]
            .map(|vip| format!("http://{vip}:8080/orders"))
            .into();
    urls.extend(vips.iter().map(|vip| format!("http://{vip}:8081/orders")));
    for url in &urls {
        let answer = pair.client.get(url).unwrap();
        assert_eq!(answer.status, None, "{url}: {}", answer.brief());
    }
    // The rules are gone, the agent is dead: addresses that were learnt earlier still lead nowhere.
    pair.node_a.agent.kill();
    ursa_init::in_netns(&pair.web.host.path(), ursa_init::nft::remove).unwrap().unwrap();
    urls.extend(vips.iter().map(|vip| format!("http://{vip}:8080/orders")));
    for url in &urls {
        let answer = pair.client.get(url).unwrap();
        assert_eq!(answer.status, None, "{url}: {}", answer.brief());
    }
    // Something must cross, or the capture proves nothing.
    let mut stranger = Client::start(&pair.lab, &pair.stranger).unwrap();
    let _ = stranger.get(&format!("http://{}:{PORT}/", pair.backend.host.v4)).unwrap();
    assert_nothing_readable(&capture.finish().unwrap(), &pair.lab);

    // Nor does it if it doesn't see IPv6.
    let capture = Capture::start(&pair.lab.net.bridge()).unwrap();
    for url in outside_urls(&pair.stranger) {
        assert!(pair.client.get(&url).unwrap().ok());
    }
    let packets = capture.finish().unwrap();
    assert!(packets.to_network6(pair.stranger.v6.parse().unwrap(), 128) > 0, "the capture sees no IPv6");
    assert!(packets.containing(PLAINTEXT) > 0, "the capture reads no IPv6");
}

#[test]
fn joining_closes_before_it_opens() {
    let mut lab = Lab::new(&Programs::discover().unwrap()).unwrap();
    let mut control = Control::start(&mut lab).unwrap();
    let (backend, outsider) = (lab.net.host("backend").unwrap(), lab.net.host("stranger").unwrap());
    let _server = program::serve(&lab, &backend, "backend", PORT).unwrap();
    let mut stranger = Client::start(&lab, &outsider).unwrap();
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
    let since = Instant::now();
    let asking = Load::start(&lab, &outsider, &url, Duration::from_millis(1)).unwrap();
    control.restart().unwrap();
    node.wait_ready("backend", SOON).unwrap();
    let answer = stranger.get(&url).unwrap();
    assert_eq!(answer.status, None, "{}", answer.brief());
    let tally = asking.tally(since);
    assert!(tally.good == 0 && tally.bad.len() > 10, "{} let in, {} not", tally.good, tally.bad.len());
}

/// Every mesh address in a resource, as it stands in a URL.
fn collect_vips(value: &serde_json::Value, found: &mut Vec<String>) {
    match value {
        serde_json::Value::String(text) => match text.parse::<std::net::IpAddr>() {
            Ok(ip) if ursa_model::vip::is_vip(ip) && ip.is_ipv6() => found.push(format!("[{ip}]")),
            Ok(ip) if ursa_model::vip::is_vip(ip) => found.push(ip.to_string()),
            _ => {}
        },
        serde_json::Value::Array(items) => items.iter().for_each(|item| collect_vips(item, found)),
        serde_json::Value::Object(fields) => fields.values().for_each(|field| collect_vips(field, found)),
        _ => {}
    }
}

/// Where a caller's requests could leave in plaintext: the name, the mesh's addresses, and those of the machine itself.
fn targets(vips: &[String], backend: &Host) -> Vec<String> {
    let mut hosts =
        vec!["backend.svc.mesh.local".to_owned(), backend.v4.clone(), format!("[{}]", backend.v6)];
    hosts.extend(vips.iter().cloned());
    hosts.iter().map(|host| format!("http://{host}:{PORT}/orders")).collect()
}

#[test]
fn a_caller_that_joins_is_closed_before_it_opens() {
    let mut lab = Lab::new(&Programs::discover().unwrap()).unwrap();
    let mut control = Control::start(&mut lab).unwrap();
    let (web, backend, stranger) =
        (lab.net.host("web").unwrap(), lab.net.host("backend").unwrap(), lab.net.host("stranger").unwrap());
    let _server = program::serve(&lab, &backend, "backend", PORT).unwrap();
    let _outside = outside(&lab, &stranger);
    let tickets = (control.ticket(&["web"]).unwrap(), control.ticket(&["backend"]).unwrap());
    let mut node_b = Node::join(&mut lab, "node-b", &tickets.1).unwrap();
    node_b.add("backend", &backend).unwrap();
    node_b.wait_ready("backend", SOON).unwrap();
    control.ursa(&["allow", "web", "backend"]).unwrap();
    let service = control.get("meshservice", "backend").unwrap();
    let mut vips = Vec::new();
    collect_vips(&service, &mut vips);
    assert_eq!(vips.len(), 2, "{service}");
    let targets = targets(&vips, &backend);

    // A program that is there before the mesh is: it reaches what isn't meshed.
    let mut client = Client::start(&lab, &web).unwrap();
    for url in outside_urls(&stranger) {
        until(&mut client, &url, "an answer before the mesh", Answer::ok).unwrap();
    }
    let mut node_a = Node::join(&mut lab, "node-a", &tickets.0).unwrap();
    control.daemon.kill();
    node_a.add("web", &web).unwrap();
    node_a.wait_status("web", "redirected", SOON, |one| one["state"] == "redirected").unwrap();
    let capture = Capture::start(&lab.net.bridge()).unwrap();
    for _ in 0..10 {
        for url in targets.iter().chain(&outside_urls(&stranger)) {
            let answer = client.get(url).unwrap();
            assert_eq!(answer.status, None, "{url}: {}", answer.brief());
        }
    }
    // Killed and started again in that state it opens nothing.
    node_a.agent.kill();
    for url in targets.iter().chain(&outside_urls(&stranger)) {
        assert_eq!(client.get(url).unwrap().status, None, "{url}");
    }
    node_a.agent.restart().unwrap();
    let closed = capture.finish().unwrap();
    let (a, b) = (web.v4.parse().unwrap(), backend.v4.parse().unwrap());
    assert_eq!(closed.between(a, b), 0, "web and backend spoke although web has no Envoy");
    assert_eq!(closed.to_network6(backend.v6.parse().unwrap(), 128), 0, "and over IPv6");

    // From here on it opens: the first answer that comes has gone by mutual TLS.
    let capture = Capture::start(&lab.net.bridge()).unwrap();
    control.restart().unwrap();
    let urls: Vec<&String> =
        targets.iter().filter(|url| !url.contains(&backend.v4) && !url.contains(&backend.v6)).collect();
    wait::until("web's requests to succeed", SOON, || {
        for url in &urls {
            let answer = client.get(url).map_err(|error| error.to_string())?;
            if !answer.ok() {
                return Err(format!("{url}: {}", answer.brief()));
            }
        }
        Ok(())
    })
    .unwrap();
    node_a.wait_ready("web", SOON).unwrap();
    assert_nothing_readable(&capture.finish().unwrap(), &lab);
}

#[test]
fn a_caller_without_an_identity_sends_nothing() {
    let mut lab = Lab::new(&Programs::discover().unwrap()).unwrap();
    let control = Control::start(&mut lab).unwrap();
    let (web, backend) = (lab.net.host("web").unwrap(), lab.net.host("backend").unwrap());
    let _server = program::serve(&lab, &backend, "backend", PORT).unwrap();
    let mut identity = control.get("meshidentity", "identity").unwrap();
    for server_side in ["status", "creationTime", "modificationTime", "kri", "labels"] {
        identity.as_object_mut().unwrap().remove(server_side);
    }
    let everybody = identity.to_string();
    identity["spec"]["selector"] =
        serde_json::json!({"dataplane": {"matchLabels": {"kuma.io/workload": "backend"}}});
    control.apply(&identity.to_string()).unwrap();
    let ticket = control.ticket(&["web", "backend"]).unwrap();
    let mut node = Node::join(&mut lab, "node", &ticket).unwrap();
    node.add("backend", &backend).unwrap();
    node.wait_ready("backend", SOON).unwrap();
    control.ursa(&["allow", "web", "backend"]).unwrap();

    node.add("web", &web).unwrap();
    node.wait_status("web", "redirected", SOON, |one| one["state"] == "redirected").unwrap();
    let capture = Capture::start(&lab.net.bridge()).unwrap();
    let mut client = Client::start(&lab, &web).unwrap();
    // Its Envoy starts without a certificate after a while: names resolve, and lead to a refusal.
    wait::until("the name to resolve", Duration::from_secs(30), || {
        let answer = client.get(URL).map_err(|error| error.to_string())?;
        assert!(!answer.ok(), "{}", answer.brief());
        if answer.failed == "name" { Err(answer.brief()) } else { Ok(()) }
    })
    .unwrap();
    for url in targets(&addresses(&mut client, "backend.svc.mesh.local"), &backend) {
        // The machine's own addresses are passthrough, by which backend accepts nothing.
        if url.contains(&backend.v4) || url.contains(&backend.v6) {
            continue;
        }
        for _ in 0..10 {
            let answer = client.get(&url).unwrap();
            assert!(!answer.ok(), "{url}: {}", answer.brief());
        }
    }
    node.wait_status("web", "told why", SOON, |one| {
        one["error"].as_str().is_some_and(|error| error.contains("no MeshIdentity selects"))
    })
    .unwrap();
    control.apply(&everybody).unwrap();
    until(&mut client, URL, "web's request to succeed", Answer::ok).unwrap();
    assert_nothing_readable(&capture.finish().unwrap(), &lab);
}
