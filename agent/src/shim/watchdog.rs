//! Telling the service manager that the shim still does its work, not merely that it still exists.

use std::path::Path;
use std::time::Duration;

use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{MissedTickBehavior, interval, timeout};
use tracing::warn;

use super::envoy::Command;
use super::lines::Receiver;
use crate::notify::Notifier;

/// Feeds the watchdog while the control socket greets and the supervisor answers. Runs on the thread that does both,
/// so it stops with it. Never returns.
pub(super) async fn feed(notifier: &Notifier, control: &Path, supervisor: &mpsc::Sender<Command>) {
    let Some(deadline) = notifier.watchdog() else { return std::future::pending().await };
    // One attempt that fails, in a busy moment, is made up for by the next.
    let mut ticks = interval(deadline / 4);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        match check(control, supervisor, deadline / 8).await {
            Ok(()) => notifier.tell(&["WATCHDOG=1"]),
            Err(reason) => warn!(%reason, "the watchdog is not fed"),
        }
    }
}

async fn check(control: &Path, supervisor: &mpsc::Sender<Command>, patience: Duration) -> Result<(), String> {
    let greets = async {
        let stream = UnixStream::connect(control).await.map_err(|error| format!("control.sock: {error}"))?;
        match Receiver::default().line(&stream).await {
            Ok(Some(_)) => Ok(()),
            Ok(None) => Err("control.sock hangs up".to_owned()),
            Err(error) => Err(format!("control.sock: {error}")),
        }
    };
    let answers = async {
        let (answer, answered) = oneshot::channel();
        // A closed channel is a supervisor that has stopped Envoy for good: the process is about to end.
        if supervisor.send(Command::Ping(answer)).await.is_ok() {
            let _ = answered.await;
        }
    };
    timeout(patience, greets).await.map_err(|_| "control.sock does not greet".to_owned())??;
    timeout(patience, answers).await.map_err(|_| "Envoy's supervisor does not answer".to_owned())
}

#[cfg(test)]
mod tests {
    use tokio::net::UnixListener;

    use super::*;

    #[tokio::test]
    async fn who_does_not_serve_is_not_fed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control.sock");
        let patience = Duration::from_millis(200);
        let (sender, mut commands) = mpsc::channel(1);
        assert!(check(&path, &sender, patience).await.unwrap_err().contains("control.sock"));
        let listener = UnixListener::bind(&path).unwrap();
        // Bound, but nobody greets.
        assert!(check(&path, &sender, patience).await.unwrap_err().contains("does not greet"));
        tokio::spawn(async move {
            let mut clients = Vec::new();
            while let Ok((client, _)) = listener.accept().await {
                // The one before it has given up.
                let _ = super::super::lines::send(&client, b"{}", None).await;
                clients.push(client);
            }
        });
        assert!(check(&path, &sender, patience).await.unwrap_err().contains("supervisor"));
        tokio::spawn(async move {
            while let Some(command) = commands.recv().await {
                if let Command::Ping(answer) = command {
                    answer.send(()).unwrap_or_default();
                }
            }
        });
        check(&path, &sender, patience).await.unwrap();
    }
}
