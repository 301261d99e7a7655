//! The CNI plugin as a runtime starts it: what one ADD costs a pod, alone and with a hundred others, and what the
//! plugin adds to a chain.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Barrier;
use std::time::Duration;
use std::{fs, thread};

use anyhow::{Context as _, bail};
use serde_json::{Value, json};

use super::space::{Call, Space, Times, alone};
use super::trace::{self, Counts};

/// Pods that start at once.
pub const STORM: usize = 100;
/// Debian's plugins.
const PLUGINS: &str = "/usr/lib/cni";
/// Namespaces that exist at a time.
const BATCH: usize = 50;

/// Everything that was measured.
#[derive(Debug)]
pub struct Cni {
    /// The plugin's size in bytes.
    pub size: u64,
    /// A process that does nothing.
    pub floor: Times,
    /// The plugin asked for its versions.
    pub version: Times,
    /// ADD of a pod that isn't meshed, one after the other.
    pub plain: Times,
    /// ADD of a meshed pod, one after the other, with an agent that answers at once.
    pub meshed: Times,
    /// The same, [`STORM`] at once.
    pub plain_storm: Times,
    /// The same, [`STORM`] at once.
    pub meshed_storm: Times,
    /// What one ADD of a pod that isn't meshed asks of the kernel.
    pub plain_counts: Counts,
    /// What one ADD of a meshed pod asks of the kernel.
    pub meshed_counts: Counts,
    /// What Debian's plugins take; none where they aren't installed.
    pub chain: Option<Chain>,
}

/// A pod that isn't meshed, by a chain of plugins.
#[derive(Debug, Default)]
pub struct Chain {
    /// `bridge` with `host-local`.
    pub bridge: Times,
    /// The same pods with `ursa-cni` after it.
    pub with_ursa: Times,
    /// The same pods with `portmap` after `bridge`.
    pub with_portmap: Times,
    /// The same pods with both.
    pub with_both: Times,
}

/// Measures all of it, with `pods` pods one after the other.
pub fn measure(bin_dir: &Path, pods: usize, say: fn(&str)) -> anyhow::Result<Cni> {
    let scratch = tempfile::tempdir().context("cannot create a folder")?;
    let agent = Agent::start(scratch.path())?;
    let plugin = Plugin { program: bin_dir.join("ursa-cni"), run_dir: agent.run_dir.clone() };
    let size = fs::metadata(&plugin.program)
        .with_context(|| format!("cannot look at {}", plugin.program.display()))?
        .len();
    say(&format!("the CNI plugin: {pods} pods one after the other, {STORM} at once"));
    let nothing = Call::new("true", &[]);
    let version = Call { envs: vec![("CNI_COMMAND".into(), "VERSION".into())], ..plugin.call() };
    let repeat = |call: &Call| (0..pods).map(|_| Ok(call.run()?.1)).collect::<anyhow::Result<Times>>();
    // The pages of the programs come into memory.
    repeat(&version)?;
    let (floor, version) = (repeat(&nothing)?, repeat(&version)?);
    let (mut plain, mut meshed) = (Times::default(), Times::default());
    let mut left = pods;
    while left > 0 {
        let batch = left.min(BATCH);
        left -= batch;
        for space in spaces(batch)? {
            plain.push(plugin.add(space.path(), false).run()?.1);
            meshed.push(plugin.add(space.path(), true).run()?.1);
        }
    }
    let storm = |meshed: bool| {
        let spaces = spaces(STORM)?;
        at_once(spaces.iter().map(|space| plugin.add(space.path(), meshed)).collect())
    };
    let (plain_storm, meshed_storm) = (storm(false)?, storm(true)?);
    let (plain_counts, meshed_counts) = counts(&plugin, scratch.path())?;
    let chain = if Path::new(PLUGINS).join("bridge").exists() {
        say("pods that aren't meshed, by a chain of Debian's plugins");
        Some(chain(&plugin, pods.min(300), scratch.path())?)
    } else {
        say("Debian's plugins aren't installed (containernetworking-plugins): no chain is measured");
        None
    };
    Ok(Cni {
        size,
        floor,
        version,
        plain,
        meshed,
        plain_storm,
        meshed_storm,
        plain_counts,
        meshed_counts,
        chain,
    })
}

/// What one ADD asks of the kernel: of a pod that isn't meshed, and of one that is.
pub fn counted(bin_dir: &Path) -> anyhow::Result<(Counts, Counts)> {
    let scratch = tempfile::tempdir().context("cannot create a folder")?;
    let agent = Agent::start(scratch.path())?;
    counts(&Plugin { program: bin_dir.join("ursa-cni"), run_dir: agent.run_dir.clone() }, scratch.path())
}

fn counts(plugin: &Plugin, scratch: &Path) -> anyhow::Result<(Counts, Counts)> {
    let space = pod()?;
    let plain = trace::count(&plugin.add(space.path(), false), scratch)?;
    Ok((plain, trace::count(&plugin.add(space.path(), true), scratch)?))
}

/// The address of every pod; each has a namespace of its own.
const ADDRESS: &str = "10.88.0.7/16";

/// A namespace with a pod's address.
fn pod() -> anyhow::Result<Space> {
    Space::new(|| Call::new("ip", &["address", "add", ADDRESS, "dev", "lo"]).run().map(drop))
}

fn spaces(count: usize) -> anyhow::Result<Vec<Space>> {
    (0..count).map(|_| pod()).collect()
}

/// Runs all of them at the same time.
fn at_once(calls: Vec<Call>) -> anyhow::Result<Times> {
    let together = Barrier::new(calls.len());
    let together = &together;
    thread::scope(|scope| {
        let run = |call: Call| {
            together.wait();
            Ok(call.run()?.1)
        };
        let running: Vec<_> = calls.into_iter().map(|call| scope.spawn(move || run(call))).collect();
        running
            .into_iter()
            .map(|one| one.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    })
}

/// The plugin and where it looks for its agent.
struct Plugin {
    program: PathBuf,
    run_dir: PathBuf,
}

impl Plugin {
    fn call(&self) -> Call {
        Call::new(&self.program, &[])
    }

    fn add(&self, netns: &Path, meshed: bool) -> Call {
        let previous = json!({
            "cniVersion": "1.0.0",
            "interfaces": [{"name": "eth0", "sandbox": netns}],
            "ips": [{"address": ADDRESS, "interface": 0}],
        });
        self.add_after(netns, meshed, &previous)
    }

    fn add_after(&self, netns: &Path, meshed: bool, previous: &Value) -> Call {
        let injection = if meshed { "enabled" } else { "disabled" };
        let config = json!({
            "cniVersion": "1.0.0", "name": "bench", "type": "ursa-cni", "runDir": self.run_dir,
            "stateDir": self.run_dir,
            "workload": {"name": "web"},
            "runtimeConfig": {"io.kubernetes.cri.pod-annotations": {"kuma.io/sidecar-injection": injection}},
            "prevResult": previous,
        });
        Call { envs: environment("ADD", netns), input: config.to_string(), ..self.call() }
    }
}

fn environment(verb: &str, netns: &Path) -> Vec<(String, String)> {
    let container = netns.to_string_lossy().replace(|c: char| !c.is_ascii_digit(), "");
    [
        ("CNI_COMMAND", verb),
        ("CNI_CONTAINERID", &container),
        ("CNI_NETNS", &netns.to_string_lossy()),
        ("CNI_IFNAME", "eth0"),
        ("CNI_PATH", PLUGINS),
        ("CNI_ARGS", "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web;K8S_POD_UID=0a1b2c"),
    ]
    .map(|(name, value)| (name.to_owned(), value.to_owned()))
    .to_vec()
}

/// In the agent's place: answers every request at once that it is done.
struct Agent {
    run_dir: PathBuf,
}

impl Agent {
    fn start(dir: &Path) -> anyhow::Result<Self> {
        let run_dir = dir.join("run");
        fs::create_dir_all(&run_dir)?;
        let socket = run_dir.join("agent.sock");
        let listener = UnixListener::bind(&socket).with_context(|| format!("no {}", socket.display()))?;
        // Ends with this program.
        thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                let mut line = String::new();
                let _ = BufReader::new(&stream).read_line(&mut line);
                let _ = stream.write_all(b"{}\n");
            }
        });
        Ok(Self { run_dir })
    }
}

/// Pods on a bridge, each by the plugins one after the other as a runtime calls them.
fn chain(plugin: &Plugin, pods: usize, scratch: &Path) -> anyhow::Result<Chain> {
    let leases = scratch.join("leases");
    let program = |name: &str| Path::new(PLUGINS).join(name);
    let bridge = json!({
        "cniVersion": "1.0.0", "name": "bench", "type": "bridge", "bridge": "cni0", "isGateway": true,
        "ipam": {"type": "host-local", "dataDir": leases, "ranges": [[{"subnet": "10.88.0.0/16"}]]},
    });
    let call = |name: &str, verb: &str, netns: &Path, config: &Value| Call {
        envs: environment(verb, netns),
        input: config.to_string(),
        ..Call::new(program(name), &[])
    };
    // The bridge is in a namespace of its own, as on a node whose own one this is.
    alone(|| {
        let mut chain = Chain::default();
        for pod in 0..pods {
            let space = Space::empty()?;
            let netns = space.path();
            let (result, first) = call("bridge", "ADD", netns, &bridge).run()?;
            let previous: Value = serde_json::from_str(&result).context("bridge's result is no JSON")?;
            let (said, ours) = plugin.add_after(netns, false, &previous).run()?;
            if serde_json::from_str::<Value>(&said)? != previous {
                bail!("ursa-cni changed prevResult");
            }
            let portmap = json!({
                "cniVersion": "1.0.0", "name": "bench", "type": "portmap",
                "capabilities": {"portMappings": true}, "prevResult": previous,
            });
            let (_, mapping) = call("portmap", "ADD", netns, &portmap).run()?;
            // The first pod makes the bridge.
            if pod > 0 {
                chain.take(first, ours, mapping);
            }
            call("bridge", "DEL", netns, &bridge).run()?;
        }
        Ok(chain)
    })
}

impl Chain {
    fn take(&mut self, bridge: Duration, ursa: Duration, portmap: Duration) {
        self.bridge.push(bridge);
        self.with_ursa.push(bridge + ursa);
        self.with_portmap.push(bridge + portmap);
        self.with_both.push(bridge + portmap + ursa);
    }
}
