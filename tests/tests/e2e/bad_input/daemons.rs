//! Settings that can't be: the daemon says so and ends, or says so in its status and stays closed.

use std::process::Command;

use ursa_tests::lab::daemon::{self, Daemon};
use ursa_tests::lab::mesh::{self, PORT};
use ursa_tests::lab::pair::SOON;
use ursa_tests::lab::program::{self, Client};
use ursa_tests::lab::wait;

use super::{complains, ground, network, refused};

#[test]
fn an_unknown_setting() {
    let ground = ground();
    let file = ground.lab.dir().join("bad.yaml");
    std::fs::write(&file, "apiSever: {}\n").unwrap();
    for (program, code) in [("ursa-control", 78), ("ursa-agent", 1)] {
        let mut command = Command::new(ground.lab.programs.path(program));
        refused(command.args(["run", "--config"]).arg(&file), "", code, &["apiSever", "bad.yaml"]);
    }
}

#[test]
fn a_port_in_use() {
    let mut ground = ground();
    // A second control plane beside the first: refused port by port, and its store isn't even made.
    let second = |settings: &[&str], words: &[&str]| {
        let mut command = Command::new("nsenter");
        daemon::without_settings(&mut command);
        command
            .arg(format!("--net={}", ground.control.host.path().display()))
            .arg(ground.lab.programs.path("ursa-control"))
            .args(["run", "--config"])
            .arg(ground.lab.dir().join("control.yaml"))
            .env("URSA_STORE_EMBEDDED_PATH", ground.lab.dir().join("second/second.db"))
            .env("URSA_API_SERVER_SOCKET", ground.lab.dir().join("second.sock"));
        for setting in settings {
            command.args(["--set", setting]);
        }
        refused(&mut command, "", 1, words);
        for left in ["second", "second.sock"] {
            assert!(!ground.lab.dir().join(left).exists(), "{left} was made");
        }
    };
    let remedy = "another process listens there";
    second(&[], &["127.0.0.1:5681", "in use", remedy, "apiServer.http.port"]);
    let mut settings = vec!["apiServer.http.port=5691"];
    second(&settings, &["0.0.0.0:5682", "in use", remedy, "apiServer.https.port"]);
    settings.push("apiServer.https.port=5692");
    second(&settings, &["0.0.0.0:5678", "in use", remedy, "dpServer.port"]);
    settings.push("dpServer.port=5698");
    second(&settings, &["5680", "in use", remedy, "diagnostics.serverPort"]);
    ground.control.get("mesh", "default").unwrap();

    // The shim's port for names, and Envoy's for traffic: the workload stays closed, and says why.
    for (port, name, words) in [
        (15053, "names", &["15053", "in use", "another shim or program"][..]),
        (15006, "inbound", &["15006", "in use"]),
    ] {
        let host = ground.lab.net.host(name).unwrap();
        let mut squatter = program::serve(&ground.lab, &host, &format!("squatter-{name}"), port).unwrap();
        let mut node = ground.node(&format!("n-{name}"), &[name]);
        node.add(name, &host).unwrap();
        complains(&node, words);
        let mut client = Client::start(&ground.lab, &host).unwrap();
        let answer = client.get("http://backend.svc.mesh.local:8080/").unwrap();
        assert!(!answer.ok(), "{}", answer.brief());
        squatter.kill();
        node.wait_ready(name, 2 * SOON).unwrap();
    }
}

#[test]
fn an_unknown_envoy_path() {
    let mut ground = ground();
    let host = ground.lab.net.host("web").unwrap();
    let before = network(&host);
    let _server: Daemon = program::serve(&ground.lab, &host, "web", PORT).unwrap();
    ground.lab.programs.envoy = "/nonexistent/envoy".into();
    let mut node = ground.node("node", &["web"]);
    node.add("web", &host).unwrap();
    complains(&node, &["Envoy is not at /nonexistent/envoy", "check the agent's settings"]);
    // Nothing runs, and the traffic that will go through Envoy is refused until then.
    assert!(host.running("ursa-shim").is_empty() && host.running("envoy").is_empty());
    let stranger = ground.lab.net.host("stranger").unwrap();
    let mut client = Client::start(&ground.lab, &stranger).unwrap();
    let answer = client.get(&format!("http://{}:{PORT}/", host.v4)).unwrap();
    assert_eq!(answer.failed, "connect", "{}", answer.brief());
    node.remove("web").unwrap();
    wait::until("the host as it was", SOON, || match network(&host) {
        now if now == before => Ok(()),
        now => Err(format!("{now:?}")),
    })
    .unwrap();
    let left: Vec<_> = std::fs::read_dir(node.run_dir().join("w")).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
    // The status is the same in text, for people.
    let text = Command::new(ground.lab.programs.path("ursa-agent"))
        .args(["status", "--config"])
        .arg(&node.config)
        .output();
    assert!(text.unwrap().status.success());
    mesh::run(ground.control.command().args(["get", "dataplanes"]), "").unwrap();
}
