//! The units of a machine: what systemd knows of them, and what they said.

use std::collections::HashMap;
use std::time::Duration;

use anyhow::{Context as _, bail};
use serde_json::{Map, Value};

use super::Vm;
use crate::lab::wait;

/// How often systemd is asked when something is waited for; it has no cheaper way to be watched from outside.
const INTERVAL: Duration = Duration::from_millis(20);

/// A unit of a machine, there or not.
#[derive(Debug, Clone, Copy)]
pub struct Unit<'a> {
    vm: &'a Vm,
    name: &'a str,
}

/// What systemd says of a unit.
#[derive(Debug, Clone, Default)]
pub struct State {
    /// `ActiveState`: `active`, `inactive`, `failed`, `activating`, …
    pub active: String,
    /// `SubState`: `running`, `dead`, `start`, `auto-restart`, …
    pub sub: String,
    /// `Result`: how the last run ended; `success` before any.
    pub result: String,
    /// `StatusText`: what its main process said by `STATUS=`.
    pub status: String,
    /// `MainPID`, by the machine's own numbers; 0 when there is none.
    pub main_pid: i32,
    /// `NRestarts`: how often it was started again by itself.
    pub restarts: u32,
    /// `InvocationID`: another one with each start.
    pub invocation: String,
}

/// A line of the journal, with all its fields.
#[derive(Debug, Clone)]
pub struct Entry {
    /// `MESSAGE`.
    pub message: String,
    /// All of them.
    pub fields: Map<String, Value>,
}

impl Entry {
    /// A field's text; empty when there is none.
    pub fn field(&self, name: &str) -> &str {
        self.fields.get(name).and_then(Value::as_str).unwrap_or_default()
    }
}

impl Vm {
    /// A unit by its full name.
    pub fn unit<'a>(&'a self, name: &'a str) -> Unit<'a> {
        Unit { vm: self, name }
    }

    /// The lines of the journal that `journalctl` gives for these arguments, oldest first.
    pub fn journal(&self, args: &[&str]) -> anyhow::Result<Vec<Entry>> {
        // What was said until now is there, and not on its way.
        self.run(&["journalctl", "--sync"])?;
        let output = self.run(&[&["journalctl", "--output=json", "--all", "--no-pager"], args].concat())?;
        if !output.ok() {
            bail!("journalctl {args:?} on {}: {}", self.host.netns, output.brief());
        }
        output.stdout.lines().map(parse_entry).collect()
    }

    /// The units that systemd calls failed.
    pub fn failed_units(&self) -> anyhow::Result<Vec<String>> {
        let text = self.sh("systemctl list-units --failed --plain --no-legend")?;
        Ok(text.lines().filter_map(|line| line.split_whitespace().next().map(str::to_owned)).collect())
    }

    /// Makes systemd read its units again.
    pub fn reload_units(&self) -> anyhow::Result<()> {
        self.sh("systemctl daemon-reload").map(drop)
    }
}

impl Unit<'_> {
    /// Starts it and waits until it has started.
    pub fn start(&self) -> anyhow::Result<()> {
        self.verb("start")
    }

    /// Stops it and waits until it has stopped.
    pub fn stop(&self) -> anyhow::Result<()> {
        self.verb("stop")
    }

    /// Stops and starts it.
    pub fn restart(&self) -> anyhow::Result<()> {
        self.verb("restart")
    }

    /// Tells it to read its settings again, as it has said that one does.
    pub fn reload(&self) -> anyhow::Result<()> {
        self.verb("reload")
    }

    /// Begins to start it, and doesn't wait.
    pub fn begin_start(&self) -> anyhow::Result<()> {
        self.systemctl(&["start", "--no-block", self.name])
    }

    /// Sends a signal to its processes: `main`, `control` or `all`.
    pub fn kill(&self, whom: &str, signal: &str) -> anyhow::Result<()> {
        self.systemctl(&["kill", &format!("--kill-whom={whom}"), &format!("--signal={signal}"), self.name])
    }

    fn verb(&self, verb: &str) -> anyhow::Result<()> {
        self.systemctl(&[verb, self.name])
    }

    fn systemctl(&self, args: &[&str]) -> anyhow::Result<()> {
        let output = self.vm.run(&[&["systemctl"], args].concat())?;
        if !output.ok() {
            bail!("systemctl {args:?}: {}\n{}", output.brief(), self.last_words());
        }
        Ok(())
    }

    /// Properties by their names, as `systemctl show` prints them.
    pub fn show(&self, properties: &[&str]) -> anyhow::Result<HashMap<String, String>> {
        let output = self.vm.run(&["systemctl", "show", self.name, "--property", &properties.join(",")])?;
        if !output.ok() {
            bail!("systemctl show {}: {}", self.name, output.brief());
        }
        let pairs = output.stdout.lines().filter_map(|line| line.split_once('='));
        Ok(pairs.map(|(key, value)| (key.to_owned(), value.to_owned())).collect())
    }

    /// One property.
    pub fn property(&self, name: &str) -> anyhow::Result<String> {
        self.show(&[name])?.remove(name).with_context(|| format!("{} has no property {name}", self.name))
    }

    /// What systemd says of it now.
    pub fn state(&self) -> anyhow::Result<State> {
        let mut all = self.show(&[
            "ActiveState",
            "SubState",
            "Result",
            "StatusText",
            "MainPID",
            "NRestarts",
            "InvocationID",
        ])?;
        let mut take = |name: &str| all.remove(name).unwrap_or_default();
        Ok(State {
            active: take("ActiveState"),
            sub: take("SubState"),
            result: take("Result"),
            status: take("StatusText"),
            main_pid: take("MainPID").parse().unwrap_or_default(),
            restarts: take("NRestarts").parse().unwrap_or_default(),
            invocation: take("InvocationID"),
        })
    }

    /// Waits until its `ActiveState` is this one.
    pub fn wait(&self, active: &str, deadline: Duration) -> anyhow::Result<State> {
        self.wait_until(&format!("to be {active}"), deadline, |state| state.active == active)
    }

    /// Waits until its state is as wished.
    pub fn wait_until(
        &self,
        what: &str,
        deadline: Duration,
        wished: impl Fn(&State) -> bool,
    ) -> anyhow::Result<State> {
        let probe = || match self.state() {
            Ok(state) if wished(&state) => Ok(state),
            Ok(state) => Err(format!("{state:?}")),
            Err(error) => Err(format!("{error:#}")),
        };
        let found = wait::until_every(INTERVAL, &format!("{} {what}", self.name), deadline, probe);
        found.map(|(state, _)| state).map_err(|error| error.context(self.last_words()))
    }

    /// Every process of it, by the machine's own numbers.
    pub fn pids(&self) -> anyhow::Result<Vec<i32>> {
        let group = self.property("ControlGroup")?;
        if group.is_empty() {
            return Ok(Vec::new());
        }
        let text = self.vm.sh(&format!(
            "cd /sys/fs/cgroup; [ -e cgroup.procs ] || cd unified 2>/dev/null || cd systemd; \
             [ ! -d '.{group}' ] || find '.{group}' -name cgroup.procs -exec cat {{}} +"
        ))?;
        text.lines().map(|line| line.parse().with_context(|| format!("no pid: {line:?}"))).collect()
    }

    /// What it and systemd about it have written to the journal, oldest first, earlier boots included.
    pub fn journal(&self) -> anyhow::Result<Vec<Entry>> {
        self.vm.journal(&["--unit", self.name])
    }

    /// Waits until a line of its journal holds this text.
    pub fn wait_said(&self, text: &str, deadline: Duration) -> anyhow::Result<Entry> {
        let probe = || {
            let all = self.journal().map_err(|error| format!("{error:#}"))?;
            let found = all.into_iter().find(|entry| entry.message.contains(text));
            found.ok_or_else(|| self.last_words())
        };
        let what = format!("{} to say {text:?}", self.name);
        wait::until_every(INTERVAL, &what, deadline, probe).map(|(entry, _)| entry)
    }

    /// The last lines of its journal, for errors.
    pub fn last_words(&self) -> String {
        let output =
            self.vm.run(&["journalctl", "--no-pager", "--output=cat", "-n", "8", "--unit", self.name]);
        output.map(|output| output.stdout.trim().to_owned()).unwrap_or_default()
    }
}

fn parse_entry(line: &str) -> anyhow::Result<Entry> {
    let fields: Map<String, Value> =
        serde_json::from_str(line).with_context(|| format!("no entry: {line}"))?;
    let message = match fields.get("MESSAGE") {
        Some(Value::String(text)) => text.clone(),
        // Bytes that are no text come as numbers.
        Some(Value::Array(bytes)) => {
            let bytes = bytes.iter().filter_map(|byte| u8::try_from(byte.as_u64()?).ok()).collect::<Vec<_>>();
            String::from_utf8_lossy(&bytes).into_owned()
        }
        _ => String::new(),
    };
    Ok(Entry { message, fields })
}
