//! A machine with processes of its own, on a host of the lab's network: what a container runtime wants.
//!
//! It has its own PID namespace, its own mounts, and an empty `/run`, `/dev/shm` and `/var/lib`. When its power
//! is cut, the kernel ends everything in it at once and no mount of it remains, so that nothing can outlive a test,
//! and a simulated power failure is one.

use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};

use anyhow::{Context as _, bail, ensure};

use super::Lab;
use super::net::{self, Host};

/// Where each hierarchy of control groups is; `unified` is among them on a machine of both versions.
pub(super) const CGROUPS: &str = "/sys/fs/cgroup";

/// The first process of a machine, as the lab sees it; 0 while the power is off. Shared with whatever runs there.
pub type Init = Arc<AtomicI32>;

/// A machine. Dropping it cuts its power.
#[derive(Debug)]
pub struct Machine {
    /// Its place in the network.
    pub host: Host,
    /// The parent of all control groups that its containers make.
    pub cgroup: String,
    init: Init,
    power: Option<Child>,
    program: PathBuf,
    /// What outlives a power failure: its `/var/lib`.
    disk: PathBuf,
    log: PathBuf,
}

impl Machine {
    /// Puts a machine into the network and switches it on.
    pub fn boot(lab: &mut Lab, name: &str) -> anyhow::Result<Self> {
        let host = lab.net.host(name)?;
        let disk = lab.dir().join(format!("{name}.disk"));
        super::create_open(&disk)?;
        let mut machine = Self {
            cgroup: format!("/{}", host.netns),
            host,
            init: Init::default(),
            power: None,
            program: lab.programs.path("lab-app"),
            disk,
            log: lab.log(&format!("{name}.machine")),
        };
        machine.power_on()?;
        Ok(machine)
    }

    /// Switches it on; nothing runs in it yet.
    pub fn power_on(&mut self) -> anyhow::Result<()> {
        ensure!(self.power.is_none(), "{} is on already", self.host.netns);
        let log = File::options().create(true).append(true).open(&self.log)?;
        let mut child = self
            .outside("unshare")
            .args(["--mount", "--pid", "--fork", "--kill-child=SIGKILL", "--mount-proc"])
            .arg(&self.program)
            .arg("machine")
            .arg("--disk")
            .arg(&self.disk)
            // Its end is the machine's: nothing survives the test, however that ends.
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .context("cannot run nsenter and unshare: is util-linux installed?")?;
        let output = child.stdout.take().context("invariant: piped")?;
        let mut line = String::new();
        BufReader::new(output).read_line(&mut line)?;
        if line.trim() != "up" {
            let _ = child.kill();
            let _ = child.wait();
            let said = std::fs::read_to_string(&self.log).unwrap_or_default();
            bail!("the machine {} doesn't start: {}", self.host.netns, said.trim());
        }
        let pid = i32::try_from(child.id())?;
        let init = child_of(pid).context("the machine has no first process")?;
        self.init.store(init, Ordering::Relaxed);
        self.power = Some(child);
        Ok(())
    }

    /// Cuts the power: no process of the machine gets to do anything any more, and only its disk remains.
    pub fn power_off(&mut self) {
        let Some(mut child) = self.power.take() else { return };
        let init = self.init.swap(0, Ordering::Relaxed);
        // The kernel ends every process of the namespace before the first one is collected.
        let _ = super::daemon::kill_pid(init);
        let _ = child.wait();
        remove_cgroups(self.cgroup.trim_start_matches('/'));
        // The namespace is the lab's and stays; the rules and links that its processes made go as with a kernel.
        let _ = self.outside("nft").args(["flush", "ruleset"]).status();
        for bridge in ["cni0", "cni1"] {
            let _ = self.host.ip(&["link", "del", bridge]);
        }
    }

    /// A command in the machine's place in the network, and in none of its other namespaces.
    fn outside(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.host.path().display())).arg(program);
        command
    }

    /// Who runs there needs this to find it, also after a power failure.
    pub fn init(&self) -> Init {
        self.init.clone()
    }

    /// A command on this machine.
    pub fn command(&self, program: &Path) -> Command {
        entering(self.init.load(Ordering::Relaxed), program)
    }

    /// A file of the machine, from outside.
    pub fn file(&self, path: &Path) -> PathBuf {
        let root = PathBuf::from(format!("/proc/{}/root", self.init.load(Ordering::Relaxed)));
        root.join(path.strip_prefix("/").unwrap_or(path))
    }

    /// The processes of the machine that run a program of this name, as the lab sees them.
    pub fn running(&self, program: &str) -> Vec<i32> {
        let space = |pid: i32| std::fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
        let own = space(self.init.load(Ordering::Relaxed));
        let mut found = net::processes();
        found.retain(|pid| net::runs(*pid, program) && own.is_some() && space(*pid) == own);
        found
    }

    /// Everything that is mounted below one of these folders, as the machine sees it.
    pub fn mounts(&self, below: &[&Path]) -> Vec<String> {
        let text = std::fs::read_to_string(self.file(Path::new("/proc/self/mounts")))
            .or_else(|_| {
                std::fs::read_to_string(format!("/proc/{}/mounts", self.init.load(Ordering::Relaxed)))
            })
            .unwrap_or_default();
        let points = text.lines().filter_map(|line| line.split(' ').nth(1));
        let wanted = |point: &&str| below.iter().any(|folder| Path::new(point).starts_with(folder));
        points.filter(wanted).map(str::to_owned).collect()
    }

    /// The control groups that its containers have made.
    pub fn cgroups(&self) -> Vec<PathBuf> {
        let own = hierarchies().into_iter().map(|dir| dir.join(self.cgroup.trim_start_matches('/')));
        own.flat_map(|dir| folders(&dir)).collect()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.power_off();
    }
}

/// A command on the machine whose first process this is. The program is a child of the process that this starts.
pub(super) fn entering(init: i32, program: &Path) -> Command {
    let mut command = Command::new("nsenter");
    command.arg(format!("--target={init}")).args(["--mount", "--pid", "--net"]).arg(program);
    command
}

/// The first child of a process; none while it has none.
pub(super) fn child_of(pid: i32) -> Option<i32> {
    children_of(pid).into_iter().next()
}

/// The children of a process.
pub(super) fn children_of(pid: i32) -> Vec<i32> {
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    children.split_whitespace().filter_map(|child| child.parse().ok()).collect()
}

/// The folder of each hierarchy of control groups; with version 2 alone, [`CGROUPS`] itself.
pub(super) fn hierarchies() -> Vec<PathBuf> {
    let dirs = folders(Path::new(CGROUPS));
    // With version 2 alone there is one hierarchy, the folder itself.
    if Path::new(CGROUPS).join("cgroup.controllers").exists() { vec![CGROUPS.into()] } else { dirs }
}

fn folders(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
        .collect()
}

/// Removes the control groups whose name begins so, which nobody may be in any more.
pub(super) fn remove_cgroups(prefix: &str) {
    fn remove(dir: &Path) {
        for inner in folders(dir) {
            remove(&inner);
        }
        // Not empty means that somebody is still in it, whose lab will remove it.
        let _ = std::fs::remove_dir(dir);
    }
    for dir in cgroups(prefix) {
        remove(&dir);
    }
}

/// The control groups whose name begins so, in all hierarchies.
pub(super) fn cgroups(prefix: &str) -> Vec<PathBuf> {
    let mut all: Vec<PathBuf> = hierarchies().iter().flat_map(|dir| folders(dir)).collect();
    all.retain(|dir| dir.file_name().is_some_and(|name| name.to_string_lossy().starts_with(prefix)));
    all
}
