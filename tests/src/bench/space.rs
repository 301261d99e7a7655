//! Network namespaces that last as long as a thread, and programs that run in them.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use nix::sched::{CloneFlags, unshare};

use super::phases::quantile_of;

/// Works in a namespace that ends with the calling thread.
pub fn fresh<T>(work: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
    unshare(CloneFlags::CLONE_NEWNET).context("network namespaces need root")?;
    work()
}

/// Works in a fresh namespace, on a thread of its own.
pub fn alone<T: Send>(work: impl FnOnce() -> anyhow::Result<T> + Send) -> anyhow::Result<T> {
    thread::scope(|scope| {
        scope.spawn(|| fresh(work)).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// A namespace without a name.
#[derive(Debug)]
pub struct Space {
    path: PathBuf,
    end: Option<mpsc::Sender<()>>,
    holder: Option<JoinHandle<()>>,
}

impl Space {
    /// Makes one, and does `first` in it.
    pub fn new(first: impl FnOnce() -> anyhow::Result<()> + Send + 'static) -> anyhow::Result<Self> {
        let (end, wait) = mpsc::channel::<()>();
        let (ready, is_ready) = mpsc::channel();
        let holder = thread::spawn(move || {
            let path = format!("/proc/{}/task/{}/ns/net", std::process::id(), nix::unistd::gettid());
            let _ = ready.send(fresh(first).map(|()| PathBuf::from(path)));
            let _ = wait.recv();
        });
        let path = is_ready.recv().context("a namespace's thread ended")??;
        Ok(Self { path, end: Some(end), holder: Some(holder) })
    }

    /// An empty one.
    pub fn empty() -> anyhow::Result<Self> {
        Self::new(|| Ok(()))
    }

    /// The file that stands for it.
    pub fn path(&self) -> &std::path::Path {
        &self.path
    }
}

impl Drop for Space {
    fn drop(&mut self) {
        drop(self.end.take());
        if let Some(holder) = self.holder.take() {
            let _ = holder.join();
        }
    }
}

/// A program with all that it is given.
#[derive(Debug, Clone)]
pub struct Call {
    /// The program.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<String>,
    /// The whole environment, `PATH` apart.
    pub envs: Vec<(String, String)>,
    /// What it reads.
    pub input: String,
}

impl Call {
    /// A program without environment or input.
    pub fn new(program: impl Into<PathBuf>, args: &[&str]) -> Self {
        let args = args.iter().map(ToString::to_string).collect();
        Self { program: program.into(), args, envs: Vec::new(), input: String::new() }
    }

    /// Runs it in the calling thread's namespace: what it printed, and how long that took from its start to its end.
    pub fn run(&self) -> anyhow::Result<(String, Duration)> {
        let start = Instant::now();
        let mut child = Command::new(&self.program)
            .args(&self.args)
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .envs(self.envs.iter().cloned())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {}", self.program.display()))?;
        if let Some(mut stdin) = child.stdin.take() {
            // Who doesn't read all of it says why in its status.
            let _ = stdin.write_all(self.input.as_bytes());
        }
        let output = child.wait_with_output()?;
        let took = start.elapsed();
        if !output.status.success() {
            bail!(
                "{} {}: {}: {}{}",
                self.program.display(),
                self.args.join(" "),
                output.status,
                String::from_utf8_lossy(&output.stdout).trim(),
                String::from_utf8_lossy(&output.stderr).trim()
            );
        }
        Ok((String::from_utf8_lossy(&output.stdout).into_owned(), took))
    }
}

/// Durations of one thing done many times.
#[derive(Debug, Clone, Default)]
pub struct Times(Vec<Duration>);

impl Times {
    /// One more.
    pub fn push(&mut self, time: Duration) {
        let at = self.0.partition_point(|other| *other <= time);
        self.0.insert(at, time);
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// A quantile; nothing of nothing.
    pub fn at(&self, quantile: f64) -> Duration {
        quantile_of(&self.0, quantile)
    }
}

impl FromIterator<Duration> for Times {
    fn from_iter<I: IntoIterator<Item = Duration>>(times: I) -> Self {
        let mut times: Vec<_> = times.into_iter().collect();
        times.sort_unstable();
        Self(times)
    }
}
