//! `ursa up`: from an installed package to a control plane that runs and a ticket for the first machine.

use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, bail};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use crate::args::{Global, UpArgs};
use crate::config::Session;
use crate::output::say;

const UNIT: &str = "ursa-control.service";
/// How long a control plane may take until it answers: the first time it makes its keys.
const DEADLINE: Duration = Duration::from_secs(60);
const LOOK: Duration = Duration::from_millis(100);

pub(crate) async fn run(global: &Global, args: UpArgs) -> anyhow::Result<()> {
    crate::args::parse_duration(&args.valid_for).map_err(anyhow::Error::msg).context("--valid-for")?;
    if !std::fs::symlink_metadata("/run/systemd/system").is_ok_and(|found| found.is_dir()) {
        bail!(
            "systemd doesn't run here, and `ursa up` starts {UNIT}; run `ursa-control run` and then `ursa ticket create`"
        );
    }
    let known = systemctl(&["cat", UNIT]);
    if known.is_err() {
        bail!("there is no {UNIT} on this machine: install the package ursa-control");
    }
    let enabled = systemctl(&["is-enabled", "--quiet", UNIT]).is_ok();
    let active = systemctl(&["is-active", "--quiet", UNIT]).is_ok();
    if !enabled || !active {
        systemctl(&["enable", "--now", "--quiet", UNIT]).with_context(|| {
            format!("cannot start {UNIT} (are you root?); `journalctl -u ursa-control` tells more")
        })?;
    }
    let changed = match (enabled, active) {
        (true, true) => String::new(),
        (true, false) => format!("  (changed: {UNIT} started)"),
        (false, true) => format!("  (changed: {UNIT} enabled)"),
        (false, false) => format!("  (changed: {UNIT} enabled and started)"),
    };
    let session = wait(global).await?;
    say!("ok    control    {UNIT} answers{changed}");
    let mut request = json!({"mesh": args.mesh, "workloads": args.workloads, "validFor": args.valid_for});
    if let (Some(uses), Value::Object(fields)) = (args.uses, &mut request) {
        fields.insert("uses".to_owned(), uses.into());
    }
    let ticket = ticket(&session, &request).await?;
    let uses = match args.uses {
        None | Some(1) => "one node".to_owned(),
        Some(uses) => format!("{uses} nodes"),
    };
    say!(
        "ok    ticket     for {uses} within {}: workloads {} of mesh {}",
        args.valid_for,
        args.workloads.join(", "),
        args.mesh
    );
    let named: Vec<&str> = args.workloads.iter().map(String::as_str).filter(|name| *name != "*").collect();
    let unit = named.first().map_or("NAME", |name| name);
    let mesh = if args.mesh == "default" { String::new() } else { format!(" --mesh {}", args.mesh) };
    say!("");
    say!("On the machine of the service, with the packages ursa-agent and ursa-envoy:");
    say!("");
    say!("ursa join {ticket} --unit {unit}.service --port PORT{mesh}");
    say!("");
    say!("undo it with: systemctl disable --now {UNIT}");
    Ok(())
}

/// A mesh that was just made may need a moment.
async fn ticket(session: &Session, request: &Value) -> anyhow::Result<String> {
    let end = Instant::now() + DEADLINE;
    loop {
        let answer = match session.api.post("/tickets", request).await {
            Ok(answer) => answer.json(),
            Err(error) => Err(error),
        };
        match answer {
            Ok(answer) => {
                let ticket =
                    answer.get("ticket").and_then(Value::as_str).context("the answer holds no ticket")?;
                return Ok(ticket.to_owned());
            }
            Err(error) if Instant::now() >= end => return Err(error.context("failed to create a ticket")),
            Err(_) => sleep(LOOK).await,
        }
    }
}

/// Until the control plane answers.
async fn wait(global: &Global) -> anyhow::Result<Session> {
    let end = Instant::now() + DEADLINE;
    loop {
        // Anew each time: where its socket is, is known once it exists.
        let tried = async {
            let session = Session::open(global)?;
            session.api.get("/").await?;
            anyhow::Ok(session)
        };
        match tried.await {
            Ok(session) => return Ok(session),
            Err(error) if Instant::now() >= end => {
                return Err(error.context(format!(
                    "{UNIT} doesn't answer within {} s; `journalctl -u ursa-control` tells why",
                    DEADLINE.as_secs()
                )));
            }
            Err(_) => sleep(LOOK).await,
        }
    }
}

fn systemctl(args: &[&str]) -> anyhow::Result<()> {
    let mut command = Command::new("systemctl");
    let output = command.args(args).stdin(Stdio::null()).output().context("cannot run systemctl")?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("systemctl {}: {}", args.join(" "), said.trim());
    }
    Ok(())
}
