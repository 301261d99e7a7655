//! The agent as systemd's service: ready, alive, reloaded, and what it says of itself.

use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use tokio::time::{sleep, timeout};

use super::config::AgentConfig;
use super::control::Control;
use super::status::{Phase, WorkloadStatus};
use super::supervisor::Supervisor;
use crate::notify::Notifier;

/// How long taking over what runs may keep systemd waiting. What takes longer goes on.
const ADOPTION: Duration = Duration::from_secs(5);
/// Between two looks at what has been taken over.
const LOOK: Duration = Duration::from_millis(20);
/// How long the supervisor may take to answer before the agent counts as hung.
const ANSWER: Duration = Duration::from_secs(10);
/// How often the agent looks at itself where nobody asks for it.
const IDLE: Duration = Duration::from_secs(15);

/// Changes the log level.
pub type SetLogLevel = Box<dyn Fn(&str) -> anyhow::Result<()> + Send + Sync>;

/// How the agent reads its configuration again.
pub struct Reload {
    /// Reads it as it was read at the start.
    pub read: Box<dyn Fn() -> anyhow::Result<AgentConfig> + Send + Sync>,
    /// Changes the log level.
    pub set_log_level: SetLogLevel,
}

/// How often [`Service::tell`] is to be called: twice per watchdog period.
pub(super) fn look(notifier: &Notifier) -> Duration {
    notifier.watchdog().map_or(IDLE, |period| period / 2)
}

/// What systemd sees of the agent.
pub(super) struct Service {
    pub(super) config: AgentConfig,
    pub(super) reload: Reload,
    pub(super) supervisor: Supervisor,
    pub(super) control: Arc<Control>,
    pub(super) notifier: Notifier,
}

impl Service {
    /// Waits until the shims that ran before this agent are taken over, or can't be.
    pub(super) async fn adopted(&self, running: Vec<String>) {
        let settled = async {
            loop {
                let (workloads, _) = self.supervisor.status().await;
                let settled = |id: &String| {
                    workloads
                        .iter()
                        .find(|workload| workload.id == *id)
                        .is_none_or(|workload| workload.shim_pid.is_some() || workload.error.is_some())
                };
                if running.iter().all(settled) {
                    return;
                }
                sleep(LOOK).await;
            }
        };
        if timeout(ADOPTION, settled).await.is_err() {
            tracing::warn!("not everything that runs is taken over yet; it goes on by itself meanwhile");
        }
    }

    /// Tells systemd something, and how the agent is. Only an agent whose supervisor answers is alive.
    pub(super) async fn tell(&self, news: &str) {
        let Ok((workloads, broken)) = timeout(ANSWER, self.supervisor.status()).await else {
            tracing::error!("the supervisor gives no answer; systemd's watchdog will start the agent again");
            return;
        };
        let status = summary(&workloads, broken.len(), self.control.watch().borrow().is_some());
        self.notifier.tell(&[news, &format!("STATUS={status}")]);
    }

    /// Reads the configuration again. A wrong one changes nothing.
    pub(super) async fn reload(&mut self) {
        self.notifier.reloading();
        match self.take_new().await {
            Ok(fixed) if fixed.is_empty() => {
                tracing::info!("the configuration is read again");
                self.tell("READY=1").await;
            }
            Ok(fixed) => {
                let fixed = fixed.join(", ");
                tracing::warn!(%fixed, "what has changed of these takes effect when the agent is started again, which harms nobody");
                let status = format!("read again; restart the agent for {fixed}");
                self.notifier.tell(&["READY=1", &format!("STATUS={status}")]);
            }
            Err(error) => {
                tracing::error!(
                    error = format!("{error:#}"),
                    "the new configuration isn't taken, the old one stays"
                );
                let status = format!("the new configuration isn't taken, the old one stays: {error:#}");
                self.notifier.tell(&["READY=1", &format!("STATUS={status}")]);
            }
        }
    }

    async fn take_new(&mut self) -> anyhow::Result<Vec<&'static str>> {
        let new = (self.reload.read)()?;
        self.control
            .move_to(new.control_plane.as_deref())
            .with_context(|| format!("controlPlane {}", new.control_plane.as_deref().unwrap_or_default()))?;
        (self.reload.set_log_level)(&new.log_level)?;
        let fixed = new.fixed_differences(&self.config);
        self.supervisor.reload(new.clone()).await;
        self.config = new;
        Ok(fixed)
    }
}

/// The line that `systemctl status` shows.
fn summary(workloads: &[WorkloadStatus], broken: usize, joined: bool) -> String {
    if !joined {
        return "this node hasn't joined; `ursa join TICKET` does that".to_owned();
    }
    let ready = workloads.iter().filter(|workload| workload.state == Phase::Ready).count();
    let mut text = format!("{ready} of {} workloads ready", workloads.len());
    if let Some(waiting) = workloads.iter().find(|workload| workload.state != Phase::Ready) {
        let why = waiting.error.as_deref().map(|error| format!(": {error}")).unwrap_or_default();
        let _ = write!(text, "; {} is {}{why}", waiting.id, waiting.state.as_str()); // a String takes it
    }
    if broken > 0 {
        let _ = write!(text, "; {broken} broken workload files");
    }
    text
}
