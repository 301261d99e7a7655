//! The one right that an Envoy behind TPROXY needs, and what is said where nobody can give it.

use std::fs;
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use ursa_agent::launcher::{Launcher as _, ShimSpec};
use ursa_agent::shim::client::ShimClient;

use crate::lab::{Lab, UID, live, running, status_line};

/// The capability, as `/proc` writes it.
const NET_RAW: &str = "0000000000002000";

#[tokio::test]
async fn a_transparent_envoy_holds_one_right_and_its_shim_uses_none() {
    let lab = Lab::new("transparent");
    let listener = serde_json::json!({
        "name": "in", "transparent": true, "filter_chains": [{}],
        "address": {"socket_address": {"address": "0.0.0.0", "port_value": 15006}},
    });
    let bootstrap = serde_json::json!({
        "node": { "id": "default.web", "cluster": "web" },
        "admin": { "address": { "pipe": { "path": lab.shim_dir().join("admin.sock") } } },
        "static_resources": { "listeners": [listener] },
    });
    fs::write(lab.shim_dir().join("bootstrap.json"), bootstrap.to_string()).unwrap();
    let launcher = lab.launcher();
    let mut state = launcher.ensure(ShimSpec { transparent: true, ..lab.spec() }).await.unwrap();
    let (shim, _) = running(&mut state, 0).await;
    let client = ShimClient::connect(&lab.shim_dir()).await.unwrap();
    let mut envoy = live(&client, None).await.pid.unwrap();
    for _ in 0..2 {
        for (pid, effective) in [(shim, "0000000000000000"), (envoy, NET_RAW)] {
            assert_eq!(status_line(pid, "Uid:"), format!("{UID}\t{UID}\t{UID}\t{UID}"));
            assert_eq!(status_line(pid, "NoNewPrivs:"), "1");
            assert_eq!(status_line(pid, "CapEff:"), effective);
            assert_eq!(status_line(pid, "CapBnd:"), "0000000000000000");
            for set in ["CapInh:", "CapPrm:", "CapAmb:"] {
                assert_eq!(status_line(pid, set), NET_RAW, "{set}");
            }
        }
        // The next one has it too.
        kill(Pid::from_raw(envoy), Signal::SIGKILL).unwrap();
        envoy = live(&client, Some(envoy)).await.pid.unwrap();
    }
    launcher.stop("web", Duration::ZERO).await.unwrap();
}

#[test]
fn a_right_that_nobody_can_give_is_named() {
    let lab = Lab::new("powerless");
    let mut shim = Command::new("setpriv");
    shim.args(["--bounding-set", "-net_raw,-net_admin", "--", env!("CARGO_BIN_EXE_ursa-shim")])
        .args([
            "--workload",
            "default.web",
            "--uid",
            "7",
            "--gid",
            "7",
            "--transparent",
            "--envoy",
            "/bin/false",
        ])
        .arg("--dir")
        .arg(lab.shim_dir())
        .arg("--last-good")
        .arg(lab.dir.path())
        .arg("--netns")
        .arg(lab.spec().netns.unwrap());
    let output = shim.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success(), "{said}");
    assert!(said.contains("CAP_NET_RAW") && said.contains("leave inbound.mode at redirect"), "{said}");
}
