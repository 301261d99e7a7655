//! `doctor`: what is wrong with this machine's part of the mesh, for people and for monitoring.

use std::path::Path;
use std::time::Duration;

use serde::Serialize;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc2822;
use tonic::client::GrpcService;
use ursa_init::watch::State;

use super::options::DoctorOptions;
use super::record::{self, Record, Records};
use super::show::print;
use super::{Result, join, selftest, system};
use crate::agent::config::AgentConfig;
use crate::agent::node::NodeIdentity;
use crate::agent::status::{AgentStatus, Phase, WorkloadStatus};
use crate::relay::Source;
use crate::shim::client::ShimClient;

/// How far the clocks of node and control plane may be apart: certificates begin a few minutes early for that.
const CLOCK: i64 = 60;
/// Less free space than this is too little for keys and last-good configurations.
const SPACE: u64 = 64 << 20;
const ANSWER: Duration = Duration::from_secs(5);
const VERSION: &str = env!("CARGO_PKG_VERSION");

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
enum Level {
    /// As it should be.
    Ok,
    /// It works, and the operator should know.
    Note,
    /// It doesn't work.
    Wrong,
}

/// What was found about a thing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Finding {
    level: Level,
    about: String,
    text: String,
}

#[derive(Debug, Default)]
struct Findings(Vec<Finding>);

impl Findings {
    fn add(&mut self, level: Level, about: &str, text: impl Into<String>) {
        self.0.push(Finding { level, about: about.to_owned(), text: text.into() });
    }

    /// The first text if `good`, else the second as `level`.
    fn judge(
        &mut self,
        good: bool,
        about: &str,
        then: impl Into<String>,
        level: Level,
        or: impl Into<String>,
    ) {
        if good { self.add(Level::Ok, about, then) } else { self.add(level, about, or) }
    }

    fn worst(&self) -> Level {
        self.0.iter().map(|finding| finding.level).max().unwrap_or(Level::Ok)
    }
}

/// Looks at everything; whether nothing is wrong.
pub async fn doctor(config: &AgentConfig, options: &DoctorOptions) -> Result<bool> {
    let mut findings = Findings::default();
    let now = OffsetDateTime::now_utc().unix_timestamp();
    let records = Records::look(Path::new(record::DIR)).all();
    let records = records.unwrap_or_else(|error| {
        findings.add(Level::Wrong, "records", error.to_string());
        Vec::new()
    });
    let status = match join::status(config).await {
        Ok(status) => Some(status),
        Err(error) => {
            findings.add(Level::Wrong, "agent", error.to_string());
            None
        }
    };
    if let Some(status) = &status {
        agent(&mut findings, status, now);
    }
    if crate::systemd::is_booted() {
        units(&mut findings, &records);
    }
    match config.envoy_binary() {
        Ok(envoy) => findings.add(Level::Ok, "envoy", envoy.display().to_string()),
        Err(why) => findings.add(Level::Wrong, "envoy", why),
    }
    clock(&mut findings, config).await;
    disk(&mut findings, &config.state_dir);
    for record in &records {
        service(&mut findings, record, status.as_ref());
    }
    for workload in status.iter().flat_map(|status| &status.workloads) {
        self::workload(&mut findings, workload, now);
        shim(&mut findings, workload).await;
    }
    let good = findings.worst() < Level::Wrong;
    if options.json {
        let all =
            serde_json::json!({ "ok": good, "version": VERSION, "findings": findings.0, "agent": status });
        print(&serde_json::to_string_pretty(&all).map_err(|error| error.to_string())?);
        return Ok(good);
    }
    for Finding { level, about, text } in &findings.0 {
        let word = match level {
            Level::Ok => "ok",
            Level::Note => "note",
            Level::Wrong => "WRONG",
        };
        print(&format!("{word:<6}{about}: {text}"));
    }
    Ok(good)
}

fn agent(findings: &mut Findings, status: &AgentStatus, now: i64) {
    findings.judge(
        status.version == VERSION,
        "agent",
        format!("version {}, pid {}", status.version, status.pid),
        Level::Note,
        format!(
            "it runs version {}, and {VERSION} is installed; `systemctl restart ursa-agent`",
            status.version
        ),
    );
    match (&status.node_id, status.node_certificate_until) {
        (None, _) => {
            findings.add(Level::Wrong, "node", "it hasn't joined a control plane; `ursa join TICKET`");
        }
        (Some(id), Some(until)) if until <= now => {
            let text = format!(
                "the certificate of node {id} has expired; `ursa join TICKET` with a new ticket renews it"
            );
            findings.add(Level::Wrong, "node", text);
        }
        (Some(id), _) => {
            findings.add(
                Level::Ok,
                "node",
                format!("{id} in zone {}", status.zone.as_deref().unwrap_or("?")),
            );
        }
    }
    let control = status.control_plane.as_deref().unwrap_or("unknown");
    findings.judge(
        status.connected,
        "control plane",
        format!("{control}, connected"),
        Level::Wrong,
        format!(
            "{control}, not connected: {}; what runs goes on with its last configuration",
            status.connection_error.as_deref().unwrap_or("not tried yet")
        ),
    );
    for file in &status.broken_files {
        findings.add(Level::Wrong, &file.path, file.error.clone());
    }
}

/// What the packages and `join` should have set up.
fn units(findings: &mut Findings, records: &[Record]) {
    let enabled = |unit: &str| system::succeeds("systemctl", &["is-enabled", "--quiet", unit]);
    let Ok(agent) = system::service("ursa-agent.service") else { return };
    if agent.load_state != "loaded" || agent.user.is_empty() {
        return; // an agent that isn't the packages', and needs none of this
    }
    let socket = enabled("ursa-agent.socket");
    let missing = "isn't enabled: at the next boot nobody would start it; `systemctl enable --now";
    let or = format!("ursa-agent.socket {missing} ursa-agent.socket`");
    findings.judge(socket, "units", "ursa-agent.socket is enabled", Level::Wrong, or);
    let needs = records.iter().any(|record| record.redirect() == super::plan::HOST_REDIRECT);
    if needs {
        let or = format!("ursa-redirect.service {missing} ursa-redirect.service`");
        findings.judge(
            enabled("ursa-redirect.service"),
            "units",
            "ursa-redirect.service is enabled",
            Level::Wrong,
            or,
        );
    }
    if agent.main_pid == 0 {
        return;
    }
    let pid = agent.main_pid.to_string();
    let asked = system::run(
        "pkcheck",
        &[
            "--action-id",
            "org.freedesktop.systemd1.manage-units",
            "--process",
            &pid,
            "--detail",
            "unit",
            "ursa-sidecar@doctor.service",
            "--detail",
            "verb",
            "start",
        ],
    );
    match asked {
        Ok(_) => findings.add(Level::Ok, "polkit", "the agent may start sidecars"),
        Err(error) => {
            let text = format!(
                "the agent may not start sidecars; is the polkit rule of ursa-agent installed? {error}"
            );
            findings.add(Level::Wrong, "polkit", text);
        }
    }
}

/// The clock against the control plane's, by the date that its answers carry.
async fn clock(findings: &mut Findings, config: &AgentConfig) {
    let Ok(Some(node)) = NodeIdentity::load(&config.node_dir()) else { return };
    let asked = async {
        let mut channel = node.channel(config.control_plane.as_deref()).map_err(|error| error.to_string())?;
        let request = http::Request::post("/ursa.v1.Join/Clock")
            .header("content-type", "application/grpc")
            .body(tonic::body::Body::empty())
            .map_err(|error| error.to_string())?;
        let ready = std::future::poll_fn(|context| {
            GrpcService::<tonic::body::Body>::poll_ready(&mut channel, context)
        });
        ready.await.map_err(|error| error.to_string())?;
        let answer = GrpcService::call(&mut channel, request).await.map_err(|error| error.to_string())?;
        let date = answer.headers().get("date").and_then(|date| date.to_str().ok()).map(str::to_owned);
        date.ok_or_else(|| "its answer carries no date".to_owned())
    };
    let found = tokio::time::timeout(ANSWER, asked).await.unwrap_or_else(|_| Err("no answer".to_owned()));
    let now = OffsetDateTime::now_utc();
    match found.map(|date| (OffsetDateTime::parse(&date.replace("GMT", "+0000"), &Rfc2822), date)) {
        Ok((Ok(theirs), _)) => {
            let offset = (now - theirs).whole_seconds();
            let text = match offset {
                -1..=1 => "the same as the control plane's".to_owned(),
                ahead @ 2.. => format!("{ahead} s ahead of the control plane's"),
                behind => format!("{} s behind the control plane's", -behind),
            };
            let or =
                format!("{text}: certificates may seem expired or not begun; set the clocks (`timedatectl`)");
            findings.judge(offset.abs() <= CLOCK, "clock", text.clone(), Level::Wrong, or);
        }
        Ok((Err(error), date)) => findings.add(Level::Note, "clock", format!("no date in {date}: {error}")),
        Err(why) => {
            findings.add(Level::Note, "clock", format!("can't be compared with the control plane's: {why}"));
        }
    }
}

fn disk(findings: &mut Findings, dir: &Path) {
    let Some((bytes, inodes)) = system::free_space(dir) else { return };
    let text = format!("{} MiB free in {}", bytes >> 20, dir.display());
    let or = format!(
        "{text} ({inodes} % of files): keys and last-good configurations can't be kept; make room there"
    );
    findings.judge(bytes >= SPACE && inodes > 0, "disk", text.clone(), Level::Wrong, or);
}

/// A joined service, by its record.
fn service(findings: &mut Findings, record: &Record, status: Option<&AgentStatus>) {
    let unit = &record.settings.unit;
    if !record.complete {
        let text = format!(
            "its join was interrupted; the same `ursa join --unit {unit} …` goes on with it, `ursa leave --unit {unit}` undoes it"
        );
        findings.add(Level::Wrong, unit, text);
    }
    if let Some(path) = record.files.iter().find(|path| !path.exists()) {
        let text = format!(
            "{} is missing, which join had made; `ursa join --unit {unit}` makes it again",
            path.display()
        );
        findings.add(Level::Wrong, unit, text);
    }
    let app = system::service(unit).unwrap_or_default();
    let sidecar = system::service(&record.sidecar()).unwrap_or_default();
    let states = format!(
        "{} (pid {}), {} {} (pid {})",
        app.active_state,
        app.main_pid,
        record.sidecar(),
        sidecar.active_state,
        sidecar.main_pid
    );
    let good = app.is_up() == sidecar.is_up();
    let or = format!("{states}: `systemctl status {}` tells why", record.sidecar());
    findings.judge(good, unit, states.clone(), Level::Wrong, or);
    if status.is_some_and(|status| !status.workloads.iter().any(|one| one.id == record.service))
        && app.is_up()
    {
        findings.add(Level::Wrong, unit, "the agent knows nothing of it, though it has joined".to_owned());
    }
    redirect(findings, record, app.is_up());
}

fn redirect(findings: &mut Findings, record: &Record, runs: bool) {
    let (about, unit) = (format!("{} redirect", record.settings.unit), record.redirect());
    let own = unit != super::plan::HOST_REDIRECT;
    let pid = system::service(&unit).map(|unit| unit.main_pid).unwrap_or_default();
    if own && !runs && pid == 0 {
        return; // it comes with the service
    }
    let Some(status) = system::redirect_status(&record.redirect_status()).filter(|status| status.pid == pid)
    else {
        let text = format!("{unit} doesn't watch it; `systemctl status {unit}` tells why");
        findings.add(Level::Wrong, &about, text);
        return;
    };
    let repaired = match status.repairs {
        0 => String::new(),
        times => format!(", put back {times} times after others had changed it"),
    };
    let message = if status.message.is_empty() { String::new() } else { format!(": {}", status.message) };
    let listed = own || status.workloads.contains(&record.service);
    match (status.state, listed) {
        (State::InPlace, true) => findings.add(Level::Ok, &about, format!("in place{repaired}{message}")),
        (State::Fighting, true) => {
            findings.add(Level::Wrong, &about, format!("somebody keeps changing it{repaired}{message}"));
        }
        _ => findings.add(
            Level::Wrong,
            &about,
            format!("NOT in place{repaired}{message}; {}", status.left_out.join("; ")),
        ),
    }
}

/// A workload, by what the agent says of it.
fn workload(findings: &mut Findings, workload: &WorkloadStatus, now: i64) {
    let name = format!("{}.{}", workload.mesh, workload.name);
    let state = workload.state.as_str();
    match &workload.error {
        None if workload.state == Phase::Ready => findings.add(Level::Ok, &name, state),
        Some(error) => findings.add(Level::Wrong, &name, format!("{state}: {error}")),
        None => {
            let text =
                format!("{state} for {} s; registration: {}", now - workload.since, workload.registration);
            findings.add(Level::Wrong, &name, text);
        }
    }
    match &workload.certificate {
        None => {
            let why = workload.certificate_error.as_deref().unwrap_or("control hasn't given any yet");
            findings.add(Level::Wrong, &name, format!("no certificate: {why}"));
        }
        Some(leaf) => {
            let text = format!(
                "{}, issued {} s ago, valid for {} s more",
                leaf.spiffe_id,
                now - leaf.issued_at,
                leaf.not_after - now
            );
            let level = if leaf.not_after <= now {
                Level::Wrong
            } else if leaf.is_overdue(now) {
                Level::Note
            } else {
                Level::Ok
            };
            let why = workload.certificate_error.as_ref().map_or_else(String::new, |why| format!(": {why}"));
            findings.add(level, &name, format!("{text}{why}"));
        }
    }
    match workload.config_source {
        Source::Live => findings.add(Level::Ok, &name, "configuration from the control plane"),
        Source::Disk => {
            findings.add(
                Level::Note,
                &name,
                "configuration from disk: the control plane hasn't answered since the start",
            );
        }
        Source::None => findings.add(Level::Wrong, &name, "no configuration yet"),
    }
    for rejection in &workload.rejections {
        let text = format!(
            "its Envoy refused {} (version {}): {}",
            rejection.name, rejection.version, rejection.message
        );
        findings.add(Level::Wrong, &name, text);
    }
    if let Some(error) = &workload.disk_error {
        findings.add(Level::Wrong, &name, error.clone());
    }
    let or = "no name of the mesh resolves".to_owned();
    findings.judge(workload.names > 0, &name, format!("{} names resolve", workload.names), Level::Note, or);
}

/// The shim's own version, where it is a unit's.
async fn shim(findings: &mut Findings, workload: &WorkloadStatus) {
    let dir = Path::new(selftest::RUN_DIR).join(&workload.id);
    if !dir.exists() {
        return;
    }
    let name = format!("{}.{}", workload.mesh, workload.name);
    match tokio::time::timeout(ANSWER, ShimClient::connect(&dir)).await {
        Ok(Ok(shim)) => {
            let (version, current) = (&shim.hello().version, !shim.hello().outdated);
            let or = format!(
                "its shim is of version {version}: `systemctl reload {}` replaces it in place",
                crate::launcher::unit::unit_name(&workload.id)
            );
            findings.judge(
                version == VERSION && current,
                &name,
                format!("shim of version {version}"),
                Level::Note,
                or,
            );
        }
        Ok(Err(error)) => findings.add(Level::Wrong, &name, join::with_causes(&error)),
        Err(_) => findings.add(Level::Wrong, &name, "its shim doesn't answer"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::status::EnvoyReport;

    fn sound() -> WorkloadStatus {
        let json = serde_json::json!({
            "id": "web", "mesh": "default", "name": "web-1", "origin": "f", "state": "ready", "since": 1000, "error": null,
            "lastError": null, "registration": "registered", "shimPid": 7, "shimOrigin": "adopted",
            "envoy": EnvoyReport::default(), "certificate": {"secretName": "s", "spiffeId": "spiffe://m/workload/web",
            "generation": "g", "issuedAt": 1000, "renewAt": 2000, "notAfter": 3000}, "certificateError": null,
            "configSource": "live", "rejections": [], "names": 3, "diskError": null
        });
        serde_json::from_value(json).expect("a workload's status")
    }

    fn judged(edit: impl FnOnce(&mut WorkloadStatus), now: i64) -> Findings {
        let (mut one, mut findings) = (sound(), Findings::default());
        edit(&mut one);
        workload(&mut findings, &one, now);
        findings
    }

    #[test]
    fn what_is_wrong_with_a_workload_is_said() {
        let fine = judged(|_| {}, 1500);
        assert_eq!(fine.worst(), Level::Ok, "{fine:?}");
        assert_eq!(judged(|_| {}, 4000).worst(), Level::Wrong);
        assert_eq!(judged(|one| one.config_source = Source::Disk, 1500).worst(), Level::Note);
        assert_eq!(judged(|one| one.state = Phase::Live, 1500).worst(), Level::Wrong);
        let full = judged(|one| one.disk_error = Some("no space left".into()), 1500);
        assert!(full.worst() == Level::Wrong && format!("{full:?}").contains("no space left"));
        let none = judged(|one| one.certificate = None, 1500);
        assert!(none.worst() == Level::Wrong && format!("{none:?}").contains("no certificate"));
    }
}
