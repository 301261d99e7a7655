//! A real `ursa-control` in a process of its own, on loopback.

use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use serde_json::{Value, json};
use tokio::process::{Child, Command};
use ursa_wire::ticket::Ticket;

use super::operator::Operator;
use super::process;

/// Longer than anything takes that isn't broken.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// The control plane and its files, which go when it is dropped.
#[derive(Debug)]
pub struct Server {
    child: Child,
    bin_dir: PathBuf,
    pin: bool,
    dir: tempfile::TempDir,
}

impl Server {
    /// Starts it with an empty store and waits until the default mesh has its identity.
    pub async fn start(bin_dir: &Path, pin: bool) -> anyhow::Result<Self> {
        let dir = tempfile::Builder::new().prefix("ursa-bench-").tempdir()?;
        // Held together, so that they differ; a port that somebody else takes meanwhile is an error at the start.
        let free: Vec<_> =
            (0..2).map(|_| TcpListener::bind((Ipv4Addr::LOCALHOST, 0))).collect::<Result<_, _>>()?;
        let ports: Vec<u16> =
            free.iter().map(|one| one.local_addr().map(|a| a.port())).collect::<Result<_, _>>()?;
        drop(free);
        let config = json!({
            "general": {"workDir": dir.path()},
            "store": {"type": "embedded", "embedded": {"path": dir.path().join("store.db")}},
            "apiServer": {
                "socket": dir.path().join("control.sock"), "http": {"enabled": false}, "https": {"enabled": false},
            },
            "dpServer": {"interface": "127.0.0.1", "port": ports[0]},
            "diagnostics": {"serverPort": ports[1]},
        });
        std::fs::write(dir.path().join("control.yaml"), config.to_string())?;
        let child = spawn(bin_dir, dir.path(), pin)?;
        let mut server = Self { child, bin_dir: bin_dir.to_owned(), pin, dir };
        server.ready().await?;
        Ok(server)
    }

    /// Kills it with no warning and starts it again on the same store; returns how long until it served.
    pub async fn restart(&mut self) -> anyhow::Result<Duration> {
        self.child.kill().await?;
        self.child = spawn(&self.bin_dir, self.dir.path(), self.pin)?;
        let start = Instant::now();
        self.ready().await?;
        Ok(start.elapsed())
    }

    /// Its process id.
    pub fn pid(&self) -> anyhow::Result<u32> {
        self.child.id().context("the control plane has ended")
    }

    /// A connection to the operator's socket.
    pub async fn operator(&self) -> anyhow::Result<Operator> {
        Operator::connect(&self.dir.path().join("control.sock")).await
    }

    /// A ticket for a node that may run every workload of the default mesh.
    pub async fn ticket(&self) -> anyhow::Result<Ticket> {
        let mut command = Command::new(self.bin_dir.join("ursa"));
        command.arg("--socket").arg(self.dir.path().join("control.sock"));
        command.args(["ticket", "create", "--mesh", "default", "--workload", "*", "--valid-for", "10m"]);
        let output = command.output().await.context("cannot run ursa")?;
        if !output.status.success() {
            bail!("ursa ticket create: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(String::from_utf8(output.stdout)?.trim().parse()?)
    }

    async fn ready(&mut self) -> anyhow::Result<()> {
        let start = Instant::now();
        loop {
            let seen = match self.look().await {
                Ok(true) => return Ok(()),
                Ok(false) => "the default mesh has no ready identity yet".to_owned(),
                Err(error) => format!("{error:#}"),
            };
            if self.child.try_wait()?.is_some() || start.elapsed() > PATIENCE {
                let log = std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default();
                let last: Vec<&str> = log.lines().rev().take(3).collect();
                bail!("ursa-control doesn't serve: {seen}; its last words: {}", last.join(" / "));
            }
            // What is waited for happens in another process, which has no other way to tell.
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    async fn look(&self) -> anyhow::Result<bool> {
        let identity = self.operator().await?.get("/meshes/default/meshidentities/identity").await?;
        let conditions = identity.pointer("/status/conditions").and_then(Value::as_array);
        Ok(conditions.is_some_and(|all| {
            all.iter().any(|condition| condition["type"] == "Ready" && condition["status"] == "True")
        }))
    }

    /// Waits until the process has nothing to do, as far as its use of the processor tells.
    pub async fn idle(&self) -> anyhow::Result<()> {
        let (pid, start) = (self.pid()?, Instant::now());
        loop {
            let before = process::cpu(pid)?;
            tokio::time::sleep(Duration::from_millis(500)).await;
            // Keep-alives and the kernel's rounding: 4 % of a processor.
            if process::cpu_since(pid, before)? <= Duration::from_millis(20) {
                return Ok(());
            }
            if start.elapsed() > PATIENCE {
                bail!("the control plane is still busy after {PATIENCE:?}, though nothing changes any more");
            }
        }
    }
}

fn spawn(bin_dir: &Path, dir: &Path, pin: bool) -> anyhow::Result<Child> {
    let log = std::fs::OpenOptions::new().create(true).append(true).open(dir.join("log"))?;
    let program = bin_dir.join("ursa-control");
    process::pinned(&program, pin)
        .args(["run", "--config"])
        .arg(dir.join("control.yaml"))
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .with_context(|| format!("cannot start {}: run `make bench`, which builds it", program.display()))
}
