//! Which workloads live here: those of the files, those that CNI added, and none besides.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::control::chain;
use super::status::{BrokenFile, Phase, WorkloadStatus};
use super::workload::{Machine, Origin, POD_UIDS, Shared, WorkloadFiles, WorkloadSpec};
use crate::relay::write_atomic;

/// Commands that wait; each caller waits for its answer.
const QUEUE: usize = 64;
const SPEC_FILE: &str = "workload.json";
/// How long CNI waits for a live Envoy: the plugin gives up after 20 s, and our words say more than its silence.
const CNI_PATIENCE: Duration = Duration::from_secs(18);

/// What becomes of a workload that CNI adds.
pub type Answer = Result<watch::Receiver<WorkloadStatus>, String>;

#[derive(Debug)]
enum Command {
    Add { spec: Box<WorkloadSpec>, answer: oneshot::Sender<Answer> },
    Remove { container: String, answer: oneshot::Sender<bool> },
    Retain { valid: BTreeSet<String>, answer: oneshot::Sender<usize> },
    Status { answer: oneshot::Sender<(Vec<WorkloadStatus>, Vec<BrokenFile>)> },
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
        };
        (Self { commands }, tokio::spawn(task.run(queue, stop)))
    }

    /// A workload appears by CNI ADD. Returns once its Envoy is live.
    pub async fn add(&self, spec: WorkloadSpec) -> Result<(), String> {
        let (answer, answered) = oneshot::channel();
        let gone = "the agent is stopping; try again";
        self.commands
            .send(Command::Add { spec: Box::new(spec), answer })
            .await
            .map_err(|_| gone.to_owned())?;
        let status = answered.await.map_err(|_| gone.to_owned())??;
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

    /// The workload of a container disappears by CNI DEL. Returns whether there was one.
    pub async fn remove(&self, container: &str) -> Result<bool, String> {
        let (answer, answered) = oneshot::channel();
        let command = Command::Remove { container: container.to_owned(), answer };
        let gone = "the agent is stopping; try again";
        self.commands.send(command).await.map_err(|_| gone.to_owned())?;
        answered.await.map_err(|_| gone.to_owned())
    }

    /// Removes the workloads of containers that don't exist any more. Returns how many.
    pub async fn retain(&self, valid: BTreeSet<String>) -> Result<usize, String> {
        let (answer, answered) = oneshot::channel();
        let gone = "the agent is stopping; try again";
        self.commands.send(Command::Retain { valid, answer }).await.map_err(|_| gone.to_owned())?;
        answered.await.map_err(|_| gone.to_owned())
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

struct Task {
    shared: Arc<Shared>,
    files: WorkloadFiles,
    machines: BTreeMap<String, Running>,
    /// On their way out; the same id may start again only afterwards.
    leaving: BTreeMap<String, watch::Receiver<WorkloadStatus>>,
    departures: JoinSet<(String, Vec<oneshot::Sender<bool>>)>,
    /// Container → workload.
    cni: BTreeMap<String, WorkloadSpec>,
    broken: Vec<BrokenFile>,
}

impl Task {
    async fn run(mut self, mut queue: mpsc::Receiver<Command>, stop: CancellationToken) {
        let remembered = self.recall();
        self.reconcile(&remembered);
        self.remove_orphans(remembered).await;
        loop {
            tokio::select! {
                () = stop.cancelled() => break,
                () = self.files.changed() => self.reconcile(&BTreeMap::new()),
                Some(departed) = self.departures.join_next() => {
                    if let Ok((id, waiting)) = departed {
                        self.leaving.remove(&id);
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
    fn recall(&mut self) -> BTreeMap<String, WorkloadSpec> {
        let dir = self.shared.config.state_dir.join("w");
        let mut specs = BTreeMap::new();
        for entry in fs::read_dir(&dir).into_iter().flatten().filter_map(Result::ok) {
            let path = entry.path().join(SPEC_FILE);
            let Ok(text) = fs::read(&path) else { continue };
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
        specs
    }

    /// What should run: the files' workloads and CNI's. A broken file keeps its former version running.
    fn desired(&mut self, remembered: &BTreeMap<String, WorkloadSpec>) -> BTreeMap<String, WorkloadSpec> {
        let mut scan = self.files.scan(&self.shared.config);
        let mut desired: BTreeMap<String, WorkloadSpec> = BTreeMap::new();
        for spec in scan.specs.into_values().chain(self.cni.values().cloned()) {
            desired.entry(spec.id()).or_insert(spec);
        }
        let former: Vec<WorkloadSpec> = self
            .machines
            .values()
            .map(|running| running.spec.clone())
            .chain(remembered.values().cloned())
            .collect();
        for broken in &mut scan.broken {
            let path = PathBuf::from(&broken.path);
            if !path.is_file() {
                continue;
            }
            let origin = Origin::File(broken.path.clone());
            if let Some(spec) = former.iter().find(|spec| spec.origin == origin) {
                broken.running = true;
                desired.entry(spec.id()).or_insert_with(|| spec.clone());
            }
        }
        let settled = |id: &str, uid: u32| former.iter().any(|spec| spec.uid == uid && spec.id() == id);
        refuse_shared_users(&mut desired, settled, &mut scan.broken);
        for broken in &scan.broken {
            if !self.broken.contains(broken) {
                tracing::error!(path = %broken.path, error = %broken.error, former_version_runs = broken.running,
                    "a workload file is broken");
            }
        }
        self.broken = scan.broken;
        desired
    }

    fn reconcile(&mut self, remembered: &BTreeMap<String, WorkloadSpec>) {
        let desired = self.desired(remembered);
        let superfluous: Vec<String> = self
            .machines
            .iter()
            .filter(|(id, running)| desired.get(*id).is_none_or(|spec| running.spec.needs_restart(spec)))
            .map(|(id, _)| id.clone())
            .collect();
        for id in superfluous {
            self.depart(&id, Vec::new());
        }
        for (id, spec) in desired {
            if self.leaving.contains_key(&id) {
                continue; // its departure reconciles again
            }
            match self.machines.get_mut(&id) {
                Some(running) if running.spec == spec => {}
                Some(running) => {
                    running.spec = spec.clone();
                    running.machine.update(spec);
                }
                None => {
                    let machine = Machine::start(Arc::clone(&self.shared), spec.clone());
                    self.machines.insert(id, Running { spec, machine });
                }
            }
        }
    }

    fn depart(&mut self, id: &str, waiting: Vec<oneshot::Sender<bool>>) {
        let Some(running) = self.machines.remove(id) else {
            for answer in waiting {
                let _ = answer.send(false);
            }
            return;
        };
        self.leaving.insert(id.to_owned(), running.machine.status());
        let id = id.to_owned();
        self.departures.spawn(async move {
            running.machine.remove().await;
            (id, waiting)
        });
    }

    /// Shims and descriptions that belong to no workload any more.
    async fn remove_orphans(&mut self, remembered: BTreeMap<String, WorkloadSpec>) {
        for (id, mut spec) in remembered {
            if !self.machines.contains_key(&id) {
                tracing::info!(workload = %id, "its file is gone; removing what a former agent left running");
                spec.origin = Origin::Orphan;
                let machine = Machine::start(Arc::clone(&self.shared), spec.clone());
                self.machines.insert(id.clone(), Running { spec, machine });
                self.depart(&id, Vec::new());
            }
        }
        let known: BTreeSet<String> = self.machines.keys().chain(self.leaving.keys()).cloned().collect();
        match self.shared.launcher.list().await {
            Ok(found) => {
                for shim in found.into_iter().filter(|shim| !known.contains(&shim.id)) {
                    tracing::warn!(id = %shim.id, dir = %shim.dir.display(), "stopping a shim that belongs to no workload");
                    if let Err(error) = self.shared.launcher.stop(&shim.id, Duration::ZERO).await {
                        tracing::error!(id = %shim.id, error = %chain(&error), "it can't be stopped");
                    }
                }
            }
            Err(error) => tracing::warn!(error = %chain(&error), "can't look for shims of former agents"),
        }
    }

    fn on_command(&mut self, command: Command) {
        match command {
            Command::Add { spec, answer } => {
                let _ = answer.send(self.add(*spec));
            }
            Command::Remove { container, answer } => match self.cni.remove(&container) {
                Some(spec) => self.depart(&spec.id(), vec![answer]),
                None => {
                    let _ = answer.send(false);
                }
            },
            Command::Retain { valid, answer } => {
                let gone: Vec<String> =
                    self.cni.keys().filter(|container| !valid.contains(*container)).cloned().collect();
                for container in &gone {
                    if let Some(spec) = self.cni.remove(container) {
                        self.depart(&spec.id(), Vec::new());
                    }
                }
                let _ = answer.send(gone.len());
            }
            Command::Status { answer } => {
                let mut all: Vec<WorkloadStatus> = self
                    .machines
                    .values()
                    .map(|running| running.machine.status().borrow().clone())
                    .chain(self.leaving.values().map(|status| status.borrow().clone()))
                    .collect();
                all.sort_by(|a, b| a.id.cmp(&b.id));
                let _ = answer.send((all, self.broken.clone()));
            }
        }
    }

    /// The user of a pod's proxy: the one it had, the one that the plugin's configuration names, or a free one.
    fn user_of(&self, container: &str, spec: &WorkloadSpec) -> Result<u32, String> {
        if let Some(former) = self.cni.get(container) {
            return Ok(former.uid);
        }
        let pods = self.cni.values().map(|pod| (pod.uid, pod.id()));
        let taken: BTreeMap<u32, String> =
            pods.chain(self.machines.iter().map(|(id, running)| (running.spec.uid, id.clone()))).collect();
        if POD_UIDS.contains(&spec.uid) {
            return POD_UIDS
                .into_iter()
                .find(|uid| !taken.contains_key(uid))
                .ok_or_else(|| "no user is free for its proxy: too many pods".to_owned());
        }
        match taken.get(&spec.uid) {
            None => Ok(spec.uid),
            Some(other) => Err(format!(
                "{} is the user of {other}'s proxy already, and with one user each could take the other's key; take \
                 proxyUids out of the plugin's redirect, and each proxy gets a user of its own",
                spec.uid
            )),
        }
    }

    fn add(&mut self, mut spec: WorkloadSpec) -> Answer {
        let Origin::Cni(container) = spec.origin.clone() else {
            return Err("only CNI adds workloads; a file is put into the workloads directory".to_owned());
        };
        spec.uid = self.user_of(&container, &spec)?;
        let id = spec.id();
        if self.leaving.contains_key(&id) {
            return Err(format!("the former {} is still draining; try again", spec.node_id()));
        }
        if let Some(running) = self.machines.get(&id)
            && running.spec.origin != spec.origin
        {
            return Err(format!("{} already runs here, from {}", spec.node_id(), running.spec.origin));
        }
        // Before anything starts: an agent that dies now must find it again.
        let dir = self.shared.state_dir(&id);
        persist(&dir, &spec).map_err(|error| format!("can't write to {}: {error}", dir.display()))?;
        self.cni.insert(container, spec);
        self.reconcile(&BTreeMap::new());
        self.machines
            .get(&id)
            .map(|running| running.machine.status())
            .ok_or_else(|| "the former workload of that name is still leaving; try again".to_owned())
    }
}

/// Of those who share a user, keeps the one that already runs, or else the first.
fn refuse_shared_users(
    desired: &mut BTreeMap<String, WorkloadSpec>,
    settled: impl Fn(&str, u32) -> bool,
    broken: &mut Vec<BrokenFile>,
) {
    let mut order: Vec<(String, u32)> = desired.iter().map(|(id, spec)| (id.clone(), spec.uid)).collect();
    order.sort_by_key(|(id, uid)| !settled(id, *uid));
    let mut users: BTreeMap<u32, String> = BTreeMap::new();
    for (id, uid) in order {
        let Some(other) = users.get(&uid) else {
            users.insert(uid, id);
            continue;
        };
        let error = format!(
            "ursa.proxyUid: {uid} is the user of {other}'s proxy already, and with one user each could take the \
             other's key; name a user of its own"
        );
        if let Some(WorkloadSpec { origin: Origin::File(path), .. }) = desired.remove(&id) {
            broken.push(BrokenFile { path, error, running: false });
        }
    }
}

fn persist(dir: &Path, spec: &WorkloadSpec) -> std::io::Result<()> {
    fs::create_dir_all(dir)?;
    let text = serde_json::to_vec_pretty(spec).map_err(std::io::Error::other)?;
    write_atomic(&dir.join(SPEC_FILE), &text, 0o600, None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::config::AgentConfig;

    fn workload(name: &str, uid: u32) -> (String, WorkloadSpec) {
        let text = format!(
            "type: Dataplane\nmesh: default\nname: {name}\nnetworking: {{address: 10.0.0.1, inbound: [{{port: 80}}]}}\n\
             ursa: {{proxyUid: {uid}}}\n"
        );
        let origin = Origin::File(format!("/w/{name}.yaml"));
        let spec = WorkloadSpec::from_yaml(&text, origin, &AgentConfig::default()).unwrap();
        (spec.id(), spec)
    }

    #[test]
    fn of_two_proxies_with_one_user_the_running_one_stays() {
        for (running, refused) in [("default.a", "/w/b.yaml"), ("default.b", "/w/a.yaml")] {
            let mut desired = BTreeMap::from([workload("a", 7), workload("b", 7), workload("c", 8)]);
            let mut broken = Vec::new();
            refuse_shared_users(&mut desired, |id, _| id == running, &mut broken);
            assert_eq!(desired.keys().map(String::as_str).collect::<Vec<_>>(), [running, "default.c"]);
            assert_eq!(broken.len(), 1);
            assert_eq!(broken[0].path, refused);
            assert!(broken[0].error.contains("user of its own"), "{}", broken[0].error);
        }
    }
}
