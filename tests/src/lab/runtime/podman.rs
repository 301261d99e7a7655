//! podman with its CNI backend and runc.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context as _;
use serde_json::Value;

use super::ground::{PLAIN_NETWORK, PODS_NETWORK};
use super::network::{Networks, RESOLVER};
use super::{Pod, PodSpec, Runtime, image};
use crate::lab::machine::Machine;
use crate::lab::{Lab, create_open, mesh};

/// podman, which has no daemon.
#[derive(Debug)]
pub struct Podman {
    dir: PathBuf,
    programs: PathBuf,
}

impl Podman {
    /// Configures it and gives it the lab's image.
    pub fn start(lab: &Lab, machine: &Machine, networks: &Networks) -> anyhow::Result<Self> {
        let dir = lab.dir().join("podman");
        create_open(&dir)?;
        let podman = Self { dir, programs: lab.programs.bin_dir.clone() };
        std::fs::write(podman.dir.join("containers.conf"), configuration(networks))?;
        mesh::run(
            podman.command(machine).args(["load", "--quiet", "--input"]).arg(image::archive(lab)?),
            "",
        )?;
        Ok(podman)
    }

    /// podman, still without a verb.
    pub fn command(&self, machine: &Machine) -> Command {
        let mut command = machine.command(Path::new("/usr/bin/podman"));
        command.env("CONTAINERS_CONF", self.dir.join("containers.conf"));
        for (flag, folder) in [("--root", self.dir.join("root")), ("--runroot", "/run/podman".into())] {
            command.arg(flag).arg(folder);
        }
        command.args(["--tmpdir", "/run/libpod"]);
        command
    }
}

impl Runtime for Podman {
    fn start(&self, machine: &Machine, spec: &PodSpec) -> anyhow::Result<Pod> {
        // It knows no namespaces and hands no annotations on: a pod's network says whether it is meshed.
        let network = if spec.meshed { PODS_NETWORK } else { PLAIN_NETWORK };
        let mut command = self.command(machine);
        command.args(["run", "--detach", "--name", &spec.name, "--network", network, "--dns", RESOLVER]);
        command.args(["--dns-option", "timeout:1", "--dns-option", "attempts:1"]);
        command.args(["--cgroup-parent", &machine.cgroup]);
        if let Some(port) = spec.host_port {
            command.args(["--publish", &format!("{port}:{}", mesh::PORT)]);
        }
        for (host, container) in image::mounts(&self.programs) {
            command.args(["--volume", &format!("{}:{container}:ro", host.display())]);
        }
        command.args(["--entrypoint", "", image::NAME]);
        if spec.app {
            command.args(super::app(&spec.name));
        } else {
            command.args(["/busybox", "sleep", "1000000"]);
        }
        let id = mesh::run(&mut command, "")?.trim().to_owned();
        let text = mesh::run(self.command(machine).args(["container", "inspect", &id]), "")?;
        let found: Value = serde_json::from_str(&text)?;
        let settings = &found[0]["NetworkSettings"];
        let word = |value: &Value| value.as_str().map(str::to_owned).context("podman doesn't say it");
        let own = &settings["Networks"][network];
        Ok(Pod {
            spec: spec.clone(),
            container: id.clone(),
            id,
            netns: word(&settings["SandboxKey"])?.into(),
            v4: word(&own["IPAddress"])?,
            v6: word(&own["GlobalIPv6Address"])?,
        })
    }

    fn exec(&self, machine: &Machine, pod: &Pod, args: &[&str]) -> Command {
        let mut command = self.command(machine);
        command.args(["exec", "--interactive", &pod.container, image::APP]).args(args);
        command
    }

    fn stop(&self, machine: &Machine, pod: &Pod) -> anyhow::Result<()> {
        mesh::run(self.command(machine).args(["stop", "--time", "0", &pod.id]), "").map(drop)
    }

    fn remove(&self, machine: &Machine, pod: &Pod) -> anyhow::Result<()> {
        let removal = ["rm", "--force", "--ignore", "--time", "0", &pod.id];
        mesh::run(self.command(machine).args(removal), "").map(drop)
    }

    fn discard(&self, machine: &Machine, spec: &PodSpec) -> anyhow::Result<()> {
        let removal = ["rm", "--force", "--ignore", "--time", "0", &spec.name];
        mesh::run(self.command(machine).args(removal), "").map(drop)
    }

    fn known(&self, machine: &Machine) -> anyhow::Result<Vec<String>> {
        let list = mesh::run(self.command(machine).args(["ps", "--all", "--format", "{{.Names}}"]), "")?;
        Ok(list.lines().map(str::to_owned).collect())
    }

    fn repeats_del(&self) -> bool {
        // `rm --force` says that the network couldn't be torn down, and forgets the container.
        false
    }

    fn service(&self, pod: &str) -> String {
        pod.to_owned()
    }
}

fn configuration(networks: &Networks) -> String {
    // Root may lack the right to raise limits, so podman's own must not be above them.
    format!(
        "[containers]\ndefault_ulimits = [\"nofile=4096:4096\", \"nproc=4096:4096\"]\n\
         [network]\nnetwork_backend = \"cni\"\ncni_plugin_dirs = [{bin:?}]\nnetwork_config_dir = {conf:?}\n\
         default_network = {PLAIN_NETWORK:?}\n\
         [engine]\ncgroup_manager = \"cgroupfs\"\nruntime = \"runc\"\nevents_logger = \"file\"\n",
        bin = networks.bin_dir.display().to_string(),
        conf = networks.conf_dir.display().to_string(),
    )
}
