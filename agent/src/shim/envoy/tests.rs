//! The supervisor with programs that behave worse than Envoy.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;

use super::*;

/// A supervisor of a shell script.
fn supervise(script: &str) -> (tempfile::TempDir, Handle, tokio::task::JoinHandle<()>) {
    let dir = tempfile::tempdir().unwrap();
    let binary = dir.path().join("envoy");
    std::fs::write(&binary, format!("#!/bin/sh\n{script}\n")).unwrap();
    std::fs::set_permissions(&binary, Permissions::from_mode(0o755)).unwrap();
    let bootstrap = dir.path().join("bootstrap.json");
    std::fs::write(&bootstrap, "{}").unwrap();
    let (supervisor, handle) = Supervisor::new(Launch {
        binary,
        bootstrap,
        admin: dir.path().join("admin.sock"),
        base_id: 1,
        concurrency: 1,
        drain_time: Duration::from_secs(1),
        log_level: "info".into(),
    });
    (dir, handle, tokio::spawn(supervisor.run()))
}

async fn reach(handle: &Handle, wanted: impl Fn(&EnvoyStatus) -> bool) -> EnvoyStatus {
    let mut status = handle.status.clone();
    let reached = status.wait_for(|status| wanted(status));
    timeout(Duration::from_secs(20), reached).await.unwrap().unwrap().clone()
}

#[tokio::test]
async fn one_that_fails_is_left_alone_longer_and_longer_and_says_why() {
    let (_dir, handle, task) = supervise("printf 'critical\\tmain\\tno such listener\\n' >&2; exit 3");
    let status = reach(&handle, |status| status.restarts >= 2 && status.state == EnvoyState::Backoff).await;
    assert_eq!(status.last_exit.as_deref(), Some("exit status: 3: critical main no such listener"));
    assert_eq!(status.pid, None);
    // A stop does not wait for the back-off to end.
    handle.commands.send(Command::Stop(Duration::from_secs(60))).await.unwrap();
    timeout(Duration::from_secs(1), task).await.unwrap().unwrap();
    assert_eq!(handle.status.borrow().state, EnvoyState::Dead);
}

#[tokio::test]
async fn one_that_ignores_sigterm_is_killed() {
    let (_dir, handle, task) = supervise("trap '' TERM; while :; do sleep 0.05; done");
    let status = reach(&handle, |status| status.pid.is_some()).await;
    handle.commands.send(Command::Stop(Duration::ZERO)).await.unwrap();
    timeout(EXIT_DEADLINE * 2, task).await.unwrap().unwrap();
    assert!(!std::fs::exists(format!("/proc/{}", status.pid.unwrap())).unwrap());
}

#[tokio::test]
async fn one_that_is_missing_or_has_no_bootstrap_is_named() {
    let (dir, handle, task) = supervise("exec sleep 100");
    let running = reach(&handle, |status| status.pid.is_some()).await;
    std::fs::remove_file(dir.path().join("envoy")).unwrap();
    handle.commands.send(Command::Restart).await.unwrap();
    let status =
        reach(&handle, |status| status.last_exit.as_ref().is_some_and(|why| why.contains("cannot start")))
            .await;
    assert!(status.last_exit.unwrap().contains("check the agent's `envoy` setting"));
    assert!(!std::fs::exists(format!("/proc/{}", running.pid.unwrap())).unwrap());
    std::fs::remove_file(dir.path().join("bootstrap.json")).unwrap();
    reach(&handle, |status| status.last_exit.as_ref().is_some_and(|why| why.contains("the agent writes it")))
        .await;
    drop(handle);
    timeout(Duration::from_secs(1), task).await.unwrap().unwrap();
}
