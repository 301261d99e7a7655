//! Ordinary programs: an HTTP server, a client that is told what to ask, and a client that asks all the time.

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, ChildStdin, ChildStdout, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use serde::{Deserialize, Serialize};

use super::Lab;
use super::daemon::Daemon;
use super::net::Host;

/// What came of one request.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Answer {
    /// The HTTP status; absent when no response came.
    pub status: Option<u16>,
    /// The body, or what went wrong.
    pub text: String,
    /// When it began, in seconds since 1970.
    #[serde(default)]
    pub began: f64,
    /// How long it took, in milliseconds.
    pub ms: f64,
    /// Whether it went over a connection that was there already.
    #[serde(default)]
    pub kept: bool,
    /// Which step failed: `name`, `connect` or `http`.
    #[serde(default)]
    pub failed: String,
}

impl Answer {
    /// Whether a response of status 200 came.
    pub fn ok(&self) -> bool {
        self.status == Some(200)
    }

    /// In one line.
    pub fn brief(&self) -> String {
        let text: String = self.text.trim().chars().take(160).collect();
        match self.status {
            Some(status) => format!("HTTP {status} {text:?}"),
            None => format!("no response ({}: {text})", self.failed),
        }
    }
}

/// Starts an HTTP server that answers with what it saw, as an unprivileged user.
pub fn serve(lab: &Lab, host: &Host, name: &str, port: u16) -> anyhow::Result<Daemon> {
    let args = vec!["serve".into(), "--name".into(), name.into(), "--port".into(), port.to_string()];
    Daemon::start(name, host, lab.programs.path("lab-app"), args, Vec::new(), lab.log(name))
}

/// A program on a host that asks what it is told. Its names are resolved by libc.
#[derive(Debug)]
pub struct Client {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Client {
    /// Starts it.
    pub fn start(lab: &Lab, host: &Host) -> anyhow::Result<Self> {
        Self::spawn(host.command(&lab.programs.path("lab-app")).arg("client"))
    }

    /// Starts it by a command of one's own, as in a container.
    pub fn spawn(command: &mut std::process::Command) -> anyhow::Result<Self> {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .context("cannot start a client")?;
        let input = child.stdin.take().context("invariant: piped")?;
        let output = BufReader::new(child.stdout.take().context("invariant: piped")?);
        Ok(Self { child, input, output })
    }

    /// One request over a new connection.
    pub fn get(&mut self, url: &str) -> anyhow::Result<Answer> {
        self.ask("get", url)
    }

    /// As [`Client::get`], with one more header.
    pub fn get_with(&mut self, url: &str, header: &str, value: &str) -> anyhow::Result<Answer> {
        self.ask("get", &format!("{url} {header}: {value}"))
    }

    /// One request over the connection of the request before, if that is still open.
    pub fn get_kept(&mut self, url: &str) -> anyhow::Result<Answer> {
        self.ask("keep", url)
    }

    /// The addresses of a name.
    pub fn resolve(&mut self, name: &str) -> anyhow::Result<Answer> {
        self.ask("name", name)
    }

    fn ask(&mut self, verb: &str, what: &str) -> anyhow::Result<Answer> {
        writeln!(self.input, "{verb} {what}").context("the client has ended")?;
        let mut line = String::new();
        self.output.read_line(&mut line)?;
        if line.is_empty() {
            bail!("the client has ended");
        }
        Ok(serde_json::from_str(&line)?)
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A program that asks all the time: over new connections with a name lookup each, and over one kept connection.
#[derive(Debug)]
pub struct Load {
    child: Child,
    answers: Arc<Mutex<Vec<(Instant, Answer)>>>,
    reader: Option<JoinHandle<()>>,
}

/// What came of the requests of a stretch of time.
#[derive(Debug, Default)]
pub struct Tally {
    /// Requests that were answered with 200.
    pub good: usize,
    /// Those over the kept connection among them.
    pub kept: usize,
    /// The others.
    pub bad: Vec<Answer>,
    /// How often the kept connection broke.
    pub drops: usize,
    /// The longest time between two good answers.
    pub gap: Duration,
}

impl Load {
    /// Starts it.
    pub fn start(lab: &Lab, host: &Host, url: &str, interval: Duration) -> anyhow::Result<Self> {
        let mut child = host
            .command(&lab.programs.path("lab-app"))
            .args(["load", "--url", url, "--interval-ms", &interval.as_millis().to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .context("cannot start a load")?;
        let output = BufReader::new(child.stdout.take().context("invariant: piped")?);
        let answers = Arc::new(Mutex::new(Vec::new()));
        let collected = answers.clone();
        let reader = std::thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                if let Ok(answer) = serde_json::from_str::<Answer>(&line)
                    && let Ok(mut all) = collected.lock()
                {
                    all.push((Instant::now(), answer));
                }
            }
        });
        Ok(Self { child, answers, reader: Some(reader) })
    }

    /// How many answers have come.
    pub fn count(&self) -> usize {
        self.answers.lock().map_or(0, |all| all.len())
    }

    /// What came since `since`.
    pub fn tally(&self, since: Instant) -> Tally {
        let mut tally = Tally::default();
        let Ok(all) = self.answers.lock() else { return tally };
        let mut last = since;
        for (at, answer) in all.iter().filter(|(at, _)| *at >= since) {
            if answer.ok() {
                tally.good += 1;
                tally.kept += usize::from(answer.kept);
                tally.gap = tally.gap.max(at.duration_since(last));
                last = *at;
            } else {
                tally.drops += usize::from(answer.kept);
                tally.bad.push(answer.clone());
            }
        }
        tally
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
    }
}
