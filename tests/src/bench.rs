//! `make bench`: how fast configuration reaches proxies, and what a proxy costs, beside a floor.
//!
//! Three processes: the real `ursa-control`, a [`bare`] server that pushes the same bytes to as many streams, and
//! this one, which is the load. Servers run on the first processor and the load on the second. Traffic stays on
//! loopback; only what needs namespaces ([`machine`]) needs root.
//!
//! * [`rules`]: the redirect beside what others start; [`cni`]: the plugin; [`connection`]: what a
//!   redirected connection costs, through a [`relay`] and Envoy. In namespaces of their own ([`space`]), counted by
//!   strace ([`trace`]).
//! * [`node`]: joining and registering; [`fleet`]: the streams.
//! * [`phases`]: what is changed and measured; [`report`]: the table and the targets.

pub mod bare;
pub mod cni;
pub mod connection;
pub mod fleet;
pub mod machine;
pub mod node;
pub mod operator;
pub mod phases;
pub mod process;
pub mod relay;
pub mod report;
pub mod rules;
pub mod server;
pub mod space;
pub mod trace;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use tokio::task::JoinSet;

use bare::Bare;
use fleet::{Fleet, Held, owner};
use node::{Node, Session, Size};
use phases::Measured;
use server::Server;

/// What to run.
#[derive(Debug, Clone)]
pub struct Options {
    /// How many of what there are.
    pub size: Size,
    /// Machines; each registers its share of the proxies.
    pub nodes: usize,
    /// Changes of one endpoint, and irrelevant writes.
    pub changes: usize,
    /// Changes that reach everybody.
    pub wide_changes: usize,
    /// Folder of the programs.
    pub bin_dir: PathBuf,
    /// The program that becomes the bare server when it is called with `--bare`; none leaves the floor out.
    pub bare: Option<PathBuf>,
    /// Whether servers run on the first processor ([`process::pin_load`] put this program on the second).
    pub pin: bool,
    /// Says what goes on.
    pub progress: fn(&str),
}

/// The control plane's and the floor's side of one measurement.
#[derive(Debug)]
pub struct Results {
    /// How many of what there were.
    pub size: Size,
    /// From nothing to every stream synced.
    pub first: Connected,
    /// One endpoint of one service.
    pub endpoint: Measured,
    /// Writes that no configuration depends on.
    pub irrelevant: Measured,
    /// A permission for the whole mesh.
    pub wide: Measured,
    /// After a kill -9, with what streams held.
    pub again: Connected,
    /// The same bytes from the bare server.
    pub floor: Option<Floor>,
}

/// All streams opened and synced.
#[derive(Debug, Clone, Copy)]
pub struct Connected {
    /// From the start of the server's process to its first answer; nothing for a first start.
    pub starting: Duration,
    /// From then until every Dataplane was registered.
    pub registering: Duration,
    /// From then until every stream was synced.
    pub streaming: Duration,
    /// Resources sent meanwhile.
    pub resources: u64,
    /// Bytes of responses that carried any.
    pub bytes: u64,
    /// The server's processor time for the streams.
    pub cpu: Duration,
    /// The server's memory before any node came, and with all streams at rest, in KiB.
    pub memory: (u64, u64),
}

/// What the bare server measured.
#[derive(Debug)]
pub struct Floor {
    /// As many streams as a change of one endpoint reaches.
    pub endpoint: Measured,
    /// All streams.
    pub wide: Measured,
    /// Its connections; the initial state's bytes were pushed to each.
    pub connected: Connected,
}

/// Runs everything that discovery is measured by.
pub async fn run(options: &Options) -> anyhow::Result<Results> {
    let say = options.progress;
    let size = options.size;
    let pin = options.pin;
    say("a control plane with an empty store");
    let mut server = Server::start(&options.bin_dir, pin).await?;
    let mut nodes = Vec::new();
    for number in 0..options.nodes {
        let ticket = server.ticket().await?;
        nodes.push(Arc::new(Node::join(&ticket, &format!("node-{number}")).await?));
    }
    say(&format!("{} nodes joined; {} Dataplanes register", options.nodes, size.proxies));
    let (first, mut fleet, sessions) = {
        let memory = process::memory(server.pid()?)?;
        let start = Instant::now();
        let sessions = register(&nodes, size).await?;
        let registering = start.elapsed();
        phases::services_are_there(&server, size).await?;
        say(&format!("registered in {registering:.1?}; {} streams open", size.proxies));
        let empty = vec![Held::default(); size.proxies];
        let (mut connected, fleet) = connect(&server, &nodes, empty).await?;
        connected.registering = registering;
        connected.memory.0 = memory;
        (connected, fleet, sessions)
    };
    say(&format!("synced in {:.1?}: {} resources", first.streaming, first.resources));

    let mut operator = server.operator().await?;
    let load = phases::Load { server: &server, size, say };
    let endpoint = load.endpoints(&mut operator, &mut fleet, options.changes).await?;
    let irrelevant = load.irrelevant(&mut operator, &mut fleet, options.changes).await?;
    let wide = load.everybody(&mut operator, &mut fleet, options.wide_changes).await?;

    say("the control plane is killed and starts again; everybody comes back");
    let starting = server.restart().await?;
    drop(sessions);
    let held = fleet.broken().await?;
    let memory = process::memory(server.pid()?)?;
    let start = Instant::now();
    let _sessions = register(&nodes, size).await?;
    let registering = start.elapsed();
    let (mut again, fleet) = connect(&server, &nodes, held).await?;
    again.starting = starting;
    again.registering = registering;
    again.memory.0 = memory;
    drop(fleet);
    drop(server);

    let floor = match &options.bare {
        Some(program) => {
            let mut bare = Bare::start(program, pin).await?;
            Some(measure_floor(&mut bare, options, &first, &endpoint, &wide).await?)
        }
        None => None,
    };
    Ok(Results { size, first, endpoint, irrelevant, wide, again, floor })
}

async fn register(nodes: &[Arc<Node>], size: Size) -> anyhow::Result<Vec<Session>> {
    let mut registering = JoinSet::new();
    for (number, node) in nodes.iter().enumerate() {
        let (node, count) = (Arc::clone(node), nodes.len());
        let mine = (0..size.proxies).filter(|proxy| owner(*proxy, count) == number);
        let dataplanes = mine.map(|proxy| size.dataplane(proxy, true)).collect();
        registering.spawn(async move { node.register(dataplanes).await });
    }
    let mut sessions = Vec::new();
    while let Some(session) = registering.join_next().await {
        sessions.push(session?.context("a node can't register")?);
    }
    Ok(sessions)
}

/// Opens every stream and waits until nothing more comes and the server rests.
async fn connect(
    server: &Server,
    nodes: &[Arc<Node>],
    held: Vec<Held>,
) -> anyhow::Result<(Connected, Fleet)> {
    let before = process::cpu(server.pid()?)?;
    let start = Instant::now();
    let mut fleet = Fleet::open(nodes, held);
    fleet.synced().await?;
    let streaming = start.elapsed();
    server.idle().await?;
    fleet.settle(Duration::from_millis(500)).await?;
    let cpu = process::cpu_since(server.pid()?, before)?;
    let tally = fleet.take();
    let connected = Connected {
        starting: Duration::ZERO,
        registering: Duration::ZERO,
        streaming,
        resources: tally.resources,
        bytes: tally.bytes,
        cpu,
        memory: (0, process::memory(server.pid()?)?),
    };
    Ok((connected, fleet))
}

async fn measure_floor(
    bare: &mut Bare,
    options: &Options,
    first: &Connected,
    endpoint: &Measured,
    wide: &Measured,
) -> anyhow::Result<Floor> {
    let (say, proxies) = (options.progress, options.size.proxies);
    say("the floor: a bare server pushes the same bytes to as many streams");
    let empty = process::memory(bare.pid()?)?;
    let before = process::cpu(bare.pid()?)?;
    let nodes = [Arc::clone(&bare.node)];
    let start = Instant::now();
    let mut fleet = Fleet::open(&nodes, vec![Held::default(); proxies]);
    fleet.synced().await?;
    let streaming = start.elapsed();
    let everybody: Vec<usize> = (0..proxies).collect();
    // The initial state, in as many messages as the real one sends it: one for each of five types.
    for _ in 0..5 {
        let since = Instant::now();
        bare.push(proxies, first.bytes / 5 / proxies as u64).await?;
        fleet.receipts(&everybody, since).await?;
    }
    let connected = Connected {
        starting: Duration::ZERO,
        registering: Duration::ZERO,
        streaming,
        resources: 0,
        bytes: fleet.take().bytes,
        cpu: process::cpu_since(bare.pid()?, before)?,
        memory: (empty, process::memory(bare.pid()?)?),
    };
    let some = options.size.callers(0).len();
    let endpoint = phases::floor(bare, &mut fleet, some, options.changes, endpoint).await?;
    let wide = phases::floor(bare, &mut fleet, proxies, options.wide_changes, wide).await?;
    Ok(Floor { endpoint, wide, connected })
}
