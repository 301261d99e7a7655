//! The runtime's sandboxes against what runs here: who should be in the mesh and isn't is put into it where it is,
//! without a restart and whatever its restart policy says.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use ursa_cni_protocol::{Call, Records};
use ursa_init::intent::kuma::for_pod;
use ursa_init::netns::Netns;
use ursa_model::injection::{Decision, PodFacts};

use super::client::{Place, Runtime, Sandbox};
use crate::agent::cni::Decisions;
use crate::agent::config::AgentConfig;
use crate::agent::status::{Phase, WorkloadStatus};
use crate::agent::supervisor::{CNI_PATIENCE, Supervisor};
use crate::agent::workload::{Origin, WorkloadSpec};

/// How often the runtime is asked: a pod that started before the agent is in the mesh within five seconds.
const INTERVAL: Duration = Duration::from_secs(3);
/// Pods that the runtime is asked about at the same time.
const AT_ONCE: usize = 16;
/// Pods are put into the mesh together, each closed before any sidecar starts; but after this time without those of
/// which the runtime still says nothing.
const TOGETHER: Duration = Duration::from_secs(1);
/// Problems that are reported; the log has all.
const REPORTED: usize = 20;

/// What the last look at the runtime showed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PodReport {
    /// The runtime's socket.
    pub runtime: PathBuf,
    /// Why it didn't say anything.
    pub error: Option<String>,
    /// Sandboxes that run.
    pub sandboxes: usize,
    /// Those that are to be meshed.
    pub meshed: usize,
    /// Those that this agent has put into the mesh after their start.
    pub repaired: usize,
    /// Those that are to be meshed and aren't, or of which nobody can say.
    pub problems: Vec<PodProblem>,
}

/// A pod that isn't where it should be.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PodProblem {
    /// `namespace/name`.
    pub pod: String,
    /// What was found, and what to do.
    pub error: String,
}

/// What repairing takes.
#[derive(Debug)]
pub struct Repair {
    config: AgentConfig,
    decisions: Arc<Decisions>,
    supervisor: Supervisor,
    report: watch::Sender<PodReport>,
    /// Pods whose redirect is put in place and whose sidecar isn't live yet.
    starting: Vec<Starting>,
}

/// A pod on its way into the mesh.
#[derive(Debug)]
struct Starting {
    pod: String,
    status: watch::Receiver<WorkloadStatus>,
    since: Instant,
}

/// What is known of a pod that is to be put into the mesh: its workload, or that there is nothing to do any more.
type Found = Result<Option<WorkloadSpec>, String>;

impl Repair {
    /// Starts looking, if a runtime is configured.
    pub fn start(
        config: &AgentConfig,
        decisions: Arc<Decisions>,
        supervisor: Supervisor,
        stop: CancellationToken,
    ) -> (watch::Receiver<PodReport>, Option<tokio::task::JoinHandle<()>>) {
        let (report, reports) = watch::channel(PodReport::default());
        let Some(path) = config.cri.clone() else { return (reports, None) };
        report.send_modify(|report| report.runtime.clone_from(&path));
        let repair = Self { config: config.clone(), decisions, supervisor, report, starting: Vec::new() };
        let task = async move {
            tokio::select! {
                () = stop.cancelled() => {}
                () = repair.run(path) => {}
            }
        };
        (reports, Some(tokio::spawn(task)))
    }

    async fn run(mut self, path: PathBuf) {
        let runtime = match Runtime::new(&path) {
            Ok(runtime) => runtime,
            Err(error) => {
                tracing::error!(%error, "pods that the plugin has missed can't be found");
                self.report.send_modify(|report| report.error = Some(error.to_string()));
                return;
            }
        };
        let mut ticks = tokio::time::interval(INTERVAL);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        // Ends with this future, as its tasks do.
        let mut waits = JoinSet::new();
        loop {
            tokio::select! {
                _ = ticks.tick() => {}
                Some(_) = waits.join_next() => {
                    self.count_live();
                    continue;
                }
            }
            match runtime.sandboxes().await {
                Ok(sandboxes) => self.look(&runtime, sandboxes, &mut waits).await,
                Err(error) => {
                    let error = error.to_string();
                    self.report.send_if_modified(|report| {
                        if report.error.as_ref() == Some(&error) {
                            return false;
                        }
                        tracing::warn!(%error, "pods that the plugin has missed can't be found");
                        report.error = Some(error);
                        true
                    });
                }
            }
        }
    }

    async fn look(&mut self, runtime: &Runtime, sandboxes: Vec<Sandbox>, waits: &mut JoinSet<()>) {
        self.decisions.learn_all(facts(&sandboxes)).await;
        let known: BTreeSet<String> =
            self.supervisor.status().await.0.into_iter().map(|workload| workload.origin).collect();
        let (mut meshed, mut problems, mut missing) = (0, Vec::new(), Vec::new());
        let count = sandboxes.len();
        for sandbox in sandboxes {
            let call = self.call(&sandbox);
            let problem = match self.decisions.decide(&call) {
                Ok(verdict) => match verdict.decision {
                    Decision::Unmeshed => continue,
                    Decision::Meshed => {
                        meshed += 1;
                        if !known.contains(&Origin::Cni(sandbox.id).to_string()) {
                            missing.push(call);
                        }
                        continue;
                    }
                    Decision::Undecided => format!("whether it is meshed isn't decided: {}", verdict.reason),
                },
                Err(error) => error.to_string(),
            };
            problems.push(PodProblem { pod: call.pod(), error: problem });
        }
        problems.extend(self.repair(runtime, missing, waits).await);
        problems.extend(self.late());
        problems.sort_by(|a, b| a.pod.cmp(&b.pod));
        let former = self.report.borrow().problems.clone();
        for problem in problems.iter().filter(|problem| !former.contains(problem)) {
            tracing::warn!(pod = %problem.pod, error = %problem.error, "a pod isn't in the mesh as it should be");
        }
        problems.truncate(REPORTED);
        self.report.send_modify(|report| {
            (report.error, report.sandboxes, report.meshed) = (None, count, meshed);
            report.problems = problems;
        });
    }

    /// The sandbox as the plugin would have described it.
    fn call(&self, sandbox: &Sandbox) -> Call {
        let config = self.config.cni.as_network();
        let annotations = config.network.annotations_with(&sandbox.annotations);
        let args = [
            ("K8S_POD_NAME", &sandbox.name),
            ("K8S_POD_NAMESPACE", &sandbox.namespace),
            ("K8S_POD_UID", &sandbox.uid),
        ];
        Call {
            container_id: sandbox.id.clone(),
            args: args.map(|(key, value)| (key.to_owned(), value.clone())).into_iter().collect(),
            annotations: Some(annotations),
            labels: Some(sandbox.labels.clone()),
            config,
            ..Call::default()
        }
    }

    /// Puts pods into the mesh: the redirect of each is tried before any of their sidecars starts, and nobody waits here
    /// for a sidecar. Returns what went wrong.
    async fn repair(
        &mut self,
        runtime: &Runtime,
        missing: Vec<Call>,
        waits: &mut JoinSet<()>,
    ) -> Vec<PodProblem> {
        let (mut problems, mut starting, mut together) = (Vec::new(), Vec::new(), Vec::new());
        let this = &*self;
        let found =
            missing.into_iter().map(|call| async move { (call.pod(), this.find(runtime, call).await) });
        let mut found = futures_util::stream::iter(found).buffer_unordered(AT_ONCE);
        let deadline = Instant::now() + TOGETHER;
        while let Ok(Some(one)) = tokio::time::timeout_at(deadline, found.next()).await {
            together.push(one);
        }
        this.start_all(together, &mut problems, &mut starting).await;
        this.start_all(found.collect().await, &mut problems, &mut starting).await;
        for starting in &starting {
            let mut status = starting.status.clone();
            waits.spawn(async move { drop(status.wait_for(is_live).await) });
        }
        self.starting.extend(starting);
        problems
    }

    /// Hands pods to the supervisor.
    async fn start_all(
        &self,
        found: Vec<(String, Found)>,
        problems: &mut Vec<PodProblem>,
        starting: &mut Vec<Starting>,
    ) {
        let (mut pods, mut specs) = (Vec::new(), Vec::new());
        for (pod, found) in found {
            match found {
                Ok(Some(spec)) => {
                    pods.push(pod);
                    specs.push(spec);
                }
                Ok(None) => {}
                Err(error) => problems.push(PodProblem { pod, error }),
            }
        }
        if specs.is_empty() {
            return;
        }
        for (pod, answer) in pods.into_iter().zip(self.supervisor.add_all(specs).await) {
            match answer {
                Ok(status) => starting.push(Starting { pod, status, since: Instant::now() }),
                Err(error) => problems.push(PodProblem { pod, error }),
            }
        }
    }

    /// The workload of a pod that is to be put into the mesh; `None` where there is nothing to repair: a pod on the
    /// machine's own network is none, nor is one that has gone.
    async fn find(&self, runtime: &Runtime, mut call: Call) -> Found {
        let place = runtime.place(&call.container_id).await.map_err(|error| error.to_string())?;
        let Some(Place::Own { netns, ips }) = place else { return Ok(None) };
        let nothing = BTreeMap::new();
        let annotations = call.annotations.as_ref().unwrap_or(&nothing);
        let network = call.config.redirect.clone().unwrap_or_default();
        let mut intent = for_pod(network, self.config.proxy_gid, annotations).map_err(|faults| {
            let faults: Vec<_> =
                faults.iter().map(|fault| format!("{} {}", fault.field, fault.message)).collect();
            format!(
                "its annotations describe no redirect: {}; correct them and create it again",
                faults.join("; ")
            )
        })?;
        call.netns.clone_from(&netns);
        call.ips = ips;
        let expected: Vec<IpAddr> = call.ips.iter().filter_map(|ip| ip.parse().ok()).collect();
        self.config.cni.kubelet_probes.exempt(&mut intent, &expected);
        call.config.redirect = Some(intent);
        let attest = move || {
            let netns = Netns::open(&netns)?;
            netns.refuse_own_or_host()?;
            netns.refuse_other_users()?;
            netns.refuse_strangers(&expected)
        };
        let attested = tokio::task::spawn_blocking(attest).await.map_err(|error| error.to_string())?;
        attested.map_err(|error| error.with_causes())?;
        let spec = self.decisions.spec(&call, &self.config)?;
        // Before anything is done: whoever stops the pod goes by it.
        Records::below(&self.config.run_dir)
            .write(&call)
            .map_err(|error| format!("its record can't be written: {error}"))?;
        Ok(Some(spec))
    }

    /// Counts the pods whose sidecar is live now, and forgets those that have gone meanwhile.
    fn count_live(&mut self) {
        let mut repaired = 0;
        self.starting.retain(|starting| {
            let is_live = is_live(&starting.status.borrow());
            if is_live {
                tracing::info!(pod = %starting.pod, "a pod that started outside of the mesh is in it now");
                repaired += 1;
            }
            !is_live && starting.status.has_changed().is_ok()
        });
        self.report.send_modify(|report| report.repaired += repaired);
    }

    /// The pods whose sidecar takes too long.
    fn late(&self) -> Vec<PodProblem> {
        let late = self.starting.iter().filter(|starting| starting.since.elapsed() > CNI_PATIENCE);
        late.map(|starting| {
            let status = starting.status.borrow();
            let why = status.error.as_ref().map(|error| format!(": {error}")).unwrap_or_default();
            let traffic = if status.state >= Phase::Redirected { "closed" } else { "NOT redirected" };
            let error = format!(
                "its traffic is {traffic}, and its sidecar isn't live after {} s; it is {}{why}",
                starting.since.elapsed().as_secs(),
                status.state.as_str()
            );
            PodProblem { pod: starting.pod.clone(), error }
        })
        .collect()
    }
}

fn is_live(status: &WorkloadStatus) -> bool {
    matches!(status.state, Phase::Live | Phase::Ready)
}

/// What the sandboxes say of themselves.
fn facts(sandboxes: &[Sandbox]) -> Vec<(String, String, PodFacts)> {
    let of = |sandbox: &Sandbox| {
        let facts = PodFacts {
            uid: sandbox.uid.clone(),
            annotations: sandbox.annotations.clone(),
            labels: sandbox.labels.clone(),
        };
        (sandbox.namespace.clone(), sandbox.name.clone(), facts)
    };
    sandboxes.iter().map(of).collect()
}
