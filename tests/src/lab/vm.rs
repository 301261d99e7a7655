//! A virtual machine with a systemd of its own as PID 1, on the lab's network: `systemd-nspawn` around Debian's root.
//!
//! ```ignore
//! let mut lab = Lab::new(&Programs::discover()?)?;
//! let mut vm = Vm::new(&mut lab, "web")?;                       // has a disk and a place in the network, and is off
//! vm.write("/etc/systemd/system/web.service", "[Service]\n…")?; // files can be put there on and off
//! vm.boot()?;                                                   // until systemd says "running" or "degraded"
//! vm.sh("systemctl enable --now web")?;                         // a command that must succeed; gives what it printed
//! vm.run(&["dpkg", "-i", "/x.deb"])?.status;                    // one that may fail; off, it runs without systemd
//! vm.run_as("user", &["id"])?;                                  // as somebody else
//! vm.run_unit(&["User=user"], &["id"])?;                        // in a transient unit: in a control group of the machine
//! vm.copy_in(&deb, "/x.deb", 0o644)?;                           // and read, write_as, exists
//! vm.unit("web.service").wait("active", SOON)?.main_pid;        // state, pids, restarts, journal: see `units`
//! vm.reboot()?;  vm.power_cut();  vm.power_on()?;               // the disk stays, everything else is new
//! Client::spawn(vm.command(vm::APP).arg("client"))?;            // the lab's programs are below /opt/lab on every machine
//! ```
//!
//! * Its disk is an overlay over the root that `make vm-root` made: nothing else of this machine is in it but the lab's
//!   programs, read only, in [`BIN`] and [`ENVOY`]. It is a folder of the lab's: `Vm::disk_file` reads it while it is off.
//! * Its `eth0` is a cable to the lab's bridge, plugged in anew at each boot, down and with no address until its own
//!   systemd-networkd has set it up: 10.99.0.N and fd99::N, known before as `vm.host`. A capture at `lab.net.bridge()`
//!   sees its first packet. Its network namespace has the name `vm.host.netns`, but is another one after each boot.
//! * Every process of it is in a PID namespace whose first process ends when the test does, however that ends; its mounts
//!   are in a mount namespace that goes with it.
//! * Its control groups are below one of its own in each hierarchy. A process that [`Vm::run`] starts isn't in them (it is
//!   in the test's), and systemd doesn't know it; one that [`Vm::run_unit`] starts is in a unit.
//! * `MemoryMax=`, `TasksMax=` and so on do nothing, where the lab's machine has the controllers on version 1, unless the
//!   machine was [`Vm::with_limits`]: then its controllers are on version 1, too (`memory.limit_in_bytes`), and only its
//!   units are on version 2. [`Vm::with_old_cgroups`] has nothing but version 1, where systemd doesn't always hear that a
//!   unit's last process has ended, and a stop then lasts as long as `TimeoutStopSec=`.
//! * Two pid numbers: a [`units::State`] has the machine's own, [`Vm::running`] the lab's; [`Vm::lab_pid`] translates.
//! * What is missing: its kernel, clock and devices are those of the lab's machine, a power cut loses nothing that was
//!   written, and `LimitNOFILE=` beyond the limit of whoever runs the tests is that limit.

pub mod exec;
pub mod guard;
pub mod units;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use sha2::Digest as _;

use self::guard::Cgroups;
use super::machine::{self, Init};
use super::net::{self, Cable, Host};
use super::{Lab, create_open, daemon, wait};

/// Where a machine has the lab's programs.
pub const BIN: &str = "/opt/lab/bin";
/// The lab's ordinary program among them.
pub const APP: &str = "/opt/lab/bin/lab-app";
/// Where a machine has Envoy.
pub const ENVOY: &str = "/opt/lab/envoy";

/// How long anything may take that a machine does by itself: booting, a command, shutting down.
const PATIENCE: Duration = Duration::from_secs(120);
/// How long until the first process is there.
const IGNITION: Duration = Duration::from_secs(20);

/// A virtual machine. Dropping it cuts its power and removes it; its journal is among the lab's logs if the test failed.
#[derive(Debug)]
pub struct Vm {
    /// Its place in the network.
    pub host: Host,
    cable: Cable,
    init: Init,
    power: Option<Child>,
    /// The program that is its first process's parent.
    program: PathBuf,
    envoy: PathBuf,
    root: PathBuf,
    disk: PathBuf,
    machine_id: String,
    limits: bool,
    cgroups: Cgroups,
    console: PathBuf,
    journal: PathBuf,
}

impl Vm {
    /// Gives it a disk and a place in the network; it is off. Its name is its hostname.
    pub fn new(lab: &mut Lab, name: &str) -> anyhow::Result<Self> {
        let root = root(&lab.programs.bin_dir)?;
        let (host, cable) = lab.net.socket(name)?;
        let disk = lab.dir().join(format!("{name}.vm"));
        create_open(&disk)?;
        let digest = sha2::Sha256::digest(&host.netns);
        let vm = Self {
            machine_id: digest.iter().take(16).fold(String::new(), |id, byte| format!("{id}{byte:02x}")),
            host,
            cable,
            init: Init::default(),
            power: None,
            program: lab.programs.path("lab-app"),
            envoy: lab.programs.envoy.clone(),
            root,
            disk,
            limits: false,
            cgroups: Cgroups::Unified,
            console: lab.log(&format!("{name}.console")),
            journal: lab.log(&format!("{name}.journal")),
        };
        vm.prepare(name)?;
        Ok(vm)
    }

    /// A new machine that has booted.
    pub fn booted(lab: &mut Lab, name: &str) -> anyhow::Result<Self> {
        let mut vm = Self::new(lab, name)?;
        vm.boot()?;
        Ok(vm)
    }

    /// With limits of memory, processes and CPU that hold. To be said before it is switched on.
    #[must_use]
    pub fn with_limits(mut self) -> Self {
        self.limits = true;
        // Where controllers are on version 1, only version 1 can have them.
        self.cgroups = Cgroups::Host;
        self
    }

    /// With control groups of version 1. To be said before it is switched on.
    #[must_use]
    pub fn with_old_cgroups(mut self) -> Self {
        self.cgroups = Cgroups::Legacy;
        self
    }

    /// What makes it a machine of its own: name, id and addresses.
    fn prepare(&self, name: &str) -> anyhow::Result<()> {
        let Host { v4, v6, .. } = &self.host;
        let (gateway4, gateway6) = net::gateways();
        let network = format!(
            "[Match]\nName=eth0\n\n[Network]\nIPv6AcceptRA=no\nIPv6DuplicateAddressDetection=0\nGateway={gateway4}\n\
             Gateway={gateway6}\n\n[Address]\nAddress={v4}/24\n\n[Address]\nAddress={v6}/64\nDuplicateAddressDetection=none\n"
        );
        let files = [
            ("etc/hostname", format!("{name}\n")),
            ("etc/hosts", format!("127.0.0.1 localhost\n::1 localhost\n127.0.1.1 {name}\n")),
            ("etc/machine-id", format!("{}\n", self.machine_id)),
            ("etc/resolv.conf", net::resolver()),
            ("etc/systemd/network/10-lab.network", network),
        ];
        let upper = self.disk.join(guard::UPPER);
        create_open(&upper)?;
        for (path, text) in files {
            let path = upper.join(path);
            for folder in ["etc", "etc/systemd", "etc/systemd/network"] {
                create_open(&upper.join(folder))?;
            }
            std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        }
        Ok(())
    }

    /// Switches it on and waits until its systemd has done what there is to do at boot; how long that took.
    pub fn boot(&mut self) -> anyhow::Result<Duration> {
        let start = Instant::now();
        self.power_on()?;
        self.wait_booted(PATIENCE)?;
        Ok(start.elapsed())
    }

    /// Switches it on, and waits only until its systemd is the first process.
    pub fn power_on(&mut self) -> anyhow::Result<()> {
        ensure!(self.power.is_none(), "{} is on already", self.host.netns);
        self.cable.plug()?;
        let console = File::options().create(true).append(true).open(&self.console)?;
        let mut child = self
            .guard(&["--boot"])
            // Its end is the machine's: nothing survives the test, however that ends.
            .stdin(Stdio::piped())
            .stdout(console.try_clone()?)
            .stderr(console)
            .spawn()
            .context("cannot run nsenter and unshare: is util-linux installed?")?;
        let outer = i32::try_from(child.id())?;
        // This process, its only child (the guard), nspawn, and the first process among nspawn's children.
        let find = || {
            if let Ok(Some(status)) = child.try_wait() {
                return Ok(Err(status));
            }
            let nspawn = machine::child_of(outer).and_then(machine::child_of).ok_or("no nspawn")?;
            let first =
                machine::children_of(nspawn).into_iter().find(|pid| net::runs_exactly(*pid, "systemd"));
            first.map(Ok).ok_or_else(|| "nspawn, but no systemd".to_owned())
        };
        let found = wait::until("the first process of a machine", IGNITION, find);
        match found {
            Ok((Ok(first), _)) => {
                self.init.store(first, Ordering::Relaxed);
                self.power = Some(child);
                Ok(())
            }
            other => {
                let _ = child.kill();
                let _ = child.wait();
                let why = match other {
                    Ok((Err(status), _)) => format!("nspawn ended ({status})"),
                    Ok(_) => String::new(),
                    Err(error) => format!("{error:#}"),
                };
                bail!("the machine {} doesn't start: {why}: {}", self.host.netns, self.last_words())
            }
        }
    }

    /// Waits until its systemd has done what there is to do at boot; `running`, or `degraded` if some of it failed.
    pub fn wait_booted(&self, deadline: Duration) -> anyhow::Result<String> {
        let probe = || {
            let output = self
                .run(&["systemctl", "is-system-running", "--wait"])
                .map_err(|error| format!("{error:#}"))?;
            match output.stdout.trim() {
                state @ ("running" | "degraded") => Ok(state.to_owned()),
                _ => Err(format!("{} (it says {})", output.brief(), self.last_words())),
            }
        };
        let (state, _) = wait::until("a machine to have booted", deadline, probe)?;
        let split = !Path::new(machine::CGROUPS).join("cgroup.controllers").exists();
        if self.limits && split {
            // Nspawn leaves the controllers' hierarchies read-only; systemd looks once whether it may write there.
            let root = machine::CGROUPS;
            self.sh(&format!(
                "for one in memory pids cpu cpuacct; do mount -o remount,bind,rw {root}/$one; done; systemctl daemon-reexec"
            ))?;
        }
        Ok(state)
    }

    /// Shuts it down in order.
    pub fn shut_down(&mut self) -> anyhow::Result<()> {
        let asked = self.run(&["systemctl", "poweroff"])?;
        let Some(child) = self.power.as_mut() else { bail!("invariant: a machine that runs commands is on") };
        let ended = wait::until("the machine to shut down", PATIENCE, || match child.try_wait() {
            Ok(Some(status)) => Ok(status),
            _ => Err(format!("it still runs; poweroff: {}", asked.brief())),
        });
        if let Err(error) = ended {
            let jobs = self.run(&["systemctl", "list-jobs"]).map(|jobs| jobs.stdout).unwrap_or_default();
            bail!("{error:#}; its jobs:\n{jobs}{}", self.last_words());
        }
        self.power_cut();
        Ok(())
    }

    /// Shuts it down and boots it again; how long the boot took.
    pub fn reboot(&mut self) -> anyhow::Result<Duration> {
        self.shut_down()?;
        self.boot()
    }

    /// Cuts the power: no process of the machine gets to do anything any more, and only its disk remains.
    pub fn power_cut(&mut self) {
        let Some(mut child) = self.power.take() else { return };
        self.init.store(0, Ordering::Relaxed);
        // The kernel ends every process of the guard's namespace before the guard is collected.
        if let Some(guard) = i32::try_from(child.id()).ok().and_then(machine::child_of) {
            let _ = daemon::kill_pid(guard);
        }
        let _ = child.kill();
        let _ = child.wait();
        machine::remove_cgroups(&self.host.netns);
        self.cable.unplug();
    }

    /// Whether it is on.
    pub fn is_on(&mut self) -> bool {
        self.power.as_mut().is_some_and(|child| matches!(child.try_wait(), Ok(None)))
    }

    /// The machine's first process, for what runs there across reboots.
    pub fn init(&self) -> Init {
        self.init.clone()
    }

    /// The processes of the machine that run a program whose name begins so, by the lab's numbers.
    pub fn running(&self, program: &str) -> Vec<i32> {
        let mut found = self.processes();
        found.retain(|pid| net::runs(*pid, program));
        found
    }

    /// The lab's number of a process that the machine knows by this one.
    pub fn lab_pid(&self, pid: i32) -> Option<i32> {
        let number = |outer: &i32| {
            let status = std::fs::read_to_string(format!("/proc/{outer}/status")).ok()?;
            let line = status.lines().find_map(|line| line.strip_prefix("NSpid:"))?;
            line.split_whitespace().next_back()?.parse::<i32>().ok()
        };
        self.processes().into_iter().find(|outer| number(outer) == Some(pid))
    }

    fn processes(&self) -> Vec<i32> {
        let space = |pid: i32| std::fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
        let own = space(self.init.load(Ordering::Relaxed));
        let mut found = net::processes();
        found.retain(|pid| own.is_some() && space(*pid) == own);
        found
    }

    /// A file of the machine's disk as it is while the machine is off, if anybody has changed it since the root was made.
    pub fn disk_file(&self, path: &str) -> PathBuf {
        self.disk.join(guard::UPPER).join(path.trim_start_matches('/'))
    }

    /// The last lines of its console.
    fn last_words(&self) -> String {
        let text = std::fs::read_to_string(&self.console).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(10)..].join("\n    ")
    }

    /// The program that mounts the machine's disk and then runs nspawn, in namespaces of its own.
    fn guard(&self, args: &[&str]) -> Command {
        let mut command = Command::new("nsenter");
        if args.contains(&"--boot") {
            command.arg(format!("--net={}", self.host.path().display()));
        }
        command
            .args(["unshare", "--mount", "--pid", "--fork", "--kill-child=SIGKILL", "--mount-proc"])
            .arg(&self.program)
            .arg("vm")
            .arg("--root")
            .arg(&self.root)
            .arg("--disk")
            .arg(&self.disk)
            .args(["--name", &self.host.netns])
            .arg("--bind")
            .arg(format!("{}:{BIN}", self.program.parent().unwrap_or(Path::new("/")).display()))
            .arg("--bind")
            .arg(format!("{}:{ENVOY}", self.envoy.display()))
            .args(["--cgroups", &self.cgroups.name()])
            .args(args);
        command
    }

    /// Puts its journal among the lab's logs.
    fn save_journal(&self) {
        let folder = self.disk_file("/var/log/journal").join(&self.machine_id);
        let file = File::create(&self.journal);
        let (Ok(file), true) = (file, folder.exists()) else { return };
        let mut command = Command::new("journalctl");
        command.args(["--no-pager", "--output=short-precise", "--directory"]).arg(folder);
        let _ = command.stdin(Stdio::null()).stdout(file).stderr(Stdio::null()).status();
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.power_cut();
        if std::thread::panicking() {
            self.save_journal();
        }
        // The work folder's insides belong to the kernel and are of no use to anybody.
        let _ = std::fs::remove_dir_all(&self.disk);
    }
}

impl From<&Vm> for daemon::Place {
    fn from(vm: &Vm) -> Self {
        Self::Machine(vm.init())
    }
}

/// The root file system below every machine.
fn root(bin_dir: &Path) -> anyhow::Result<PathBuf> {
    let dir = std::env::var_os("URSA_VM_DIR").map(PathBuf::from);
    let dir = dir.or_else(|| Some(bin_dir.parent()?.join("vm"))).context("URSA_VM_DIR names no folder")?;
    let root = dir.join("root");
    root.canonicalize().with_context(|| format!("{} is missing: run `make vm-root`", root.display()))
}
