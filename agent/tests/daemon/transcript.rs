//! What earlier versions of agent and shim said to each other, as it was recorded between real ones. `shim` lines are the
//! shim's, `agent` lines the agent's.

use std::collections::VecDeque;

use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixListener;
use tokio::time::timeout;
use ursa_agent::shim::client::{ClientError, ShimClient};
use ursa_agent::shim::protocol::{EnvoyState, Request, XdsRole};

use crate::lab::PATIENCE;

const V1: &str = include_str!("transcripts/v1.txt");

/// Says the shim's part. A line of the agent's must be the one that was recorded, in whatever order its fields are.
async fn play(listener: UnixListener, lines: &str) {
    let (stream, _) = listener.accept().await.unwrap();
    let (read, mut write) = stream.into_split();
    let mut heard = BufReader::new(read).lines();
    for line in lines.lines() {
        match line.split_once(' ').unwrap() {
            ("shim", text) => write.write_all(format!("{text}\n").as_bytes()).await.unwrap(),
            ("agent", text) => {
                let recorded: serde_json::Value = serde_json::from_str(text).unwrap();
                let said: serde_json::Value =
                    serde_json::from_str(&heard.next_line().await.unwrap().expect("it hung up")).unwrap();
                assert_eq!(said["cmd"], recorded["cmd"]);
            }
            (other, _) => panic!("{other}?"),
        }
    }
}

/// The parts of a transcript between requests.
fn shims_lines() -> VecDeque<&'static str> {
    V1.lines().filter_map(|line| line.strip_prefix("shim ")).collect()
}

#[tokio::test]
async fn a_shim_of_version_1_is_understood() {
    let dir = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(dir.path().join("control.sock")).unwrap();
    // It can't pass a socket here; that part is covered by the real one.
    let without: Vec<&str> = V1.lines().collect();
    let take = without.iter().position(|line| line.contains("take-xds")).unwrap();
    let lines = [&without[..take], &without[take + 2..]].concat().join("\n");
    let shim = tokio::spawn(async move { play(listener, &lines).await });
    let client = ShimClient::connect(dir.path()).await.unwrap();
    let hello = client.hello();
    assert_eq!((hello.shim, hello.workload.as_str()), (1, "default.web"));
    assert_eq!((hello.service.as_deref(), hello.reexecs, hello.envoy.drained), (None, 0, false));
    assert_eq!(client.status().await.unwrap().envoy.state, EnvoyState::Starting);
    client.reload_dns().await.unwrap();
    let mut envoy = client.envoy();
    timeout(PATIENCE, envoy.wait_for(|envoy| envoy.state == EnvoyState::Live)).await.unwrap().unwrap();
    assert_eq!(client.status().await.unwrap().xds, XdsRole::Agent);
    client.set_log_level("debug").await.unwrap();
    // What it doesn't know it refuses in words, and the connection goes on.
    let settings = serde_json::json!({
        "workload": "default.web", "envoy": "/e", "bootstrap": {}, "last_good": "/l", "dns_table": "/t"
    });
    let refused = client.configure(serde_json::from_value(settings).unwrap()).await.unwrap_err();
    assert!(
        matches!(&refused, ClientError::Refused { reason, .. } if reason.contains("configure")),
        "{refused}"
    );
    client.restart_envoy().await.unwrap();
    timeout(PATIENCE, envoy.wait_for(|envoy| envoy.epoch == 1 && envoy.state == EnvoyState::Live))
        .await
        .unwrap()
        .unwrap();
    client.drain(None).await.unwrap();
    client.stop(std::time::Duration::ZERO).await.unwrap();
    timeout(PATIENCE, shim).await.unwrap().unwrap();
}

/// An agent of version 1 knows these states and needs these fields.
#[test]
fn an_agent_of_version_1_is_understood() {
    for line in V1.lines().filter_map(|line| line.strip_prefix("agent ")) {
        if line.contains("configure") {
            continue;
        }
        let request: Request = serde_json::from_str(line).unwrap();
        let again = serde_json::to_value(&request).unwrap();
        assert_eq!(again, serde_json::from_str::<serde_json::Value>(line).unwrap(), "and said the same way");
    }
    let hello: serde_json::Value = serde_json::from_str(shims_lines()[0]).unwrap();
    let now: ursa_agent::shim::protocol::Status = serde_json::from_value(hello.clone()).unwrap();
    let now = serde_json::to_value(now).unwrap();
    for (name, value) in hello.as_object().unwrap() {
        let same = match (value, &now[name]) {
            (serde_json::Value::Object(old), serde_json::Value::Object(new)) => {
                old.keys().all(|key| new.contains_key(key))
            }
            (old, new) => old == new,
        };
        assert!(same, "{name} is said another way now: {value} and {}", now[name]);
    }
}
