//! `leave`: what `join` has made is taken back, and nothing else; the service keeps running.

use std::fs;
use std::path::Path;
use std::time::Duration;

use ursa_init::watch::State;

use super::options::LeaveOptions;
use super::plan::HOST_REDIRECT;
use super::record::{self, Apart, Record, Records};
use super::show::{Steps, note, print};
use super::{HostError, Result, names, system};
use crate::agent::config::AgentConfig;

/// How long rules may take until they are gone.
const REDIRECT: Duration = Duration::from_secs(30);
/// How long a sidecar may take to stop beyond its drain.
const STOP: Duration = Duration::from_secs(100);

/// Takes services out of the mesh.
pub async fn leave(config: &AgentConfig, options: &LeaveOptions) -> Result<()> {
    system::check()?;
    let dir = Path::new(record::DIR);
    let records = if options.dry_run { Records::look(dir) } else { Records::lock(dir)? };
    let all = records.all()?;
    let leaving: Vec<&Record> = match &options.unit {
        Some(unit) => {
            let service = names::service(unit)?;
            all.iter().filter(|record| record.service == service).collect()
        }
        None if options.all => all.iter().collect(),
        None => Vec::new(),
    };
    if options.node && leaving.len() < all.len() {
        let stay: Vec<_> =
            all.iter().filter(|one| !leaving.contains(one)).map(|one| one.settings.unit.as_str()).collect();
        return Err(format!("{} would be left without a node's identity; add --all", stay.join(", ")).into());
    }
    if leaving.is_empty() && !options.node {
        match &options.unit {
            Some(unit) => print(&format!("{unit} isn't in the mesh by `ursa join`; nothing changed")),
            None => print("no service is in the mesh by `ursa join`; nothing changed"),
        }
        return Ok(());
    }
    for (gone, record) in leaving.iter().enumerate() {
        let last = all.len() - gone == 1;
        let mut steps = Steps::new(options.dry_run);
        if options.dry_run {
            show_plan(&mut steps, record);
        } else {
            undo(config, &records, record, last, &mut steps).await.map_err(|error| {
                HostError::new(format!(
                    "{error}\nwhat is left of {0} is on record: `ursa leave --unit {0}` goes on with it",
                    record.settings.unit
                ))
            })?;
        }
    }
    if options.node {
        forget_node(config, options.dry_run)?;
    }
    Ok(())
}

fn show_plan(steps: &mut Steps, record: &Record) {
    let there = |path: &&std::path::PathBuf| path.exists();
    let mut files: Vec<String> =
        record.files.iter().rev().filter(there).map(|path| path.display().to_string()).collect();
    files.extend(record.folders.iter().rev().filter(there).map(|path| path.display().to_string()));
    if record.makes_user && system::ids(&record.user).is_some() {
        files.push(format!("user {}", record.user));
    }
    steps.step("leave", &format!("{} leaves the mesh and keeps running", record.settings.unit), &files);
}

async fn undo(
    config: &AgentConfig,
    records: &Records,
    record: &Record,
    last: bool,
    steps: &mut Steps,
) -> Result<()> {
    let unit = &record.settings.unit;
    let (sidecar, redirect) = (record.sidecar(), record.redirect());
    let of = |part: String| record.files.iter().filter(move |path| path.to_string_lossy().contains(&part));
    // New connections go straight to it; those that its Envoy has stay there until they are drained.
    let mut gone = remove(of("/etc/ursa/redirect".to_owned()))?;
    gone.extend(remove_redirect(record, &redirect, last).await?);
    steps.step("redirect", &format!("nothing of {unit} is redirected"), &gone);

    // From here on nothing that happens to the sidecar concerns the service.
    let mut gone = remove(of(format!("/{unit}.d/")))?;
    gone.extend(system::remove_folders(&folders(record, &format!("/{unit}.d"))));
    system::run("systemctl", &["daemon-reload"])?;
    steps.step("service", &format!("{unit} doesn't want {sidecar} any more, and runs on"), &gone);

    let gone = remove(of(config.workloads_dir.display().to_string()))?;
    let drain = Duration::from_secs(config.drain_seconds.into());
    wait_stopped(&sidecar, drain).await?;
    steps.step("sidecar", &format!("{sidecar} has drained and stopped"), &gone);

    let mut gone = remove(record.files.iter())?;
    gone.extend(system::remove_folders(&record.folders));
    system::run("systemctl", &["daemon-reload"])?;
    // What is left of failures long ago.
    let _ = system::run("systemctl", &["reset-failed", &sidecar]);
    if record.makes_user && system::remove_user(&record.user)? {
        gone.push(format!("user {}", record.user));
    }
    for unit in record.enables.iter().filter(|_| last) {
        system::run("systemctl", &["disable", "--quiet", unit])?;
        gone.push(unit.clone());
    }
    steps.step("files", "what join made is gone", &gone);
    if let Apart::Slice(slice) = &record.settings.apart
        && system::service(unit).is_ok_and(|app| app.is_up())
    {
        note(&format!(
            "{unit} stays in {slice} until it is restarted, which makes no difference to its traffic"
        ));
    }
    records.forget(record)
}

fn folders(record: &Record, part: &str) -> Vec<std::path::PathBuf> {
    record.folders.iter().filter(|folder| folder.to_string_lossy().contains(part)).cloned().collect()
}

fn remove<'a>(files: impl Iterator<Item = &'a std::path::PathBuf>) -> Result<Vec<String>> {
    let mut gone = Vec::new();
    for path in files.collect::<Vec<_>>().into_iter().rev() {
        if system::remove(path)? {
            gone.push(path.display().to_string());
        }
    }
    Ok(gone)
}

async fn remove_redirect(record: &Record, unit: &str, last: bool) -> Result<Vec<String>> {
    let state = system::service(unit)?;
    if let Apart::Namespace(path) = &record.settings.apart {
        if state.is_up() {
            system::run("systemctl", &["stop", unit])?;
        }
        if path.exists() {
            let path = path.display().to_string();
            system::run("ursa-init", &["remove", "--netns", &path])?;
        }
        return Ok(Vec::new());
    }
    if !state.is_up() {
        if last && !holds_anything() {
            system::run("ursa-init", &["remove", "--host"])?;
        }
        return Ok(Vec::new());
    }
    system::run("systemctl", &["reload", unit])?;
    let file = record.redirect_status();
    let found = system::until(REDIRECT, async || match system::redirect_status(&file) {
        Some(status) if status.workloads.contains(&record.service) => {
            Err(format!("{unit} still redirects it"))
        }
        Some(status) if status.state == State::Failing => Err(status.message),
        _ => Ok(Some(())),
    })
    .await;
    found.map_err(|why| {
        HostError::new(format!(
            "the redirect isn't gone after {} s: {why}; `journalctl -u {unit}` tells more",
            REDIRECT.as_secs()
        ))
    })?;
    if holds_anything() {
        return Ok(Vec::new());
    }
    // Nothing is redirected any more, and at the next boot it wouldn't start.
    system::run("systemctl", &["stop", unit])?;
    system::run("ursa-init", &["remove", "--host"])?;
    Ok(vec![HOST_REDIRECT.to_owned()])
}

/// Whether anything of this machine is to be redirected.
fn holds_anything() -> bool {
    let parts = fs::read_dir("/etc/ursa/redirect.d").into_iter().flatten().flatten();
    let yaml = |path: &Path| path.extension().is_some_and(|kind| kind == "yaml" || kind == "yml");
    let hidden = |path: &Path| path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
    Path::new("/etc/ursa/redirect.yaml").exists()
        || parts.into_iter().map(|entry| entry.path()).any(|path| yaml(&path) && !hidden(&path))
}

/// The agent drains and stops it; where it doesn't, because it doesn't run, systemd does.
async fn wait_stopped(sidecar: &str, drain: Duration) -> Result<()> {
    let stopped = async |deadline| {
        system::until(deadline, async || match system::service(sidecar) {
            Ok(state) if matches!(state.active_state.as_str(), "inactive" | "failed") => Ok(Some(())),
            Ok(state) => Err(format!("it is {}", state.active_state)),
            Err(error) => Err(error.to_string()),
        })
        .await
    };
    if stopped(drain + Duration::from_secs(5)).await.is_ok() {
        return Ok(());
    }
    system::run("systemctl", &["stop", "--no-block", sidecar])?;
    stopped(STOP).await.map_err(|why| {
        HostError::new(format!("{sidecar} doesn't stop: {why}; `systemctl status {sidecar}` tells more"))
    })
}

fn forget_node(config: &AgentConfig, dry: bool) -> Result<()> {
    let dir = config.node_dir();
    let mut steps = Steps::new(dry);
    let there = dir.exists();
    if there && !dry {
        system::run("systemctl", &["stop", "ursa-agent.service"])?;
        fs::remove_dir_all(&dir)
            .map_err(|error| HostError::new(format!("can't remove {}: {error}", dir.display())))?;
    }
    let changed = if there { vec![dir.display().to_string()] } else { Vec::new() };
    steps.step(
        "node",
        "the node has no identity; `ursa node revoke` on the control plane ends what was issued to it",
        &changed,
    );
    Ok(())
}
