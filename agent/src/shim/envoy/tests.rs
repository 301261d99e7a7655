//! The supervisor with programs that behave worse than Envoy.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;

use tokio::time::timeout;

use super::*;

/// A supervisor of a shell script.
fn supervise(script: &str) -> (tempfile::TempDir, Handle, tokio::task::JoinHandle<Ended>) {
    let (dir, launch) = scripted(script);
    // The sender may go: what was sent last stays.
    let (supervisor, handle) = Supervisor::new(watch::channel(Some(launch)).1, None);
    (dir, handle, tokio::spawn(supervisor.run()))
}

fn scripted(script: &str) -> (tempfile::TempDir, Launch) {
    let dir = tempfile::tempdir().unwrap();
    let binary = dir.path().join("envoy");
    std::fs::write(&binary, format!("#!/bin/sh\n{script}\n")).unwrap();
    std::fs::set_permissions(&binary, Permissions::from_mode(0o755)).unwrap();
    let bootstrap = dir.path().join("bootstrap.json");
    std::fs::write(&bootstrap, "{}").unwrap();
    let launch = Launch {
        binary,
        bootstrap,
        admin: dir.path().join("admin.sock"),
        base_id: 1,
        concurrency: 1,
        drain_time: Duration::from_secs(1),
        log_level: "info".into(),
    };
    (dir, launch)
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

#[tokio::test]
async fn it_waits_for_settings_and_says_what_the_agent_waits_for() {
    let (dir, launch) = scripted("exec sleep 100");
    let (launches, seen) = watch::channel(None);
    let (supervisor, handle) = Supervisor::new(seen, None);
    let task = tokio::spawn(supervisor.run());
    let waiting = |status: &EnvoyStatus, words: &str| {
        status.state == EnvoyState::Waiting
            && status.waiting.as_ref().is_some_and(|said| said.contains(words))
    };
    reach(&handle, |status| waiting(status, "the agent has not sent")).await;
    handle.commands.send(Command::Awaited("the control plane".into())).await.unwrap();
    reach(&handle, |status| waiting(status, "the control plane")).await;
    handle.commands.send(Command::Awaited(String::new())).await.unwrap();
    reach(&handle, |status| waiting(status, "the agent has not sent")).await;
    launches.send_replace(Some(launch));
    let status = reach(&handle, |status| status.state == EnvoyState::Starting).await;
    assert_eq!((status.epoch, status.restarts), (0, 0));
    handle.commands.send(Command::Stop(Duration::from_secs(60))).await.unwrap();
    timeout(Duration::from_secs(10), task).await.unwrap().unwrap();
    drop(dir);
}

#[tokio::test]
async fn another_supervisor_goes_on_with_the_same_process() {
    let (dir, launch) =
        scripted("printf 'error\\tx\\tone' >&2; touch \"$0.said\"; while :; do sleep 0.05; done");
    let (_launches, seen) = watch::channel(Some(launch));
    let (supervisor, mut handle) = Supervisor::new(seen.clone(), None);
    let mut task = tokio::spawn(supervisor.run());
    let first = reach(&handle, |status| status.pid.is_some()).await;
    for _ in 0..3 {
        handle.commands.send(Command::HandOver).await.unwrap();
        let ended = timeout(Duration::from_secs(10), task).await.unwrap().unwrap();
        let Ended::HandedOver(snapshot) = ended else { panic!("{ended:?}") };
        let text = serde_json::to_string(&snapshot).unwrap();
        let (supervisor, next) = Supervisor::new(seen.clone(), serde_json::from_str(&text).unwrap());
        (task, handle) = (tokio::spawn(supervisor.run()), next);
        assert_eq!(*handle.status.borrow(), first);
    }
    let said = async {
        while !dir.path().join("envoy.said").exists() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(Duration::from_secs(20), said).await.unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(first.pid.unwrap()), Signal::SIGKILL).unwrap();
    let status = reach(&handle, |status| status.last_exit.is_some()).await;
    assert_eq!(status.last_exit.as_deref(), Some("signal: 9 (SIGKILL): error x one"));
    reach(&handle, |status| status.epoch == 1 && status.pid.is_some()).await;
    handle.commands.send(Command::Stop(Duration::ZERO)).await.unwrap();
    timeout(Duration::from_secs(10), task).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_wait_before_the_next_start_is_handed_over_too() {
    let (_dir, launch) = scripted("exit 1");
    let (_launches, seen) = watch::channel(Some(launch));
    let (supervisor, handle) = Supervisor::new(seen.clone(), None);
    let task = tokio::spawn(supervisor.run());
    reach(&handle, |status| status.restarts >= 4 && status.state == EnvoyState::Backoff).await;
    handle.commands.send(Command::HandOver).await.unwrap();
    let ended = timeout(Duration::from_secs(10), task).await.unwrap().unwrap();
    let Ended::HandedOver(snapshot) = ended else { panic!("{ended:?}") };
    assert!(snapshot.failures >= 5 && snapshot.pause_ms.is_some_and(|ms| ms > 100), "{snapshot:?}");
    let (supervisor, handle) = Supervisor::new(seen, Some(snapshot));
    let task = tokio::spawn(supervisor.run());
    assert_eq!(handle.status.borrow().state, EnvoyState::Backoff);
    handle.commands.send(Command::Stop(Duration::ZERO)).await.unwrap();
    timeout(Duration::from_secs(1), task).await.unwrap().unwrap();
}
