//! A process of the lab that can be killed and started again.

use std::fs::OpenOptions;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::Context as _;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::machine::{self, Init};
use super::net::Host;
use super::wait;

/// Where a program runs.
#[derive(Debug, Clone)]
pub enum Place {
    /// In a network namespace.
    Netns(PathBuf),
    /// On a machine of its own.
    Machine(Init),
}

impl From<&Host> for Place {
    fn from(host: &Host) -> Self {
        Self::Netns(host.path())
    }
}

impl From<&machine::Machine> for Place {
    fn from(machine: &machine::Machine) -> Self {
        Self::Machine(machine.init())
    }
}

/// One long-running program. Dropping it kills it.
#[derive(Debug)]
pub struct Daemon {
    name: String,
    program: PathBuf,
    args: Vec<String>,
    envs: Vec<(String, String)>,
    place: Place,
    log: PathBuf,
    detached: bool,
    child: Option<Child>,
}

impl Daemon {
    /// Starts `program` in `place`; what it says goes to `log`.
    pub fn start(
        name: &str,
        place: impl Into<Place>,
        program: PathBuf,
        args: Vec<String>,
        envs: Vec<(String, String)>,
        log: PathBuf,
    ) -> anyhow::Result<Self> {
        let mut daemon = Self {
            name: name.to_owned(),
            program,
            args,
            envs,
            place: place.into(),
            log,
            detached: false,
            child: None,
        };
        daemon.restart()?;
        Ok(daemon)
    }

    /// Starts it again, with the arguments of the first time. It must not run.
    pub fn restart(&mut self) -> anyhow::Result<()> {
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&self.log)
            .with_context(|| format!("cannot open the log {}", self.log.display()))?;
        let mut command = match &self.place {
            // nsenter executes the program in its own place, so the child's pid is the program's.
            Place::Netns(netns) => {
                let mut command = Command::new("nsenter");
                command.arg(format!("--net={}", netns.display())).arg(&self.program);
                command
            }
            Place::Machine(init) => machine::entering(init.load(Ordering::Relaxed), &self.program),
        };
        without_settings(&mut command);
        let child = command
            .args(&self.args)
            .envs(self.envs.iter().cloned())
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("cannot start {}", self.program.display()))?;
        self.child = Some(child);
        Ok(())
    }

    /// Its process id, while it runs.
    pub fn pid(&self) -> Option<i32> {
        let child = i32::try_from(self.child.as_ref()?.id()).ok()?;
        match self.place {
            Place::Netns(_) => Some(child),
            // What nsenter forked, or is about to.
            Place::Machine(_) => {
                let forked = || machine::child_of(child).ok_or_else(|| "none".to_owned());
                wait::until("nsenter to fork", Duration::from_secs(1), forked).ok().map(|(pid, _)| pid)
            }
        }
    }

    /// `None` while it runs, else how it ended.
    pub fn ended(&mut self) -> Option<String> {
        match self.child.as_mut()?.try_wait() {
            Ok(Some(status)) => Some(status.to_string()),
            _ => None,
        }
    }

    /// An error that quotes the log when the process has ended.
    pub fn check(&mut self) -> Result<(), String> {
        match self.ended() {
            None => Ok(()),
            Some(status) => Err(format!("{} ended ({status}): {}", self.name, self.last_words())),
        }
    }

    /// The last lines of its log.
    pub fn last_words(&self) -> String {
        let text = std::fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(5)..].join("\n    ")
    }

    /// Kills it with no warning, and collects it.
    pub fn kill(&mut self) {
        let inner = if matches!(self.place, Place::Machine(_)) { self.pid() } else { None };
        if let Some(mut child) = self.child.take() {
            // nsenter ends with what it forked, and not the other way round.
            let _ = inner.map_or_else(|| child.kill().map_err(Into::into), kill_pid);
            let _ = child.wait();
        }
    }

    /// Asks it to end, and waits; how it ended.
    pub fn stop(&mut self, deadline: Duration) -> anyhow::Result<ExitStatus> {
        self.signal(Signal::SIGTERM)?;
        self.wait_end(deadline)
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        let pid = self.pid().with_context(|| format!("{} doesn't run", self.name))?;
        kill(Pid::from_raw(pid), signal).with_context(|| format!("cannot send {signal} to {}", self.name))
    }

    /// Waits until it has ended by itself; how it ended.
    pub fn wait_end(&mut self, deadline: Duration) -> anyhow::Result<ExitStatus> {
        let child = self.child.as_mut().with_context(|| format!("{} doesn't run", self.name))?;
        let (status, _) =
            wait::until(&format!("{} to end", self.name), deadline, || match child.try_wait() {
                Ok(Some(status)) => Ok(status),
                _ => Err("it still runs".to_owned()),
            })?;
        self.child = None;
        Ok(status)
    }

    /// Lets it run on when this value is dropped.
    pub fn detach(&mut self) {
        self.detached = true;
    }

    /// Waits until a line of its log holds all of these texts, and returns that line.
    pub fn wait_said(&self, texts: &[&str], deadline: Duration) -> anyhow::Result<String> {
        let what = format!("a line with {texts:?} in {}'s log", self.name);
        let (line, _) = wait::until(&what, deadline, || {
            let log = std::fs::read_to_string(&self.log).map_err(|error| error.to_string())?;
            let found = log.lines().find(|line| texts.iter().all(|text| line.contains(text)));
            found.map(str::to_owned).ok_or_else(|| self.last_words())
        })?;
        Ok(line)
    }

    /// How many lines of its log hold this text.
    pub fn times_said(&self, text: &str) -> usize {
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        log.lines().filter(|line| line.contains(text)).count()
    }

    /// Where its log is.
    pub fn log(&self) -> &std::path::Path {
        &self.log
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if !self.detached {
            self.kill();
        }
    }
}

/// Takes our own variables out of a command's environment: they are settings of the programs, and a test wants
/// only its own.
pub fn without_settings(command: &mut Command) {
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("URSA_") {
            command.env_remove(name);
        }
    }
}

/// Kills a process that isn't ours to collect, with no warning.
pub fn kill_pid(pid: i32) -> anyhow::Result<()> {
    kill(Pid::from_raw(pid), Signal::SIGKILL).with_context(|| format!("cannot kill process {pid}"))
}
