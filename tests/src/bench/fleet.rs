//! The load: one delta stream per proxy, each over a TLS connection of its own, which subscribe and acknowledge
//! as agents do and report what they receive.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use prost::Message as _;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::ReceiverStream;
use ursa_wire::discovery::{
    self, AggregatedDiscoveryClient, DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource,
};
use ursa_wire::type_url;

use super::node::{Node, proxy_name};
use super::server::PATIENCE;

/// Handshakes under way at a time; a kernel's queue of new connections isn't what is measured.
const HANDSHAKES: usize = 256;
/// Reports that wait for the collector.
const REPORTS: usize = 1 << 16;
/// The five bytes before each gRPC message.
const FRAME: usize = 5;

/// What a stream holds: type → name → version.
pub type Held = HashMap<&'static str, HashMap<String, String>>;

/// What one stream reports.
#[derive(Debug)]
enum Report {
    Push(Push),
    /// Every type's initial state has come.
    Synced,
    Ended(String),
}

/// A response with something in it.
#[derive(Debug, Clone, Copy)]
struct Push {
    proxy: usize,
    at: Instant,
    resources: u64,
    bytes: u64,
}

/// What came, in all.
#[derive(Debug, Clone, Copy, Default)]
pub struct Tally {
    /// Responses that carried or removed something.
    pub pushes: u64,
    /// Resources in them, and names of removed ones.
    pub resources: u64,
    /// Their size on the wire before TLS.
    pub bytes: u64,
    /// Pushes to proxies that the change doesn't concern.
    pub strays: u64,
}

/// All streams.
#[derive(Debug)]
pub struct Fleet {
    streams: Vec<JoinHandle<Held>>,
    reports: mpsc::Receiver<Report>,
    /// What came since this was last taken.
    pub tally: Tally,
}

impl Fleet {
    /// Opens a stream for each proxy through the nodes, which share the proxies evenly: a proxy's node has the
    /// number that [`owner`] says. `held` is what each proxy has from an earlier stream.
    pub fn open(nodes: &[Arc<Node>], held: Vec<Held>) -> Self {
        let (sender, reports) = mpsc::channel(REPORTS);
        let handshakes = Arc::new(Semaphore::new(HANDSHAKES));
        let streams = held
            .into_iter()
            .enumerate()
            .map(|(proxy, held)| {
                let node = Arc::clone(&nodes[owner(proxy, nodes.len())]);
                let (sender, handshakes) = (sender.clone(), Arc::clone(&handshakes));
                tokio::spawn(async move {
                    let mut stream = Stream { proxy, held, reports: sender };
                    let ended = stream.serve(&node, &handshakes).await;
                    let words = ended.err().map_or_else(|| "closed".to_owned(), |error| format!("{error:#}"));
                    // Nobody listens any more when the fleet was dropped.
                    let _ = stream.reports.send(Report::Ended(words)).await;
                    stream.held
                })
            })
            .collect();
        Self { streams, reports, tally: Tally::default() }
    }

    /// Waits until every stream has its whole initial state.
    pub async fn synced(&mut self) -> anyhow::Result<()> {
        let mut missing = self.streams.len();
        while missing > 0 {
            match self.next().await.with_context(|| format!("{missing} streams are not synced"))? {
                Report::Synced => missing -= 1,
                Report::Push(push) => self.count(push, true),
                Report::Ended(words) => bail!("a stream ended: {words}"),
            }
        }
        Ok(())
    }

    /// Waits for the first push to each of `affected` after `since`; returns how long each took.
    pub async fn receipts(&mut self, affected: &[usize], since: Instant) -> anyhow::Result<Vec<Duration>> {
        let affected: BTreeSet<usize> = affected.iter().copied().collect();
        let mut missing = affected.clone();
        let mut took = Vec::with_capacity(missing.len());
        while !missing.is_empty() {
            let report = self
                .next()
                .await
                .with_context(|| format!("{} of {} got no push", missing.len(), affected.len()))?;
            match report {
                Report::Push(push) => {
                    self.count(push, affected.contains(&push.proxy));
                    if push.at >= since && missing.remove(&push.proxy) {
                        took.push(push.at - since);
                    }
                }
                Report::Synced => {}
                Report::Ended(words) => bail!("a stream ended: {words}"),
            }
        }
        Ok(took)
    }

    /// Waits until nothing has come for `quiet`: what follows a change that was announced already.
    pub async fn settle(&mut self, quiet: Duration) -> anyhow::Result<()> {
        let start = Instant::now();
        while let Ok(report) = timeout(quiet, self.reports.recv()).await {
            match report.context("every stream has ended")? {
                Report::Push(push) => self.count(push, true),
                Report::Synced => {}
                Report::Ended(words) => bail!("a stream ended: {words}"),
            }
            if start.elapsed() > PATIENCE {
                bail!("pushes don't end within {PATIENCE:?}");
            }
        }
        Ok(())
    }

    /// Waits until every stream has ended by itself; returns what each held.
    pub async fn broken(mut self) -> anyhow::Result<Vec<Held>> {
        // Reports nobody reads would hold the streams up.
        self.reports.close();
        let mut held = Vec::with_capacity(self.streams.len());
        for stream in &mut self.streams {
            held.push(timeout(PATIENCE, stream).await.context("a stream goes on without a server")??);
        }
        Ok(held)
    }

    /// Takes the tally and begins a new one.
    pub fn take(&mut self) -> Tally {
        std::mem::take(&mut self.tally)
    }

    async fn next(&mut self) -> anyhow::Result<Report> {
        let report = timeout(PATIENCE, self.reports.recv()).await;
        report.with_context(|| format!("nothing came for {PATIENCE:?}"))?.context("every stream has ended")
    }

    fn count(&mut self, push: Push, expected: bool) {
        self.tally.pushes += 1;
        self.tally.resources += push.resources;
        self.tally.bytes += push.bytes;
        self.tally.strays += u64::from(!expected);
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        for stream in &self.streams {
            stream.abort();
        }
    }
}

/// The node, by number, that has a proxy.
pub fn owner(proxy: usize, nodes: usize) -> usize {
    proxy % nodes
}

struct Stream {
    proxy: usize,
    held: Held,
    reports: mpsc::Sender<Report>,
}

impl Stream {
    async fn serve(&mut self, node: &Node, handshakes: &Semaphore) -> anyhow::Result<()> {
        let (requests, receiver) = mpsc::channel(2 * type_url::ADD_ORDER.len());
        let permit = handshakes.acquire().await?;
        let mut who = Some(discovery::Node {
            id: format!("default.{}", proxy_name(self.proxy)),
            ..discovery::Node::default()
        });
        for type_url in type_url::ADD_ORDER {
            let request = DeltaDiscoveryRequest {
                node: who.take(),
                type_url: type_url.to_owned(),
                resource_names_subscribe: vec!["*".to_owned()],
                initial_resource_versions: self.held.get(type_url).cloned().unwrap_or_default(),
                ..DeltaDiscoveryRequest::default()
            };
            requests.send(request).await?;
        }
        let mut client = AggregatedDiscoveryClient::new(node.channel()?);
        let mut responses = client.delta(ReceiverStream::new(receiver)).await?.into_inner();
        drop(permit);
        let mut unsynced: BTreeSet<&str> = type_url::ADD_ORDER.into();
        while let Some(response) = responses.next().await {
            let response = response?;
            let at = Instant::now();
            let acknowledgement = DeltaDiscoveryRequest {
                type_url: response.type_url.clone(),
                response_nonce: response.nonce.clone(),
                ..DeltaDiscoveryRequest::default()
            };
            requests.send(acknowledgement).await?;
            self.take(&response, at).await?;
            if response.is_synced() && unsynced.remove(response.type_url.as_str()) && unsynced.is_empty() {
                self.reports.send(Report::Synced).await?;
            }
        }
        Ok(())
    }

    async fn take(&mut self, response: &DeltaDiscoveryResponse, at: Instant) -> anyhow::Result<()> {
        if response.resources.is_empty() && response.removed_resources.is_empty() {
            return Ok(());
        }
        let kind = type_url::ADD_ORDER.into_iter().find(|kind| *kind == response.type_url);
        let held = self.held.entry(kind.context("a type that was not asked for")?).or_default();
        for resource in &response.resources {
            let resource = Resource::parse(resource)?;
            held.insert(resource.name, resource.version);
        }
        for name in &response.removed_resources {
            held.remove(name);
        }
        let push = Push {
            proxy: self.proxy,
            at,
            resources: (response.resources.len() + response.removed_resources.len()) as u64,
            bytes: (FRAME + response.encoded_len()) as u64,
        };
        Ok(self.reports.send(Report::Push(push)).await?)
    }
}
