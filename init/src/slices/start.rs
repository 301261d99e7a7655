//! Having systemd make slices, so that rules match what runs in them from its first packet on.

use std::process::{Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{Missing, unit};

/// A slice is made within milliseconds. Where systemd has more important things to do the redirect doesn't wait: it
/// is told when the slice comes.
const PATIENCE: Duration = Duration::from_secs(10);

/// Starts the slices that don't exist. The error is for the operator: it changes nothing for everybody else's redirect.
pub fn start(missing: &[Missing]) -> Result<(), String> {
    let (units, strange): (Vec<_>, Vec<_>) = missing.iter().partition(|m| unit(&m.slice).is_some());
    let started = by_systemd(&units.into_iter().filter_map(|m| unit(&m.slice)).collect::<Vec<_>>());
    if strange.is_empty() {
        return started;
    }
    let names: Vec<_> = strange.iter().map(|m| m.slice.to_string()).collect();
    let why = format!(
        "systemd makes no slice at {}: that of `a-b.slice` is `a.slice/a-b.slice`",
        names.join(" and none at ")
    );
    Err(started.err().map_or_else(|| why.clone(), |error| format!("{error}; {why}")))
}

fn by_systemd(units: &[&str]) -> Result<(), String> {
    if units.is_empty() {
        return Ok(());
    }
    let what = format!("systemctl start {}", units.join(" "));
    let child = Command::new("systemctl")
        .args(["start", "--no-ask-password", "--"])
        .args(units)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| format!("can't run `{what}`: {error}"))?;
    let pid = child.id().cast_signed();
    let (tell, told) = channel();
    let waiting = thread::spawn(move || tell.send(child.wait_with_output()));
    let output = told.recv_timeout(PATIENCE);
    if let Err(RecvTimeoutError::Timeout) = output {
        // Not collected before it is dead, so the number is still its own.
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
    let _ = waiting.join();
    match output {
        Ok(Ok(output)) if output.status.success() => Ok(()),
        Ok(Ok(output)) => {
            let said = String::from_utf8_lossy(&output.stderr);
            Err(format!("`{what}` failed ({}): {}", output.status, said.trim()))
        }
        Ok(Err(error)) => Err(format!("`{what}` can't be waited for: {error}")),
        Err(_) => Err(format!("`{what}` has taken longer than {} s", PATIENCE.as_secs())),
    }
}
