//! Control plane, a machine with an agent, and a container runtime on it.

use std::path::Path;

use anyhow::Context as _;
use serde_json::Value;

use super::network::Networks;
use super::{PodSpec, Runtime};
use crate::lab::daemon::Daemon;
use crate::lab::machine::Machine;
use crate::lab::mesh::{self, Control, Node};
use crate::lab::program;
use crate::lab::{Lab, Programs};

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
            let control = Control::start(lab)?;
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

    /// What is left of pods on the machine when there should be none.
    pub fn left(&self) -> anyhow::Result<Vec<String>> {
        let mut left = Vec::new();
        for program in ["envoy", "ursa-shim", "containerd-shim", "conmon", "busybox"] {
            left.extend(self.machine.running(program).iter().map(|pid| format!("{program}, process {pid}")));
        }
        // Of the machine's own rules only those that bridge and portmap share between pods may stay.
        let rules = mesh::run(&mut self.machine.command(Path::new("iptables-save")), "")?
            + &mesh::run(&mut self.machine.command(Path::new("ip6tables-save")), "")?;
        let own =
            |rule: &&str| rule.starts_with("-A") && (rule.contains("10.244.") || rule.contains("fd10:244:"));
        left.extend(rules.lines().filter(own).map(str::to_owned));
        let names = |dir: &Path| -> Vec<String> {
            let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
            entries.map(|entry| entry.path().display().to_string()).collect()
        };
        left.extend(names(&self.machine.file(Path::new("/run/netns"))));
        left.extend(names(&self.machine.file(Path::new("/var/lib/cni/results"))));
        for network in [PODS_NETWORK, PLAIN_NETWORK] {
            let reserved = names(&self.machine.file(&Path::new("/var/lib/cni/networks").join(network)));
            left.extend(
                reserved
                    .into_iter()
                    .filter(|name| !name.contains("last_reserved") && !name.ends_with("lock")),
            );
        }
        left.extend(names(&self.node.run_dir().join("w")));
        left.extend(names(&self.node.state_dir().join("w")));
        let status = self.node.status()?;
        let workloads = status["workloads"].as_array().cloned().unwrap_or_default();
        left.extend(workloads.iter().map(Value::to_string));
        Ok(left)
    }
}
