//! From what the operator says and what the machine is to what is to be made, or why it can't be. Touches nothing.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use super::facts::Service;
use super::names::{self, SidecarPorts};
use super::options::JoinOptions;
use super::record::{Apart, Record, Settings};
use super::{HostError, Result};
use crate::agent::config::AgentConfig;
use crate::agent::workload::{Origin, WorkloadSpec};

/// Where the package puts the shim.
const SHIM: &str = "/usr/libexec/ursa/ursa-shim";

/// The unit of the redirect of all that lives in the machine's own network namespace.
pub(super) const HOST_REDIRECT: &str = "ursa-redirect.service";
const VERSION: u32 = 1;
/// Stands for the sidecar's user and group until they exist.
const ANY: Ids = Ids { uid: 64_000, gid: 64_000 };

/// What the machine is, as far as it matters.
#[derive(Debug)]
pub(super) struct Facts<'a> {
    /// The service that is to join.
    pub(super) app: &'a Service,
    /// All services of the machine.
    pub(super) services: &'a [Service],
    /// The number of its user, if there is such a user.
    pub(super) uid: Option<u32>,
    /// Ports that somebody has bound.
    pub(super) taken: &'a BTreeSet<u16>,
    /// Services that have joined.
    pub(super) records: &'a [Record],
    /// The machine's name.
    pub(super) host: &'a str,
    /// From where it reaches the control plane.
    pub(super) address: Option<std::net::IpAddr>,
    /// Whether the sidecar's user exists.
    pub(super) has_user: bool,
    /// The agent's configuration.
    pub(super) config: &'a AgentConfig,
}

/// The numbers of a sidecar's user and of its group.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ids {
    pub(super) uid: u32,
    pub(super) gid: u32,
}

/// A file that join makes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Made {
    pub(super) path: PathBuf,
    pub(super) text: String,
}

/// All files of a joined service, by what they are for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Files {
    /// Who the sidecar runs as.
    pub(super) user: Made,
    /// What differs between sidecars; and, in a namespace of its own, between redirects.
    pub(super) units: Vec<Made>,
    /// The workload's part of the redirect.
    pub(super) redirect: Made,
    /// The workload.
    pub(super) workload: Made,
    /// The service's own drop-in.
    pub(super) app: Made,
}

impl Files {
    /// In the order in which they are made.
    pub(super) fn all(&self) -> impl Iterator<Item = &Made> {
        [&self.user].into_iter().chain(&self.units).chain([&self.redirect, &self.workload, &self.app])
    }
}

/// What join has to make: the record that it writes first. An existing one is taken up again.
pub(super) fn plan(options: &JoinOptions, facts: &Facts<'_>) -> Result<Record> {
    let unit = options.unit.as_deref().unwrap_or_default();
    let service = names::service(unit)?;
    let known = facts.records.iter().find(|record| record.service == service);
    check_unit(facts.app, &service)?;
    let others: Vec<&Record> = facts.records.iter().filter(|record| record.service != service).collect();
    let settings = settings(options, facts, &service, known)?;
    if let Some(known) = known {
        same(&known.settings, &settings)?;
        return Ok(known.clone());
    }
    if let Some(other) = others.iter().find(|other| {
        (&other.settings.mesh, &other.settings.dataplane) == (&settings.mesh, &settings.dataplane)
    }) {
        return Err(format!(
            "the Dataplane {} in mesh {} is {}'s already; name another one by --dataplane",
            settings.dataplane, settings.mesh, other.settings.unit
        )
        .into());
    }
    let in_host = !matches!(settings.apart, Apart::Namespace(_));
    if in_host
        && let Some(other) = others.iter().find(|other| {
            !matches!(other.settings.apart, Apart::Namespace(_)) && other.settings.port == settings.port
        })
    {
        return Err(format!(
            "port {} is {}'s already, which has joined with it; name the port on which {unit} itself listens",
            settings.port, other.settings.unit
        )
        .into());
    }
    let ports = if in_host {
        let mut taken = facts.taken.clone();
        taken.insert(settings.port);
        taken.extend(others.iter().flat_map(|other| other.ports.all()));
        SidecarPorts::free(&taken)?
    } else {
        SidecarPorts::ALONE
    };
    let mut record = Record {
        version: VERSION,
        user: names::user(&service),
        makes_user: !facts.has_user,
        service,
        settings,
        ports,
        folders: Vec::new(),
        files: Vec::new(),
        enables: Vec::new(),
        ticket: None,
        complete: false,
    };
    let files = files(&record, ANY, facts.config);
    record.files = files.all().map(|file| file.path.clone()).collect();
    check_files(&files, facts.config)?;
    Ok(record)
}

fn check_unit(app: &Service, service: &str) -> Result<()> {
    match app.load_state.as_str() {
        "loaded" => {}
        "not-found" | "" => {
            return Err(format!(
                "systemd knows no {service}.service; name the unit that runs your service (`systemctl list-units \
                 --type=service`)"
            )
            .into());
        }
        "masked" => {
            return Err(format!("{service}.service is masked; `systemctl unmask {service}` first").into());
        }
        other => {
            return Err(format!(
                "systemd can't load {service}.service ({other}); `systemctl status {service}` says why"
            )
            .into());
        }
    }
    if app.id != format!("{service}.service") {
        return Err(format!("{service}.service is an alias; name the unit itself: --unit {}", app.id).into());
    }
    if app.private_network && app.netns.is_empty() {
        return Err(format!(
            "{service}.service has PrivateNetwork=yes: a namespace that nobody else can enter and that reaches nothing. Give \
             it one with a name (`NetworkNamespacePath=/run/netns/{service}`), or take that setting out"
        )
        .into());
    }
    Ok(())
}

fn settings(
    options: &JoinOptions,
    facts: &Facts<'_>,
    service: &str,
    known: Option<&Record>,
) -> Result<Settings> {
    // What a second join doesn't say is what the first one said.
    let before = known.map(|record| &record.settings);
    let port = options.port.or_else(|| before.map(|before| before.port)).ok_or_else(|| {
        HostError::new(format!(
            "on which port does {service}.service listen? say --port (`ss -lntp` shows who listens where)"
        ))
    })?;
    let workload = options.workload.clone().or_else(|| before.map(|before| before.workload.clone()));
    let workload = workload.unwrap_or_else(|| service.to_owned());
    let address = options.address.map(|address| address.to_string());
    let address = address
        .or_else(|| before.map(|before| before.address.clone()))
        .or_else(|| facts.address.map(|address| address.to_string()))
        .ok_or_else(|| {
            HostError::new("no address of this machine reaches the control plane; say at which one others reach the service by --address")
        })?;
    let memory_max =
        options.memory_max.clone().or_else(|| before.and_then(|before| before.memory_max.clone()));
    if let Some(limit) = &memory_max {
        let digits = limit.trim_end_matches(['K', 'M', 'G', 'T']);
        if digits.is_empty() || digits.len() + 1 < limit.len() || !digits.chars().all(|c| c.is_ascii_digit())
        {
            return Err(
                format!("--memory-max {limit}: a number of bytes with K, M, G or T, as in 256M").into()
            );
        }
    }
    let dataplane = options.dataplane.clone().or_else(|| before.map(|before| before.dataplane.clone()));
    Ok(Settings {
        unit: format!("{service}.service"),
        port,
        protocol: options.protocol.or_else(|| before.map(|before| before.protocol)).unwrap_or_default(),
        mesh: options
            .mesh
            .clone()
            .or_else(|| before.map(|before| before.mesh.clone()))
            .unwrap_or_else(|| "default".to_owned()),
        dataplane: dataplane.unwrap_or_else(|| names::dataplane(&workload, facts.host)),
        workload,
        address,
        memory_max,
        apart: match before {
            // Its slice is in force by now: systemd would say that it has one.
            Some(before) if options.slice || matches!(before.apart, Apart::Slice(_)) => before.apart.clone(),
            _ => tell_apart(options, facts, service)?,
        },
    })
}

/// By what the service's traffic can be told from all else on the machine.
fn tell_apart(options: &JoinOptions, facts: &Facts<'_>, service: &str) -> Result<Apart> {
    let app = facts.app;
    if !app.netns.is_empty() {
        return Ok(Apart::Namespace(PathBuf::from(&app.netns)));
    }
    if options.slice {
        return Ok(Apart::Slice(names::slice(service)));
    }
    let offer = || {
        let port = options.port.map_or_else(|| "PORT".to_owned(), |port| port.to_string());
        let restart = if app.is_up() { format!(", which restarts {service}.service") } else { String::new() };
        format!(
            "Give it a slice of its own{restart}: `ursa join TICKET --unit {service}.service --port {port} --slice`"
        )
    };
    let why = if app.dynamic_user {
        format!("{service}.service has DynamicUser=yes: its user is another one after each start")
    } else if app.user.is_empty() || facts.uid == Some(0) {
        format!("{service}.service runs as root, and so does half of this machine")
    } else if let Some(uid) = facts.uid {
        let shares = facts.services.iter().find(|other| {
            other.id != app.id
                && !other.dynamic_user
                && (other.user == app.user || other.user == uid.to_string())
        });
        match shares {
            None => return Ok(Apart::Uid(uid)),
            Some(other) => {
                format!("{service}.service runs as user {}, and so does {}", app.user, other.id)
            }
        }
    } else {
        return Err(format!(
            "{service}.service runs as user {}, and there is no such user; make it, or correct User=",
            app.user
        )
        .into());
    };
    Err(format!("{why}; nothing tells their traffic apart. {}", offer()).into())
}

/// A second join may say the same again.
fn same(before: &Settings, now: &Settings) -> Result<()> {
    let differences = [
        ("--port", before.port == now.port, before.port.to_string()),
        ("--protocol", before.protocol == now.protocol, before.protocol.as_str().to_owned()),
        ("--mesh", before.mesh == now.mesh, before.mesh.clone()),
        ("--workload", before.workload == now.workload, before.workload.clone()),
        ("--dataplane", before.dataplane == now.dataplane, before.dataplane.clone()),
        ("--address", before.address == now.address, before.address.clone()),
        ("--memory-max", before.memory_max == now.memory_max, before.memory_max.clone().unwrap_or_default()),
        ("what tells it apart", before.apart == now.apart, format!("{:?}", before.apart)),
    ];
    let different: Vec<_> = differences
        .iter()
        .filter(|(_, same, _)| !same)
        .map(|(what, _, was)| format!("{what} (it was {was})"))
        .collect();
    if different.is_empty() {
        return Ok(());
    }
    Err(format!(
        "{unit} has joined already, with another {}; `ursa leave --unit {unit}` first, or say the same",
        different.join(", "),
        unit = before.unit
    )
    .into())
}

/// The files as they will be read: mistakes show before anything is made.
fn check_files(files: &Files, config: &AgentConfig) -> Result<()> {
    let origin = Origin::File(files.workload.path.display().to_string());
    WorkloadSpec::from_yaml(&files.workload.text, origin, config)
        .map_err(|error| HostError::new(format!("the workload would be wrong: {error}")))?;
    Ok(())
}

/// Everything that join writes for a service whose sidecar has these ids.
pub(super) fn files(record: &Record, ids: Ids, config: &AgentConfig) -> Files {
    let service = &record.service;
    let units = Path::new("/etc/systemd/system");
    let file = |path: PathBuf, text: &str| Made { path, text: format!("{}{text}", head(record)) };
    let netns = match &record.settings.apart {
        Apart::Namespace(path) => Some(format!("NetworkNamespacePath={}\n", path.display())),
        Apart::Uid(_) | Apart::Slice(_) => None,
    };
    let mut sidecar = String::new();
    if netns.is_some() {
        // As weak as the template's own: a restart of the redirect must not take the service with it.
        let _ = write!(sidecar, "[Unit]\nWants={0}\nAfter={0}\n\n", record.redirect());
    }
    let _ = write!(sidecar, "[Service]\nUser={}\n{}", record.user, netns.as_deref().unwrap_or_default());
    if let Some(limit) = &record.settings.memory_max {
        let _ = writeln!(sidecar, "MemoryMax={limit}");
    }
    let mut drop_ins = vec![file(units.join(format!("{}.d/10-ursa.conf", record.sidecar())), &sidecar)];
    if let Some(netns) = &netns {
        let path = units.join(format!("{}.d/10-ursa.conf", record.redirect()));
        drop_ins.push(file(path, &format!("[Service]\n{netns}")));
    }
    // Callers are sent elsewhere before it stops, and come back when it starts, because its sidecar runs on meanwhile. As
    // root (+), who may always ask the sidecar, and whatever comes of it (-) the service's own matter goes on.
    let mut app = format!(
        "[Unit]\nWants={0}\nAfter={0}\n\n[Service]\nExecStartPre=+-{SHIM} resume --service {service}\n\
         ExecStop=+-{SHIM} drain --service {service}\n",
        record.sidecar()
    );
    if let Apart::Slice(slice) = &record.settings.apart {
        let _ = writeln!(app, "Slice={slice}");
    }
    let user = format!("u {} -:ursa-proxy \"Sidecar of {}\" / -\n", record.user, record.settings.unit);
    let redirect = match netns {
        None => format!("/etc/ursa/redirect.d/{service}.yaml"),
        Some(_) => format!("/etc/ursa/redirect.netns.d/{service}.yaml"),
    };
    Files {
        user: file(format!("/etc/sysusers.d/ursa-{service}.conf").into(), &user),
        units: drop_ins,
        redirect: file(redirect.into(), &redirect_text(record, ids)),
        workload: file(config.workloads_dir.join(format!("{service}.yaml")), &workload_text(record, ids)),
        app: file(units.join(format!("{}.d/50-ursa.conf", record.settings.unit)), &app),
    }
}

fn head(record: &Record) -> String {
    let unit = &record.settings.unit;
    format!("# Made by `ursa join --unit {unit}`; `ursa leave --unit {unit}` removes it.\n")
}

/// Who the service is, as redirect and workload say it.
fn who(apart: &Apart) -> String {
    match apart {
        Apart::Uid(uid) => format!("uids: [{uid}]\n"),
        Apart::Slice(slice) => format!("slices: [ursa.slice/{slice}]\n"),
        Apart::Namespace(_) => String::new(),
    }
}

fn redirect_text(record: &Record, ids: Ids) -> String {
    let SidecarPorts { inbound, outbound, dns } = record.ports;
    let named = match record.settings.apart {
        Apart::Namespace(_) => String::new(),
        Apart::Uid(_) | Apart::Slice(_) => format!("name: {}\n", record.service),
    };
    format!(
        "{named}{}proxyUids: [{}]\ninbound: {{port: {inbound}, includePorts: [{}]}}\noutbound: {{port: {outbound}}}\ndns: \
         {{port: {dns}}}\n",
        who(&record.settings.apart),
        ids.uid,
        record.settings.port
    )
}

fn workload_text(record: &Record, ids: Ids) -> String {
    let Settings { unit, port, protocol, mesh, workload, dataplane, address, apart, .. } = &record.settings;
    let SidecarPorts { inbound, outbound, dns } = record.ports;
    let place = match apart {
        Apart::Namespace(path) => format!("netns: {}\n", path.display()),
        other => who(other),
    };
    format!(
        "type: Dataplane\nmesh: {mesh}\nname: {dataplane}\nlabels:\n  kuma.io/workload: {workload}\nnetworking:\n  address: \
         '{address}'\n  inbound:\n    - {{name: main, port: {port}, protocol: {protocol}}}\nursa:\n  unit: {unit}\n  \
         proxyUid: {uid}\n  proxyGid: {gid}\n  {place}  redirect:\n    inbound: {{port: {inbound}, includePorts: \
         [{port}]}}\n    outbound: {{port: {outbound}}}\n    dns: {{port: {dns}}}\n",
        protocol = protocol.as_str(),
        uid = ids.uid,
        gid = ids.gid,
    )
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
