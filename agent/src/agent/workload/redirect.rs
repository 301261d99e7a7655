//! The redirect of a workload, in its own network namespace and never in the machine's by accident.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use ursa_init::netns::Netns;
use ursa_init::{Applied, Plan, RedirectIntent};

use super::WorkloadSpec;

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
#[derive(Debug, Default)]
pub struct Redirects {
    specs: Mutex<BTreeMap<String, WorkloadSpec>>,
    /// Whoever writes rules holds it, so that nobody puts an older picture in place after a newer one.
    writing: tokio::sync::Mutex<()>,
}

impl Redirects {
    /// From now on the workload's traffic is part of its namespace's rules, whoever puts them in place: those of a
    /// neighbour must not open it.
    pub fn expect(&self, spec: &WorkloadSpec) {
        if spec.redirect.is_some() {
            lock(&self.specs).insert(spec.id(), spec.clone());
        } else {
            lock(&self.specs).remove(&spec.id());
        }
    }

    /// Puts the redirect in place. Idempotent: it changes nothing that is already right.
    pub(super) async fn apply(&self, spec: &WorkloadSpec) -> Result<Option<Applied>, String> {
        if spec.redirect.is_none() {
            return Ok(None);
        }
        let _writing = self.writing.lock().await;
        self.expect(spec);
        let Some(plan) = self.plan_of(spec)? else { return Ok(None) };
        let netns = spec.netns.clone();
        let work = move || within(netns.as_deref(), || ursa_init::apply(&plan)).map(Some);
        blocking(work).await.map_err(|error| {
            format!("the redirect can't be put in place: {error}; nothing of it is left half done")
        })
    }

    /// Removes the redirect; that of neighbours stays. A namespace that is gone took its rules along.
    pub(super) async fn remove(&self, spec: &WorkloadSpec) -> Result<(), String> {
        if spec.redirect.is_none() {
            return Ok(());
        }
        let _writing = self.writing.lock().await;
        let held = lock(&self.specs).remove(&spec.id());
        let netns = spec.netns.clone();
        if netns.as_ref().is_some_and(|path| !path.exists()) {
            return Ok(());
        }
        let rest = self.plan_of(spec)?;
        let work = move || {
            within(netns.as_deref(), || match rest {
                Some(plan) => ursa_init::apply(&plan).map(drop),
                None => ursa_init::remove().map(drop),
            })
        };
        let removed = blocking(work).await;
        if let (Err(_), Some(held)) = (&removed, held) {
            lock(&self.specs).insert(held.id(), held); // it is still there
        }
        removed.map_err(|error| format!("the redirect can't be removed: {error}; try `ursa-init remove`"))
    }

    /// The rules of all that live in the same namespace; `None` when nobody does.
    fn plan_of(&self, spec: &WorkloadSpec) -> Result<Option<Plan>, String> {
        let specs = lock(&self.specs);
        let here: Vec<_> = specs.values().filter(|other| same_namespace(other, spec)).collect();
        if here.is_empty() { Ok(None) } else { plan(&here).map(Some) }
    }
}

/// Whether two workloads live in one network namespace, by whichever of its names.
pub fn same_namespace(one: &WorkloadSpec, other: &WorkloadSpec) -> bool {
    let id = |spec: &WorkloadSpec| spec.netns.as_deref().and_then(|path| inode(path).ok());
    one.netns == other.netns || id(one).is_some_and(|found| id(other) == Some(found))
}

/// A map that is read and written whole is right even if somebody died while holding it.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn within<T: Send>(
    netns: Option<&Path>,
    work: impl FnOnce() -> Result<T, ursa_init::Error> + Send,
) -> Result<T, String> {
    let done = match netns {
        // What was the workload's may be another's by now: a path below /proc is used again.
        Some(path) => Netns::open(path)
            .and_then(|netns| netns.refuse_own_or_host().map(|()| netns))
            .and_then(|netns| netns.run(work)?),
        None => work(),
    };
    done.map_err(|error| error.with_causes())
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, String> + Send + 'static,
) -> Result<T, String> {
    tokio::task::spawn_blocking(work).await.map_err(|error| error.to_string())?
}
