//! Very many resources at once, and a server that answers others meanwhile.

use std::io::Write as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};

use super::mesh::Control;
use super::{Lab, http};

/// What it cost.
#[derive(Debug)]
pub struct Flood {
    /// How many resources.
    pub resources: usize,
    /// How long `ursa apply` took.
    pub took: Duration,
    /// How long `GET /` took meanwhile: 99 of 100, and the slowest.
    pub index: (Duration, Duration),
    /// The control plane's memory before and after, in KiB.
    pub memory: (u64, u64),
    /// The control plane's time on a processor.
    pub processor: Duration,
}

/// A document with one policy that concerns nobody.
pub fn policy(name: &str, seconds: usize) -> String {
    format!(
        "type: MeshTimeout\nmesh: default\nname: {name}\nspec:\n  targetRef: {{kind: Dataplane, labels: {{flood: {name}}}}}\n  \
         to:\n  - targetRef: {{kind: Mesh}}\n    default: {{http: {{requestTimeout: {seconds}s}}}}\n"
    )
}

/// Applies so many resources from one file, and looks at the server meanwhile.
pub fn run(lab: &Lab, control: &Control, resources: usize) -> anyhow::Result<Flood> {
    let path = lab.dir().join("flood.yaml");
    let mut file = std::io::BufWriter::new(std::fs::File::create(&path)?);
    for number in 0..resources {
        write!(file, "---\n{}", policy(&format!("flood-{number}"), 10))?;
    }
    file.into_inner()?.sync_all()?;
    let pid = control.daemon.pid().context("the control plane doesn't run")?;
    let before = (memory(pid)?, processor(pid)?);
    let prober = Prober::start(control.socket.clone());
    let start = Instant::now();
    let said = control.ursa(&["apply", "-f", &path.display().to_string()])?;
    let took = start.elapsed();
    let index = prober.end()?;
    ensure!(said.lines().count() == resources, "{} lines were printed", said.lines().count());
    ensure!(
        count(control, "flood-")? == resources as u64,
        "{} resources are there",
        count(control, "flood-")?
    );
    let processor = processor(pid)?.saturating_sub(before.1);
    Ok(Flood { resources, took, index, memory: (before.0, memory(pid)?), processor })
}

/// How many MeshTimeouts have names that contain this.
pub fn count(control: &Control, part: &str) -> anyhow::Result<u64> {
    let path = format!("/meshes/default/meshtimeouts?size=1&name={part}");
    let reply = http::ask(&control.socket, "GET", &path, None, Duration::from_secs(30))?;
    reply.json()?["total"].as_u64().with_context(|| reply.brief())
}

fn memory(pid: i32) -> anyhow::Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}

fn processor(pid: i32) -> anyhow::Result<Duration> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    // utime and stime, in hundredths of a second on every Linux.
    let ticks = |at: usize| fields.get(at).and_then(|text| text.parse::<u64>().ok());
    Ok(Duration::from_millis(10 * (ticks(11).context("no utime")? + ticks(12).context("no stime")?)))
}

/// Asks for the index all the time.
struct Prober {
    stop: Arc<AtomicBool>,
    thread: std::thread::JoinHandle<anyhow::Result<Vec<Duration>>>,
}

impl Prober {
    fn start(socket: PathBuf) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let thread = std::thread::spawn({
            let stop = Arc::clone(&stop);
            move || {
                let mut took = Vec::new();
                loop {
                    let start = Instant::now();
                    let reply = http::ask(&socket, "GET", "/", None, Duration::from_secs(30))?;
                    ensure!(reply.ok(), "GET / meanwhile: {}", reply.brief());
                    took.push(start.elapsed());
                    if stop.load(Ordering::Relaxed) {
                        return Ok(took);
                    }
                    std::thread::sleep(Duration::from_millis(20));
                }
            }
        });
        Self { stop, thread }
    }

    fn end(self) -> anyhow::Result<(Duration, Duration)> {
        self.stop.store(true, Ordering::Relaxed);
        let mut took = self.thread.join().map_err(|_| anyhow::anyhow!("the prober panicked"))??;
        took.sort();
        let at = |share: usize| took.get((took.len() * share / 100).min(took.len() - 1)).copied();
        Ok((at(99).context("no answer")?, at(100).context("no answer")?))
    }
}
