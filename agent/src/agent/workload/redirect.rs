//! The redirect of a workload, in its own network namespace and never in the machine's by accident.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use ursa_init::{Applied, Plan};

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

/// Puts the redirect in place. Idempotent: it changes nothing that is already right.
pub(super) async fn apply(spec: &WorkloadSpec) -> Result<Option<Applied>, String> {
    let Some(intent) = spec.redirect.clone() else { return Ok(None) };
    let netns = spec.netns.clone();
    let work = move || {
        let plan = Plan::compile(&intent).map_err(|error| error.to_string())?;
        within(netns.as_deref(), || ursa_init::apply(&plan)).map(Some)
    };
    blocking(work).await.map_err(|error| {
        format!("the redirect can't be put in place: {error}; nothing of it is left half done")
    })
}

/// Removes the redirect. A namespace that is gone took its rules along.
pub(super) async fn remove(spec: &WorkloadSpec) -> Result<(), String> {
    if spec.redirect.is_none() {
        return Ok(());
    }
    let netns = spec.netns.clone();
    if netns.as_ref().is_some_and(|path| !path.exists()) {
        return Ok(());
    }
    blocking(move || within(netns.as_deref(), ursa_init::remove).map(drop))
        .await
        .map_err(|error| format!("the redirect can't be removed: {error}; try `ursa-init remove`"))
}

fn within<T: Send>(
    netns: Option<&Path>,
    work: impl FnOnce() -> Result<T, ursa_init::Error> + Send,
) -> Result<T, String> {
    let done = match netns {
        Some(path) => ursa_init::in_netns(path, work).and_then(|done| done),
        None => work(),
    };
    done.map_err(|error| error.with_causes())
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, String> + Send + 'static,
) -> Result<T, String> {
    tokio::task::spawn_blocking(work).await.map_err(|error| error.to_string())?
}
