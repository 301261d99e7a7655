//! kill -9 of control plane, agent, shim or Envoy of both sides, each alone and any two together, with requests,
//! lookups and acknowledged writes flowing.
//!
//! * [`part`]: what dies, in which combinations.
//! * [`flow`]: requests and lookups; [`writes`]: writes and the ledger of what was acknowledged.
//! * [`outage`]: when a part was down, as an observer saw it: a failure must fall into an outage of its path.
//! * [`census`]: what there is; more than before is a leak.
//! * [`farewell`]: workloads removed, agents and control stopped, nothing left.

pub mod census;
pub mod farewell;
pub mod flow;
pub mod outage;
pub mod part;
pub mod writes;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};

use self::census::Census;
use self::flow::{Failure, Flow, now};
use self::outage::{Outage, Probe, Watch};
use self::part::Part::{Agent, Control, Envoy, Shim};
use self::part::Side::{Backend, Web};
use self::part::{Part, Side, names};
use self::writes::Writes;
use super::daemon::{Daemon, kill_pid};
use super::mesh::Node;
use super::net::Host;
use super::pair::{Pair, SOON, URL};
use super::wait;

/// A part may be slow to come back on a machine that does other things; then the outage is long, not the test wrong.
const PATIENCE: Duration = Duration::from_secs(45);
/// A name that the mesh answers from its table.
const MESH_NAME: &str = "backend.svc.mesh.local";
/// A name that the shim forwards to the resolver on the bridge.
const OTHER_NAME: &str = "www.example.org";

/// What a round showed.
#[derive(Debug)]
pub struct Round {
    /// What died.
    pub killed: Vec<Part>,
    /// Requests that succeeded.
    pub requests: usize,
    /// Requests that failed while an Envoy on their path was down.
    pub cut: usize,
    /// Lookups that succeeded.
    pub lookups: usize,
    /// Lookups that failed while the shim that answers them was down: with the `fork` launcher it holds the sockets.
    pub unresolved: usize,
    /// Acknowledged writes.
    pub writes: usize,
    /// Writes that failed while the control plane was down.
    pub unwritten: usize,
    /// How long the path was cut: from the kill until both Envoys were live again.
    pub outage: Duration,
    /// From the kill until everything runs, is ready and written again.
    pub back_after: Duration,
    /// Open files of the process of each program that has most.
    pub open_files: BTreeMap<&'static str, usize>,
}

/// A running soak.
#[derive(Debug)]
pub struct Soak<'a> {
    pair: &'a mut Pair,
    requests: Flow,
    lookups: [(Side, Flow); 2],
    writes: Writes,
    envoys: [(Side, Watch); 2],
    shims: [(Side, Watch); 2],
    control: Vec<Outage>,
    before: Census,
    judged: Judged,
    _resolver: Daemon,
}

/// How many of each have been judged already.
#[derive(Debug, Default, Clone, Copy)]
struct Judged {
    requests: (usize, usize),
    lookups: [(usize, usize); 2],
    writes: (usize, usize),
}

impl<'a> Soak<'a> {
    /// Lets everything flow, and takes stock.
    pub fn start(pair: &'a mut Pair) -> anyhow::Result<Self> {
        let resolver = resolver(pair)?;
        let app = pair.lab.programs.path("lab-app");
        let requests = Flow::start(
            "requests",
            pair.web.host.command(&app).args(["load", "--url", URL, "--interval-ms", "5"]),
        )?;
        let lookups = |side, host: &Host, what| -> anyhow::Result<_> {
            let names = ["--name", MESH_NAME, "--name", OTHER_NAME, "--interval-ms", "10"];
            Ok((side, Flow::start(what, host.command(&app).arg("lookups").args(names))?))
        };
        let lookups = [
            lookups(Web, &pair.web.host, "lookups of web")?,
            lookups(Backend, &pair.backend.host, "lookups of backend")?,
        ];
        let watch = |side, what: &str, probe| -> anyhow::Result<_> {
            Ok((side, Watch::start(what, probe, PATIENCE)?))
        };
        let envoys = [
            watch(Web, "web's Envoy", Probe::Envoy(socket(pair, Web, "admin.sock")))?,
            watch(Backend, "backend's Envoy", Probe::Envoy(socket(pair, Backend, "admin.sock")))?,
        ];
        let shims = [
            watch(Web, "web's shim", Probe::Shim(socket(pair, Web, "control.sock")))?,
            watch(Backend, "backend's shim", Probe::Shim(socket(pair, Backend, "control.sock")))?,
        ];
        let writes = Writes::start(&pair.control.socket);
        let mut soak = Self {
            before: Census::default(),
            control: Vec::new(),
            judged: Judged::default(),
            _resolver: resolver,
            pair,
            requests,
            lookups,
            writes,
            envoys,
            shims,
        };
        soak.flowing()?;
        soak.verify()?;
        (soak.before, _) = wait::until("every address to be the host's own", SOON, || {
            let census = Census::take(soak.pair).map_err(|error| format!("{error:#}"))?.settled();
            // The kernel first asks whether somebody else has it; only then it gets its route.
            if census.tentative() { Err("one is tentative".to_owned()) } else { Ok(census) }
        })?;
        soak.judge(&[])?;
        Ok(soak)
    }

    /// One round: kill, see the rest go on, bring back what nobody else would, and judge all that happened.
    pub fn round(&mut self, killed: &[Part]) -> anyhow::Result<Round> {
        let judged = self.judged;
        let (begin, began) = (Instant::now(), now());
        self.kill(killed)?;
        self.others_go_on(killed)?;
        for part in killed {
            if let Agent(side) = part {
                self.node(*side).agent.restart()?;
            }
        }
        for (_, watch) in self.shims.iter().chain(&self.envoys) {
            watch.until_back(PATIENCE)?;
        }
        if killed.contains(&Control) {
            // Everything but writes works without it.
            self.requests.more(30, PATIENCE)?;
            self.pair.control.restart()?;
            if let Some(outage) = self.control.last_mut() {
                outage.to = now();
            }
        }
        self.pair.node_a.wait_ready("web", PATIENCE)?;
        self.pair.node_b.wait_ready("backend", PATIENCE)?;
        self.flowing()?;
        self.verify()?;
        let back_after = begin.elapsed();
        let census = self.without_leaks()?;
        self.judge(killed)?;
        let outages = self.envoys.iter().flat_map(|(_, watch)| watch.outages());
        let outage =
            outages.filter(|outage| outage.from >= began).map(|outage| outage.ms()).fold(0.0, f64::max);
        let since = |now: (usize, usize), then: (usize, usize)| (now.0 - then.0, now.1 - then.1);
        let (requests, cut) = since(self.judged.requests, judged.requests);
        let (writes, unwritten) = since(self.judged.writes, judged.writes);
        let lookups = [0, 1].map(|side| since(self.judged.lookups[side], judged.lookups[side]));
        Ok(Round {
            killed: killed.to_owned(),
            requests,
            cut,
            lookups: lookups[0].0 + lookups[1].0,
            unresolved: lookups[0].1 + lookups[1].1,
            writes,
            unwritten,
            outage: Duration::from_secs_f64(outage / 1e3),
            back_after,
            open_files: census.open_files(),
        })
    }

    /// Ends the flows and hands the pair back.
    pub fn end(self) -> &'a mut Pair {
        self.pair
    }

    fn kill(&mut self, killed: &[Part]) -> anyhow::Result<()> {
        // Looked up before the first kill: an Envoy dies with its shim.
        let mut victims = Vec::new();
        for part in killed {
            let (host, program) = match part {
                Control | Agent(_) => continue,
                Shim(side) => (self.host(*side), "ursa-shim"),
                Envoy(side) => (self.host(*side), "envoy"),
            };
            let pids = host.running(program);
            ensure!(pids.len() == 1, "{part} is {pids:?}, not one process");
            victims.extend(pids);
        }
        for part in killed {
            match part {
                Control => self.control.push(Outage { from: now(), to: f64::INFINITY }),
                Agent(_) => {}
                Shim(side) => {
                    of(&self.shims, *side).falls();
                    of(&self.envoys, *side).falls();
                }
                Envoy(side) => of(&self.envoys, *side).falls(),
            }
        }
        for part in killed {
            match part {
                Control => self.pair.control.daemon.kill(),
                Agent(side) => self.node(*side).agent.kill(),
                Shim(_) | Envoy(_) => {}
            }
        }
        for pid in victims {
            // One that went with the other, killed just before, is as dead as wanted.
            if kill_pid(pid).is_err() {
                ensure!(!PathBuf::from(format!("/proc/{pid}")).exists(), "cannot kill {pid}");
            }
        }
        Ok(())
    }

    /// What was not killed does its work meanwhile.
    fn others_go_on(&mut self, killed: &[Part]) -> anyhow::Result<()> {
        for (side, flow) in &mut self.lookups {
            if !killed.contains(&Shim(*side)) {
                flow.more(20, PATIENCE)?;
            } else if killed.contains(&Agent(*side)) {
                // Nobody is left who could start the shim again: so it stays, until the agent is back.
                flow.fewer(10, PATIENCE)?;
                let host = match side {
                    Web => &self.pair.web.host,
                    Backend => &self.pair.backend.host,
                };
                let running = host.running("ursa-shim");
                ensure!(running.is_empty(), "shim {running:?} runs although its agent is dead");
            }
        }
        if !killed.iter().any(|part| matches!(part, Shim(_) | Envoy(_))) {
            self.requests.more(50, PATIENCE)?;
        }
        if !killed.contains(&Control) {
            self.writes.more(5, PATIENCE)?;
        }
        Ok(())
    }

    fn flowing(&mut self) -> anyhow::Result<()> {
        self.requests.more(50, PATIENCE)?;
        for (_, flow) in &mut self.lookups {
            flow.more(50, PATIENCE)?;
        }
        self.writes.more(10, PATIENCE)
    }

    fn verify(&self) -> anyhow::Result<()> {
        let admins = [socket(self.pair, Web, "admin.sock"), socket(self.pair, Backend, "admin.sock")];
        self.writes.verify(&admins, PATIENCE)
    }

    fn without_leaks(&self) -> anyhow::Result<Census> {
        let (census, _) = wait::until("nothing more than before", SOON, || {
            let census = Census::take(self.pair).map_err(|error| format!("{error:#}"))?;
            let leaks = census.against(&self.before);
            if leaks.is_empty() { Ok(census) } else { Err(leaks.join("; ")) }
        })?;
        Ok(census)
    }

    /// Each failure since the last judgement must be explained by an outage on its path.
    fn judge(&mut self, killed: &[Part]) -> anyhow::Result<()> {
        let down = |watches: &[(Side, Watch); 2]| -> Vec<(Side, Vec<Outage>)> {
            watches.iter().map(|(side, watch)| (*side, watch.outages())).collect()
        };
        let (envoys, shims) = (down(&self.envoys), down(&self.shims));
        let on_path: Vec<Outage> = envoys.iter().flat_map(|(_, outages)| outages.clone()).collect();
        let mut unexplained = Vec::new();
        let mut explain = |what: &str, failures: &[Failure], outages: &[Outage]| {
            for failure in failures {
                if !outages.iter().any(|outage| outage.explains(failure)) {
                    unexplained.push(describe(what, failure, outages));
                }
            }
        };
        {
            let record = self.requests.record();
            explain("request", &record.failures[self.judged.requests.1..], &on_path);
            self.judged.requests = (record.good, record.failures.len());
        }
        for (at, (side, flow)) in self.lookups.iter().enumerate() {
            let record = flow.record();
            let outages = shims.iter().find(|(other, _)| other == side).map(|(_, outages)| outages.clone());
            explain("lookup", &record.failures[self.judged.lookups[at].1..], &outages.unwrap_or_default());
            self.judged.lookups[at] = (record.good, record.failures.len());
        }
        let failures = self.writes.failures();
        explain("write", &failures[self.judged.writes.1..], &self.control);
        self.judged.writes = (self.writes.good(), failures.len());
        let surprises = self.envoys.iter().chain(&self.shims).flat_map(|(_, watch)| watch.surprises());
        unexplained.extend(surprises);
        ensure!(
            unexplained.is_empty(),
            "{} failures that no outage explains, after kill -9 of {}; the first: {}",
            unexplained.len(),
            names(killed),
            unexplained[..unexplained.len().min(5)].join("\n  ")
        );
        Ok(())
    }

    fn host(&self, side: Side) -> &Host {
        match side {
            Web => &self.pair.web.host,
            Backend => &self.pair.backend.host,
        }
    }

    fn node(&mut self, side: Side) -> &mut Node {
        match side {
            Web => &mut self.pair.node_a,
            Backend => &mut self.pair.node_b,
        }
    }
}

fn of(watches: &[(Side, Watch); 2], side: Side) -> &Watch {
    match side {
        Web => &watches[0].1,
        Backend => &watches[1].1,
    }
}

fn describe(what: &str, failure: &Failure, outages: &[Outage]) -> String {
    let nearest = outages
        .iter()
        .map(|outage| {
            let after = (failure.began - outage.to) * 1e3;
            let before = (outage.from - failure.ended) * 1e3;
            if after > 0.0 {
                (after, format!("it began {after:.0} ms after the end of an outage of {:.0} ms", outage.ms()))
            } else {
                (before, format!("it ended {before:.0} ms before the next outage"))
            }
        })
        .min_by(|one, other| one.0.total_cmp(&other.0))
        .map_or_else(|| "nothing on its path was ever down".to_owned(), |(_, text)| text);
    let took = (failure.ended - failure.began) * 1e3;
    format!("{what} that took {took:.0} ms: {}; {nearest}", failure.what)
}

/// A socket in a workload's run folder.
pub fn socket(pair: &Pair, side: Side, name: &str) -> PathBuf {
    let (node, id) = match side {
        Web => (&pair.node_a, "default.web"),
        Backend => (&pair.node_b, "default.backend"),
    };
    node.run_dir().join("w").join(id).join(name)
}

/// The resolver that workloads would have used, on the bridge.
fn resolver(pair: &Pair) -> anyhow::Result<Daemon> {
    let bridge = pair.lab.net.bridge_host();
    let args = vec!["resolver".into(), "--address".into(), bridge.v4.clone()];
    let program = pair.lab.programs.path("lab-app");
    Daemon::start("resolver", &bridge, program, args, Vec::new(), pair.lab.log("resolver"))
}

/// Runs the rounds one after the other, telling `report` of each, and takes everything down.
pub fn run(
    pair: &mut Pair,
    rounds: &[Vec<Part>],
    mut report: impl FnMut(usize, &Round),
) -> anyhow::Result<()> {
    let mut soak = Soak::start(pair).context("before the first round")?;
    let start = Instant::now();
    for (number, killed) in rounds.iter().enumerate() {
        let at = start.elapsed().as_secs_f64();
        let round = soak.round(killed).with_context(|| {
            format!("round {number}, {at:.1} s after the first: kill -9 of {}", names(killed))
        })?;
        report(number, &round);
    }
    let pair = soak.end();
    farewell::leave(pair).context("after the last round, everything taken down")
}
