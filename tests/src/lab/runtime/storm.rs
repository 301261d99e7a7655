//! Very many pods at once, and what dies meanwhile.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Barrier, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};

use super::ground::Ground;
use super::network::{self, Networks};
use super::{Pod, PodSpec, Runtime};
use crate::lab::Lab;
use crate::lab::daemon::{Daemon, kill_pid};
use crate::lab::machine::Machine;
use crate::lab::net;

/// How long a meshed pod may be refused while agent and plugins die: each try takes seconds on a machine that is busy
/// with a hundred pods.
const PATIENCE: Duration = Duration::from_secs(180);
/// The longest pause between two kills, and the longest time that an agent stays away, in milliseconds. Most starts get
/// through in between.
const PAUSE: u64 = 2000;
const AWAY: u64 = 500;

/// Begins the names of meshed pods.
const MESHED: &str = "m";

/// How much of it.
#[derive(Debug, Clone, Copy)]
pub struct Storm {
    /// How many pods.
    pub pods: usize,
    /// How many of them are in the mesh.
    pub meshed: usize,
    /// How often each comes and goes; when only once, all are there at the same time.
    pub lives: usize,
    /// Whether the agent and plugins at work for meshed pods are killed meanwhile, again and again.
    pub kills: bool,
    /// What chance is drawn from.
    pub seed: u64,
}

/// What happened.
#[derive(Debug, Default)]
pub struct Sum {
    /// From the first pod's start until every pod has lived.
    pub took: Duration,
    /// How long the start of a pod outside the mesh took, each.
    pub plain: Vec<Duration>,
    /// How long the start of a meshed pod took from its first try on, each.
    pub meshed: Vec<Duration>,
    /// How many tries to start or stop a meshed pod failed and were made again, as kubelet does.
    pub again: usize,
    /// How often the agent was killed.
    pub agents: usize,
    /// How many plugins were killed at work.
    pub plugins: usize,
}

impl Storm {
    /// The names of its meshed pods.
    pub fn names(&self) -> impl Iterator<Item = String> + use<> {
        (0..self.meshed).map(|number| format!("{MESHED}{number}"))
    }

    fn specs(&self) -> Vec<PodSpec> {
        let meshed = self.names().map(|name| PodSpec::meshed(&name));
        let plain = (self.meshed..self.pods).map(|number| PodSpec::plain(&format!("p{number}")));
        meshed.chain(plain).map(PodSpec::sandbox).collect()
    }

    /// Sets up a machine with this runtime, whose node may run the storm's pods, and lets it pass over that.
    pub fn on<R: Runtime>(
        &self,
        runtime: impl FnOnce(&Lab, &Machine, &Networks) -> anyhow::Result<R>,
    ) -> anyhow::Result<(Ground<R>, Sum)> {
        // A runtime that knows no namespaces calls a workload as its pod.
        let services: Vec<String> =
            self.names().flat_map(|name| [format!("{name}-{}", network::MESHED), name]).collect();
        let services: Vec<&str> = services.iter().map(String::as_str).collect();
        let mut ground = Ground::start(&services, runtime)?;
        match self.pass(&mut ground) {
            Ok(sum) => Ok((ground, sum)),
            Err(error) => Err(match ground.lab.save_logs() {
                Some(logs) => error.context(format!("the lab's logs: {}", logs.display())),
                None => error,
            }),
        }
    }

    /// Lets it pass over a machine. No meshed pod ever runs without its rules and its Envoy, no other pod fails, and
    /// afterwards nothing is left.
    fn pass<R: Runtime>(&self, ground: &mut Ground<R>) -> anyhow::Result<Sum> {
        let started = Instant::now();
        let (machine, runtime) = (&ground.machine, &ground.runtime);
        let sum = Mutex::new(Sum::default());
        let rules = AtomicUsize::new(0);
        let all_there = Barrier::new(if self.lives == 1 { self.pods } else { 1 });
        let over = AtomicBool::new(false);
        let agent = &mut ground.node.agent;
        std::thread::scope(|scope| {
            let killer = self.kills.then(|| scope.spawn(|| self.kill(machine, agent, &over, &sum)));
            let pods: Vec<_> = self
                .specs()
                .into_iter()
                .map(|spec| {
                    let life = Life { machine, runtime, sum: &sum, rules: &rules, all_there: &all_there };
                    scope.spawn(move || life.lead(spec, self.lives))
                })
                .collect();
            let ended: Vec<_> = pods.into_iter().map(join).collect();
            over.store(true, Ordering::Relaxed);
            killer.map_or(Ok(()), join)?;
            ended.into_iter().collect::<anyhow::Result<()>>()
        })?;
        let left = runtime.known(machine)?;
        ensure!(left.is_empty(), "the runtime still knows {}", left.join(", "));
        let mut sum = sum.into_inner().unwrap_or_else(PoisonError::into_inner);
        sum.took = started.elapsed();
        sum.plain.sort_unstable();
        sum.meshed.sort_unstable();
        Ok(sum)
    }

    /// Kills the agent, or a plugin at work for a meshed pod, at random moments.
    fn kill(
        &self,
        machine: &Machine,
        agent: &mut Daemon,
        over: &AtomicBool,
        sum: &Mutex<Sum>,
    ) -> anyhow::Result<()> {
        let mut state = self.seed;
        let mut random = |below: u64| {
            // SplitMix64, as in the other soak.
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut mixed = state;
            mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            (mixed ^ (mixed >> 31)) % below
        };
        while !over.load(Ordering::Relaxed) {
            // The moment is to be any; nothing waits for it.
            std::thread::sleep(Duration::from_millis(random(PAUSE)));
            if random(3) == 0 {
                agent.kill();
                std::thread::sleep(Duration::from_millis(random(AWAY)));
                agent.restart()?;
                sum.lock().unwrap_or_else(PoisonError::into_inner).agents += 1;
                continue;
            }
            // Whichever is at work, or the first one that will be.
            let victim = loop {
                let at_work: Vec<i32> =
                    machine.running("ursa-cni").into_iter().filter(|pid| serves(*pid)).collect();
                let count = u64::try_from(at_work.len()).unwrap_or_default();
                if over.load(Ordering::Relaxed) {
                    return Ok(());
                } else if count > 0 {
                    break usize::try_from(random(count)).ok().and_then(|at| at_work.get(at).copied());
                }
                // No event tells that a runtime has started a plugin.
                std::thread::sleep(Duration::from_millis(10));
            };
            if victim.is_some_and(|pid| kill_pid(pid).is_ok()) {
                sum.lock().unwrap_or_else(PoisonError::into_inner).plugins += 1;
            }
        }
        Ok(())
    }
}

/// Whether a plugin is at work for a meshed pod. One that dies at work for another fails that pod, whoever wrote it.
fn serves(pid: i32) -> bool {
    let own = format!("K8S_POD_NAME={MESHED}");
    let variables = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
    String::from_utf8_lossy(&variables).contains(&own)
}

fn join<T>(thread: std::thread::ScopedJoinHandle<'_, anyhow::Result<T>>) -> anyhow::Result<T> {
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// What the lives of pods share.
struct Life<'a, R> {
    machine: &'a Machine,
    runtime: &'a R,
    sum: &'a Mutex<Sum>,
    /// How many rules a meshed pod has; 0 until the first one is there.
    rules: &'a AtomicUsize,
    all_there: &'a Barrier,
}

impl<R: Runtime> Life<'_, R> {
    fn lead(&self, mut spec: PodSpec, lives: usize) -> anyhow::Result<()> {
        for _ in 0..lives {
            let begin = Instant::now();
            let pod = self.start(&mut spec);
            let took = begin.elapsed();
            // Others wait for this one, also when it has failed.
            self.all_there.wait();
            let pod = pod?;
            let mut sum = self.sum.lock().unwrap_or_else(PoisonError::into_inner);
            if spec.meshed { &mut sum.meshed } else { &mut sum.plain }.push(took);
            drop(sum);
            self.look(&pod)?;
            self.end(&pod)?;
            spec.attempt += 1;
        }
        Ok(())
    }

    fn start(&self, spec: &mut PodSpec) -> anyhow::Result<Pod> {
        let begin = Instant::now();
        loop {
            match self.runtime.start(self.machine, spec) {
                Ok(pod) => {
                    self.look(&pod)?;
                    return Ok(pod);
                }
                Err(error) => self.try_again(spec, "start", begin, &error)?,
            }
            self.collect(spec)?;
            spec.attempt += 1;
        }
    }

    fn end(&self, pod: &Pod) -> anyhow::Result<()> {
        let begin = Instant::now();
        while let Err(error) = self.runtime.remove(self.machine, pod) {
            self.try_again(&pod.spec, "end", begin, &error)?;
        }
        Ok(())
    }

    /// Removes what the runtime keeps of a failed try: of a pod there is one at a time.
    fn collect(&self, spec: &PodSpec) -> anyhow::Result<()> {
        let begin = Instant::now();
        while let Err(error) = self.runtime.discard(self.machine, spec) {
            self.try_again(spec, "go", begin, &error)?;
        }
        Ok(())
    }

    /// Whether kubelet would, and may.
    fn try_again(
        &self,
        spec: &PodSpec,
        what: &str,
        begin: Instant,
        error: &anyhow::Error,
    ) -> anyhow::Result<()> {
        let error = format!("{error:#}");
        ensure!(spec.meshed, "pod {}, outside the mesh, doesn't {what}: {error}", spec.name);
        ensure!(error.contains("ursa-cni"), "pod {} doesn't {what}: {error}", spec.name);
        ensure!(begin.elapsed() < PATIENCE, "pod {} doesn't {what} in {PATIENCE:?}: {error}", spec.name);
        self.sum.lock().unwrap_or_else(PoisonError::into_inner).again += 1;
        Ok(())
    }

    /// A running pod is meshed and whole, or untouched.
    fn look(&self, pod: &Pod) -> anyhow::Result<()> {
        let name = &pod.spec.name;
        let rules = pod.rules(self.machine).with_context(|| format!("the rules of {name}"))?;
        // Whoever looked at all processes for each of a hundred pods would do nothing else.
        if !pod.spec.meshed {
            ensure!(rules.is_empty(), "{name}, outside the mesh, has rules: {}", rules.join("\n"));
            return Ok(());
        }
        let expected = self
            .rules
            .compare_exchange(0, rules.len(), Ordering::Relaxed, Ordering::Relaxed)
            .map_or_else(|first| first, |_| rules.len());
        if rules.is_empty() || rules.len() != expected {
            bail!("{name} runs with {} rules instead of {expected}: {}", rules.len(), rules.join("\n"));
        }
        let envoys = pod.envoys(self.machine);
        ensure!(envoys.len() == 1, "{name} runs with {} Envoys: {envoys:?}", envoys.len());
        ensure!(envoys.iter().all(|pid| net::runs(*pid, "envoy")), "{name}'s Envoy has ended");
        Ok(())
    }
}
