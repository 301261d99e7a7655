//! A full disk: writes are refused, nothing acknowledged is lost, and all goes on when there is space again.

use std::collections::BTreeMap;
use std::time::Duration;

use ursa_tests::lab::fault::Disk;
use ursa_tests::lab::mesh::{Control, Node};
use ursa_tests::lab::pair::SOON;
use ursa_tests::lab::soak::flow::now;
use ursa_tests::lab::{Lab, Programs, http, wait};

use super::complains;

const PATIENCE: Duration = Duration::from_secs(30);

/// Writes a secret of some size, and says what came of it.
fn write(control: &Control, number: usize) -> http::Reply {
    let name = format!("s-{number}");
    let body =
        serde_json::json!({"type": "Secret", "mesh": "default", "name": name, "data": "QUFB".repeat(700)});
    let path = format!("/meshes/default/secrets/{name}");
    http::ask(&control.socket, "PUT", &path, Some(&body.to_string()), PATIENCE).unwrap()
}

fn secrets(control: &Control) -> BTreeMap<String, String> {
    let list = http::ask(&control.socket, "GET", "/meshes/default/secrets?size=1000&name=s-", None, PATIENCE)
        .unwrap();
    assert!(list.ok(), "{}", list.brief());
    let list = list.json().unwrap();
    let text = |item: &serde_json::Value, field: &str| item[field].as_str().unwrap().to_owned();
    list["items"].as_array().unwrap().iter().map(|item| (text(item, "name"), text(item, "data"))).collect()
}

#[test]
fn a_full_disk_of_the_control_plane() {
    let mut lab = Lab::new(&Programs::discover().unwrap()).unwrap();
    let disk = Disk::mount(&lab.dir().join("control"), 8 << 20).unwrap();
    let mut control = Control::start(&mut lab).unwrap();
    disk.fill(192 << 10).unwrap();
    let mut acknowledged = Vec::new();
    let refusal = loop {
        assert!(acknowledged.len() < 1000, "the disk doesn't fill");
        let reply = write(&control, acknowledged.len());
        if !reply.ok() {
            break reply;
        }
        acknowledged.push(format!("s-{}", acknowledged.len()));
    };
    println!("{} writes fitted; then {}", acknowledged.len(), refusal.brief());
    assert!(!acknowledged.is_empty());
    assert_eq!(refusal.status, 503, "{}", refusal.brief());
    for word in ["no space left", "free space on its file system", "nothing was written"] {
        assert!(refusal.body.contains(word), "{word:?} is missing in {}", refusal.brief());
    }
    let held = |control: &Control| secrets(control).into_keys().collect::<std::collections::BTreeSet<_>>();
    let expected: std::collections::BTreeSet<_> = acknowledged.iter().cloned().collect();
    assert_eq!(held(&control), expected, "while the disk is full");
    // The CLI says the same.
    let large = format!("type: Secret\nmesh: default\nname: another\ndata: {}\n", "QUFB".repeat(7000));
    let error = control.apply(&large).unwrap_err().to_string();
    assert!(error.contains("no space left") && error.contains("nothing was written"), "{error}");

    // Killed on a full disk, it serves what it has if the little that opening takes is there; else it says what to do.
    control.daemon.kill();
    let started = control.restart();
    match &started {
        Ok(_) => assert_eq!(held(&control), expected, "after kill -9 on the full disk"),
        Err(error) => {
            let said = error.to_string();
            assert!(
                said.contains("no space left") && said.contains("free space on its file system"),
                "{said}"
            );
        }
    }

    disk.free().unwrap();
    if started.is_err() {
        // As systemd would.
        control.restart().unwrap();
    }
    wait::until("writes to be taken again", SOON, || match write(&control, acknowledged.len()) {
        reply if reply.ok() => Ok(()),
        reply => Err(reply.brief()),
    })
    .unwrap();
    acknowledged.push(format!("s-{}", acknowledged.len()));
    control.daemon.kill();
    control.restart().unwrap();
    assert_eq!(held(&control), acknowledged.iter().cloned().collect(), "with space again");
}

#[test]
fn a_full_disk_of_an_agent() {
    let mut lab = Lab::new(&Programs::discover().unwrap()).unwrap();
    let disk = Disk::mount(&lab.dir().join("node/state"), 4 << 20).unwrap();
    let control = Control::start(&mut lab).unwrap();
    let host = lab.net.host("web").unwrap();
    let ticket = control.ticket(&["web"]).unwrap();
    let mut node = Node::join(&mut lab, "node", &ticket).unwrap();
    node.add("web", &host).unwrap();
    node.wait_ready("web", SOON).unwrap();
    let admin = node.run_dir().join("w/default.web/admin.sock");
    let applied = |seconds: u32| {
        let yaml = format!(
            "type: MeshTimeout\nmesh: default\nname: full\nspec:\n  targetRef: {{kind: Mesh}}\n  to:\n  - targetRef: {{kind: Mesh}}\n    \
             default: {{http: {{requestTimeout: {seconds}s}}}}\n"
        );
        control.apply(&yaml).unwrap();
        let wanted = format!("\"{seconds}s\"");
        wait::until("Envoy to have it", SOON, || {
            let dump = http::ask(&admin, "GET", "/config_dump", None, PATIENCE)
                .map_err(|error| error.to_string())?;
            if dump.body.contains(&wanted) { Ok(()) } else { Err(format!("no {wanted}")) }
        })
        .unwrap();
    };
    applied(101);
    disk.fill(0).unwrap();
    // Serving goes on with the new configuration; only a restart would not have it, and the status says that.
    applied(102);
    complains(&node, &["No space left on device", "serving goes on", "older configuration"]);
    node.wait_ready("web", SOON).unwrap();
    // An agent that starts on a full disk serves from what it has.
    node.agent.kill();
    node.agent.restart().unwrap();
    node.wait_ready("web", SOON).unwrap();
    applied(103);

    disk.free().unwrap();
    let freed = now();
    wait::until("the agent to keep its configuration again", 4 * SOON, || {
        let status = node.status().map_err(|error| format!("{error:#}"))?;
        let error = &status["workloads"][0]["diskError"];
        if error.is_null() { Ok(()) } else { Err(error.to_string()) }
    })
    .unwrap();
    println!("recovered after {:.1} s", now() - freed);
}
