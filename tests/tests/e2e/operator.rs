//! The control plane as a process of an operator: how it starts, with whom it speaks, how it ends.

use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::json;
use ursa_tests::lab::daemon::{self, Daemon};
use ursa_tests::lab::mesh::{self, Control, Node};
use ursa_tests::lab::net::Host;
use ursa_tests::lab::pair::SOON;
use ursa_tests::lab::program::Client;
use ursa_tests::lab::{Lab, Programs, wait};

/// How long ending may take; its parts have deadlines that add up to less.
const ENDING: Duration = Duration::from_secs(20);

fn lab() -> Lab {
    Lab::new(&Programs::discover().unwrap()).unwrap()
}

/// A control plane whose files and ports are all its own.
struct Instance {
    config: PathBuf,
    socket: PathBuf,
    dir: PathBuf,
    daemon: Daemon,
}

impl Instance {
    /// Starts one on `host` with its store in `dir`; `base` is the first of its four ports.
    fn start(lab: &Lab, host: &Host, name: &str, dir: &Path, base: u16, envs: &[(&str, &str)]) -> Self {
        let socket = lab.dir().join(format!("{name}.sock"));
        let config = lab.dir().join(format!("{name}.yaml"));
        let settings = json!({
            "general": {"workDir": dir},
            "apiServer": {"socket": socket, "http": {"port": base}, "https": {"port": base + 1}},
            "dpServer": {"port": base + 2},
            "diagnostics": {"serverPort": base + 3},
        });
        std::fs::write(&config, settings.to_string()).unwrap();
        let args = vec!["run".into(), "--config".into(), config.display().to_string()];
        let envs = envs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        let daemon =
            Daemon::start(name, host, lab.programs.path("ursa-control"), args, envs, lab.log(name)).unwrap();
        Self { config, socket, dir: dir.to_owned(), daemon }
    }

    fn ursa(&self, lab: &Lab, args: &[&str]) -> anyhow::Result<String> {
        mesh::run(Command::new(lab.programs.path("ursa")).arg("--socket").arg(&self.socket).args(args), "")
    }

    fn wait_ready(&mut self, lab: &Lab) {
        wait::until("the control plane to serve", SOON, || {
            self.daemon.check()?;
            self.ursa(lab, &["get", "mesh", "default"]).map_err(|error| format!("{error:#}"))
        })
        .unwrap();
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.daemon.log()).unwrap()
    }
}

#[test]
fn sigterm_ends_it_in_order_while_nodes_are_connected() {
    let mut lab = lab();
    let mut control = Control::start(&mut lab).unwrap();
    let host = lab.net.host("web").unwrap();
    let ticket = control.ticket(&["web"]).unwrap();
    let mut node = Node::join(&mut lab, "node", &ticket).unwrap();
    let web = node.add("web", &host).unwrap();
    node.wait_ready("web", SOON).unwrap();

    // A service's reload is no reason to end.
    control.daemon.signal(Signal::SIGHUP).unwrap();
    wait::until("the log to tell of SIGHUP", SOON, || {
        let log = std::fs::read_to_string(control.daemon.log()).unwrap_or_default();
        if log.contains("SIGHUP changes nothing") { Ok(()) } else { Err(log) }
    })
    .unwrap();
    control.ursa(&["get", "meshes"]).unwrap();

    let status = control.daemon.stop(ENDING).unwrap();
    assert_eq!(status.code(), Some(0), "{status}: {}", control.daemon.last_words());
    assert!(
        control.daemon.last_words().contains("the control plane has stopped"),
        "{}",
        control.daemon.last_words()
    );
    // Nothing of it is in the way of the next one, and the node finds that.
    control.restart().unwrap();
    control.ursa(&["delete", "dataplane", "no-such-dataplane"]).unwrap_err();
    node.wait_ready(&web.name, SOON).unwrap();
}

#[test]
fn a_second_one_says_what_is_in_its_way() {
    let mut lab = lab();
    let host = lab.net.host("control").unwrap();
    let (mine, yours) = (lab.dir().join("mine"), lab.dir().join("yours"));
    let mut first = Instance::start(&lab, &host, "first", &mine, 7000, &[]);
    first.wait_ready(&lab);

    let mut same_store = Instance::start(&lab, &host, "same-store", &mine, 7100, &[]);
    assert_eq!(same_store.daemon.wait_end(SOON).unwrap().code(), Some(1));
    assert!(same_store.log().contains("another control plane is using it"), "{}", same_store.log());

    let mut second = Instance::start(&lab, &host, "second", &yours, 7200, &[]);
    second.wait_ready(&lab);
    second.daemon.stop(ENDING).unwrap();
    let text = std::fs::read_to_string(&second.config).unwrap();
    std::fs::write(
        &second.config,
        text.replace(second.socket.to_str().unwrap(), first.socket.to_str().unwrap()),
    )
    .unwrap();
    second.daemon.restart().unwrap();
    assert_eq!(second.daemon.wait_end(SOON).unwrap().code(), Some(1));
    assert!(second.log().contains("another control plane answers there"), "{}", second.log());
    // The first one's socket is still its own.
    first.ursa(&lab, &["get", "meshes"]).unwrap();

    // A socket that a killed process left is nobody's.
    first.daemon.kill();
    first.daemon.restart().unwrap();
    first.wait_ready(&lab);
}

#[test]
fn a_first_start_may_be_killed_at_any_moment() {
    let mut lab = lab();
    let host = lab.net.host("control").unwrap();
    let dir = lab.dir().join("store");
    let mut control = Instance::start(&lab, &host, "control", &dir, 7000, &[]);
    // Each life is longer than the one before: files, store, keys, tokens and defaults are all cut off once.
    for step in 0..12 {
        std::thread::sleep(Duration::from_millis(step * 15));
        control.daemon.kill();
        control.daemon.restart().unwrap();
    }
    control.wait_ready(&lab);
    control.ursa(&lab, &["generate", "user-token", "--name", "x", "--valid-for", "1h"]).unwrap();
    control.ursa(&lab, &["generate", "zone-token", "--zone", "x", "--valid-for", "1h"]).unwrap();
    control.ursa(&lab, &["get", "globalsecret", "admin-user-token"]).unwrap();
    wait::until("the mesh's signing key", SOON, || {
        control
            .ursa(&lab, &["generate", "dataplane-token", "--valid-for", "1h"])
            .map_err(|error| format!("{error:#}"))
    })
    .unwrap();
}

#[test]
fn of_two_first_starts_one_wins() {
    let mut lab = lab();
    let host = lab.net.host("control").unwrap();
    for round in 0..5 {
        let dir = lab.dir().join(format!("store-{round}"));
        let mut both = [
            Instance::start(&lab, &host, &format!("a{round}"), &dir, 7000, &[]),
            Instance::start(&lab, &host, &format!("b{round}"), &dir, 7100, &[]),
        ];
        let (loser, _) = wait::until("one of them to give up", SOON, || {
            both.iter_mut().position(|one| one.daemon.ended().is_some()).ok_or_else(|| "both run".to_owned())
        })
        .unwrap();
        assert!(both[loser].log().contains("another control plane is using it"), "{}", both[loser].log());
        let winner = &mut both[1 - loser];
        winner.wait_ready(&lab);
        winner.ursa(&lab, &["generate", "user-token", "--name", "x", "--valid-for", "1h"]).unwrap();
        // The winner's certificate fits its key at the next start, too.
        winner.daemon.stop(ENDING).unwrap();
        winner.daemon.restart().unwrap();
        winner.wait_ready(&lab);
        assert!(winner.dir.join("api-tls.crt").exists());
    }
}

#[test]
fn variables_of_other_programs_are_left_alone() {
    let mut lab = lab();
    let host = lab.net.host("control").unwrap();
    let envs = [
        ("URSA_SOCKET", "/run/ursa/control.sock"),
        ("URSA_ENVOY", "/usr/bin/envoy"),
        ("URSA_NODE", "n"),
        ("URSA_API_SERVER_HTTP_PROT", "1"),
        ("URSA_MULTIZONE_ZONE_NAME", "east"),
    ];
    let mut control = Instance::start(&lab, &host, "control", &lab.dir().join("store"), 7000, &envs);
    control.wait_ready(&lab);
    assert!(control.ursa(&lab, &["get", "zones"]).unwrap().contains("east"));
    let log = control.log();
    assert!(log.contains("did you mean URSA_API_SERVER_HTTP_PORT?"), "{log}");
    assert!(!log.contains("URSA_SOCKET") && !log.contains("URSA_NODE"), "{log}");
}

#[test]
fn only_root_and_its_own_user_rule_by_the_socket() {
    let mut lab = lab();
    let control = Control::start(&mut lab).unwrap();
    let mut command = Command::new(lab.programs.path("ursa"));
    daemon::without_settings(&mut command);
    let output = command
        .arg("--socket")
        .arg(&control.socket)
        .args(["get", "meshes"])
        .env("HOME", "/nonexistent")
        .uid(12_345)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("Unauthenticated") && said.contains("--auth-conf token=-"), "{said}");
    control.ursa(&["get", "meshes"]).unwrap();
}

#[test]
fn diagnostics_tell_of_health_and_counts_and_no_secret() {
    let mut lab = lab();
    let control = Control::start(&mut lab).unwrap();
    let mut client = Client::start(&lab, &control.host).unwrap();
    let mut ask = |path: &str| client.get(&format!("http://127.0.0.1:5680{path}")).unwrap();
    for path in ["/healthy", "/ready"] {
        let answer = ask(path);
        assert!(answer.ok() && answer.text.trim() == "OK", "{answer:?}");
    }
    let metrics = ask("/metrics").text;
    for name in ["ursa_control_sessions", "ursa_control_discovery_streams", "ursa_control_identity_refusals"]
    {
        assert!(metrics.contains(&format!("# TYPE {name} ")), "{name}: {metrics}");
    }
    assert_eq!(ask("/nothing").status, Some(404));
}

#[test]
fn a_running_agent_joins_by_ursa_join() {
    let mut lab = lab();
    let control = Control::start(&mut lab).unwrap();
    let host = lab.net.host("web").unwrap();
    let mut node = Node::unjoined(&mut lab, "node").unwrap();
    wait::until("the agent to answer", SOON, || node.status().map_err(|error| format!("{error:#}"))).unwrap();
    let web = node.add("web", &host).unwrap();

    let socket = node.run_dir().join("agent.sock");
    let join = |ticket: &str| {
        let mut command = mesh::ursa_join(&lab.programs, &node.host);
        mesh::run(command.arg("--agent-socket").arg(&socket).args(["--name", "node"]), ticket)
    };
    let refused = format!("{:#}", join("no ticket").unwrap_err());
    assert!(refused.contains("the agent could not join"), "{refused}");
    let said = join(&control.ticket(&["web"]).unwrap()).unwrap();
    assert!(said.starts_with(&format!("joined zone {} as node ", mesh::ZONE)), "{said}");
    // At once: nobody starts the agent again.
    node.wait_ready(&web.name, SOON).unwrap();

    // By the configuration the same agent is found.
    let mut command = mesh::ursa_join(&lab.programs, &node.host);
    command.arg("--agent-config").arg(&node.config);
    let again = mesh::run(&mut command, &control.ticket(&["web"]).unwrap()).unwrap();
    assert!(again.starts_with(&format!("joined zone {}", mesh::ZONE)), "{again}");

    node.agent.kill();
    let mut command = mesh::ursa_join(&lab.programs, &node.host);
    let gone = mesh::run(command.arg("--agent-socket").arg(&socket), "x").unwrap_err().to_string();
    assert!(gone.contains("is ursa-agent running there?"), "{gone}");
}
