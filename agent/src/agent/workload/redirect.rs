//! The redirect of a workload, in its own network namespace and never in the machine's by accident: put in place, kept
//! there, and taken away.

mod kept;
mod kernel;
mod units;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{OwnedMutexGuard, Semaphore, watch};
use tokio_util::task::AbortOnDropHandle;
use ursa_init::{Applied, Plan, RedirectIntent};

use self::kept::{Kept, keep};
use self::kernel::{Id, Namespace};
use self::units::Units;
use super::WorkloadSpec;
use crate::agent::status::RedirectReport;
use crate::redirected::RedirectFile;

/// Namespaces that are looked at together after a change.
const LOOKS: usize = 8;
/// How long a sidecar waits for the redirects of workloads that came with its own: they are a matter of milliseconds,
/// and one that hangs must not keep others out of the mesh.
const PATIENCE: Duration = Duration::from_secs(5);

/// Checks that the workload's namespace exists and isn't the agent's own.
pub(super) fn attest(spec: &WorkloadSpec) -> Result<(), String> {
    let Some(netns) = &spec.netns else { return Ok(()) };
    let found = inode(netns).map_err(|error| {
        format!(
            "the network namespace {} isn't there ({error}); start the workload's namespace first, or correct `ursa.netns`",
            netns.display()
        )
    })?;
    let own = inode(Path::new("/proc/self/ns/net")).map_err(|error| format!("can't read /proc: {error}"))?;
    if found == own {
        return Err(format!(
            "{} is the agent's own network namespace; leave `ursa.netns` out for a workload of the host",
            netns.display()
        ));
    }
    Ok(())
}

fn inode(path: &Path) -> std::io::Result<(u64, u64)> {
    fs::metadata(path).map(|meta| (meta.dev(), meta.ino()))
}

/// The rules of a namespace in which these workloads live.
pub fn plan(specs: &[&WorkloadSpec]) -> Result<Plan, String> {
    let intent = match specs {
        [spec] if !spec.is_told_apart() => spec.redirect.clone().unwrap_or_default(),
        _ => {
            if let Some(spec) = specs.iter().find(|spec| !spec.is_told_apart()) {
                let others = specs.iter().filter(|other| other.node_id() != spec.node_id());
                let others: Vec<_> = others.map(|other| other.node_id()).collect();
                return Err(format!(
                    "{} shares its network namespace with {}, and nothing tells their traffic apart: say in each file who \
                     the workload is (`ursa.uids`, its users, or `ursa.slices`, its slices)",
                    spec.node_id(),
                    others.join(", ")
                ));
            }
            let parts: Vec<_> = specs.iter().filter_map(|spec| spec.part()).collect();
            RedirectIntent::combine(&parts).map_err(|error| error.to_string())?
        }
    };
    Plan::compile(&intent).map_err(|error| error.to_string())
}

/// Whose redirects are in place, or are to be: workloads of one namespace share its rules.
#[derive(Debug)]
pub struct Redirects {
    /// Where `ursa-init` says which namespaces it keeps itself.
    run_dir: PathBuf,
    /// Who puts them in place instead of this agent, if anybody does.
    units: Option<Units>,
    specs: Mutex<BTreeMap<String, WorkloadSpec>>,
    kept: Mutex<BTreeMap<Id, Keeping>>,
    /// Workloads that came together and whose redirect wasn't tried yet.
    awaited: watch::Sender<BTreeSet<String>>,
    looks: Arc<Semaphore>,
    /// Whoever writes rules holds it, so that nobody puts an older picture in place after a newer one.
    writing: Arc<tokio::sync::Mutex<()>>,
}

/// A namespace that is kept, and for whom.
#[derive(Debug)]
struct Keeping {
    kept: Arc<Kept>,
    workloads: BTreeSet<String>,
    _task: AbortOnDropHandle<()>,
}

impl Redirects {
    /// None yet. In `run_dir` is what `ursa-init` says of those that it keeps itself.
    pub fn new(run_dir: PathBuf) -> Self {
        Self {
            run_dir,
            units: None,
            specs: Mutex::default(),
            kept: Mutex::default(),
            awaited: watch::Sender::default(),
            looks: Arc::new(Semaphore::new(LOOKS)),
            writing: Arc::default(),
        }
    }

    /// Those that units put in place and tell of in `run_dir`; this agent touches none.
    pub fn by_units(run_dir: PathBuf) -> std::io::Result<Self> {
        let units = Some(Units::in_dir(run_dir.clone())?);
        Ok(Self { units, ..Self::new(run_dir) })
    }

    /// Where others tell whether the workload's redirect is in place; `None` where this agent puts it there itself.
    pub(super) fn told_in(&self, spec: &WorkloadSpec) -> Option<RedirectFile> {
        spec.redirect.as_ref().and(self.units.as_ref()).map(|units| units.file(spec))
    }

    /// Returns when something is told about redirects that others put in place.
    pub(super) async fn news(&self) {
        match &self.units {
            Some(units) => units.news().await,
            None => std::future::pending().await,
        }
    }

    /// From now on the workload's traffic is part of its namespace's rules, whoever puts them in place: those of a
    /// neighbour must not open it.
    pub fn expect(&self, spec: &WorkloadSpec) {
        if spec.redirect.is_some() {
            lock(&self.specs).insert(spec.id(), spec.clone());
        } else {
            lock(&self.specs).remove(&spec.id());
        }
    }

    /// These workloads come together: no sidecar of theirs starts before each redirect was tried.
    pub fn expect_together(&self, ids: impl IntoIterator<Item = String>) {
        self.awaited.send_modify(|awaited| awaited.extend(ids));
    }

    /// The workload's redirect was tried, or isn't needed any more.
    pub fn tried(&self, id: &str) {
        self.awaited.send_if_modified(|awaited| awaited.remove(id));
    }

    /// Waits until the redirects of all workloads that came together were tried.
    pub(super) async fn all_tried(&self) {
        let mut awaited = self.awaited.subscribe();
        if tokio::time::timeout(PATIENCE, awaited.wait_for(BTreeSet::is_empty)).await.is_err() {
            let waiting = self.awaited.borrow().len();
            tracing::warn!(waiting, "the redirects of other workloads take long; this sidecar starts before");
        }
    }

    /// Puts the redirect in place and keeps it there. Idempotent: it changes nothing that is already right.
    pub(super) async fn apply(&self, spec: &WorkloadSpec) -> Result<Option<Applied>, String> {
        if spec.redirect.is_none() {
            return Ok(None);
        }
        if let Some(units) = &self.units {
            let in_place = units.file(spec).in_place();
            return in_place.map(|()| None).map_err(|why| format!("the redirect isn't in place: {why}"));
        }
        let writing = self.write().await;
        self.expect(spec);
        let Some(plan) = self.plan_of(spec)? else { return Ok(None) };
        let (netns, run_dir, known) = (spec.netns.clone(), self.run_dir.clone(), self.known());
        let work = move || {
            let namespace = Namespace::open(netns.as_deref(), &run_dir)?;
            let id = namespace.id()?;
            if let Some(kept) = known.get(&id) {
                return kept.put(plan).map(|applied| (id, Arc::clone(kept), applied));
            }
            Kept::start(namespace, plan).map(|(kept, applied)| (id, Arc::new(kept), applied))
        };
        let (_writing, done) = blocking(writing, work).await?;
        let (id, kept, applied) = done.map_err(|error| {
            format!("the redirect can't be put in place: {error}; nothing of it is left half done")
        })?;
        self.keep(&spec.id(), id, &kept);
        Ok(Some(applied))
    }

    /// Removes the redirect; that of neighbours stays. A namespace that is gone took its rules along.
    pub(super) async fn remove(&self, spec: &WorkloadSpec) -> Result<(), String> {
        self.tried(&spec.id());
        if spec.redirect.is_none() || self.units.is_some() {
            return Ok(());
        }
        let writing = self.write().await;
        let held = lock(&self.specs).remove(&spec.id());
        let kept = self.kept_for(&spec.id());
        let netns = spec.netns.clone();
        if kept.is_none() && netns.as_ref().is_some_and(|path| !path.exists()) {
            return Ok(());
        }
        let (rest, run_dir) = (self.plan_of(spec), self.run_dir.clone());
        let work = move || match (kept, rest?) {
            (Some(kept), Some(plan)) => kept.put(plan).map(drop),
            (Some(kept), None) => kept.remove(),
            (None, rest) => {
                let namespace = Namespace::open(netns.as_deref(), &run_dir)?;
                match rest {
                    // Whoever is left keeps it.
                    Some(plan) => namespace.run(|| ursa_init::apply(&plan).map(drop)),
                    None => namespace.remove(),
                }
            }
        };
        let (_writing, removed) = blocking(writing, work).await?;
        match (&removed, held) {
            (Ok(()), _) => self.leave(&spec.id()),
            (Err(_), Some(held)) => drop(lock(&self.specs).insert(held.id(), held)), // it is still there
            _ => {}
        }
        removed.map_err(|error| format!("the redirect can't be removed: {error}; try `ursa-init remove`"))
    }

    /// Puts nothing back any more: whoever put the workload there takes its redirect away now. Neighbours' stay.
    pub fn release(&self, id: &str) {
        self.tried(id);
        lock(&self.specs).remove(id);
        self.leave(id);
    }

    /// How the redirect stands; `None` while this agent keeps none for the workload.
    pub fn report(&self, id: &str, spec: Option<&WorkloadSpec>) -> Option<RedirectReport> {
        if let Some(units) = &self.units {
            return units.report(spec.filter(|spec| spec.redirect.is_some())?);
        }
        self.kept_for(id).map(|kept| kept.report())
    }

    async fn write(&self) -> OwnedMutexGuard<()> {
        Arc::clone(&self.writing).lock_owned().await
    }

    fn known(&self) -> BTreeMap<Id, Arc<Kept>> {
        lock(&self.kept).iter().map(|(id, keeping)| (*id, Arc::clone(&keeping.kept))).collect()
    }

    fn kept_for(&self, workload: &str) -> Option<Arc<Kept>> {
        let kept = lock(&self.kept);
        kept.values()
            .find(|keeping| keeping.workloads.contains(workload))
            .map(|found| Arc::clone(&found.kept))
    }

    fn keep(&self, workload: &str, id: Id, kept: &Arc<Kept>) {
        let is_here = lock(&self.kept).get(&id).is_some_and(|keeping| keeping.workloads.contains(workload));
        if is_here {
            return;
        }
        self.leave(workload); // its path leads to another namespace than before
        let start = || Keeping {
            kept: Arc::clone(kept),
            workloads: BTreeSet::new(),
            _task: AbortOnDropHandle::new(tokio::spawn(keep(Arc::clone(kept), Arc::clone(&self.looks)))),
        };
        lock(&self.kept).entry(id).or_insert_with(start).workloads.insert(workload.to_owned());
    }

    /// The namespace isn't kept for the workload any more; for nobody, if it was the last one.
    fn leave(&self, workload: &str) {
        lock(&self.kept).retain(|_, keeping| {
            if keeping.workloads.remove(workload) && keeping.workloads.is_empty() {
                keeping.kept.release();
            }
            !keeping.workloads.is_empty()
        });
    }

    /// The rules of all that live in the same namespace; `None` when nobody does.
    fn plan_of(&self, spec: &WorkloadSpec) -> Result<Option<Plan>, String> {
        let (specs, here) = (lock(&self.specs), place_of(spec));
        let here: Vec<_> = specs.values().filter(|other| place_of(other) == here).collect();
        if here.is_empty() { Ok(None) } else { plan(&here).map(Some) }
    }
}

/// What tells the namespaces of workloads apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// The agent's own.
    Own,
    /// One that is there, by whichever of its names.
    Id(u64, u64),
    /// One that isn't there.
    Path(PathBuf),
}

/// The namespace that a workload lives in.
pub fn place_of(spec: &WorkloadSpec) -> Place {
    match &spec.netns {
        None => Place::Own,
        Some(path) => {
            inode(path).map_or_else(|_| Place::Path(path.clone()), |(device, inode)| Place::Id(device, inode))
        }
    }
}

/// A map that is read and written whole is right even if somebody died while holding it.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs `work` where it may block. It keeps the right to write even if nobody waits for it any more.
async fn blocking<T: Send + 'static>(
    writing: OwnedMutexGuard<()>,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<(OwnedMutexGuard<()>, T), String> {
    let work = move || {
        let done = work();
        (writing, done)
    };
    tokio::task::spawn_blocking(work).await.map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::config::AgentConfig;
    use crate::agent::workload::Origin;

    /// Those that are left can't be told apart, so that there are no rules for them alone.
    #[tokio::test]
    async fn what_cannot_be_removed_is_still_there() {
        let config = AgentConfig::default();
        let workload = |name: &str, local: &str| {
            // No namespace at all: should this fail, then it does nothing.
            let text = format!(
                "type: Dataplane\nmesh: default\nname: {name}\nnetworking: {{address: 10.0.0.1, inbound: [{{port: 80}}]}}\n\
                 ursa: {{netns: /dev/null{local}}}\n"
            );
            WorkloadSpec::from_yaml(&text, Origin::File(name.to_owned()), &config).unwrap()
        };
        let redirects = Redirects::new(PathBuf::new());
        let web = workload("web", ", uids: [1001]");
        for spec in [&web, &workload("a", ""), &workload("b", "")] {
            redirects.expect(spec);
        }
        let error = redirects.remove(&web).await.unwrap_err();
        assert!(error.contains("nothing tells their traffic apart"), "{error}");
        assert_eq!(lock(&redirects.specs).get(&web.id()), Some(&web));
    }

    #[tokio::test]
    async fn a_sidecar_waits_for_the_redirects_that_came_with_its_own() {
        let redirects = Redirects::new(PathBuf::new());
        redirects.all_tried().await;
        redirects.expect_together(["a".to_owned(), "b".to_owned()]);
        redirects.tried("a");
        assert!(futures_util::FutureExt::now_or_never(redirects.all_tried()).is_none(), "b isn't closed yet");
        let (start, tried) = (tokio::time::Instant::now(), redirects.all_tried());
        let ((), ()) = tokio::join!(tried, async { redirects.tried("b") });
        assert!(start.elapsed() < PATIENCE);
    }
}
