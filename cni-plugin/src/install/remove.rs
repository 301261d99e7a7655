//! Out again: configuration, then the pods that still need the program, then the program.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use std::os::fd::AsFd as _;

use super::attachments::{self, Attachments};
use super::conflist::Conflist;
use super::directory::{Directory, Kind};
use super::error::{InstallError, io};
use super::file;
use super::lock::{Lock, What};
use super::place::{self, SAVED};
use super::watch::{Events, LOOK};
use super::{ATTEMPTS, Layout, busy, plugin, read_directory, stub};

/// What is left when [`uninstall`] is done.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Left {
    /// What was removed or restored.
    pub done: Vec<String>,
    /// Containers that still know the plugin; for their DEL a stub stays.
    pub attachments: Vec<String>,
    /// Containers whose sidecar still runs.
    pub sidecars: Vec<String>,
}

/// How long between two looks at the agent's sidecars.
const LOOK_AGAIN: Duration = Duration::from_millis(500);
/// More than a runtime takes to read a changed directory and to get through a list that it has begun.
const SETTLED: Duration = Duration::from_secs(2);

/// Removes everything; what is gone already doesn't matter. `told` hears what is waited for.
pub fn uninstall(layout: &Layout, drain: Duration, mut told: impl FnMut(&str)) -> Result<Left, InstallError> {
    let mut left = Left::default();
    if Lock::is_held(&layout.run_dir, What::Watch)? {
        return Err(InstallError::Watched(What::Watch.path(&layout.run_dir)));
    }
    if layout.net_dir.is_dir() {
        let _lock = Lock::hold(&layout.run_dir, What::Install)?;
        file::clean(&layout.net_dir)?;
        let mut attempts = 1;
        while !remove_configuration(&layout.net_dir, &mut left.done)? {
            if attempts == ATTEMPTS {
                return Err(busy(&layout.net_dir));
            }
            attempts += 1;
        }
    }
    let attachments = wait(layout, drain, !left.done.is_empty(), &mut told);
    if layout.bin_dir.is_dir() {
        let _lock = Lock::hold(&layout.run_dir, What::Install)?;
        file::clean(&layout.bin_dir)?;
        if attachments.cached.is_empty() {
            if file::remove(&layout.program())? {
                left.done.push(format!("removed {}", layout.program().display()));
            }
            file::remove(&stub::path(layout))?;
        } else {
            stub::put(layout)?;
        }
    }
    let state = super::watch::state_file(&layout.run_dir);
    file::remove(&state)?;
    remove_locks(&layout.run_dir)?;
    left.attachments = attachments.cached;
    left.sidecars = attachments.sidecars;
    Ok(left)
}

/// Whoever holds one meanwhile keeps it.
fn remove_locks(run_dir: &Path) -> Result<(), InstallError> {
    for what in [What::Watch, What::Install] {
        if what.path(run_dir).exists()
            && let Some(lock) = Lock::try_hold(run_dir, what)?
        {
            lock.remove()?;
        }
    }
    Ok(())
}

/// Removes everything, stays until SIGTERM, and removes the stub when nobody needs it any more.
pub fn uninstall_and_stay(layout: &Layout, mut told: impl FnMut(&Left)) -> Result<(), InstallError> {
    let events = Events::new()?;
    let mut before = None;
    loop {
        events.watch(&layout.cache_dir.join("results"));
        let left = uninstall(layout, Duration::ZERO, |_| ())?;
        if before.as_ref() != Some(&left) {
            told(&left);
        }
        before = Some(Left { done: Vec::new(), ..left });
        if !events.wait(LOOK) {
            return Ok(());
        }
    }
}

/// Waits until nobody needs the plugin, or the time is over. A runtime that has read the list a moment ago may
/// still be about to call the program: `settle` says that there was one.
fn wait(layout: &Layout, patience: Duration, settle: bool, told: &mut impl FnMut(&str)) -> Attachments {
    let start = Instant::now();
    let settled = if settle { SETTLED.min(patience) } else { Duration::ZERO };
    let mut before = Attachments::default();
    let mut seen = BTreeSet::new();
    loop {
        let now = Attachments::read(&layout.cache_dir, &layout.run_dir, plugin::TYPE);
        if (now.is_empty() && start.elapsed() >= settled) || start.elapsed() >= patience {
            return now;
        }
        attachments::tell_gone(&layout.run_dir, &now, &seen);
        seen.extend(now.alive.iter().cloned());
        if !now.is_empty() && (&now.cached, &now.sidecars) != (&before.cached, &before.sidecars) {
            told(&format!(
                "waiting until {} pods that started with ursa-cni have ended ({} with a sidecar), at most {} s",
                now.cached.len().max(now.sidecars.len()),
                now.sidecars.len(),
                patience.saturating_sub(start.elapsed()).as_secs()
            ));
        }
        before = now;
        let pause = LOOK_AGAIN.min(patience.saturating_sub(start.elapsed()));
        wait_for_cache(&layout.cache_dir, pause);
    }
}

/// Until the runtime's cache changes, or for that long: the agent's sidecars give no sign.
fn wait_for_cache(cache_dir: &Path, pause: Duration) {
    let timeout = PollTimeout::try_from(pause).unwrap_or(PollTimeout::MAX);
    let inotify = Inotify::init(InitFlags::IN_CLOEXEC).ok();
    // Where the user has no inotify left, the clock is all there is.
    let Some(inotify) = inotify else { return std::thread::sleep(pause) };
    let flags = AddWatchFlags::IN_DELETE | AddWatchFlags::IN_MOVED_TO | AddWatchFlags::IN_CLOSE_WRITE;
    let _ = inotify.add_watch(&cache_dir.join("results"), flags);
    let _ = poll(&mut [PollFd::new(inotify.as_fd(), PollFlags::POLLIN)], timeout);
}

/// Takes the entry out of wherever it is. False when somebody wrote to a file meanwhile.
fn remove_configuration(dir: &Path, done: &mut Vec<String>) -> Result<bool, InstallError> {
    restore_saved(dir, done)?;
    let directory = read_directory(dir)?;
    for conf in &directory.files {
        let path = dir.join(&conf.name);
        let Ok(text) = &conf.text else { continue };
        if let Some(why) = conf.problem().filter(|_| text.contains(plugin::TYPE)) {
            done.push(format!(
                "left {} as it is, though it names ursa-cni: {why}; take it out by hand",
                path.display()
            ));
        }
        if !conf.types().iter().any(|kind| kind == plugin::TYPE) {
            continue;
        }
        let without = match conf.kind {
            Kind::List => Conflist::parse(text).ok().and_then(|list| list.without(plugin::TYPE)),
            Kind::Single => None,
        };
        if !place::is_still(&path, text)? {
            return Ok(false);
        }
        if let Some(without) = without.filter(|without| !is_conversion(&directory, &conf.name, without)) {
            file::replace(&path, without.as_bytes())?;
            done.push(format!("took ursa-cni out of {}", path.display()));
        } else {
            file::remove(&path)?;
            done.push(format!("removed {}", path.display()));
        }
    }
    for entry in fs::read_dir(dir).map_err(io("read", dir))?.flatten() {
        let drop_in = entry.path().join(place::DROP_IN);
        if entry.path().is_dir() && place::remove_drop_in(&drop_in)? {
            done.push(format!("removed {}", drop_in.display()));
        }
    }
    Ok(true)
}

/// A single plugin's file gets its place back; the list beside it is removed afterwards.
fn restore_saved(dir: &Path, done: &mut Vec<String>) -> Result<(), InstallError> {
    for entry in fs::read_dir(dir).map_err(io("read", dir))?.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Some(conf) = name.strip_suffix(SAVED) else { continue };
        let conf = dir.join(conf);
        if conf.exists() {
            // The base CNI has written it anew.
            file::remove(&entry.path())?;
        } else {
            file::rename(&entry.path(), &conf)?;
            done.push(format!("restored {}", conf.display()));
        }
    }
    Ok(())
}

/// Whether a list without us is but a single plugin whose own file stands beside it.
fn is_conversion(directory: &Directory, name: &str, without: &str) -> bool {
    let stem = |name: &str| Path::new(name).file_stem().map(std::ffi::OsStr::to_os_string);
    let types = Conflist::parse(without).map(|list| list.types().map(str::to_owned).collect::<Vec<_>>());
    let singles = directory.files.iter().filter(|file| file.kind == Kind::Single);
    singles.filter(|file| stem(&file.name) == stem(name)).any(|file| types.as_ref() == Ok(&file.types()))
}
