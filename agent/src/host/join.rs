//! `join --unit`: a service of this machine becomes part of a mesh.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use sha2::{Digest, Sha256};
use tokio::time::Instant;
use ursa_init::watch::State;
use ursa_wire::ticket::Ticket;

use super::facts::Service;
use super::options::JoinOptions;
use super::plan::{self, Facts, Files, HOST_REDIRECT};
use super::record::{self, Apart, Record, Records};
use super::show::{Steps, note, print};
use super::{HostError, Result, names, selftest, system};
use crate::agent::config::AgentConfig;
use crate::agent::node::NodeIdentity;
use crate::agent::socket::{Request, ask};
use crate::agent::status::{AgentStatus, Phase, WorkloadStatus};
use crate::relay::hex;

const SOCKET: &str = "ursa-agent.socket";
/// How long the rules may take until they are in place.
const REDIRECT: Duration = Duration::from_secs(30);
/// How long a sidecar may take until it is ready, identity and configuration included.
const READY: Duration = Duration::from_secs(90);

/// A ticket that was read, and its digest: the ticket itself stays nowhere.
struct GivenTicket {
    text: String,
    ticket: Ticket,
    digest: String,
}

fn read_ticket(text: &str) -> Result<GivenTicket> {
    let ticket: Ticket =
        text.trim().parse().map_err(|error: ursa_wire::ticket::TicketError| error.to_string())?;
    Ok(GivenTicket {
        digest: hex(&Sha256::digest(text.trim().as_bytes())),
        text: text.trim().to_owned(),
        ticket,
    })
}

/// Puts the service into the mesh. What was made before stays, and is gone on with. Without a ticket this node must have
/// joined before.
pub async fn join(
    config: &AgentConfig,
    ticket: Option<&str>,
    node_name: Option<String>,
    options: &JoinOptions,
) -> Result<()> {
    let ticket = ticket.map(read_ticket).transpose()?;
    system::check()?;
    let unit = options.unit.as_deref().unwrap_or_default();
    let service = names::service(unit)?;
    let dir = Path::new(record::DIR);
    let records = if options.dry_run { Records::look(dir) } else { Records::lock(dir)? };
    let known = records.all()?;
    let node = NodeIdentity::load(&config.node_dir()).map_err(|error| with_causes(&error))?;
    if ticket.is_none() && node.is_none() {
        return Err(HostError::new(
            "this node hasn't joined a control plane yet: `ursa ticket create --workload NAME` there (or `ursa up`) prints the \
             ticket that goes before --unit",
        ));
    }
    let envoy = config.envoy_binary()?;
    let app = system::service(&format!("{service}.service"))?;
    let control = ticket.as_ref().map(|given| given.ticket.address.clone());
    let control = control
        .or_else(|| config.control_plane.clone())
        .or_else(|| node.as_ref().map(|node| node.address.clone()));
    let services = system::services()?;
    let taken = system::taken_ports();
    let facts = Facts {
        app: &app,
        services: &services,
        uid: system::uid(&app.user),
        taken: &taken,
        records: &known,
        host: &config.node.clone().unwrap_or_else(system::host_name),
        address: control.as_deref().and_then(system::source_address),
        has_user: system::ids(&names::user(&service)).is_some(),
        config,
    };
    let mut record = plan::plan(options, &facts)?;
    let again = known.iter().any(|one| one.service == service);
    if !again {
        refuse_strange_files(&record)?;
        record.folders = system::missing_folders(record.files.iter().map(PathBuf::as_path));
        record.enables = [SOCKET, HOST_REDIRECT]
            .into_iter()
            .filter(|unit| *unit != HOST_REDIRECT || !matches!(record.settings.apart, Apart::Namespace(_)))
            .filter(|unit| !system::succeeds("systemctl", &["is-enabled", "--quiet", unit]))
            .map(str::to_owned)
            .collect();
    }
    let mut join =
        Join { config, records: &records, record, app, steps: Steps::new(options.dry_run), ticket };
    join.steps.step("service", &join.describe_service(), &[]);
    join.steps.step("envoy", &envoy.display().to_string(), &[]);
    if options.dry_run {
        join.show_plan(options, node.as_ref());
        return Ok(());
    }
    let outcome = join.make(options, node_name).await;
    let steps = &join.steps;
    match outcome {
        Ok(()) if steps.changes() == 0 => {
            print(&format!("{service}.service was in the mesh already; nothing changed"));
        }
        Ok(()) => {}
        Err(error) => {
            return Err(format!(
                "{error}\nwhat was made so far is on record: the same command goes on with it, and `ursa leave --unit \
                 {service}.service` takes it back"
            )
            .into());
        }
    }
    print(&format!("undo it with: ursa leave --unit {service}.service"));
    Ok(())
}

/// Files of these names that no record knows are somebody else's.
fn refuse_strange_files(record: &Record) -> Result<()> {
    match record.files.iter().find(|path| path.exists()) {
        None => Ok(()),
        Some(path) => Err(format!(
            "{} is there already, and no `ursa join` has made it; move it away (what it says may be worth keeping)",
            path.display()
        )
        .into()),
    }
}

struct Join<'a> {
    config: &'a AgentConfig,
    records: &'a Records,
    record: Record,
    app: Service,
    steps: Steps,
    ticket: Option<GivenTicket>,
}

impl Join<'_> {
    fn describe_service(&self) -> String {
        let unit = &self.record.settings.unit;
        match &self.record.settings.apart {
            Apart::Uid(uid) => {
                format!(
                    "{unit} runs as user {} (uid {uid}), as no other service does: told apart by that",
                    self.app.user
                )
            }
            Apart::Slice(slice) => format!("{unit} is told apart by its slice, {slice}"),
            Apart::Namespace(path) => {
                format!("{unit} has a network namespace of its own, {}", path.display())
            }
        }
    }

    /// Whether the service runs outside the slice that it is to be told apart by.
    fn must_move(&self) -> bool {
        matches!(&self.record.settings.apart, Apart::Slice(slice) if self.app.is_up() && self.app.slice != *slice)
    }

    fn show_plan(&mut self, options: &JoinOptions, node: Option<&NodeIdentity>) {
        let ids = system::ids(&self.record.user);
        let files = plan::files(&self.record, ids.unwrap_or(plan::Ids { uid: 0, gid: 0 }), self.config);
        // Without its user's number nothing of it can be there.
        let differs = |made: &plan::Made| {
            ids.is_none() || std::fs::read_to_string(&made.path).map_or(true, |text| text != made.text)
        };
        let changed = |all: &[&plan::Made]| -> Vec<String> {
            all.iter().filter(|made| differs(made)).map(|made| made.path.display().to_string()).collect()
        };
        let uses = self.ticket.as_ref().filter(|given| self.record.ticket.as_ref() != Some(&given.digest));
        let node_dir = uses.map(|_| self.config.node_dir().display().to_string());
        let joined = match (&uses, node) {
            (Some(given), _) => format!("joins the control plane at {}", given.ticket.address),
            (None, Some(node)) => describe_node(&node.zone, &node.node_id),
            (None, None) => "joined".to_owned(),
        };
        self.steps.step("node", &joined, &node_dir.into_iter().collect::<Vec<_>>());
        self.steps.step("user", &format!("{}, group ursa-proxy", self.record.user), &changed(&[&files.user]));
        let mut units: Vec<&plan::Made> = files.units.iter().collect();
        units.push(&files.app);
        self.steps.step("units", &self.describe_units(), &changed(&units));
        self.steps.step("redirect", &self.describe_redirect(), &changed(&[&files.redirect]));
        self.steps.step("workload", &self.describe_workload(), &changed(&[&files.workload]));
        let sidecar = self.record.sidecar();
        let starts = !system::service(&sidecar).is_ok_and(|unit| unit.is_up());
        let change =
            if starts && (self.app.is_up() || options.restart) { vec![sidecar.clone()] } else { Vec::new() };
        self.steps.step("sidecar", &format!("{sidecar} with Envoy"), &change);
        if options.restart || self.must_move() {
            let unit = self.record.settings.unit.clone();
            self.steps.step("restart", &format!("{unit} is restarted"), std::slice::from_ref(&unit));
        }
        match self.steps.changes() {
            0 => print("nothing would change"),
            _ => print(&format!(
                "nothing was changed; undo it later with: ursa leave --unit {}",
                self.record.settings.unit
            )),
        }
    }

    fn describe_units(&self) -> String {
        let limit = self.record.settings.memory_max.as_ref();
        let limit = limit.map_or_else(String::new, |limit| format!(", {limit} of memory at most"));
        format!("{} wants {}{limit}", self.record.settings.unit, self.record.sidecar())
    }

    fn describe_redirect(&self) -> String {
        let ports = self.record.ports;
        let port = self.record.settings.port;
        let mut text = format!(
            "what arrives at port {port} goes to Envoy ({}), and what the service opens ({}) and looks up ({})",
            ports.inbound, ports.outbound, ports.dns
        );
        if !matches!(self.record.settings.apart, Apart::Namespace(_)) {
            let ssh: Vec<_> = ursa_init::ssh::ports().ports.iter().map(ToString::to_string).collect();
            if !ssh.is_empty() {
                let _ = write!(text, "; sshd's port {} is left alone", ssh.join(", ")); // a String takes it
            }
        }
        text
    }

    fn describe_workload(&self) -> String {
        let settings = &self.record.settings;
        format!(
            "{} in mesh {}: Dataplane {}, {}:{} ({})",
            settings.workload,
            settings.mesh,
            settings.dataplane,
            settings.address,
            settings.port,
            settings.protocol.as_str()
        )
    }

    async fn make(&mut self, options: &JoinOptions, node_name: Option<String>) -> Result<()> {
        // Before anything is made.
        self.records.save(&self.record)?;
        self.join_node(node_name).await?;
        system::make_folders(&self.record.folders)?;
        let files = self.make_user()?;
        self.make_units(&files)?;
        self.make_redirect(&files).await?;
        let made = write_all(&[&files.workload])?;
        let text = self.describe_workload();
        self.steps.step("workload", &text, &made);
        self.start(options).await?;
        if !self.record.complete {
            self.record.complete = true;
            self.records.save(&self.record)?;
        }
        Ok(())
    }

    async fn join_node(&mut self, node_name: Option<String>) -> Result<()> {
        let mut changed = Vec::new();
        if self.record.enables.iter().any(|one| one == SOCKET)
            && !system::succeeds("systemctl", &["is-enabled", "--quiet", SOCKET])
        {
            system::run("systemctl", &["enable", "--quiet", SOCKET])?;
            changed.push(SOCKET.to_owned());
        }
        if !system::succeeds("systemctl", &["is-active", "--quiet", SOCKET]) {
            system::run("systemctl", &["start", SOCKET])?;
        }
        let socket = self.config.socket();
        let given = self.ticket.as_ref().filter(|given| self.record.ticket.as_ref() != Some(&given.digest));
        let text = if let Some(given) = given {
            let request = Request::Join { ticket: given.text.clone(), name: node_name };
            let reply = ask(&socket, &request).await?;
            let get = |key: &str| reply.get(key).and_then(|value| value.as_str()).unwrap_or("?").to_owned();
            changed.push(self.config.node_dir().display().to_string());
            let text = format!(
                "{}, by the control plane at {}",
                describe_node(&get("zone"), &get("nodeId")),
                given.ticket.address
            );
            self.record.ticket = Some(given.digest.clone());
            self.records.save(&self.record)?;
            text
        } else {
            let status = status(self.config).await?;
            let id = status.node_id.ok_or_else(|| {
                HostError::new("the running agent has no identity, although one is on this disk; `systemctl restart ursa-agent`")
            })?;
            describe_node(status.zone.as_deref().unwrap_or("?"), &id)
        };
        self.steps.step("node", &text, &changed);
        Ok(())
    }

    fn make_user(&mut self) -> Result<Files> {
        // The file is the same whatever number the user gets.
        let any = plan::files(&self.record, plan::Ids { uid: 0, gid: 0 }, self.config);
        let mut changed = write_all(&[&any.user])?;
        let was = system::ids(&self.record.user);
        let ids = system::make_user(&any.user.path, &self.record.user)?;
        if was.is_none() {
            changed.push(format!("user {}", self.record.user));
        }
        self.steps.step(
            "user",
            &format!("{} (uid {}), group ursa-proxy", self.record.user, ids.uid),
            &changed,
        );
        Ok(plan::files(&self.record, ids, self.config))
    }

    fn make_units(&mut self, files: &Files) -> Result<()> {
        let mut all: Vec<&plan::Made> = files.units.iter().collect();
        all.push(&files.app);
        let changed = write_all(&all)?;
        if !changed.is_empty() || !self.record.complete {
            system::run("systemctl", &["daemon-reload"])?;
        }
        let text = self.describe_units();
        self.steps.step("units", &text, &changed);
        Ok(())
    }

    async fn make_redirect(&mut self, files: &Files) -> Result<()> {
        let mut changed = write_all(&[&files.redirect])?;
        let unit = self.record.redirect();
        if self.record.enables.contains(&unit)
            && !system::succeeds("systemctl", &["is-enabled", "--quiet", &unit])
        {
            system::run("systemctl", &["enable", "--quiet", &unit])?;
            changed.push(unit.clone());
        }
        let own = matches!(self.record.settings.apart, Apart::Namespace(_));
        let state = system::service(&unit)?;
        if own && !self.app.is_up() {
            // Nobody needs it yet, and systemd would stop it again.
            let text = self.describe_redirect();
            self.steps.step("redirect", &format!("{text}; from the service's start on"), &changed);
            return Ok(());
        }
        if !state.is_up() {
            system::run("systemctl", &["start", &unit])?;
            changed.push(unit.clone());
        } else if !changed.is_empty() || !self.record.complete {
            system::run("systemctl", &["reload", &unit])?;
        }
        let file = self.record.redirect_status();
        let (service, part) = (self.record.service.clone(), files.redirect.path.display().to_string());
        let found = system::until(REDIRECT, async || {
            let pid = system::service(&unit).map_err(|error| error.to_string())?.main_pid;
            let Some(status) = system::redirect_status(&file) else {
                return Err(format!("{unit} says nothing in {}", file.display()));
            };
            if status.pid != pid {
                return Err(format!("{} is of another run", file.display()));
            }
            if status.left_out.iter().any(|why| why.contains(&part)) {
                return Err(status.left_out.join("; "));
            }
            let listed = own || status.workloads.contains(&service);
            if listed && status.state == State::InPlace {
                return Ok(Some(()));
            }
            Err(if status.message.is_empty() {
                format!("{unit} is in state {:?} and redirects {:?}", status.state, status.workloads)
            } else {
                status.message
            })
        })
        .await;
        found.map_err(|why| {
            HostError::new(format!(
                "the redirect isn't in place after {} s: {why}; `journalctl -u {unit}` tells more",
                REDIRECT.as_secs()
            ))
        })?;
        let text = self.describe_redirect();
        self.steps.step("redirect", &text, &changed);
        Ok(())
    }

    async fn start(&mut self, options: &JoinOptions) -> Result<()> {
        let unit = self.record.settings.unit.clone();
        let sidecar = self.record.sidecar();
        let moves = self.must_move();
        if !self.app.is_up() && !options.restart {
            self.steps.step("sidecar", &format!("{sidecar} starts with {unit}, which doesn't run now"), &[]);
            note(&format!(
                "`systemctl start {unit}`, then this command again: it tests the way through the mesh"
            ));
            return Ok(());
        }
        let began = Instant::now();
        let mut changed = Vec::new();
        if !system::service(&sidecar)?.is_up() {
            system::run("systemctl", &["start", "--no-block", &sidecar])?;
            changed.push(sidecar.clone());
        }
        if self.app.is_up() {
            let workload = self.wait_ready().await?;
            self.show_ready(&workload, began, &changed);
            changed.clear();
        }
        if options.restart || moves {
            system::run("systemctl", &["restart", &unit])?;
            let why = if moves { "it runs in its slice now" } else { "as --restart says" };
            self.steps.step("restart", &format!("{unit} was restarted: {why}"), std::slice::from_ref(&unit));
            if !self.app.is_up() {
                let workload = self.wait_ready().await?;
                self.show_ready(&workload, began, &changed);
            }
        } else {
            note(&format!(
                "{unit} runs on, since {}: connections that it had before go past the mesh until they end (--restart ends them)",
                self.app.since
            ));
        }
        let tested = selftest::run(self.config, &self.record, &self.app).await?;
        for line in tested {
            self.steps.step("self-test", &line, &[]);
        }
        Ok(())
    }

    fn show_ready(&mut self, workload: &WorkloadStatus, began: Instant, changed: &[String]) {
        let seconds = began.elapsed().as_secs_f32();
        let took = if changed.is_empty() { String::new() } else { format!(" after {seconds:.1} s") };
        let pid = workload.envoy.pid.map_or_else(String::new, |pid| format!(", Envoy's pid is {pid}"));
        let id = workload.certificate.as_ref().map_or("no certificate", |leaf| leaf.spiffe_id.as_str());
        self.steps.step("sidecar", &format!("{} is ready{took}{pid}: {id}", self.record.sidecar()), changed);
    }

    async fn wait_ready(&self) -> Result<WorkloadStatus> {
        let found = system::until(READY, async || {
            let status = status(self.config).await.map_err(|error| error.to_string())?;
            if let Some(file) =
                status.broken_files.iter().find(|file| file.path.contains(&self.record.service))
            {
                return Err(format!("the agent can't use {}: {}", file.path, file.error));
            }
            let Some(workload) = status.workloads.into_iter().find(|one| one.id == self.record.service)
            else {
                return Err("the agent hasn't seen its file yet".to_owned());
            };
            if workload.state == Phase::Ready {
                return Ok(Some(workload));
            }
            let why = workload.error.unwrap_or_else(|| match status.connection_error {
                Some(why) if !status.connected => format!("the control plane: {why}"),
                _ => workload.registration,
            });
            Err(format!("it is {}, {why}", workload.state.as_str()))
        })
        .await;
        found.map_err(|why| {
            HostError::new(format!(
                "the sidecar isn't ready after {} s: {why}; `ursa-agent status` and `systemctl status {}` tell more. It goes on \
                 trying; until then the service is closed to the mesh and to everybody else",
                READY.as_secs(),
                self.record.sidecar()
            ))
        })
    }
}

/// What the agent knows.
pub(super) async fn status(config: &AgentConfig) -> Result<AgentStatus> {
    let reply = ask(&config.socket(), &Request::Status).await?;
    let status = reply.get("status").cloned().unwrap_or_default();
    serde_json::from_value(status).map_err(|error| {
        HostError::new(format!(
            "the running agent is of another version ({error}); `systemctl restart ursa-agent`"
        ))
    })
}

/// An error with its causes, on one line.
pub(super) fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

/// Writes what isn't there yet, or differs.
fn write_all(files: &[&plan::Made]) -> Result<Vec<String>> {
    let mut changed = Vec::new();
    for file in files {
        if system::write(file)? {
            changed.push(file.path.display().to_string());
        }
    }
    Ok(changed)
}

fn describe_node(zone: &str, id: &str) -> String {
    format!("node {id} of zone {zone}")
}
