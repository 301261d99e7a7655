//! A control plane, nodes with agents, and workloads, as an operator sets them up.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context as _, bail};
use serde_json::{Value, json};

use super::daemon::{Daemon, Place};
use super::machine::Machine;
use super::net::Host;
use super::{Lab, Programs, wait};

/// The zone of every lab.
pub const ZONE: &str = "lab";
/// The port that workloads serve.
pub const PORT: u16 = 8080;
/// The user of the first workload's Envoy; the following count up, over all nodes of a lab: its namespaces share one
/// machine's users.
const PROXY_UID: u32 = 5678;

/// A control plane with the embedded store.
#[derive(Debug)]
pub struct Control {
    /// Its process.
    pub daemon: Daemon,
    /// Where it runs.
    pub host: Host,
    /// The operator's socket.
    pub socket: PathBuf,
    ursa: PathBuf,
}

impl Control {
    /// Starts it on a host of its own and waits until it serves.
    pub fn start(lab: &mut Lab) -> anyhow::Result<Self> {
        Self::start_with(lab, |_| {})
    }

    /// As [`Control::start`], with changes to its configuration.
    pub fn start_with(lab: &mut Lab, edit: impl FnOnce(&mut Value)) -> anyhow::Result<Self> {
        let host = lab.net.host("control")?;
        let dir = lab.dir().join("control");
        super::create_open(&dir)?;
        let socket = dir.join("control.sock");
        let mut config = json!({
            "mode": "zone",
            "general": {"workDir": dir},
            "store": {"type": "embedded", "embedded": {"path": dir.join("store.db")}},
            "apiServer": {"socket": socket, "http": {"interface": "127.0.0.1", "port": 5681}},
            "dpServer": {"interface": "0.0.0.0", "port": 5678, "publicAddress": format!("{}:5678", host.v4)},
            "multizone": {"zone": {"name": ZONE}},
        });
        edit(&mut config);
        let file = lab.dir().join("control.yaml");
        std::fs::write(&file, serde_json::to_string_pretty(&config)?)?;
        let args = vec!["run".into(), "--config".into(), file.display().to_string()];
        let daemon = Daemon::start(
            "ursa-control",
            &host,
            lab.programs.path("ursa-control"),
            args,
            Vec::new(),
            lab.log("control"),
        )?;
        let mut control = Self { daemon, host, socket, ursa: lab.programs.path("ursa") };
        control.wait_ready()?;
        Ok(control)
    }

    /// Waits until the API answers and the default mesh has its identity.
    pub fn wait_ready(&mut self) -> anyhow::Result<Duration> {
        let ((), took) = wait::until("the control plane to serve", Duration::from_secs(10), || {
            self.daemon.check()?;
            self.ursa(&["get", "mesh", "default"]).map(drop).map_err(|error| format!("{error:#}"))
        })?;
        Ok(took)
    }

    /// Starts it again after its death.
    pub fn restart(&mut self) -> anyhow::Result<Duration> {
        self.daemon.restart()?;
        self.wait_ready()
    }

    /// Runs the operator's CLI.
    pub fn ursa(&self, args: &[&str]) -> anyhow::Result<String> {
        self.ursa_with(args, "")
    }

    /// Runs the operator's CLI with this standard input.
    pub fn ursa_with(&self, args: &[&str], input: &str) -> anyhow::Result<String> {
        run(self.command().args(args), input)
    }

    /// The operator's CLI, still without a verb.
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.ursa);
        command.arg("--socket").arg(&self.socket);
        command
    }

    /// Applies resources.
    pub fn apply(&self, yaml: &str) -> anyhow::Result<String> {
        self.ursa_with(&["apply", "-f", "-"], yaml)
    }

    /// One resource.
    pub fn get(&self, kind: &str, name: &str) -> anyhow::Result<Value> {
        Ok(serde_json::from_str(&self.ursa(&["get", kind, name, "-o", "json"])?)?)
    }

    /// A ticket for a node that may run these workloads.
    pub fn ticket(&self, workloads: &[&str]) -> anyhow::Result<String> {
        let mut args = vec!["ticket", "create", "--mesh", "default", "--valid-for", "10m"];
        for workload in workloads {
            args.extend(["--workload", workload]);
        }
        Ok(self.ursa(&args)?.trim().to_owned())
    }
}

/// How a command ended, and what it said.
#[derive(Debug)]
pub struct Outcome {
    /// The exit code; none if it was killed.
    pub code: Option<i32>,
    /// What it printed.
    pub out: String,
    /// What it complained of.
    pub err: String,
}

/// Runs a command to its end; what it printed, or an error that quotes it.
pub fn run(command: &mut Command, input: &str) -> anyhow::Result<String> {
    let Outcome { code, out, err } = outcome(command, input)?;
    if code != Some(0) {
        bail!("{}{out}", err.trim());
    }
    Ok(out)
}

/// Runs a command to its end.
pub fn outcome(command: &mut Command, input: &str) -> anyhow::Result<Outcome> {
    use std::io::Write as _;
    super::daemon::without_settings(command);
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {command:?}"))?;
    if let Some(mut stdin) = child.stdin.take() {
        // A command that fails early doesn't read.
        let _ = stdin.write_all(input.as_bytes());
    }
    let output = child.wait_with_output()?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ok(Outcome { code: output.status.code(), out: text(&output.stdout), err: text(&output.stderr) })
}

/// `ursa join` on a machine; the ticket is its input.
pub fn ursa_join(programs: &Programs, host: &Host) -> Command {
    let mut command = Command::new("nsenter");
    command.arg(format!("--net={}", host.path().display())).arg(programs.path("ursa")).args(["join", "-"]);
    command
}

/// A machine with an agent.
#[derive(Debug)]
pub struct Node {
    /// Its name.
    pub name: String,
    /// Where the agent runs.
    pub host: Host,
    /// The agent's process.
    pub agent: Daemon,
    /// The agent's configuration file.
    pub config: PathBuf,
    dir: PathBuf,
    program: PathBuf,
    /// How many users the lab has given away.
    proxies: Arc<AtomicU32>,
}

/// A workload's place in the mesh.
#[derive(Debug, Clone)]
pub struct Workload {
    /// Its name, of the Dataplane as well.
    pub name: String,
    /// Where it runs.
    pub host: Host,
    /// The user of its Envoy.
    pub uid: u32,
}

impl Node {
    /// Joins a node with a ticket and starts its agent.
    pub fn join(lab: &mut Lab, name: &str, ticket: &str) -> anyhow::Result<Self> {
        let host = lab.net.host(name)?;
        let place = Place::from(&host);
        Self::start_in(lab, name, host, place, Some(ticket), |_| {})
    }

    /// Joins a machine with a ticket and starts its agent, with changes to the agent's configuration.
    pub fn join_on(
        lab: &Lab,
        machine: &Machine,
        name: &str,
        ticket: &str,
        edit: impl FnOnce(&mut Value),
    ) -> anyhow::Result<Self> {
        Self::start_in(lab, name, machine.host.clone(), machine.into(), Some(ticket), edit)
    }

    /// Starts an agent that hasn't joined.
    pub fn unjoined(lab: &mut Lab, name: &str) -> anyhow::Result<Self> {
        Self::unjoined_with(lab, name, |_| {})
    }

    /// Starts an agent that hasn't joined, with changes to its configuration.
    pub fn unjoined_with(lab: &mut Lab, name: &str, edit: impl FnOnce(&mut Value)) -> anyhow::Result<Self> {
        let host = lab.net.host(name)?;
        let place = Place::from(&host);
        Self::start_in(lab, name, host, place, None, edit)
    }

    fn start_in(
        lab: &Lab,
        name: &str,
        host: Host,
        place: Place,
        ticket: Option<&str>,
        edit: impl FnOnce(&mut Value),
    ) -> anyhow::Result<Self> {
        let dir = lab.dir().join(name);
        super::create_open(&dir)?;
        for folder in ["run", "state", "workloads.d"] {
            super::create_open(&dir.join(folder))?;
        }
        let mut config = json!({
            "node": name,
            "runDir": dir.join("run"),
            "stateDir": dir.join("state"),
            "workloadsDir": dir.join("workloads.d"),
            "envoy": lab.programs.envoy,
            "launcher": "fork",
        });
        edit(&mut config);
        let file = lab.dir().join(format!("{name}.yaml"));
        std::fs::write(&file, serde_json::to_string_pretty(&config)?)?;
        let program = lab.programs.path("ursa-agent");
        if let Some(ticket) = ticket {
            let mut join = ursa_join(&lab.programs, &host);
            join.arg("--agent-config").arg(&file);
            run(&mut join, ticket).with_context(|| format!("{name} cannot join"))?;
        }
        let args = vec!["run".into(), "--config".into(), file.display().to_string()];
        let agent = Daemon::start("ursa-agent", place, program.clone(), args, Vec::new(), lab.log(name))?;
        Ok(Self {
            name: name.to_owned(),
            host,
            agent,
            config: file,
            dir,
            program,
            proxies: lab.proxies.clone(),
        })
    }

    /// Puts a workload on this node: `host` gets an Envoy of its own and its traffic is redirected.
    pub fn add(&mut self, name: &str, host: &Host) -> anyhow::Result<Workload> {
        self.add_with(name, host, |_| {})
    }

    /// As [`Node::add`], with changes to its file.
    pub fn add_with(
        &mut self,
        name: &str,
        host: &Host,
        edit: impl FnOnce(&mut Value),
    ) -> anyhow::Result<Workload> {
        let uid = PROXY_UID + self.proxies.fetch_add(1, Ordering::Relaxed);
        let mut file = json!({
            "type": "Dataplane",
            "mesh": "default",
            "name": name,
            "labels": {"kuma.io/workload": name},
            "networking": {
                "address": host.v4,
                "inbound": [{"name": "http", "port": PORT, "protocol": "http"}],
            },
            "ursa": {
                "netns": host.path(),
                "proxyUid": uid,
                "proxyGid": uid,
                "resolvConf": format!("/etc/netns/{}/resolv.conf", host.netns),
            },
        });
        edit(&mut file);
        // Written aside and renamed, as any careful operator's tool does.
        let aside = self.dir.join(format!("{name}.new"));
        std::fs::write(&aside, serde_json::to_string_pretty(&file)?)?;
        std::fs::rename(&aside, self.dir.join("workloads.d").join(format!("{name}.yaml")))?;
        Ok(Workload { name: name.to_owned(), host: host.clone(), uid })
    }

    /// Takes a workload off this node.
    pub fn remove(&self, name: &str) -> anyhow::Result<()> {
        let file = self.dir.join("workloads.d").join(format!("{name}.yaml"));
        std::fs::remove_file(&file).with_context(|| format!("cannot remove {}", file.display()))
    }

    /// What the agent says of itself and its workloads.
    pub fn status(&self) -> anyhow::Result<Value> {
        let text = self.ask(&["status", "--json"])?;
        serde_json::from_str(&text).with_context(|| format!("the agent's status is not JSON: {text}"))
    }

    /// What `ursa-agent status` prints for people.
    pub fn status_text(&self) -> anyhow::Result<String> {
        self.ask(&["status"])
    }

    /// What `ursa-agent status --metrics` prints.
    pub fn metrics(&self) -> anyhow::Result<String> {
        self.ask(&["status", "--metrics"])
    }

    fn ask(&self, args: &[&str]) -> anyhow::Result<String> {
        run(Command::new(&self.program).args(args).arg("--config").arg(&self.config), "")
    }

    /// Waits until the status of a workload is as wanted, and returns it.
    pub fn wait_status(
        &self,
        name: &str,
        what: &str,
        deadline: Duration,
        wanted: impl Fn(&Value) -> bool,
    ) -> anyhow::Result<Value> {
        let what = format!("{name} on {} {what}", self.name);
        let (status, _) = wait::until(&what, deadline, || {
            let status = self.status().map_err(|error| format!("{error:#}"))?;
            let all = status["workloads"].as_array().cloned().unwrap_or_default();
            match all.into_iter().find(|one| one["name"] == name) {
                Some(one) if wanted(&one) => Ok(one),
                Some(one) => Err(one.to_string()),
                None => Err(status.to_string()),
            }
        })?;
        Ok(status)
    }

    /// The folder of a workload's sockets.
    pub fn socket_dir(&self, name: &str) -> PathBuf {
        self.run_dir().join("w").join(format!("default.{name}"))
    }

    /// The folder of a workload's keys and certificates.
    pub fn identity_dir(&self, name: &str) -> PathBuf {
        self.state_dir().join("w").join(format!("default.{name}")).join("identity")
    }

    /// Waits until the workload's Envoy is live with its configuration.
    pub fn wait_ready(&mut self, name: &str, deadline: Duration) -> anyhow::Result<Duration> {
        let what = format!("workload {name} ready on {}", self.name);
        let ((), took) = wait::until(&what, deadline, || {
            self.agent.check()?;
            let status = self.status().map_err(|error| format!("{error:#}"))?;
            let workloads = status.get("workloads").and_then(Value::as_array).cloned().unwrap_or_default();
            let wanted = |one: &&Value| {
                [name, &format!("default.{name}")].contains(&one["name"].as_str().unwrap_or_default())
                    || one["workload"].as_str() == Some(&format!("default.{name}"))
            };
            match workloads.iter().find(wanted) {
                Some(one) if one["state"] == "ready" => Ok(()),
                Some(one) => Err(one.to_string()),
                None => Err(format!("the agent doesn't know it: {status}")),
            }
        })?;
        Ok(took)
    }

    /// The agent's run folder.
    pub fn run_dir(&self) -> PathBuf {
        self.dir.join("run")
    }

    /// The agent's state folder.
    pub fn state_dir(&self) -> PathBuf {
        self.dir.join("state")
    }
}
