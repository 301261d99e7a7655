//! The containers of a DaemonSet's manifest under containerd, as kubelet runs them on one node.

use std::collections::BTreeMap;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use serde_json::Value;

use super::containerd::Containerd;
use super::{cri, image};
use crate::lab::machine::Machine;
use crate::lab::{Lab, create_open, wait};

/// What a program of ours is linked with.
const LIBRARIES: [&str; 3] = ["libc.so.6", "libm.so.6", "libgcc_s.so.1"];
const LOADER: &str = "/lib64/ld-linux-x86-64.so.2";

/// The content of the image `ursa-node`: `/usr`, with the programs of the packages and the units of a node.
#[derive(Debug)]
pub struct NodeImage {
    usr: PathBuf,
}

impl NodeImage {
    /// Gathers it.
    pub fn new(lab: &Lab, envoy: &Path) -> anyhow::Result<Self> {
        let usr = lab.dir().join("node-image");
        for dir in ["", "bin", "lib/x86_64-linux-gnu", "lib64", "lib/systemd/system"] {
            create_open(&usr.join(dir))?;
        }
        for program in ["ursa-cni", "ursa-agent", "ursa-shim", "ursa-init"] {
            copy(&lab.programs.path(program), &usr.join("bin").join(program))?;
        }
        copy(envoy, &usr.join("bin/envoy"))?;
        for library in LIBRARIES {
            let folder = Path::new("lib/x86_64-linux-gnu");
            copy(&Path::new("/usr").join(folder).join(library), &usr.join(folder).join(library))?;
        }
        copy(Path::new(LOADER), &usr.join("lib64/ld-linux-x86-64.so.2"))?;
        symlink("bin", usr.join("sbin"))?;
        for unit in std::fs::read_dir(repository().join("packaging/kubernetes/units"))?.flatten() {
            copy(&unit.path(), &usr.join("lib/systemd/system").join(unit.file_name()))?;
        }
        Ok(Self { usr })
    }

    /// Makes the plugin another one, as a new version's is.
    pub fn renew(&self) -> anyhow::Result<Vec<u8>> {
        let (path, aside) = (self.usr.join("bin/ursa-cni"), self.usr.join("bin/ursa-cni.new"));
        let mut program = std::fs::read(&path)?;
        // What stands behind a program's sections is nobody's.
        program.extend_from_slice(b"another version");
        std::fs::copy(&path, &aside)?;
        std::fs::write(&aside, &program)?;
        std::fs::rename(&aside, &path)?;
        Ok(program)
    }
}

fn copy(from: &Path, to: &Path) -> anyhow::Result<()> {
    std::fs::copy(from, to).map(drop).with_context(|| format!("cannot copy {}", from.display()))
}

/// Where the repository is.
pub fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// A document of a manifest in the repository, by its kind.
pub fn document(path: &str, kind: &str) -> anyhow::Result<Value> {
    let path = repository().join(path);
    let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let all: Vec<Value> = serde_saphyr::from_multiple(&text)?;
    let found = all.into_iter().find(|document| document["kind"] == kind);
    found.with_context(|| format!("no {kind} in {}", path.display()))
}

/// What kubelet knows of a node.
#[derive(Debug)]
pub struct Kubelet<'a> {
    /// The container runtime.
    pub runtime: &'a Containerd,
    /// The node.
    pub machine: &'a Machine,
    /// The image.
    pub image: &'a NodeImage,
    /// The node's `/`, where the manifest's `hostPath`s are.
    pub root: PathBuf,
    /// Paths of the node that are elsewhere in the lab.
    pub elsewhere: BTreeMap<PathBuf, PathBuf>,
    /// Files of the ConfigMap.
    pub config: PathBuf,
    /// Where logs go.
    pub logs: PathBuf,
}

/// A running pod of a DaemonSet.
#[derive(Debug)]
pub struct DaemonPod {
    sandbox: String,
    containers: BTreeMap<String, String>,
}

impl Kubelet<'_> {
    /// Runs a DaemonSet's pod: its init containers to their end, one after the other, then the others. `attempt` tells it
    /// from former ones. A container that fails is started again until `patience` is over.
    pub fn run(&self, manifest: &Value, attempt: u32, patience: Duration) -> anyhow::Result<DaemonPod> {
        let name = manifest["metadata"]["name"].as_str().context("the manifest has no name")?;
        let spec = &manifest["spec"]["template"]["spec"];
        ensure!(spec["hostNetwork"] == true, "{name} must start where no pod network works");
        let options = Some(cri::NamespaceOption { network: cri::NODE });
        let config = cri::PodSandboxConfig {
            metadata: Some(cri::PodSandboxMetadata {
                name: name.to_owned(),
                uid: name.to_owned(),
                namespace: manifest["metadata"]["namespace"].as_str().unwrap_or_default().to_owned(),
                attempt,
            }),
            log_directory: self.logs.display().to_string(),
            linux: Some(cri::LinuxPodSandboxConfig {
                cgroup_parent: self.machine.cgroup.clone(),
                security_context: Some(cri::SandboxSecurity { namespace_options: options, privileged: true }),
            }),
            ..cri::PodSandboxConfig::default()
        };
        let question = cri::RunPodSandboxRequest { config: Some(config.clone()) };
        let cri::Id { id } = self.runtime.call("RunPodSandbox", question)?;
        let mut pod = DaemonPod { sandbox: id, containers: BTreeMap::new() };
        for container in list(&spec["initContainers"]) {
            let tried = wait::until(&format!("{name} to initialise"), patience, || {
                let id = self.start(&pod, &config, spec, container).map_err(|error| format!("{error:#}"))?;
                let ended = self.end_of(&id, container, patience);
                self.runtime
                    .call::<_, cri::Empty>("RemoveContainer", cri::Id { id })
                    .map_err(|e| e.to_string())?;
                ended.map_err(|error| format!("{error:#}"))
            });
            tried?;
        }
        for container in list(&spec["containers"]) {
            let id = self.start(&pod, &config, spec, container)?;
            pod.containers.insert(word(&container["name"])?, id);
        }
        Ok(pod)
    }

    /// Runs a container's readiness probe once.
    pub fn probe(&self, pod: &DaemonPod, manifest: &Value) -> anyhow::Result<()> {
        for container in list(&manifest["spec"]["template"]["spec"]["containers"]) {
            let command = list(&container["readinessProbe"]["exec"]["command"]);
            ensure!(!command.is_empty(), "{container} has no probe");
            let cmd = command.iter().map(word).collect::<anyhow::Result<_>>()?;
            let container_id = pod.containers.get(&word(&container["name"])?).cloned().unwrap_or_default();
            let question = cri::ExecSyncRequest { container_id, cmd, timeout: 10 };
            let answer: cri::ExecSyncResponse = self.runtime.call("ExecSync", question)?;
            let said = String::from_utf8_lossy(&answer.stdout).into_owned();
            ensure!(answer.exit_code == 0, "not ready ({}): {said}", answer.exit_code);
        }
        Ok(())
    }

    /// Stops it as kubelet does: SIGTERM, patience, SIGKILL.
    pub fn stop(&self, pod: DaemonPod) -> anyhow::Result<()> {
        for container_id in pod.containers.into_values() {
            let question = cri::StopContainerRequest { container_id, timeout: 10 };
            self.runtime.call::<_, cri::Empty>("StopContainer", question)?;
        }
        self.runtime.remove_sandbox(&pod.sandbox)
    }

    fn start(
        &self,
        pod: &DaemonPod,
        sandbox_config: &cri::PodSandboxConfig,
        spec: &Value,
        container: &Value,
    ) -> anyhow::Result<String> {
        let name = word(&container["name"])?;
        let security = &container["securityContext"];
        let words = |value: &Value| list(value).iter().map(word).collect::<anyhow::Result<Vec<_>>>();
        let context = cri::ContainerSecurity {
            capabilities: Some(cri::Capability {
                add: words(&security["capabilities"]["add"])?,
                drop: words(&security["capabilities"]["drop"])?,
            }),
            privileged: security["privileged"] == true,
            namespace_options: Some(cri::NamespaceOption { network: cri::NODE }),
            readonly_rootfs: security["readOnlyRootFilesystem"] == true,
            no_new_privs: security["allowPrivilegeEscalation"] == false,
            seccomp: (security["seccompProfile"]["type"] == "RuntimeDefault")
                .then_some(cri::SecurityProfile {}),
        };
        let mut mounts = vec![mount(&self.image.usr, Path::new("/usr"), true)];
        for wanted in list(&container["volumeMounts"]) {
            let volume = list(&spec["volumes"]).iter().find(|volume| volume["name"] == wanted["name"]);
            let volume = volume.with_context(|| format!("no volume {}", wanted["name"]))?;
            let from = match volume["hostPath"]["path"].as_str() {
                Some(path) => self.on_node(Path::new(path)),
                None => self.config.clone(),
            };
            mounts.push(mount(&from, Path::new(&word(&wanted["mountPath"])?), wanted["readOnly"] == true));
        }
        let config = cri::ContainerConfig {
            metadata: Some(cri::ContainerMetadata { name: name.clone() }),
            image: Some(cri::ImageSpec { image: image::NAME.to_owned() }),
            command: words(&container["command"])?,
            mounts,
            log_path: format!("{name}.log"),
            linux: Some(cri::LinuxContainerConfig { security_context: Some(context) }),
        };
        let question = cri::CreateContainerRequest {
            pod_sandbox_id: pod.sandbox.clone(),
            config: Some(config),
            sandbox_config: Some(sandbox_config.clone()),
        };
        let id: cri::Id = self.runtime.call("CreateContainer", question)?;
        self.runtime.call::<_, cri::Empty>("StartContainer", id.clone())?;
        Ok(id.id)
    }

    /// Waits until a container has done its work.
    fn end_of(&self, id: &str, container: &Value, patience: Duration) -> anyhow::Result<()> {
        let what = format!("container {} to end", container["name"]);
        let (code, _) = wait::until(&what, patience, || {
            let question = cri::Id { id: id.to_owned() };
            let status = self.runtime.call::<_, cri::ContainerStatusResponse>("ContainerStatus", question);
            match status.map(|status| status.status.unwrap_or_default()) {
                Ok(status) if status.state == cri::EXITED => Ok(status.exit_code),
                Ok(status) => Err(format!("state {}", status.state)),
                Err(error) => Err(format!("{error:#}")),
            }
        })?;
        if code != 0 {
            let log = self.logs.join(format!("{}.log", word(&container["name"])?));
            bail!("{what}: exit code {code}: {}", std::fs::read_to_string(log).unwrap_or_default());
        }
        Ok(())
    }

    fn on_node(&self, path: &Path) -> PathBuf {
        self.elsewhere
            .get(path)
            .cloned()
            .unwrap_or_else(|| self.root.join(path.strip_prefix("/").unwrap_or(path)))
    }
}

fn mount(from: &Path, to: &Path, readonly: bool) -> cri::Mount {
    cri::Mount { container_path: to.display().to_string(), host_path: from.display().to_string(), readonly }
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn word(value: &Value) -> anyhow::Result<String> {
    value.as_str().map(str::to_owned).with_context(|| format!("expected a text, found {value}"))
}
