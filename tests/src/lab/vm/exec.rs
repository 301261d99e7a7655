//! Commands and files of a machine.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::Ordering;

use anyhow::{Context as _, bail};

use super::{PATIENCE, Vm};
use crate::lab::machine;

/// How a command ended, and what it said.
#[derive(Debug, Clone)]
pub struct Output {
    /// Its exit code; for one that a signal ended, 128 and the signal's number, as a shell has it.
    pub status: i32,
    /// What it wrote to its standard output.
    pub stdout: String,
    /// What it wrote to its standard error.
    pub stderr: String,
}

impl Output {
    /// Whether it ended with 0.
    pub fn ok(&self) -> bool {
        self.status == 0
    }

    /// In one line.
    pub fn brief(&self) -> String {
        let said = format!("status {}: {} {}", self.status, self.stdout.trim(), self.stderr.trim());
        said.trim_end().to_owned()
    }
}

/// Where the bytes of a file or of a command's standard input come from.
enum Input<'a> {
    Nothing,
    Bytes(&'a [u8]),
    File(File),
}

impl Vm {
    /// A command in the machine with an environment of nothing but a path, as root. It isn't in a unit of the machine and
    /// in none of its control groups. The program is a child of the process that this starts. The machine must be on.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--target={}", self.init.load(Ordering::Relaxed)))
            .arg("--all")
            .arg(program)
            .env_clear()
            .envs([("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"), ("HOME", "/root"), ("LANG", "C.UTF-8")]);
        command
    }

    /// Runs a command as [`Vm::command`] does and waits for its end; while the machine is off, without systemd, network
    /// and other processes.
    pub fn run(&self, command: &[&str]) -> anyhow::Result<Output> {
        self.execute(command, &["--"], Input::Nothing)
    }

    /// Runs a command with this as its standard input.
    pub fn run_with(&self, command: &[&str], input: &[u8]) -> anyhow::Result<Output> {
        self.execute(command, &["--"], Input::Bytes(input))
    }

    /// Runs a shell script that must succeed; what it printed. A command that fails ends it.
    pub fn sh(&self, script: &str) -> anyhow::Result<String> {
        let output = self.run(&["sh", "-ec", script])?;
        if !output.ok() {
            bail!("{script:?} on {}: {}", self.host.netns, output.brief());
        }
        Ok(output.stdout)
    }

    /// Runs a command as another user.
    pub fn run_as(&self, user: &str, command: &[&str]) -> anyhow::Result<Output> {
        self.run(&[&["runuser", "-u", user, "--"], command].concat())
    }

    /// Runs a command in a transient unit with these settings (`User=web`, `Slice=x.slice`): in a control group of the
    /// machine, as a process that systemd knows. The machine must be on.
    pub fn run_unit(&self, settings: &[&str], command: &[&str]) -> anyhow::Result<Output> {
        let mut all = vec!["systemd-run", "--quiet", "--wait", "--pipe", "--collect", "--service-type=exec"];
        for setting in settings {
            all.extend(["-p", setting]);
        }
        all.push("--");
        self.run(&[&all, command].concat())
    }

    /// Writes a file that all may read, and the folders above it.
    pub fn write(&self, path: &str, text: &str) -> anyhow::Result<()> {
        self.write_as(path, "root", 0o644, text.as_bytes())
    }

    /// Writes a file that belongs to `owner` and their group.
    pub fn write_as(&self, path: &str, owner: &str, mode: u32, bytes: &[u8]) -> anyhow::Result<()> {
        self.install(path, owner, mode, Input::Bytes(bytes))
    }

    /// Copies a file of the lab.
    pub fn copy_in(&self, from: &Path, path: &str, mode: u32) -> anyhow::Result<()> {
        let file = File::open(from).with_context(|| format!("cannot open {}", from.display()))?;
        self.install(path, "root", mode, Input::File(file))
    }

    /// The text of a file.
    pub fn read(&self, path: &str) -> anyhow::Result<String> {
        let output = self.run(&["cat", path])?;
        if !output.ok() {
            bail!("cannot read {path} of {}: {}", self.host.netns, output.brief());
        }
        Ok(output.stdout)
    }

    /// Whether there is such a file or folder.
    pub fn exists(&self, path: &str) -> anyhow::Result<bool> {
        Ok(self.run(&["test", "-e", path])?.ok())
    }

    fn install(&self, path: &str, owner: &str, mode: u32, input: Input<'_>) -> anyhow::Result<()> {
        // Renamed into place, so that whoever looks at it sees all of it, and a program that runs can be replaced.
        let script = "mkdir -p \"${1%/*}\"; new=$(mktemp \"$1.XXXXXX\"); cat >\"$new\"; chmod \"$3\" \"$new\"; \
                      chown \"$2:\" \"$new\"; mv -fT \"$new\" \"$1\"";
        let output = self.execute(
            &["sh", "-ec", script, "sh", path, owner, &format!("{mode:o}")],
            &["--plain", "--"],
            input,
        )?;
        if !output.ok() {
            bail!("cannot write {path} of {}: {}", self.host.netns, output.brief());
        }
        Ok(())
    }

    /// `off` is what the guard is told while the machine is off.
    fn execute(&self, command: &[&str], off: &[&str], input: Input<'_>) -> anyhow::Result<Output> {
        let on = self.init.load(Ordering::Relaxed) != 0;
        let mut process = match command {
            [] => bail!("which program?"),
            [program, args @ ..] if on => {
                let mut process = self.command(program);
                process.args(args);
                process
            }
            all => {
                let mut process = self.guard(off);
                process.args(all);
                process
            }
        };
        let (stdin, bytes) = match input {
            Input::Nothing => (Stdio::null(), None),
            Input::Bytes(bytes) => (Stdio::piped(), Some(bytes)),
            Input::File(file) => (file.into(), None),
        };
        let mut child = process
            .stdin(stdin)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot run {command:?} on {}", self.host.netns))?;
        let (mut out, mut err) = (child.stdout.take(), child.stderr.take());
        let mut feed = child.stdin.take().zip(bytes.map(<[u8]>::to_vec));
        let (done, finished) = std::sync::mpsc::channel();
        let outer = i32::try_from(child.id())?;
        // Threads of their own, because a machine that hangs answers nobody.
        std::thread::spawn(move || {
            let errors = std::thread::spawn(move || {
                let mut text = Vec::new();
                let _ = err.as_mut().map(|err| err.read_to_end(&mut text));
                text
            });
            let feeder = std::thread::spawn(move || {
                // Whoever doesn't read it has said why.
                let _ = feed.take().map(|(mut stdin, bytes)| stdin.write_all(&bytes));
            });
            let mut text = Vec::new();
            let _ = out.as_mut().map(|out| out.read_to_end(&mut text));
            let _ = feeder.join();
            let _ = done.send((text, errors.join().unwrap_or_default(), child.wait()));
        });
        let Ok((stdout, stderr, status)) = finished.recv_timeout(PATIENCE) else {
            // What nsenter forked, or nsenter that has become the program.
            let inner = machine::child_of(outer).unwrap_or(outer);
            let _ = crate::lab::daemon::kill_pid(inner);
            bail!("{command:?} on {} has not ended within {PATIENCE:?}", self.host.netns);
        };
        let status = status?;
        let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or_default());
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Ok(Output { status: code, stdout: text(stdout), stderr: text(stderr) })
    }
}
