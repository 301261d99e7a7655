//! Keeps the plugin in place: puts it back when the base CNI rewrites its file, and gives way in a fight.

use std::collections::VecDeque;
use std::fs;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use serde_json::json;

use super::error::{InstallError, io};
use super::file;
use super::lock::{Lock, What};
use super::place::{self, Change};
use super::{Wish, install, read_directory, stub};

/// At most so many repairs …
const REPAIRS: usize = 3;
/// … within this time: more is a fight.
const WITHIN: Duration = Duration::from_secs(60);
/// A directory that says nothing is looked at all the same.
pub(super) const LOOK: Duration = Duration::from_secs(30);
/// Where there is no directory to watch.
const NO_DIRECTORY: Duration = Duration::from_secs(1);
/// Whoever writes is left to finish.
const QUIET: Duration = Duration::from_millis(100);
/// How long a file may be invalid, being written, before another one counts.
const BEING_WRITTEN: Duration = Duration::from_secs(5);

/// Counts repairs.
#[derive(Debug, Default)]
struct Pace {
    repairs: VecDeque<Instant>,
}

impl Pace {
    /// How long the next repair has to wait.
    fn pause(&mut self, now: Instant) -> Option<Duration> {
        while self.repairs.front().is_some_and(|then| now.duration_since(*then) >= WITHIN) {
            self.repairs.pop_front();
        }
        let oldest = self.repairs.front()?;
        (self.repairs.len() >= REPAIRS).then(|| WITHIN.saturating_sub(now.duration_since(*oldest)))
    }

    fn note(&mut self, now: Instant) {
        self.repairs.push_back(now);
    }
}

/// Where the watch says what it sees, for `status`.
pub(super) fn state_file(run_dir: &Path) -> PathBuf {
    run_dir.join("cni-install.json")
}

/// What wakes a process that stays.
pub(super) struct Events {
    inotify: Inotify,
    stop: SignalFd,
}

impl Events {
    pub(super) fn new() -> Result<Self, InstallError> {
        let signals: SigSet = [Signal::SIGTERM, Signal::SIGINT].into_iter().collect();
        let system = |tried, error: nix::Error| io(tried, Path::new("signals"))(error.into());
        signals.thread_block().map_err(|error| system("block", error))?;
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        let stop = SignalFd::with_flags(&signals, flags).map_err(|error| system("wait for", error))?;
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK);
        let inotify = inotify.map_err(|error| io("watch", Path::new("files"))(error.into()))?;
        Ok(Self { inotify, stop })
    }

    /// A directory that is watched already stays so. False when it isn't there.
    pub(super) fn watch(&self, dir: &Path) -> bool {
        let flags = AddWatchFlags::IN_CLOSE_WRITE
            | AddWatchFlags::IN_CREATE
            | AddWatchFlags::IN_MOVED_TO
            | AddWatchFlags::IN_MOVED_FROM
            | AddWatchFlags::IN_DELETE
            | AddWatchFlags::IN_DELETE_SELF
            | AddWatchFlags::IN_MOVE_SELF
            | AddWatchFlags::IN_ONLYDIR;
        self.inotify.add_watch(dir, flags).is_ok()
    }

    /// Until something happens and is over, or for that long. False when the watch is to end.
    pub(super) fn wait(&self, timeout: Duration) -> bool {
        let mut timeout = timeout;
        loop {
            let limit = PollTimeout::try_from(timeout).unwrap_or(PollTimeout::MAX);
            let mut fds = [
                PollFd::new(self.inotify.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.stop.as_fd(), PollFlags::POLLIN),
            ];
            let woken = poll(&mut fds, limit);
            if self.stop.read_signal().ok().flatten().is_some() {
                return false;
            }
            match woken {
                Ok(0) => return true,
                // What happened doesn't matter: everything is looked at.
                _ => while self.inotify.read_events().is_ok_and(|events| !events.is_empty()) {},
            }
            timeout = QUIET;
        }
    }
}

/// Says a thing once, until there is another one to say.
#[derive(Default)]
struct Voice(String);

impl Voice {
    fn say(&mut self, text: String) {
        if self.0 != text {
            say!("{text}");
            self.0 = text;
        }
    }
}

/// Installs and keeps it so, until SIGTERM or SIGINT. `ready_file` exists while the plugin is in place.
pub fn watch(wish: &Wish, ready_file: Option<&Path>) -> Result<(), InstallError> {
    let events = Events::new()?;
    let mut watch = Watch {
        wish,
        ready_file,
        voice: Voice::default(),
        pace: Pace::default(),
        lock: None,
        last: None,
        base: PathBuf::new(),
        torn: None,
    };
    watch.ready(false)?;
    watch.publish(None);
    loop {
        let dir = events.watch(&wish.layout.net_dir);
        events.watch(&wish.layout.bin_dir);
        if let Some(drop_in) = watch.last.as_deref().and_then(Path::parent) {
            events.watch(drop_in);
        }
        let pause = watch.look()?;
        if !events.wait(if dir { pause } else { pause.min(NO_DIRECTORY) }) {
            break;
        }
    }
    watch.ready(false)?;
    watch.publish(None);
    say!("ursa-cni: the watch ends; what is installed stays");
    Ok(())
}

struct Watch<'a> {
    wish: &'a Wish,
    ready_file: Option<&'a Path>,
    voice: Voice,
    pace: Pace,
    lock: Option<Lock>,
    /// Where the entry was put.
    last: Option<PathBuf>,
    /// The network's file.
    base: PathBuf,
    /// Since when one of the two has been invalid.
    torn: Option<Instant>,
}

impl Watch<'_> {
    /// Looks, repairs, and says when to look again.
    fn look(&mut self) -> Result<Duration, InstallError> {
        if self.last.is_none() {
            return self.start();
        }
        if self.lock.is_none() {
            self.lock = Lock::try_hold(&self.wish.layout.run_dir, What::Watch)?;
            if self.lock.is_none() {
                self.voice.say(
                    "installed; another `ursa-cni install --watch` runs on this node and keeps it in place: waiting for its end"
                        .to_owned(),
                );
                self.ready(true)?;
                return Ok(NO_DIRECTORY);
            }
            // The other one may have been of another version.
            return self.start();
        }
        if self.is_being_written() {
            return Ok(QUIET * 2);
        }
        match self.missing() {
            Ok(None) => {
                self.content()?;
                Ok(self.pace.pause(Instant::now()).map_or(LOOK, |pause| pause.min(LOOK)))
            }
            Ok(Some(why)) => self.repair(&why),
            Err(error) => self.complain(&error),
        }
    }

    fn start(&mut self) -> Result<Duration, InstallError> {
        match install(self.wish) {
            Ok(installed) => {
                for warning in &installed.warnings {
                    eprintln!("ursa-cni: {warning}");
                }
                (self.last, self.base) = (Some(installed.path), installed.base);
                // At once on to the lock.
                Ok(Duration::ZERO)
            }
            Err(error @ (InstallError::Plugin { .. } | InstallError::Binary { .. })) => Err(error),
            Err(error) => self.complain(&error),
        }
    }

    /// What may be over when somebody does something: said, and looked at again.
    fn complain(&mut self, error: &InstallError) -> Result<Duration, InstallError> {
        self.ready(false)?;
        self.voice.say(match error {
            InstallError::Absent { .. } => format!("waiting for the base CNI: {error}"),
            _ => format!("not installed: {error}. Looking again when something changes"),
        });
        Ok(LOOK)
    }

    fn is_being_written(&mut self) -> bool {
        let directory = read_directory(&self.wish.layout.net_dir).unwrap_or_default();
        let torn = [self.last.as_deref(), Some(&*self.base)].into_iter().flatten().any(|path| {
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            directory.named(name).is_some_and(|file| file.problem().is_some())
        });
        if !torn {
            self.torn = None;
            return false;
        }
        let since = *self.torn.get_or_insert_with(Instant::now);
        since.elapsed() < BEING_WRITTEN
    }

    /// What isn't in place. An entry that only differs is somebody's decision: a newer installer's, the operator's.
    fn missing(&mut self) -> Result<Option<String>, InstallError> {
        let program = self.wish.layout.program();
        if !program.is_file() || stub::is_in_place(&self.wish.layout) {
            return Ok(Some(format!("{} was removed", program.display())));
        }
        let quick = Wish { check_versions: false, ..self.wish.clone() };
        let plan = place::plan(&quick)?;
        let there = match &plan.change {
            Change::Nothing => true,
            Change::Edit { seen, .. } => {
                super::conflist::Conflist::parse(seen).is_ok_and(|list| list.has(super::plugin::TYPE))
            }
            Change::Convert { .. } => false,
            Change::Own { .. } => plan.path.is_file(),
        };
        (self.last, self.base) = (Some(plan.path.clone()), plan.base.clone());
        Ok((!there).then(|| format!("{} no longer holds ursa-cni", plan.path.display())))
    }

    fn repair(&mut self, why: &str) -> Result<Duration, InstallError> {
        self.ready(false)?;
        let now = Instant::now();
        if let Some(pause) = self.pace.pause(now) {
            let fight = format!(
                "{why}: another program took it out {} times within {} s, and pods that start now are NOT in the mesh. Find that \
                 program (Cilium: set `cni.exclusive: false`); a drop-in ends the fight where the runtime reads it (`--mode \
                 drop-in`)",
                REPAIRS + 1,
                WITHIN.as_secs()
            );
            self.publish(Some(&fight));
            self.voice
                .say(format!("FIGHT: {fight}. The next repair is {} s after the first", WITHIN.as_secs()));
            return Ok(pause.min(LOOK));
        }
        match install(self.wish) {
            Ok(installed) => {
                self.pace.note(now);
                self.voice.say(format!("repaired: {why}"));
                (self.last, self.base) = (Some(installed.path), installed.base);
                self.content()?;
                Ok(LOOK)
            }
            Err(error) => self.complain(&error),
        }
    }

    fn content(&mut self) -> Result<(), InstallError> {
        self.ready(true)?;
        // A fight that pauses isn't over.
        if self.pace.pause(Instant::now()).is_none() {
            self.publish(None);
        }
        if let Some(path) = &self.last {
            self.voice.say(format!("ready: ursa-cni is in {}", path.display()));
        }
        Ok(())
    }

    fn ready(&mut self, ready: bool) -> Result<(), InstallError> {
        let Some(path) = self.ready_file else { return Ok(()) };
        match ready {
            true if path.exists() => Ok(()),
            true => fs::write(path, "ready\n").map_err(io("write", path)),
            false => file::remove(path).map(drop),
        }
    }

    /// For `status`. Where the agent's directory isn't, nobody reads it.
    fn publish(&self, fight: Option<&str>) {
        let dir = &self.wish.layout.run_dir;
        let file = state_file(dir);
        let state = json!({"fight": fight}).to_string();
        if dir.is_dir() && fs::read_to_string(&file).ok().as_deref() != Some(state.as_str()) {
            let _ = file::replace(&file, state.as_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fight_gets_three_repairs_a_minute() {
        let mut pace = Pace::default();
        let start = Instant::now();
        let mut repairs = 0;
        for second in 0..600 {
            let now = start + Duration::from_secs(second);
            if pace.pause(now).is_none() {
                pace.note(now);
                repairs += 1;
            }
        }
        assert_eq!(repairs, 30);
        assert_eq!(pace.pause(start + Duration::from_secs(599)), Some(Duration::from_secs(1)));
    }
}
