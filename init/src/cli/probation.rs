//! `apply --confirm`, `ursa-init confirm`, and the guards between both.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use super::place::Place;
use crate::confirm::{ConfirmError, Guard, Probation, guard};
use crate::netns::Netns;
use crate::watch::owner::{self, Claim, OwnerError};

/// Where what waits to be confirmed is kept.
#[derive(Debug, Clone, Args)]
pub(super) struct RunDir {
    /// Where a change that waits to be confirmed is kept
    #[arg(long, env = "URSA_RUN_DIR", value_name = "DIR", default_value = "/run/ursa")]
    run_dir: PathBuf,
}

/// What makes a change provisional.
#[derive(Debug, Clone, Args)]
pub(super) struct Confirm {
    /// Roll back to the rules from before unless `ursa-init confirm` says within this time (30s, 5m) that all is well
    #[arg(long, env = "URSA_CONFIRM", value_name = "TIME", value_parser = duration)]
    confirm: Option<Duration>,
    #[command(flatten)]
    run_dir: RunDir,
}

/// One of the two guards.
#[derive(Debug, Clone, Args)]
pub(super) struct GuardArguments {
    #[command(flatten)]
    place: Place,
    #[command(flatten)]
    run_dir: RunDir,
    #[arg(long)]
    id: String,
    #[arg(long)]
    twin: bool,
}

/// `30s`, `5m`, or seconds.
fn duration(text: &str) -> Result<Duration, String> {
    let (number, unit) = match text.strip_suffix('m') {
        Some(minutes) => (minutes, 60),
        None => (text.strip_suffix('s').unwrap_or(text), 1),
    };
    let seconds =
        number.parse::<u64>().ok().map(|n| n.saturating_mul(unit)).filter(|s| (1..=3600).contains(s));
    seconds.map(Duration::from_secs).ok_or_else(|| "must be a time from 1s to 60m, such as 30s".to_owned())
}

impl RunDir {
    pub(super) fn probation(&self) -> Probation {
        Probation::new(&self.run_dir)
    }

    /// Takes the say over the namespace's redirect.
    pub(super) fn claim(&self, netns: &Netns) -> Result<Claim, OwnerError> {
        owner::claim(&self.run_dir, netns)
    }

    /// The process that watches the host's redirect, as it says itself.
    fn watcher(&self) -> Option<u32> {
        let status = std::fs::read(self.run_dir.join("redirect.json")).ok()?;
        let status: serde_json::Value = serde_json::from_slice(&status).ok()?;
        let pid = u32::try_from(status["pid"].as_u64()?).ok()?;
        let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
        (status["state"] != "stopped" && name.starts_with("ursa-init")).then_some(pid)
    }

    /// Rolls back what is overdue, and refuses to change anything while a change waits: what came on top of it would go
    /// with it.
    pub(super) fn settle(&self, netns: &Netns) -> anyhow::Result<()> {
        if self.probation().settle(netns)? {
            eprintln!("ursa-init: a change that was never confirmed is rolled back first");
        }
        match self.probation().pending(netns)? {
            None => Ok(()),
            Some(left) => Err(ConfirmError::Pending(left.as_secs() + 1).into()),
        }
    }
}

impl Confirm {
    /// Runs the change; what there is to be told besides its result.
    pub(super) fn around<T>(
        &self,
        place: &Place,
        netns: &Netns,
        change: impl FnOnce() -> anyhow::Result<T>,
    ) -> anyhow::Result<(T, Option<String>)> {
        let Some(time) = self.confirm else {
            self.run_dir.settle(netns)?;
            return Ok((change()?, None));
        };
        if let Some(pid) = self.run_dir.watcher().filter(|_| place.host) {
            let text = format!(
                "`ursa-init watch` (pid {pid}) keeps its own redirect in place and would undo this one: stop it \
                 (`systemctl stop ursa-redirect`), change its document when this is confirmed, and start it again"
            );
            return Err(anyhow::anyhow!(text));
        }
        let probation = self.run_dir.probation();
        let id = probation.begin(netns, time)?;
        let mut arguments: Vec<OsString> = vec!["guard".into(), "--id".into(), (&id).into()];
        arguments.extend(["--run-dir".into(), self.run_dir.run_dir.clone().into_os_string()]);
        // Another process has another thread-self.
        if let Some(path) = &place.netns {
            arguments.extend(["--netns".into(), path.into()]);
        }
        if place.host {
            arguments.push("--host".into());
        }
        if let Err(error) = (Guard { arguments }).spawn() {
            probation.cancel(&id)?;
            return Err(error.into());
        }
        match change() {
            Ok(done) => {
                let text = format!(
                    "it stays for {} s: try a NEW connection, then run `ursa-init confirm` there; otherwise the rules \
                     from before come back",
                    time.as_secs()
                );
                Ok((done, Some(text)))
            }
            Err(error) => Err(match probation.abandon(netns, &id) {
                Ok(()) => error.context("the change failed, and what was there before is in place"),
                Err(more) => error.context(more),
            }),
        }
    }
}

/// `ursa-init confirm`.
pub(super) fn confirm(place: &Place, run_dir: &RunDir) -> anyhow::Result<&'static str> {
    run_dir.probation().confirm(&place.look()?)?;
    Ok("confirmed: the redirect stays")
}

/// `ursa-init guard`: nobody types this.
pub(super) fn run_guard(arguments: &GuardArguments) -> anyhow::Result<()> {
    let netns = arguments.place.look()?;
    let twin = (!arguments.twin).then(|| Guard { arguments: std::env::args_os().skip(1).collect() });
    super::drop_capabilities()?;
    guard(&arguments.run_dir.probation(), &netns, &arguments.id, twin.as_ref())?;
    Ok(())
}
