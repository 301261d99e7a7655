//! Two workloads in one network namespace, each with a user, an Envoy and an identity of its own.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use ursa_tests::lab::daemon::Daemon;
use ursa_tests::lab::mesh::{Control, Node, PORT};
use ursa_tests::lab::net::Host;
use ursa_tests::lab::pair::{SOON, URL, until};
use ursa_tests::lab::program::{Answer, Client, Load};
use ursa_tests::lab::{Lab, Programs, wait};

/// The applications' users; the last one belongs to no workload.
const WEB: u32 = 2001;
const BACKEND: u32 = 2002;
const NOBODY: u32 = 3000;
/// The port on which `web` listens.
const WEB_PORT: u16 = 8081;

fn serve(lab: &Lab, host: &Host, name: &str, uid: u32, port: u16) -> Daemon {
    let args = ["serve", "--name", name, "--port", &port.to_string(), "--uid", &uid.to_string()];
    let args = args.map(str::to_owned).to_vec();
    Daemon::start(name, host, lab.programs.path("lab-app"), args, Vec::new(), lab.log(name)).unwrap()
}

fn client(lab: &Lab, host: &Host, uid: u32) -> Client {
    let mut command = host.command(&lab.programs.path("lab-app"));
    Client::spawn(command.args(["client", "--uid", &uid.to_string()])).unwrap()
}

/// The file of a workload that shares its namespace.
fn shares(file: &mut Value, uid: u32, base: u16, port: u16) {
    file["networking"]["inbound"][0]["port"] = port.into();
    file["ursa"]["uids"] = json!([uid]);
    file["ursa"]["redirect"] = json!({
        "inbound": {"port": base + 6}, "outbound": {"port": base + 1}, "dns": {"port": base + 53},
    });
}

#[test]
fn neighbours_in_a_namespace_meet_only_by_their_proxies() {
    let mut lab = Lab::new(&Programs::discover().unwrap()).unwrap();
    let control = Control::start(&mut lab).unwrap();
    let ticket = control.ticket(&["web", "backend"]).unwrap();
    let mut node = Node::join(&mut lab, "node", &ticket).unwrap();
    let (host, outside) = (lab.net.host("box").unwrap(), lab.net.host("outside").unwrap());
    let _web = serve(&lab, &host, "web", WEB, WEB_PORT);
    let _backend = serve(&lab, &host, "backend", BACKEND, PORT);
    node.add_with("web", &host, |file| shares(file, WEB, 15100, WEB_PORT)).unwrap();
    node.add_with("backend", &host, |file| shares(file, BACKEND, 15200, PORT)).unwrap();
    node.wait_ready("web", SOON).unwrap();
    node.wait_ready("backend", SOON).unwrap();
    assert_eq!(host.running("envoy").len(), 2, "an Envoy each");

    let mut of_web = client(&lab, &host, WEB);
    let mut of_backend = client(&lab, &host, BACKEND);
    let mut of_nobody = client(&lab, &host, NOBODY);
    let mut stranger = Client::start(&lab, &outside).unwrap();
    until(&mut of_web, URL, "web to be refused", |answer| answer.status == Some(403)).unwrap();
    control.ursa(&["allow", "web", "backend"]).unwrap();
    until(&mut of_web, URL, "web to be served", Answer::ok).unwrap();
    // Each has the other's policy to fear, not its own.
    let back = format!("http://web.svc.mesh.local:{WEB_PORT}/");
    until(&mut of_backend, &back, "backend to be refused", |answer| answer.status == Some(403)).unwrap();
    // No way round on loopback or by the host's address: it is the neighbour's proxy that answers, and it wants TLS.
    for address in ["127.0.0.1", "[::1]", &host.v4] {
        let answer = of_web.get(&format!("http://{address}:{PORT}/orders")).unwrap();
        assert!(!answer.ok(), "{address}: {}", answer.brief());
    }
    assert!(of_backend.get(&format!("http://127.0.0.1:{PORT}/")).unwrap().ok(), "its own port is its own");
    // Who belongs to no workload is left alone, and the mesh is closed to it.
    assert!(!of_nobody.get(URL).unwrap().ok());
    let vip = of_web.resolve("backend.svc.mesh.local").unwrap().text;
    let vip = vip.split_whitespace().next().unwrap().to_owned();
    assert_eq!(of_nobody.get(&format!("http://{vip}:{PORT}/")).unwrap().failed, "connect");

    // The agent comes back and one workload after the other: the rules of one never open the other.
    let since = Instant::now();
    let plain = [PORT, WEB_PORT].map(|port| format!("http://{}:{port}/plain", host.v4));
    let loads = plain.clone().map(|url| Load::start(&lab, &outside, &url, Duration::from_millis(1)).unwrap());
    for _ in 0..3 {
        node.agent.kill();
        node.agent.restart().unwrap();
        node.wait_ready("web", SOON).unwrap();
        node.wait_ready("backend", SOON).unwrap();
    }
    for load in loads {
        let tally = load.tally(since);
        assert!(tally.good == 0 && tally.bad.len() > 20, "{} of {}", tally.good, tally.bad.len());
    }

    // One goes: its port is as it was before the mesh, its neighbour's isn't.
    node.remove("backend").unwrap();
    wait::until("backend's redirect to go", SOON, || match stranger.get(&plain[0]).unwrap() {
        answer if answer.ok() => Ok(()),
        answer => Err(answer.brief()),
    })
    .unwrap();
    let answer = stranger.get(&plain[1]).unwrap();
    assert!(!answer.ok(), "{}", answer.brief());
    node.remove("web").unwrap();
    wait::until("the last redirect to go", SOON, || {
        match ursa_init::in_netns(&host.path(), ursa_init::show).unwrap() {
            Ok(lines) if lines.is_empty() => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .unwrap();
}
