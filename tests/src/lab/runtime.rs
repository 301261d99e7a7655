//! Real container runtimes, and one that only speaks CNI, each on a [`Machine`] with Debian's `bridge`, `host-local`
//! and `portmap` before `ursa-cni`.
//!
//! * [`containerd`]: its CRI, as kubelet uses it; [`cri`] holds the calls.
//! * [`podman`]: with the CNI backend.
//! * [`driver`]: what libcni does, for the verbs that these runtimes never call.
//! * [`fake`]: a runtime that only says which pods there are.
//! * [`daemonset`]: containers of a manifest, as kubelet runs them; [`churn`]: pods that come and go meanwhile.
//! * [`network`]: the conflists; [`image`]: the one image.
//! * [`ground`]: control plane, agent and a runtime together; [`storm`]: very many pods on it.

pub mod churn;
pub mod containerd;
pub mod cri;
pub mod daemonset;
pub mod driver;
pub mod fake;
pub mod ground;
pub mod image;
pub mod network;
pub mod podman;
pub mod storm;

use std::path::PathBuf;
use std::process::Command;

use super::machine::Machine;
use super::mesh::PORT;
use super::net;

/// A pod to be.
#[derive(Debug, Clone)]
pub struct PodSpec {
    /// `K8S_POD_NAME`.
    pub name: String,
    /// `K8S_POD_NAMESPACE`, where the runtime knows namespaces.
    pub namespace: String,
    /// Whether it is to be in the mesh, by whatever the runtime has to say so.
    pub meshed: bool,
    /// A port of the machine that leads to the pod's own.
    pub host_port: Option<u16>,
    /// How often a pod of this name was started before.
    pub attempt: u32,
    /// Whether a container runs in it; without, it is a sandbox.
    pub app: bool,
}

impl PodSpec {
    /// A pod in the mesh with the lab's HTTP server.
    pub fn meshed(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            namespace: network::MESHED.to_owned(),
            meshed: true,
            host_port: None,
            attempt: 0,
            app: true,
        }
    }

    /// The same, outside the mesh.
    pub fn plain(name: &str) -> Self {
        Self { namespace: network::PLAIN.to_owned(), meshed: false, ..Self::meshed(name) }
    }

    /// Without a container.
    #[must_use]
    pub fn sandbox(mut self) -> Self {
        self.app = false;
        self
    }
}

/// A running pod.
#[derive(Debug, Clone)]
pub struct Pod {
    /// What it was to be.
    pub spec: PodSpec,
    /// The runtime's id of it, which is `CNI_CONTAINERID`.
    pub id: String,
    /// The container in it.
    pub container: String,
    /// Its network namespace, as the machine sees it.
    pub netns: PathBuf,
    /// Its IPv4 address.
    pub v4: String,
    /// Its IPv6 address.
    pub v6: String,
}

impl Pod {
    /// Its rules.
    pub fn rules(&self, machine: &Machine) -> anyhow::Result<Vec<String>> {
        Ok(ursa_init::in_netns(&machine.file(&self.netns), ursa_init::show)??)
    }

    /// The Envoys in its namespace, as the lab sees them.
    pub fn envoys(&self, machine: &Machine) -> Vec<i32> {
        let mut found = net::processes_in(&machine.file(&self.netns));
        found.retain(|pid| net::runs(*pid, "envoy"));
        found
    }
}

/// What starts and stops pods. Every call may come from several threads at once.
pub trait Runtime: std::fmt::Debug + Sync {
    /// Starts a pod and its container.
    fn start(&self, machine: &Machine, spec: &PodSpec) -> anyhow::Result<Pod>;
    /// A command that runs the lab's program with these arguments in the pod's container.
    fn exec(&self, machine: &Machine, pod: &Pod, args: &[&str]) -> Command;
    /// Stops it: its network goes.
    fn stop(&self, machine: &Machine, pod: &Pod) -> anyhow::Result<()>;
    /// Removes it, stopped or not.
    fn remove(&self, machine: &Machine, pod: &Pod) -> anyhow::Result<()>;
    /// Removes what it keeps of a pod that didn't start, as whoever wants it started does before the next try.
    fn discard(&self, machine: &Machine, spec: &PodSpec) -> anyhow::Result<()>;
    /// The pods that it knows, running or not.
    fn known(&self, machine: &Machine) -> anyhow::Result<Vec<String>>;
    /// Whether a DEL that failed is repeated until it succeeds, by it or by whoever removes a pod through it.
    fn repeats_del(&self) -> bool {
        true
    }
    /// The mesh's name of a service whose pods have this name.
    fn service(&self, pod: &str) -> String;
}

/// What the container of a pod runs.
fn app(name: &str) -> Vec<String> {
    let args = [image::APP, "serve", "--name", name, "--port", &PORT.to_string()];
    args.map(str::to_owned).to_vec()
}
