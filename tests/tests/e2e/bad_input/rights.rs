//! Without the rights, and without nf_tables: nothing is changed, and the error says what is missing.

use std::path::Path;
use std::process::Command;

use ursa_tests::lab::Programs;
use ursa_tests::lab::daemon::Daemon;
use ursa_tests::lab::pair::SOON;
use ursa_tests::lab::{mesh, wait};

use super::{differences, ground, network, refused};

/// A command as an ordinary user, in a namespace.
fn as_nobody(netns: &Path, program: &Path) -> Command {
    let mut command = Command::new("nsenter");
    command
        .arg(format!("--net={}", netns.display()))
        .args(["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"])
        .arg(program);
    command
}

#[test]
fn missing_rights() {
    let mut ground = ground();
    let host = ground.lab.net.host("web").unwrap();
    let programs: Programs = ground.lab.programs.clone();
    let (before, stored) = (network(&host), ground.stored());

    // Everybody may connect to the operator's socket; the kernel says who it is.
    let mut ursa = as_nobody(&ground.control.host.path(), &programs.path("ursa"));
    ursa.arg("--socket").arg(&ground.control.socket).args(["apply", "-f", "-"]);
    refused(&mut ursa, "type: Mesh\nname: stolen\n", 1, &["send a user token", "unix socket", "as root"]);
    assert_eq!(differences(&stored, &ground.stored()), "");

    let mut init = as_nobody(&host.path(), &programs.path("ursa-init"));
    refused(init.args(["apply", "--proxy-uid", "5678"]), "", 1, &["CAP_NET_ADMIN", "run as root"]);
    // Root without the one capability that counts.
    let mut init = Command::new("nsenter");
    init.arg(format!("--net={}", host.path().display()))
        .args(["setpriv", "--bounding-set", "-net_admin", "--inh-caps", "-net_admin"])
        .arg(programs.path("ursa-init"));
    refused(init.args(["apply", "--proxy-uid", "5678"]), "", 1, &["CAP_NET_ADMIN", "run as root or grant"]);
    assert_eq!(network(&host), before);

    let node = ground.node("node", &["web"]);
    let mut status = as_nobody(&host.path(), &programs.path("ursa-agent"));
    refused(status.args(["status", "--config"]).arg(&node.config), "", 1, &["agent.sock", "root"]);
    let mut second = as_nobody(&host.path(), &programs.path("ursa-agent"));
    refused(second.args(["run", "--config"]).arg(&node.config), "", 1, &["run the agent as root"]);
    let fresh = ground.lab.dir().join("fresh.yaml");
    let state = ground.lab.dir().join("fresh");
    std::fs::write(&fresh, format!("runDir: {0}/run\nstateDir: {0}/state\n", state.display())).unwrap();
    let mut agent = as_nobody(&host.path(), &programs.path("ursa-agent"));
    refused(agent.args(["run", "--config"]).arg(&fresh), "", 1, &["can't create", "run the agent as root"]);
    assert!(!state.exists());

    let store = ground.lab.dir().join("nowhere");
    let mut control = as_nobody(&host.path(), &programs.path("ursa-control"));
    control.args(["run", "--config"]).arg(ground.lab.dir().join("control.yaml"));
    control.args(["--set", &format!("general.workDir={}", store.display())]);
    control.args(["--set", &format!("store.embedded.path={}/store.db", store.display())]);
    control.args(["--set", &format!("apiServer.socket={}/control.sock", store.display())]);
    refused(&mut control, "", 1, &["can't create", "nowhere"]);
    assert!(!store.exists());
    // An existing store, as somebody else.
    let mut control = as_nobody(&host.path(), &programs.path("ursa-control"));
    control
        .args(["run", "--config"])
        .arg(ground.lab.dir().join("control.yaml"))
        .args(["--set", "apiServer.socket="]);
    control.args(["--set", "apiServer.https.enabled=false"]);
    refused(&mut control, "", 1, &["store.db", "writable by this user"]);
}

#[test]
fn no_nf_tables() {
    let mut ground = ground();
    let host = ground.lab.net.host("web").unwrap();
    let before = network(&host);
    let programs: Programs = ground.lab.programs.clone();
    let app = programs.path("lab-app");
    let without = |program: &str| {
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--net={}", host.path().display()))
            .arg(&app)
            .arg("without-nf-tables")
            .arg(programs.path(program));
        command
    };
    let words = ["kernel", "lacks nf_tables", "modprobe", "Protocol not supported"];
    let asked = ["apply", "--proxy-uid", "5678", "--backend", "nftables"];
    refused(without("ursa-init").args(asked), "", 1, &words);
    assert_eq!(network(&host), before);
    // Where nobody asked for it, iptables' old tables take its place, and all of it goes again.
    let done = |args: &[&str]| mesh::run(without("ursa-init").args(args), "").unwrap();
    done(&["apply", "--proxy-uid", "5678"]);
    assert!(done(&["show"]).contains("URSA_"));
    done(&["remove"]);
    assert_eq!((done(&["show"]).as_str(), network(&host)), ("", before.clone()));
    // The filter stands for the kernel and for nothing else: the same namespace without it takes the rules.
    let init = ground.lab.programs.path("ursa-init");
    let applied = |verb: &[&str]| {
        mesh::run(Command::new(&init).args(verb).arg("--netns").arg(host.path()), "").unwrap()
    };
    applied(&["apply", "--proxy-uid", "5678"]);
    applied(&["remove"]);
    assert_eq!(network(&host), before);

    let mut node = ground.node("node", &["web"]);
    node.agent.kill();
    let args = ["without-nf-tables".into(), ground.lab.programs.path("ursa-agent").display().to_string()];
    let run = ["run".into(), "--config".into(), node.config.display().to_string()];
    let args = args.into_iter().chain(run).collect();
    node.agent =
        Daemon::start("ursa-agent", &node.host, app.clone(), args, Vec::new(), ground.lab.log("node"))
            .unwrap();
    node.add("web", &host).unwrap();
    node.wait_ready("web", SOON).unwrap();
    assert!(done(&["show"]).contains("URSA_"));
    node.remove("web").unwrap();
    wait::until("web's redirect to go", SOON, || match network(&host) {
        now if now == before => Ok(()),
        now => Err(now.join("\n")),
    })
    .unwrap();
}
