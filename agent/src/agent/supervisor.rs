//! Which workloads live here: those of the files, those that CNI added, and none besides.

mod namespaces;
mod pods;
mod remains;
mod users;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use self::namespaces::refuse_ambiguous;
use self::users::refuse_shared_users;
use super::config::AgentConfig;
use super::control::chain;
use super::status::{BrokenFile, Phase, WorkloadStatus};
use super::workload::{Machine, Origin, Shared, WorkloadFiles, WorkloadSpec};
use crate::relay::write_atomic;

/// Commands that wait; each caller waits for its answer.
const QUEUE: usize = 64;
const SPEC_FILE: &str = "workload.json";
/// The answer of a supervisor that ends.
const GONE: &str = "the agent is stopping; try again";
/// How long CNI waits for a live Envoy: the plugin gives up after 20 s, and our words say more than its silence.
pub const CNI_PATIENCE: Duration = Duration::from_secs(18);

/// When a directory of files that couldn't be listed is looked at again.
const LOOK_AGAIN: Duration = Duration::from_secs(5);

/// How often pods are looked for that went without a word: the plugin was killed, or nobody answered it.
const SWEEP: Duration = Duration::from_secs(5);

/// What becomes of a workload that CNI adds.
pub type Answer = Result<watch::Receiver<WorkloadStatus>, String>;

#[derive(Debug)]
enum Command {
    Add { specs: Vec<WorkloadSpec>, answer: oneshot::Sender<Vec<Answer>> },
    Remove { container: String, answer: oneshot::Sender<bool> },
    Sweep { answer: oneshot::Sender<usize> },
    Status { answer: oneshot::Sender<(Vec<WorkloadStatus>, Vec<BrokenFile>)> },
    Reload(Box<AgentConfig>),
}

/// A handle to the supervisor's task. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Supervisor {
    commands: mpsc::Sender<Command>,
}

impl Supervisor {
    /// Starts the supervisor: adopts what runs, starts what should, removes what shouldn't. On `stop` everything
    /// is left running.
    pub fn start(
        shared: Arc<Shared>,
        files: WorkloadFiles,
        stop: CancellationToken,
    ) -> (Self, tokio::task::JoinHandle<()>) {
        let (commands, queue) = mpsc::channel(QUEUE);
        let task = Task {
            shared,
            files,
            machines: BTreeMap::new(),
            leaving: BTreeMap::new(),
            departures: JoinSet::new(),
            cni: BTreeMap::new(),
            broken: Vec::new(),
            unlisted: false,
        };
        (Self { commands }, tokio::spawn(task.run(queue, stop)))
    }

    /// A workload appears by CNI ADD. Returns once its Envoy is live.
    pub async fn add(&self, spec: WorkloadSpec) -> Result<(), String> {
        let status = self.add_all(vec![spec]).await.pop().unwrap_or_else(|| Err(GONE.to_owned()))?;
        let mut waiting = status.clone();
        let live = async move {
            waiting.wait_for(|status| matches!(status.state, Phase::Live | Phase::Ready)).await.is_ok()
        };
        match tokio::time::timeout(CNI_PATIENCE, live).await {
            Ok(true) => Ok(()),
            Ok(false) => Err("the workload was removed while it started".to_owned()),
            Err(_) => {
                let status = status.borrow();
                Err(format!(
                    "the sidecar isn't live after {} s; it is {}{}",
                    CNI_PATIENCE.as_secs(),
                    status.state.as_str(),
                    status.error.as_ref().map(|error| format!(": {error}")).unwrap_or_default()
                ))
            }
        }
    }

    /// Workloads appear together: each redirect is put in place before any of their sidecars starts. What becomes of each,
    /// in their order.
    pub async fn add_all(&self, specs: Vec<WorkloadSpec>) -> Vec<Answer> {
        let (answer, answered) = oneshot::channel();
        let count = specs.len();
        if self.commands.send(Command::Add { specs, answer }).await.is_ok()
            && let Ok(answers) = answered.await
        {
            return answers;
        }
        (0..count).map(|_| Err(GONE.to_owned())).collect()
    }

    /// The workload of a container disappears by CNI DEL. Returns whether there was one.
    pub async fn remove(&self, container: &str) -> Result<bool, String> {
        let (answer, answered) = oneshot::channel();
        let command = Command::Remove { container: container.to_owned(), answer };
        self.commands.send(command).await.map_err(|_| GONE.to_owned())?;
        answered.await.map_err(|_| GONE.to_owned())
    }

    /// Removes the workloads of containers that have no attachment any more. Returns how many.
    pub async fn sweep(&self) -> Result<usize, String> {
        let (answer, answered) = oneshot::channel();
        self.commands.send(Command::Sweep { answer }).await.map_err(|_| GONE.to_owned())?;
        answered.await.map_err(|_| GONE.to_owned())
    }

    /// The configuration has changed: workloads that inherit something of it follow.
    pub async fn reload(&self, config: AgentConfig) {
        // Without a supervisor the agent is stopping.
        let _ = self.commands.send(Command::Reload(Box::new(config))).await;
    }

    /// The workloads, and the files that describe none.
    pub async fn status(&self) -> (Vec<WorkloadStatus>, Vec<BrokenFile>) {
        let (answer, answered) = oneshot::channel();
        if self.commands.send(Command::Status { answer }).await.is_err() {
            return Default::default();
        }
        answered.await.unwrap_or_default()
    }
}

#[derive(Debug)]
struct Running {
    spec: WorkloadSpec,
    machine: Machine,
}

/// A workload on its way out.
struct Leaving {
    status: watch::Receiver<WorkloadStatus>,
    /// Its proxy's user, which is nobody else's until it is gone.
    uid: u32,
    /// It couldn't be removed: its status stays, and it may only start again.
    stuck: bool,
}

struct Task {
    shared: Arc<Shared>,
    files: WorkloadFiles,
    machines: BTreeMap<String, Running>,
    /// On their way out; the same id may start again only afterwards.
    leaving: BTreeMap<String, Leaving>,
    departures: JoinSet<(String, bool, Vec<oneshot::Sender<bool>>)>,
    /// Container → workload.
    cni: BTreeMap<String, WorkloadSpec>,
    broken: Vec<BrokenFile>,
    /// The files couldn't be listed.
    unlisted: bool,
}

impl Task {
    async fn run(mut self, mut queue: mpsc::Receiver<Command>, stop: CancellationToken) {
        match self.recall() {
            Ok(remembered) => {
                self.sweep();
                self.reconcile(&remembered);
                self.remove_orphans().await; // each stop goes on by itself
            }
            Err(error) => {
                tracing::error!(dir = %self.shared.state_dir.display(), %error,
                    "can't read what a former agent left; nothing of it is removed: mend that and restart the agent");
                self.reconcile(&BTreeMap::new());
            }
        }
        let mut sweep = tokio::time::interval(SWEEP);
        sweep.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = stop.cancelled() => break,
                _ = sweep.tick() => { self.sweep(); }
                () = self.files.changed() => self.reconcile(&BTreeMap::new()),
                () = tokio::time::sleep(LOOK_AGAIN), if self.unlisted => self.reconcile(&BTreeMap::new()),
                Some(departed) = self.departures.join_next() => {
                    if let Ok((id, gone, waiting)) = departed {
                        if gone {
                            self.leaving.remove(&id);
                        } else if let Some(leaving) = self.leaving.get_mut(&id) {
                            leaving.stuck = true;
                        }
                        for answer in waiting {
                            let _ = answer.send(true); // who asked may have gone
                        }
                    }
                    self.reconcile(&BTreeMap::new());
                }
                command = queue.recv() => match command {
                    Some(command) => self.on_command(command),
                    None => break,
                }
            }
        }
        for (_, running) in std::mem::take(&mut self.machines) {
            running.machine.detach().await;
        }
        // What is leaving finishes within the drain time; a later agent would have to do it again.
        while self.departures.join_next().await.is_some() {}
    }

    /// The workloads of a former agent.
    fn recall(&mut self) -> io::Result<BTreeMap<String, WorkloadSpec>> {
        let dir = self.shared.state_dir.join("w");
        let mut specs = BTreeMap::new();
        let entries = match fs::read_dir(&dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(specs),
            entries => entries?,
        };
        for entry in entries {
            let path = entry?.path().join(SPEC_FILE);
            let text = match fs::read(&path) {
                Err(error)
                    if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) =>
                {
                    continue;
                }
                text => text?,
            };
            match serde_json::from_slice::<WorkloadSpec>(&text) {
                Ok(spec) => {
                    if let Origin::Cni(container) = &spec.origin {
                        self.cni.insert(container.clone(), spec.clone());
                    }
                    specs.insert(spec.id(), spec);
                }
                Err(error) => {
                    tracing::warn!(path = %path.display(), %error, "a description of a workload is damaged");
                }
            }
        }
        Ok(specs)
    }

    /// What should run: the files' workloads and CNI's. A broken file keeps its former version running.
    fn desired(&mut self, remembered: &BTreeMap<String, WorkloadSpec>) -> BTreeMap<String, WorkloadSpec> {
        let mut scan = self.files.scan(&self.shared.config.load());
        let mut desired: BTreeMap<String, WorkloadSpec> = BTreeMap::new();
        for spec in scan.specs.into_values().chain(self.cni.values().cloned()) {
            desired.entry(spec.id()).or_insert(spec);
        }
        let mut former = remembered.clone();
        former.extend(self.machines.iter().map(|(id, running)| (id.clone(), running.spec.clone())));
        self.unlisted = scan.unlisted;
        if scan.unlisted {
            let files = former.values().filter(|spec| matches!(spec.origin, Origin::File(_)));
            for spec in files {
                desired.entry(spec.id()).or_insert_with(|| spec.clone());
            }
        }
        for broken in &mut scan.broken {
            if matches!(PathBuf::from(&broken.path).try_exists(), Ok(false)) {
                continue; // gone since it was listed
            }
            let origin = Origin::File(broken.path.clone());
            if let Some(spec) = former.values().find(|spec| spec.origin == origin) {
                broken.running = true;
                desired.entry(spec.id()).or_insert_with(|| spec.clone());
            }
        }
        refuse_shared_users(&mut desired, &former, &mut scan.broken);
        refuse_ambiguous(&mut desired, &former, &mut scan.broken);
        for broken in &scan.broken {
            if !self.broken.contains(broken) {
                tracing::error!(path = %broken.path, error = %broken.error, former_version_runs = broken.running,
                    "a workload file is broken");
            }
        }
        self.broken = scan.broken;
        desired
    }

    /// Makes it so. `remembered` is what a former agent left; with the first call it is taken over or removed.
    fn reconcile(&mut self, remembered: &BTreeMap<String, WorkloadSpec>) {
        let desired = self.desired(remembered);
        let handover = self.shared.launcher.handover();
        let superfluous: Vec<String> = self
            .machines
            .iter()
            .filter(|(id, running)| {
                desired.get(*id).is_none_or(|spec| running.spec.needs_restart(spec, handover))
            })
            .map(|(id, _)| id.clone())
            .collect();
        for id in superfluous {
            self.depart(&id, desired.get(&id), Vec::new());
        }
        // Before any of them writes rules: those of one must not open its neighbours.
        for (_, spec) in desired.iter().filter(|(id, _)| !self.is_leaving(id)) {
            self.shared.redirects.expect(spec);
        }
        for (id, former) in remembered {
            let why = match desired.get(id) {
                None if matches!(former.origin, Origin::Cni(_)) => "its pod is gone",
                None => "its file is gone",
                Some(spec) if former.needs_restart(spec, handover) => "it has changed while no agent ran",
                Some(_) => continue,
            };
            tracing::info!(workload = %id, "{why}; removing what a former agent left running");
            self.depart_former(id, former.clone(), desired.get(id));
        }
        for (id, spec) in desired {
            if self.is_leaving(&id) {
                continue; // its departure reconciles again
            }
            if !self.machines.contains_key(&id)
                && let Some((other, _)) =
                    self.leaving.iter().find(|(other, leaving)| leaving.uid == spec.uid && **other != id)
            {
                let error =
                    format!("it starts when {other} is gone, whose proxy still has user {}", spec.uid);
                tracing::info!(workload = %id, %error, "not yet");
                if let Origin::File(path) = spec.origin {
                    self.broken.push(BrokenFile { path, error, running: false });
                }
                continue; // likewise
            }
            match self.machines.get_mut(&id) {
                Some(running) if running.spec == spec => {}
                Some(running) => {
                    running.spec = spec.clone();
                    running.machine.update(spec);
                }
                None => {
                    self.leaving.remove(&id); // stuck, if anything: what is left of it is adopted
                    let machine = Machine::start(Arc::clone(&self.shared), spec.clone());
                    self.machines.insert(id, Running { spec, machine });
                }
            }
        }
    }

    fn is_leaving(&self, id: &str) -> bool {
        self.leaving.get(id).is_some_and(|leaving| !leaving.stuck)
    }

    /// Takes a workload away. The rules stay for a `successor` in the same place: its traffic is never open between.
    fn depart(&mut self, id: &str, successor: Option<&WorkloadSpec>, waiting: Vec<oneshot::Sender<bool>>) {
        let Some(running) = self.machines.remove(id) else {
            for answer in waiting {
                let _ = answer.send(false);
            }
            return;
        };
        let leaving = Leaving { status: running.machine.status(), uid: running.spec.uid, stuck: false };
        self.leaving.insert(id.to_owned(), leaving);
        let keeps = |next: &WorkloadSpec| next.redirect.is_some() && next.netns == running.spec.netns;
        let keep_redirect = successor.is_some_and(keeps);
        if matches!(running.spec.origin, Origin::Cni(_)) && !keep_redirect {
            // Its pod ends: from now on the plugin takes the redirect away, or the namespace's end does.
            self.shared.redirects.release(id);
        }
        let id = id.to_owned();
        self.departures.spawn(async move {
            let gone = running.machine.remove(keep_redirect).await;
            (id, gone, waiting)
        });
    }

    /// Removes what a former agent left of a workload.
    fn depart_former(&mut self, id: &str, mut spec: WorkloadSpec, successor: Option<&WorkloadSpec>) {
        if !matches!(spec.origin, Origin::Cni(_)) {
            spec.origin = Origin::Orphan;
        }
        self.shared.redirects.expect(&spec);
        let machine = Machine::start(Arc::clone(&self.shared), spec.clone());
        self.machines.insert(id.to_owned(), Running { spec, machine });
        self.depart(id, successor, Vec::new());
    }

    /// Stops shims that belong to no workload any more.
    async fn remove_orphans(&self) {
        let known: BTreeSet<String> = self.machines.keys().chain(self.leaving.keys()).cloned().collect();
        match self.shared.launcher.list().await {
            Ok(found) => {
                for shim in found.into_iter().filter(|shim| !known.contains(&shim.id)) {
                    tracing::warn!(id = %shim.id, dir = %shim.dir.display(), "stopping a shim that belongs to no workload");
                    let launcher = Arc::clone(&self.shared.launcher);
                    tokio::spawn(async move {
                        if let Err(error) = launcher.stop(&shim.id, Duration::ZERO).await {
                            tracing::error!(id = %shim.id, error = %chain(&error), "it can't be stopped");
                        }
                    });
                }
            }
            Err(error) => tracing::warn!(error = %chain(&error), "can't look for shims of former agents"),
        }
        remains::remove(&self.shared.state_dir.join("w"), &known);
    }

    fn on_command(&mut self, command: Command) {
        match command {
            Command::Add { specs, answer } => {
                let _ = answer.send(self.add(specs));
            }
            Command::Remove { container, answer } => match self.cni.remove(&container) {
                Some(spec) => self.depart(&spec.id(), None, vec![answer]),
                None => {
                    let _ = answer.send(false);
                }
            },
            Command::Sweep { answer } => {
                let _ = answer.send(self.sweep());
            }
            Command::Reload(config) => {
                self.shared.config.store(Arc::new(*config));
                self.reconcile(&BTreeMap::new());
            }
            Command::Status { answer } => {
                let mut all: Vec<WorkloadStatus> = self
                    .machines
                    .values()
                    .map(|running| running.machine.status().borrow().clone())
                    .chain(self.leaving.values().map(|leaving| leaving.status.borrow().clone()))
                    .collect();
                for status in &mut all {
                    let spec = self.machines.get(&status.id).map(|running| &running.spec);
                    status.redirect = self.shared.redirects.report(&status.id, spec);
                }
                all.sort_by(|a, b| a.id.cmp(&b.id));
                let _ = answer.send((all, self.broken.clone()));
            }
        }
    }
}

fn persist(dir: &Path, spec: &WorkloadSpec) -> io::Result<()> {
    fs::create_dir_all(dir)?;
    let text = serde_json::to_vec_pretty(spec).map_err(io::Error::other)?;
    write_atomic(&dir.join(SPEC_FILE), &text, 0o600, None)
}

#[cfg(test)]
mod tests;
