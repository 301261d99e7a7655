//! containerd with its CRI, used as kubelet uses it.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tonic::transport::{Channel, Endpoint};

use super::network::{Networks, RESOLVER};
use super::{Pod, PodSpec, Runtime, cri, image};
use crate::lab::daemon::Daemon;
use crate::lab::machine::Machine;
use crate::lab::{Lab, mesh, wait};

/// Where it listens, on its machine.
pub const SOCKET: &str = "/run/containerd/containerd.sock";
/// A pod whose sidecar doesn't come takes the plugin's 20 s, and 100 pods at once wait for each other's disk.
const PATIENCE: Duration = Duration::from_secs(120);

/// A running containerd.
#[derive(Debug)]
pub struct Containerd {
    /// Its process.
    pub daemon: Mutex<Daemon>,
    /// What pods may say for themselves; see [`PodSpec::meshed`].
    pub annotations: Vec<(String, String)>,
    programs: PathBuf,
    channel: Mutex<Channel>,
    executions: AtomicU32,
    tokio: tokio::runtime::Runtime,
}

impl Containerd {
    /// Starts it and gives it the lab's image.
    pub fn start(lab: &Lab, machine: &Machine, networks: &Networks) -> anyhow::Result<Self> {
        let dir = lab.dir().join("containerd");
        let config = lab.dir().join("containerd.toml");
        std::fs::write(&config, configuration(&dir, networks))?;
        let tokio = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let args = vec!["--config".to_owned(), config.display().to_string()];
        let log = lab.log("containerd");
        let daemon =
            Daemon::start("containerd", machine, "/usr/bin/containerd".into(), args, Vec::new(), log)?;
        let channel = Mutex::new(connect(&tokio, machine));
        let containerd = Self {
            daemon: Mutex::new(daemon),
            annotations: Vec::new(),
            programs: lab.programs.bin_dir.clone(),
            channel,
            executions: AtomicU32::default(),
            tokio,
        };
        containerd.wait_ready()?;
        let archive = image::archive(lab)?;
        mesh::run(Self::ctr(machine).args(["images", "import"]).arg(archive), "")?;
        Ok(containerd)
    }

    /// Starts it again after the machine was switched off and on.
    pub fn restart(&self, machine: &Machine) -> anyhow::Result<()> {
        let mut daemon = self.daemon.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        daemon.kill();
        daemon.restart()?;
        drop(daemon);
        *self.channel.lock().unwrap_or_else(std::sync::PoisonError::into_inner) =
            connect(&self.tokio, machine);
        self.wait_ready()
    }

    /// One call of its CRI.
    pub fn call<Q, A>(&self, method: &'static str, question: Q) -> anyhow::Result<A>
    where
        Q: prost::Message + 'static,
        A: prost::Message + Default + 'static,
    {
        let channel = self.channel.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone();
        self.tokio.block_on(async {
            tokio::time::timeout(PATIENCE, cri::call(channel, method, question))
                .await
                .with_context(|| format!("{method}: no answer within {PATIENCE:?}"))?
        })
    }

    /// Whether `NetworkReady`, and why not.
    pub fn network_ready(&self) -> anyhow::Result<(bool, String)> {
        let status: cri::StatusResponse = self.call("Status", cri::StatusRequest { verbose: false })?;
        let conditions = status.status.unwrap_or_default().conditions;
        let network = conditions.into_iter().find(|condition| condition.kind == "NetworkReady");
        let network = network.context("containerd says nothing of the network")?;
        Ok((network.status, network.message))
    }

    /// The conflists that it has read.
    pub fn conflists(&self) -> anyhow::Result<String> {
        let status: cri::StatusResponse = self.call("Status", cri::StatusRequest { verbose: true })?;
        Ok(status.info.get("cniconfig").cloned().unwrap_or_default())
    }

    /// The sandboxes that it knows.
    pub fn sandboxes(&self) -> anyhow::Result<Vec<cri::PodSandbox>> {
        Ok(self.call::<_, cri::ListPodSandboxResponse>("ListPodSandbox", cri::Empty {})?.items)
    }

    /// `StopPodSandbox`.
    pub fn stop_sandbox(&self, id: &str) -> anyhow::Result<()> {
        self.call::<_, cri::Empty>("StopPodSandbox", cri::Id { id: id.to_owned() }).map(drop)
    }

    /// `StopPodSandbox` and `RemovePodSandbox`, as kubelet ends every sandbox.
    pub fn remove_sandbox(&self, id: &str) -> anyhow::Result<()> {
        self.stop_sandbox(id)?;
        self.call::<_, cri::Empty>("RemovePodSandbox", cri::Id { id: id.to_owned() }).map(drop)
    }

    /// Runs a program in a container to its end, by the CRI; what it printed.
    pub fn exec_sync(&self, pod: &Pod, cmd: &[&str]) -> anyhow::Result<String> {
        let cmd = cmd.iter().map(|&word| word.to_owned()).collect();
        let question = cri::ExecSyncRequest { container_id: pod.container.clone(), cmd, timeout: 10 };
        let answer: cri::ExecSyncResponse = self.call("ExecSync", question)?;
        let (out, err) = (String::from_utf8_lossy(&answer.stdout), String::from_utf8_lossy(&answer.stderr));
        ensure!(answer.exit_code == 0, "exit code {}: {out}{err}", answer.exit_code);
        Ok(out.into_owned())
    }

    fn wait_ready(&self) -> anyhow::Result<()> {
        let ready = || match self.network_ready() {
            Ok((true, _)) => Ok(()),
            Ok((false, why)) => Err(why),
            Err(error) => Err(format!("{error:#}")),
        };
        wait::until("containerd with a network", Duration::from_secs(20), ready).map(drop)
    }

    fn ctr(machine: &Machine) -> Command {
        let mut command = machine.command(Path::new("/usr/bin/ctr"));
        command.args(["--address", SOCKET, "--namespace", "k8s.io"]);
        command
    }

    /// What kubelet would send for this pod.
    fn config(&self, machine: &Machine, spec: &PodSpec) -> cri::PodSandboxConfig {
        let ports = spec
            .host_port
            .map(|port| cri::PortMapping { container_port: mesh::PORT.into(), host_port: port.into() });
        let annotations = self.annotations.iter().filter(|_| spec.meshed).cloned().collect();
        cri::PodSandboxConfig {
            metadata: Some(cri::PodSandboxMetadata {
                name: spec.name.clone(),
                uid: format!("uid-{}-{}", spec.namespace, spec.name),
                namespace: spec.namespace.clone(),
                attempt: spec.attempt,
            }),
            hostname: spec.name.clone(),
            dns_config: Some(cri::DnsConfig {
                servers: vec![RESOLVER.to_owned()],
                options: vec!["timeout:1".to_owned(), "attempts:1".to_owned()],
            }),
            port_mappings: ports.into_iter().collect(),
            annotations,
            linux: Some(cri::LinuxPodSandboxConfig {
                cgroup_parent: machine.cgroup.clone(),
                ..cri::LinuxPodSandboxConfig::default()
            }),
            ..cri::PodSandboxConfig::default()
        }
    }

    /// `RunPodSandbox` and what became of it, still without a container.
    pub fn run_sandbox(&self, machine: &Machine, spec: &PodSpec) -> anyhow::Result<Pod> {
        let config = Some(self.config(machine, spec));
        let cri::Id { id } = self.call("RunPodSandbox", cri::RunPodSandboxRequest { config })?;
        let question = cri::PodSandboxStatusRequest { id: id.clone(), verbose: true };
        let status: cri::PodSandboxStatusResponse = self.call("PodSandboxStatus", question)?;
        let info: Value = serde_json::from_str(status.info.get("info").map_or("", String::as_str))?;
        let namespaces = info["runtimeSpec"]["linux"]["namespaces"].as_array().cloned().unwrap_or_default();
        let netns = namespaces.iter().find(|one| one["type"] == "network");
        let netns = netns.and_then(|one| one["path"].as_str()).context("the sandbox has no namespace")?;
        // As the machine sees it: /var/run is a link, which from outside leads elsewhere.
        let netns = netns.strip_prefix("/var").unwrap_or(netns);
        let network = status.status.and_then(|status| status.network).unwrap_or_default();
        let v6 = network.additional_ips.first().map(|one| one.ip.clone()).unwrap_or_default();
        Ok(Pod { spec: spec.clone(), id, container: String::new(), netns: netns.into(), v4: network.ip, v6 })
    }

    /// `CreateContainer` and `StartContainer`.
    pub fn run_container(&self, machine: &Machine, pod: &mut Pod) -> anyhow::Result<()> {
        let mounts = image::mounts(&self.programs).into_iter().map(|(host, container)| cri::Mount {
            container_path: container.to_owned(),
            host_path: host.display().to_string(),
            readonly: true,
        });
        let config = cri::ContainerConfig {
            metadata: Some(cri::ContainerMetadata { name: "app".to_owned() }),
            image: Some(cri::ImageSpec { image: image::NAME.to_owned() }),
            command: super::app(&pod.spec.name),
            mounts: mounts.collect(),
            ..cri::ContainerConfig::default()
        };
        let question = cri::CreateContainerRequest {
            pod_sandbox_id: pod.id.clone(),
            config: Some(config),
            sandbox_config: Some(self.config(machine, &pod.spec)),
        };
        let container: cri::Id = self.call("CreateContainer", question)?;
        pod.container.clone_from(&container.id);
        self.call::<_, cri::Empty>("StartContainer", container).map(drop)
    }
}

impl Runtime for Containerd {
    fn start(&self, machine: &Machine, spec: &PodSpec) -> anyhow::Result<Pod> {
        let mut pod = self.run_sandbox(machine, spec)?;
        if spec.app {
            self.run_container(machine, &mut pod)?;
        }
        Ok(pod)
    }

    fn exec(&self, machine: &Machine, pod: &Pod, args: &[&str]) -> Command {
        let number = self.executions.fetch_add(1, Ordering::Relaxed);
        let mut command = Self::ctr(machine);
        command.args(["tasks", "exec", "--exec-id", &format!("lab{number}"), &pod.container, image::APP]);
        command.args(args);
        command
    }

    fn stop(&self, _machine: &Machine, pod: &Pod) -> anyhow::Result<()> {
        self.stop_sandbox(&pod.id)
    }

    fn remove(&self, _machine: &Machine, pod: &Pod) -> anyhow::Result<()> {
        self.remove_sandbox(&pod.id)
    }

    fn discard(&self, _machine: &Machine, spec: &PodSpec) -> anyhow::Result<()> {
        let of_this = |sandbox: &cri::PodSandbox| {
            let metadata = sandbox.metadata.as_ref();
            metadata.is_some_and(|found| (&found.name, &found.namespace) == (&spec.name, &spec.namespace))
        };
        self.sandboxes()?
            .iter()
            .filter(|sandbox| of_this(sandbox))
            .try_for_each(|one| self.remove_sandbox(&one.id))
    }

    fn known(&self, _machine: &Machine) -> anyhow::Result<Vec<String>> {
        Ok(self.sandboxes()?.into_iter().map(|sandbox| format!("{sandbox:?}")).collect())
    }

    fn service(&self, pod: &str) -> String {
        // Nothing but its arguments tells the plugin who a pod is.
        format!("{pod}-{}", super::network::MESHED)
    }
}

fn connect(tokio: &tokio::runtime::Runtime, machine: &Machine) -> Channel {
    let socket = machine.file(Path::new(SOCKET));
    let endpoint = Endpoint::from_static("http://containerd").connect_timeout(Duration::from_secs(5));
    let _inside = tokio.enter();
    endpoint.connect_with_connector_lazy(tower::service_fn(move |_: http::Uri| {
        let socket = socket.clone();
        async move { tokio::net::UnixStream::connect(socket).await.map(TokioIo::new) }
    }))
}

fn configuration(dir: &Path, networks: &Networks) -> String {
    let cri = "plugins.\"io.containerd.grpc.v1.cri\"";
    // Quoted strings of TOML and of Rust are the same for any path of the lab.
    format!(
        "version = 2\nroot = {root:?}\nstate = \"/run/containerd\"\n\
         disabled_plugins = [\"io.containerd.snapshotter.v1.btrfs\", \"io.containerd.snapshotter.v1.zfs\", \
         \"io.containerd.snapshotter.v1.devmapper\", \"io.containerd.snapshotter.v1.aufs\"]\n\
         [grpc]\naddress = {SOCKET:?}\n\
         [{cri}]\nsandbox_image = {image:?}\nrestrict_oom_score_adj = true\ndisable_tcp_service = true\n\
         [{cri}.cni]\nbin_dir = {bin:?}\nconf_dir = {conf:?}\n\
         [{cri}.containerd.runtimes.runc]\nruntime_type = \"io.containerd.runc.v2\"\n\
         [{cri}.containerd.runtimes.runc.options]\nSystemdCgroup = false\n",
        root = dir.display().to_string(),
        image = image::NAME,
        bin = networks.bin_dir.display().to_string(),
        conf = networks.conf_dir.display().to_string(),
    )
}
