//! What stands between the lab and a machine's first process: it mounts the machine's disk, enters the machine's own
//! control groups and runs nspawn, in mount and PID namespaces that go with it.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, bail};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::wait::{WaitStatus, wait};

use crate::lab::machine;

/// What a machine has changed of its root, in the folder of its disk.
pub(super) const UPPER: &str = "upper";
const WORK: &str = "work";
const MERGED: &str = "merged";

/// Which control groups a machine has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Cgroups {
    /// Version 2 alone.
    #[default]
    Unified,
    /// Version 1 alone.
    Legacy,
    /// As the lab's machine has them: version 2 alone, or 1 for limits and 2 for knowing processes.
    Host,
}

impl Cgroups {
    /// As the command line has it.
    pub(super) fn name(self) -> String {
        clap::ValueEnum::to_possible_value(&self).map(|value| value.get_name().to_owned()).unwrap_or_default()
    }
}

/// What `lab-app vm` is told.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The root file system that many machines share.
    #[arg(long)]
    root: PathBuf,
    /// The folder of this machine's own layer.
    #[arg(long)]
    disk: PathBuf,
    /// Its unique name.
    #[arg(long)]
    name: String,
    /// `SOURCE:TARGET`: what it sees of the lab, read only.
    #[arg(long)]
    bind: Vec<String>,
    /// Which control groups it has.
    #[arg(long, value_enum, default_value_t)]
    cgroups: Cgroups,
    /// Starts systemd, and ends when the standard input does.
    #[arg(long)]
    boot: bool,
    /// Runs the program with nothing but the disk: nspawn takes a quarter of a second, and a file doesn't need it.
    #[arg(long, conflicts_with = "boot")]
    plain: bool,
    /// A program to run instead of systemd.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

/// Runs the machine until it ends; the exit code of nspawn.
pub fn run(args: &Args) -> anyhow::Result<i32> {
    let merged = mount_disk(args)?;
    if args.plain {
        let status = Command::new("chroot").arg(&merged).args(&args.command).status();
        return Ok(status.context("cannot run chroot")?.code().unwrap_or(1));
    }
    hide_run()?;
    let mut command = entering(&cgroups(&args.name)?);
    command
        .arg("systemd-nspawn")
        .args(["--quiet", "--register=no", "--keep-unit", "--resolv-conf=off", "--timezone=off"])
        .args(["--link-journal=no", "--console=pipe", "--capability=CAP_NET_ADMIN"])
        .arg(format!("--machine={}", args.name))
        .arg(format!("--directory={}", merged.display()))
        .args(args.bind.iter().map(|bind| format!("--bind-ro={bind}")))
        // A machine sets its own kernel's network up; nspawn would allow it with a network of its own making only.
        .env("SYSTEMD_NSPAWN_API_VFS_WRITABLE", "network");
    match args.cgroups {
        Cgroups::Unified => command.env("SYSTEMD_NSPAWN_UNIFIED_HIERARCHY", "1"),
        Cgroups::Legacy => command.env("SYSTEMD_NSPAWN_UNIFIED_HIERARCHY", "0"),
        Cgroups::Host => command.env_remove("SYSTEMD_NSPAWN_UNIFIED_HIERARCHY"),
    };
    if args.boot {
        command.args(["--network-namespace-path=/proc/self/ns/net", "--boot"]).stdin(Stdio::null());
        // The machine's power comes from here.
        std::thread::spawn(|| {
            let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
            std::process::exit(0);
        });
    } else {
        command
            .args(["--private-network", "--setenv=SYSTEMD_COLORS=0", "--setenv=SYSTEMD_URLIFY=0", "--"])
            .args(&args.command);
    }
    let child = command.spawn().context("cannot run systemd-nspawn")?;
    let child = i32::try_from(child.id())?;
    // The first process of a namespace has orphans to collect.
    loop {
        match wait().context("cannot wait for systemd-nspawn")? {
            WaitStatus::Exited(pid, code) if pid.as_raw() == child => return Ok(code),
            WaitStatus::Signaled(pid, signal, _) if pid.as_raw() == child => {
                bail!("systemd-nspawn: {signal}")
            }
            _ => {}
        }
    }
}

fn mount_disk(args: &Args) -> anyhow::Result<PathBuf> {
    let (upper, work, merged) = (args.disk.join(UPPER), args.disk.join(WORK), args.disk.join(MERGED));
    // The kernel refuses a work folder of an earlier mount that didn't promise to sync.
    match std::fs::remove_dir_all(&work) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("cannot empty {}", work.display()));
        }
        _ => {}
    }
    for dir in [&upper, &work, &merged] {
        std::fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    }
    let layers =
        format!("lowerdir={},upperdir={},workdir={}", args.root.display(), upper.display(), work.display());
    // Nobody wants to wait for a disk that is thrown away.
    let fast = format!("{layers},volatile");
    let overlay = |data: &str| mount(Some("disk"), &merged, Some("overlay"), MsFlags::empty(), Some(data));
    overlay(&fast).or_else(|_| overlay(&layers)).with_context(|| {
        format!(
            "cannot mount an overlay with {layers}: a folder on an overlay can't be the upper one; \
             set TMPDIR to a folder on another file system"
        )
    })?;
    Ok(merged)
}

/// An empty `/run`, so that nspawn leaves nothing there; and without the namespaces of other machines and labs, which
/// would live as long as this one.
fn hide_run() -> anyhow::Result<()> {
    let _ = umount2("/run/netns", MntFlags::MNT_DETACH);
    mount(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::empty(), None::<&str>)
        .context("cannot mount an empty /run")
}

/// Makes the machine's own control groups; the files that one enters them by.
fn cgroups(name: &str) -> anyhow::Result<Vec<PathBuf>> {
    let mut entrances = Vec::new();
    for hierarchy in machine::hierarchies() {
        // With version 1, those that systemd makes groups in. The others want settings before anybody may enter.
        let known = ["unified", "systemd", "memory", "pids", "cpu", "cpuacct", "cpu,cpuacct"];
        let only = hierarchy == Path::new(machine::CGROUPS);
        if !only && !hierarchy.file_name().is_some_and(|own| known.iter().any(|known| own == *known)) {
            continue;
        }
        if only {
            // So that limits hold; where somebody forbids it they don't, and tests of limits say so.
            let _ = std::fs::write(hierarchy.join("cgroup.subtree_control"), "+memory +pids +cpu");
        }
        let own = hierarchy.join(name);
        std::fs::create_dir_all(&own).with_context(|| format!("cannot create {}", own.display()))?;
        entrances.push(own.join("cgroup.procs"));
    }
    Ok(entrances)
}

/// A command that enters these control groups first, and the caller doesn't.
fn entering(entrances: &[PathBuf]) -> Command {
    let mut script = String::new();
    for entrance in entrances {
        let _ = writeln!(script, "echo 0 > '{}' || exit 1", entrance.display());
    }
    script.push_str("exec \"$@\"");
    let mut command = Command::new("sh");
    command.args(["-c", &script, "vm"]);
    command
}
