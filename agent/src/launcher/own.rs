//! Which process is a shim of ours: the only ones that are adopted, stopped or killed.

use std::io;
use std::path::Path;
use std::time::Duration;

use nix::sys::signal::Signal;
use tracing::warn;

use super::process::Process;
use crate::shim::client::{ClientError, ShimClient};

/// How long a shim may take beyond its drain until it has exited: Envoy's own deadline and some.
const STOP_DEADLINE: Duration = Duration::from_secs(10);

/// The process behind a control socket, if it is one of ours.
pub(super) fn identify(client: &ShimClient, dir: &Path, workload: &str) -> Result<Process, String> {
    let (peer, hello) = (client.peer(), client.hello());
    let own = nix::unistd::geteuid().as_raw();
    if peer.uid != own {
        return Err(format!(
            "{} was bound by uid {}, not by us (uid {own}): somebody replaced the socket; stop pid {} and try again",
            client.path().display(),
            peer.uid,
            peer.pid
        ));
    }
    if hello.pid != peer.pid {
        return Err(format!("the shim says it is pid {}, the kernel says {}", hello.pid, peer.pid));
    }
    if hello.workload != workload {
        return Err(format!(
            "the shim in {} belongs to {}, not to {workload}; stop it (pid {}) and remove that directory",
            dir.display(),
            hello.workload,
            peer.pid
        ));
    }
    let process = Process::open(hello.pid, Some(hello.start_time))
        .map_err(|error| format!("the shim (pid {}) cannot be watched: {error}", hello.pid))?;
    process.check_shim_of(dir).map_err(|error| format!("pid {} is not adopted: {error}", hello.pid))?;
    Ok(process)
}

/// Ends the shim that listens in `dir`, if any, and nobody else.
pub(super) async fn end(dir: &Path, workload: Option<&str>, drain: Duration) -> Result<(), String> {
    let Some(peer) = ShimClient::listener(dir).await.map_err(|error| with_cause(&error))? else {
        return Ok(());
    };
    if peer.uid != nix::unistd::geteuid().as_raw() {
        return Err(format!(
            "pid {} of uid {} listens in {} and is none of our shims",
            peer.pid,
            peer.uid,
            dir.display()
        ));
    }
    let process = match Process::open(peer.pid, None) {
        Ok(process) => process,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(format!("the shim (pid {}) cannot be watched: {error}", peer.pid)),
    };
    match process.check_shim_of(dir) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(format!("pid {} is left alone: {error}", peer.pid)),
    }
    let asked = match ShimClient::connect(dir).await {
        Ok(client) => {
            let said = &client.hello().workload;
            if client.peer() != peer || workload.is_some_and(|workload| workload != said) {
                return Err(format!(
                    "the shim in {} (pid {}) says it is {said}'s and is left alone",
                    dir.display(),
                    client.peer().pid
                ));
            }
            client.stop(drain).await
        }
        Err(error) => Err(error),
    };
    let patience = match asked {
        Ok(()) => drain + STOP_DEADLINE,
        Err(error) => {
            warn!(pid = process.pid(), %error, "the shim cannot be asked to stop");
            // One that is hung would not hear the signal either; any other ends by it, or is ending already.
            let hung = matches!(error, ClientError::Timeout { .. });
            process
                .signal(Signal::SIGTERM)
                .map_err(|error| format!("pid {} gets no signal: {error}", process.pid()))?;
            if hung { Duration::ZERO } else { drain + STOP_DEADLINE }
        }
    };
    if process.ends_within(patience).await {
        return Ok(());
    }
    warn!(pid = process.pid(), "the shim did not stop and is killed, and Envoy with it");
    process
        .signal(Signal::SIGKILL)
        .map_err(|error| format!("pid {} cannot be killed: {error}", process.pid()))?;
    if process.ends_within(STOP_DEADLINE).await {
        return Ok(());
    }
    Err(format!("pid {} is still there after SIGKILL", process.pid()))
}

/// An error of the client, and what the system said.
pub(super) fn with_cause(error: &ClientError) -> String {
    match std::error::Error::source(error) {
        Some(cause) => format!("{error}: {cause}"),
        None => error.to_string(),
    }
}

/// Ends a shim that is still there although it should have ended, by what was known of it when it was ours.
pub(super) async fn end_known(pid: i32, start_time: u64) -> Result<(), String> {
    let process = match Process::open(pid, Some(start_time)) {
        Ok(process) => process,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(format!("the shim (pid {pid}) cannot be watched: {error}")),
    };
    warn!(pid, "the shim could not be asked to stop and is killed, and Envoy with it");
    process.signal(Signal::SIGKILL).map_err(|error| format!("pid {pid} cannot be killed: {error}"))?;
    if process.ends_within(STOP_DEADLINE).await {
        return Ok(());
    }
    Err(format!("pid {pid} is still there after SIGKILL"))
}
