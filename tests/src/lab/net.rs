//! Namespaces that share one bridge, itself in a namespace.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context as _, bail};

/// The IPv4 network of every lab; labs don't see each other.
const V4: &str = "10.99.0";
const V6: &str = "fd99::";
const BRIDGE: &str = "net";

/// A bridge and the hosts on it.
#[derive(Debug)]
pub struct Network {
    prefix: String,
    hosts: u8,
}

/// A namespace with one address per family.
#[derive(Debug, Clone)]
pub struct Host {
    /// The namespace's name, as `ip netns` knows it.
    pub netns: String,
    /// Its IPv4 address.
    pub v4: String,
    /// Its IPv6 address.
    pub v6: String,
}

impl Host {
    /// The file that stands for the namespace.
    pub fn path(&self) -> PathBuf {
        PathBuf::from("/run/netns").join(&self.netns)
    }

    /// A command in this namespace and its view of `/etc/resolv.conf`.
    pub fn command(&self, program: &std::path::Path) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.netns]).arg(program);
        command
    }

    /// The processes that run in this namespace.
    pub fn pids(&self) -> Vec<i32> {
        pids(&self.netns)
    }

    /// The processes here that run a program of this name.
    pub fn running(&self, program: &str) -> Vec<i32> {
        self.pids().into_iter().filter(|pid| runs(*pid, program)).collect()
    }

    /// Runs `work` on a thread of its own in this namespace, with an event loop whose sockets are here too.
    pub fn within<T: Send>(&self, work: impl AsyncFnOnce() -> anyhow::Result<T> + Send) -> anyhow::Result<T> {
        let file =
            std::fs::File::open(self.path()).with_context(|| format!("no namespace {}", self.netns))?;
        let run = || {
            nix::sched::setns(&file, nix::sched::CloneFlags::CLONE_NEWNET)
                .context("cannot enter the namespace")?;
            tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(work())
        };
        std::thread::scope(|scope| {
            scope.spawn(run).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Runs an `ip` command in this namespace.
    pub fn ip(&self, args: &[&str]) -> anyhow::Result<String> {
        let mut all = vec!["-n", self.netns.as_str()];
        all.extend_from_slice(args);
        ip(&all, "")
    }
}

/// What connects a machine to the bridge. Nothing is there until it is plugged in.
#[derive(Debug)]
pub struct Cable {
    bridge: String,
    port: String,
    netns: String,
    /// The same at each boot, as with real hardware: neighbours needn't learn it anew.
    mac: String,
}

impl Cable {
    /// Makes the machine's namespace, with the cable's end as an `eth0` that is down and has no address.
    pub fn plug(&self) -> anyhow::Result<()> {
        let Self { bridge, port, netns, mac } = self;
        self.unplug();
        ip(&["netns", "add", netns], "")?;
        let batch = format!(
            "link add {port} type veth peer name eth0 address {mac} netns {netns}\nlink set {port} master br0\n\
             link set {port} up\n"
        );
        ip(&["-n", bridge, "-batch", "-"], &batch).map(drop)
    }

    /// Removes both ends, and the name of the namespace, which itself goes with its last process.
    pub fn unplug(&self) {
        let _ = ip(&["-n", &self.bridge, "link", "del", &self.port], "");
        let _ = ip(&["netns", "del", &self.netns], "");
    }
}

/// The bridge's addresses, where everything goes that is for nobody on it.
pub fn gateways() -> (String, String) {
    (format!("{V4}.1"), format!("{V6}1"))
}

/// The `/etc/resolv.conf` of every host: the resolver is the bridge, where nobody answers, because names must come from
/// the mesh.
pub fn resolver() -> String {
    format!("nameserver {V4}.1\noptions timeout:1 attempts:1\n")
}

impl Network {
    pub(super) fn new(prefix: &str) -> anyhow::Result<Self> {
        let netns = format!("{prefix}-{BRIDGE}");
        ip(&["netns", "add", &netns], "")?;
        let network = Self { prefix: prefix.to_owned(), hosts: 1 };
        let batch = format!(
            "link set lo up\nlink add br0 type bridge\nlink set br0 up\n\
             addr add {V4}.1/24 dev br0\naddr add {V6}1/64 dev br0 nodad\n"
        );
        ip(&["-n", &netns, "-batch", "-"], &batch)?;
        Ok(network)
    }

    /// The namespace of the bridge, where everything passes.
    pub fn bridge(&self) -> PathBuf {
        PathBuf::from("/run/netns").join(format!("{}-{BRIDGE}", self.prefix))
    }

    /// The bridge as a host: where programs that are nobody's workload may run.
    pub fn bridge_host(&self) -> Host {
        Host { netns: format!("{}-{BRIDGE}", self.prefix), v4: format!("{V4}.1"), v6: format!("{V6}1") }
    }

    /// Adds a place for a machine that sets its addresses itself; the namespace comes with [`Cable::plug`].
    pub fn socket(&mut self, name: &str) -> anyhow::Result<(Host, Cable)> {
        let host = self.place(name)?;
        let cable = Cable {
            bridge: format!("{}-{BRIDGE}", self.prefix),
            port: format!("p{}", self.hosts),
            netns: host.netns.clone(),
            mac: format!("02:99:00:00:00:{:02x}", self.hosts),
        };
        Ok((host, cable))
    }

    /// A name and addresses.
    fn place(&mut self, name: &str) -> anyhow::Result<Host> {
        self.hosts += 1;
        let host = Host {
            netns: format!("{}-{name}", self.prefix),
            v4: format!("{V4}.{}", self.hosts),
            v6: format!("{V6}{:x}", self.hosts),
        };
        let etc = PathBuf::from("/etc/netns").join(&host.netns);
        std::fs::create_dir_all(&etc).with_context(|| format!("cannot create {}", etc.display()))?;
        std::fs::write(etc.join("resolv.conf"), resolver())?;
        Ok(host)
    }

    /// Adds a host.
    pub fn host(&mut self, name: &str) -> anyhow::Result<Host> {
        let host = self.place(name)?;
        let bridge = format!("{}-{BRIDGE}", self.prefix);
        ip(&["netns", "add", &host.netns], "")?;
        let port = format!("p{}", self.hosts);
        let batch = format!(
            "link add {port} type veth peer name eth0 netns {}\nlink set {port} master br0\nlink set {port} up\n",
            host.netns
        );
        ip(&["-n", &bridge, "-batch", "-"], &batch)?;
        let batch = format!(
            "link set lo up\nlink set eth0 up\naddr add {}/24 dev eth0\naddr add {}/64 dev eth0 nodad\n\
             route add default via {V4}.1\nroute add default via {V6}1\n",
            host.v4, host.v6
        );
        ip(&["-n", &host.netns, "-batch", "-"], &batch)?;
        Ok(host)
    }
}

/// Every process of the machine that runs the lab.
pub fn processes() -> Vec<i32> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

/// Whether a process runs a program whose name begins so.
pub fn runs(pid: i32, program: &str) -> bool {
    let exe = std::fs::read_link(format!("/proc/{pid}/exe"));
    exe.is_ok_and(|exe| exe.file_name().is_some_and(|name| name.to_string_lossy().starts_with(program)))
}

/// Whether a process runs a program of exactly this name.
pub(super) fn runs_exactly(pid: i32, program: &str) -> bool {
    let exe = std::fs::read_link(format!("/proc/{pid}/exe"));
    exe.is_ok_and(|exe| exe.file_name().is_some_and(|name| name == program))
}

/// The processes in the network namespace that this file stands for, wherever that file is mounted.
pub fn processes_in(netns: &std::path::Path) -> Vec<i32> {
    use std::os::unix::fs::MetadataExt as _;
    let identity = |path: PathBuf| std::fs::metadata(path).map(|meta| (meta.dev(), meta.ino())).ok();
    let Some(wanted) = identity(netns.to_owned()) else { return Vec::new() };
    let mut found = processes();
    found.retain(|pid| identity(format!("/proc/{pid}/ns/net").into()) == Some(wanted));
    found
}

fn ip(args: &[&str], input: &str) -> anyhow::Result<String> {
    let mut child = Command::new("ip")
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot run ip: is iproute2 installed?")?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(input.as_bytes())?;
    }
    let output = child.wait_with_output()?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        bail!("ip {} {input:?}: {said}", args.join(" "));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn pids(netns: &str) -> Vec<i32> {
    let text = ip(&["netns", "pids", netns], "").unwrap_or_default();
    text.lines().filter_map(|line| line.trim().parse().ok()).collect()
}

/// Ends everything in the namespaces of a prefix and removes them.
pub(super) fn remove(prefix: &str) -> Vec<String> {
    let mine = format!("{prefix}-");
    let names = |dir: &str| -> Vec<String> {
        let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
        entries
            .filter_map(|entry| entry.file_name().into_string().ok())
            .filter(|name| name.starts_with(&mine))
            .collect()
    };
    let mut problems = Vec::new();
    let namespaces = names("/run/netns");
    // An agent restarts what dies: go round until nobody is left.
    for _ in 0..50 {
        let running: Vec<i32> = namespaces.iter().flat_map(|name| pids(name)).collect();
        if running.is_empty() {
            break;
        }
        for pid in running {
            let _ =
                nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    for name in namespaces {
        if let Err(error) = ip(&["netns", "del", &name], "") {
            problems.push(error.to_string());
        }
    }
    for name in names("/etc/netns") {
        let dir = PathBuf::from("/etc/netns").join(name);
        if let Err(error) = std::fs::remove_dir_all(&dir) {
            problems.push(format!("cannot remove {}: {error}", dir.display()));
        }
    }
    // Ours only when the last lab took its entry out.
    let _ = std::fs::remove_dir("/etc/netns");
    problems
}
