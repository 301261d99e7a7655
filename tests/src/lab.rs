//! Network namespaces, real daemons and a real Envoy for end-to-end tests.
//!
//! A [`Lab`] owns namespaces joined by one bridge, a folder for everything that runs in it, and the processes it
//! started. Names are unique, so two labs at once don't meet; nothing is put into the machine's own network
//! namespace. Dropping a lab removes everything; a lab that was told of a failure keeps its logs and says where.
//!
//! * [`net`]: namespaces, bridge, addresses.
//! * [`daemon`]: processes that can be killed and restarted.
//! * [`program`]: ordinary HTTP programs that know nothing of a mesh.
//! * [`capture`]: every packet that crosses the bridge.
//! * [`fault`]: a full disk, a kernel without nf_tables; [`flood`]: very many resources.
//! * [`machine`]: a host with processes and mounts of its own; [`runtime`]: real container runtimes on it.
//! * [`vm`]: a machine with a systemd of its own; [`packages`]: what is installed on it.
//! * [`http`]: one request over a unix socket.
//! * [`mesh`]: control plane, nodes and workloads on top.
//! * [`pair`]: the smallest mesh that does something; [`soak`]: its parts killed in turn.
//! * [`sweep`]: removes a lab whose test was killed.
//! * [`wait`]: waiting for a condition, with a deadline and an explanation.

pub mod capture;
pub mod daemon;
pub mod fault;
pub mod flood;
pub mod http;
pub mod machine;
pub mod mesh;
pub mod net;
pub mod packages;
pub mod pair;
pub mod program;
pub mod runtime;
pub mod soak;
pub mod sweep;
pub mod vm;
pub mod wait;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context as _, bail};

use self::net::Network;
use self::sweep::Sweeper;

static COUNTER: AtomicU32 = AtomicU32::new(0);

/// Where the programs under test are.
#[derive(Debug, Clone)]
pub struct Programs {
    /// Folder with `ursa`, `ursa-control`, `ursa-agent`, `ursa-shim`, `ursa-init` and `lab-app`.
    pub bin_dir: PathBuf,
    /// Envoy's binary.
    pub envoy: PathBuf,
}

impl Programs {
    /// From the folder of the running program (tests run in `deps/` below it) and `URSA_ENVOY`.
    pub fn discover() -> anyhow::Result<Self> {
        let exe = std::env::current_exe().context("cannot tell where this program is")?;
        let mut bin_dir = exe.parent().context("this program is nowhere")?.to_owned();
        if bin_dir.ends_with("deps") {
            bin_dir.pop();
        }
        let envoy = std::env::var_os("URSA_ENVOY")
            .map(PathBuf::from)
            .or_else(|| Some(bin_dir.parent()?.join("envoy/envoy")))
            .context("URSA_ENVOY names no Envoy")?;
        Self { bin_dir, envoy }.checked()
    }

    /// Refuses to go on with a program missing.
    pub fn checked(self) -> anyhow::Result<Self> {
        for program in ["ursa", "ursa-control", "ursa-agent", "ursa-shim", "lab-app"] {
            let path = self.bin_dir.join(program);
            if !path.exists() {
                bail!("{} is missing: run `make build`", path.display());
            }
        }
        if !self.envoy.exists() {
            bail!("{} is missing: run `make envoy`, or set URSA_ENVOY", self.envoy.display());
        }
        Ok(self)
    }

    /// The path of one of our programs.
    pub fn path(&self, name: &str) -> PathBuf {
        self.bin_dir.join(name)
    }
}

/// Namespaces, a folder, and what runs in them.
#[derive(Debug)]
pub struct Lab {
    /// The programs under test.
    pub programs: Programs,
    /// The network.
    pub net: Network,
    /// What begins every name that this lab gives.
    pub prefix: String,
    dir: PathBuf,
    keep: bool,
    sweeper: Sweeper,
    proxies: Arc<AtomicU32>,
}

impl Lab {
    /// A lab with an empty network.
    pub fn new(programs: &Programs) -> anyhow::Result<Self> {
        if !nix::unistd::geteuid().is_root() {
            bail!("the lab builds network namespaces and wants root: run it with sudo");
        }
        let prefix = format!("ursa{:x}-{}", std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed));
        // Not below target/: sockets have paths of 107 bytes at most, and Envoy's user must be able to pass through
        // every folder above, which a checkout in somebody's home doesn't promise.
        let dir = std::env::temp_dir().join(&prefix);
        let sweeper = Sweeper::start(&programs.path("lab-app"), &prefix)?;
        create_open(&dir)?;
        create_open(&dir.join("log"))?;
        let programs = reachable(programs, &dir)?;
        let net = Network::new(&prefix).inspect_err(|_| {
            Self::remove(&prefix);
        })?;
        Ok(Self { programs, net, prefix, dir, keep: false, sweeper, proxies: Arc::default() })
    }

    /// The folder of everything that this lab writes.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where logs go.
    pub fn log(&self, name: &str) -> PathBuf {
        self.dir.join("log").join(format!("{name}.log"))
    }

    /// Leaves everything as it is when this lab is dropped.
    pub fn keep(&mut self) {
        self.keep = true;
        self.sweeper.dismiss();
    }

    /// Moves the logs out of the way of the removal, and says where they are.
    pub fn save_logs(&self) -> Option<PathBuf> {
        let saved = std::env::temp_dir().join(format!("{}-logs", self.prefix));
        std::fs::rename(self.dir.join("log"), &saved).ok()?;
        // What each daemon believed, for whoever looks at the failure.
        for entry in std::fs::read_dir(&self.dir).ok()?.flatten() {
            // The logs of a node's shims and Envoys, which its errors name.
            for log in std::fs::read_dir(entry.path().join("run/log")).into_iter().flatten().flatten() {
                let name = format!("{}.{}", entry.file_name().display(), log.file_name().display());
                let _ = std::fs::copy(log.path(), saved.join(name));
            }
            if entry.path().extension().is_some_and(|kind| kind == "yaml") {
                let _ = std::fs::copy(entry.path(), saved.join(entry.file_name()));
            }
        }
        Some(saved)
    }

    /// Removes what a lab of this prefix left: processes, namespaces, files. Says what couldn't be removed.
    pub fn remove(prefix: &str) -> Vec<String> {
        let mut problems = net::remove(prefix);
        machine::remove_cgroups(prefix);
        let dir = std::env::temp_dir().join(prefix);
        match std::fs::remove_dir_all(&dir) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                problems.push(format!("cannot remove {}: {error}", dir.display()));
            }
            _ => {}
        }
        problems
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if self.keep {
            return;
        }
        if std::thread::panicking()
            && let Some(logs) = self.save_logs()
        {
            eprintln!("the lab's logs: {}", logs.display());
        }
        for problem in Self::remove(&self.prefix) {
            eprintln!("lab: {problem}");
        }
    }
}

fn create_open(dir: &Path) -> anyhow::Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o755))?;
    Ok(())
}

/// Copies programs that other users could not execute where they are, as in a checkout below `/root`.
fn reachable(programs: &Programs, dir: &Path) -> anyhow::Result<Programs> {
    use std::os::unix::fs::PermissionsExt as _;
    let open = |path: &Path| {
        path.ancestors()
            .skip(1)
            .all(|folder| folder.metadata().is_ok_and(|metadata| metadata.permissions().mode() & 0o001 != 0))
    };
    let bin_dir = std::fs::canonicalize(&programs.bin_dir)?;
    let envoy = std::fs::canonicalize(&programs.envoy)?;
    if open(&bin_dir.join("ursa")) && open(&envoy) {
        return Ok(Programs { bin_dir, envoy });
    }
    let copies = dir.join("bin");
    create_open(&copies)?;
    for name in ["ursa", "ursa-control", "ursa-agent", "ursa-shim", "ursa-init", "ursa-cni", "lab-app"] {
        let from = bin_dir.join(name);
        if from.exists() {
            std::fs::copy(&from, copies.join(name))
                .with_context(|| format!("cannot copy {}", from.display()))?;
        }
    }
    std::fs::copy(&envoy, copies.join("envoy")).context("cannot copy Envoy")?;
    Ok(Programs { envoy: copies.join("envoy"), bin_dir: copies })
}
