//! Control plane, a machine with an agent, and a container runtime on it.

use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use serde_json::{Value, json};

use super::network::Networks;
use super::{PodSpec, Runtime};
use crate::lab::daemon::Daemon;
use crate::lab::machine::Machine;
use crate::lab::mesh::{self, Control, Node};
use crate::lab::program;
use crate::lab::{Lab, Programs, wait};

/// The network of meshed pods; where namespaces decide, of all pods.
pub const PODS_NETWORK: &str = "pods";
/// The network of pods outside the mesh, where networks decide. Our plugin is in its chain as well.
pub const PLAIN_NETWORK: &str = "plain";
/// The port of the server outside of the mesh.
pub const OUTSIDE: u16 = 9090;

/// All of it. Fields are dropped in their order: programs before the machine, and that before the lab.
#[derive(Debug)]
pub struct Ground<R> {
    /// The container runtime.
    pub runtime: R,
    /// The agent.
    pub node: Node,
    /// The control plane.
    pub control: Control,
    /// A server that is nobody's workload, on the bridge.
    pub outside: Daemon,
    /// Where the runtime and the agent run.
    pub machine: Machine,
    /// Its networks.
    pub networks: Networks,
    /// The ground under all this.
    pub lab: Lab,
}

impl<R: Runtime> Ground<R> {
    /// Sets it up: the node may run pods of these names.
    pub fn start(
        services: &[&str],
        runtime: impl FnOnce(&Lab, &Machine, &Networks) -> anyhow::Result<R>,
    ) -> anyhow::Result<Self> {
        Self::set_up(services, true, |_| {}, runtime)
    }

    /// As [`Ground::start`], but the plugin is still to be installed.
    pub fn bare(
        services: &[&str],
        runtime: impl FnOnce(&Lab, &Machine, &Networks) -> anyhow::Result<R>,
    ) -> anyhow::Result<Self> {
        Self::set_up(services, false, |_| {}, runtime)
    }

    /// As [`Ground::start`], with changes to the agent's configuration and a choice whether the plugin is in the chain.
    pub fn set_up(
        services: &[&str],
        installed: bool,
        agent: impl FnOnce(&mut Value),
        runtime: impl FnOnce(&Lab, &Machine, &Networks) -> anyhow::Result<R>,
    ) -> anyhow::Result<Self> {
        let mut lab = Lab::new(&Programs::discover()?)?;
        let set_up = |lab: &mut Lab| {
            // A killed agent doesn't take its pods off the control plane; that is so long.
            let brief = |config: &mut Value| config["identity"] = json!({"sessionGrace": "5s"});
            let control = Control::start_with(lab, brief)?;
            let machine = Machine::boot(lab, "node")?;
            let node = Node::join_on(lab, &machine, "node", &control.ticket(services)?, agent)?;
            let networks = Networks::new(lab, &node.run_dir(), installed)?;
            let ursa = networks.ursa();
            let mut silent = ursa.clone();
            silent.as_object_mut().context("invariant: an object")?.remove("annotations");
            networks
                .write("10-pods.conflist", &networks.conflist(PODS_NETWORK, 0, installed.then_some(ursa)))?;
            let plain = networks.conflist(PLAIN_NETWORK, 1, installed.then_some(silent));
            networks.write("20-plain.conflist", &plain)?;
            let outside = program::serve(lab, &lab.net.bridge_host(), "outside", OUTSIDE)?;
            let runtime = runtime(lab, &machine, &networks)?;
            Ok((runtime, node, control, outside, machine, networks))
        };
        match set_up(&mut lab) {
            Ok((runtime, node, control, outside, machine, networks)) => {
                Ok(Self { runtime, node, control, outside, machine, networks, lab })
            }
            Err(error) => {
                let error: anyhow::Error = error;
                Err(match lab.save_logs() {
                    Some(logs) => error.context(format!("the lab's logs: {}", logs.display())),
                    None => error,
                })
            }
        }
    }

    /// Starts a pod.
    pub fn run(&self, spec: &PodSpec) -> anyhow::Result<super::Pod> {
        self.runtime.start(&self.machine, spec).with_context(|| format!("pod {} doesn't start", spec.name))
    }

    /// A program in a pod's container that asks what it is told.
    pub fn client(&self, pod: &super::Pod) -> anyhow::Result<program::Client> {
        program::Client::spawn(&mut self.runtime.exec(&self.machine, pod, &["client"]))
    }

    /// Waits until nothing of any pod is left: rules, namespaces, sidecars, files, reserved addresses, Dataplanes.
    pub fn wait_empty(&self, deadline: Duration) -> anyhow::Result<()> {
        self.wait_gone(deadline)?;
        wait::until("the control plane to forget them", deadline, || {
            let list = self.control.ursa(&["get", "dataplanes", "-o", "json"]);
            let list: Value = serde_json::from_str(&list.map_err(|error| error.to_string())?)
                .map_err(|error| error.to_string())?;
            match list["items"].as_array() {
                Some(items) if items.is_empty() => Ok(()),
                _ => Err(list.to_string()),
            }
        })
        .map(drop)
    }

    /// As [`Ground::wait_empty`], but for Dataplanes that nobody sends anything to: an agent that is killed before its
    /// last word is heard takes it along, and what it had registered is withdrawn.
    fn wait_gone(&self, deadline: Duration) -> anyhow::Result<()> {
        self.wait_nothing_left(deadline, true)
    }

    /// As [`Ground::wait_gone`] after plugins have died: where the runtime doesn't repeat a DEL that failed, what the
    /// plugins before ours keep isn't looked at, because they were never called.
    pub fn wait_gone_after_kills(&self, deadline: Duration) -> anyhow::Result<()> {
        self.wait_nothing_left(deadline, self.runtime.repeats_del())
    }

    fn wait_nothing_left(&self, deadline: Duration, of_network: bool) -> anyhow::Result<()> {
        wait::until("nothing to be left of pods", deadline, || match self.left(of_network) {
            Ok(left) if left.is_empty() => Ok(()),
            Ok(left) => Err(left.join("\n")),
            Err(error) => Err(format!("{error:#}")),
        })?;
        wait::until("no pod to be online", deadline, || match self.control.ursa(&["inspect", "dataplanes"]) {
            Ok(table) if !table.contains("Online") => Ok(()),
            Ok(table) => Err(table),
            Err(error) => Err(format!("{error:#}")),
        })
        .map(drop)
    }

    /// What is left of pods on the machine when there should be none.
    fn left(&self, of_network: bool) -> anyhow::Result<Vec<String>> {
        let mut left = if of_network { self.left_of_network()? } else { Vec::new() };
        for program in ["envoy", "ursa-shim", "containerd-shim", "conmon", "busybox"] {
            left.extend(self.machine.running(program).iter().map(|pid| format!("{program}, process {pid}")));
        }
        left.extend(names(&self.machine.file(Path::new("/run/netns"))));
        left.extend(names(&self.node.run_dir().join("cni")));
        left.extend(names(&self.node.run_dir().join("w")));
        left.extend(names(&self.node.state_dir().join("w")));
        let status = self.node.status()?;
        let workloads = status["workloads"].as_array().cloned().unwrap_or_default();
        left.extend(workloads.iter().map(Value::to_string));
        Ok(left)
    }

    /// What the plugins before ours keep of pods, and the runtime of their networks.
    fn left_of_network(&self) -> anyhow::Result<Vec<String>> {
        // Of the machine's own rules only those that bridge and portmap share between pods may stay.
        let rules = mesh::run(&mut self.machine.command(Path::new("iptables-save")), "")?
            + &mesh::run(&mut self.machine.command(Path::new("ip6tables-save")), "")?;
        let own =
            |rule: &&str| rule.starts_with("-A") && (rule.contains("10.244.") || rule.contains("fd10:244:"));
        let mut left: Vec<String> = rules.lines().filter(own).map(str::to_owned).collect();
        left.extend(names(&self.machine.file(Path::new("/var/lib/cni/results"))));
        for network in [PODS_NETWORK, PLAIN_NETWORK] {
            let reserved = names(&self.machine.file(&Path::new("/var/lib/cni/networks").join(network)));
            left.extend(
                reserved
                    .into_iter()
                    .filter(|name| !name.contains("last_reserved") && !name.ends_with("lock")),
            );
        }
        Ok(left)
    }
}

fn names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|entry| entry.path().display().to_string()).collect()
}
