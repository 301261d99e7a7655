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
use tokio_util::sync::CancellationToken;
use ursa_cni_protocol::{Call, Records};
use ursa_init::intent::kuma::for_pod;
use ursa_init::netns::Netns;
use ursa_model::injection::{Decision, PodFacts};

use super::client::{Place, Runtime, Sandbox};
use crate::agent::cni::Decisions;
use crate::agent::config::AgentConfig;
use crate::agent::supervisor::Supervisor;
use crate::agent::workload::Origin;

/// How often the runtime is asked: a pod that started before the agent is in the mesh within five seconds.
const INTERVAL: Duration = Duration::from_secs(3);
/// Pods that are repaired at the same time.
const AT_ONCE: usize = 8;
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
}

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
        let repair = Self { config: config.clone(), decisions, supervisor, report };
        let task = async move {
            tokio::select! {
                () = stop.cancelled() => {}
                () = repair.run(path) => {}
            }
        };
        (reports, Some(tokio::spawn(task)))
    }

    async fn run(self, path: PathBuf) {
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
        loop {
            ticks.tick().await;
            match runtime.sandboxes().await {
                Ok(sandboxes) => self.look(&runtime, sandboxes).await,
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

    async fn look(&self, runtime: &Runtime, sandboxes: Vec<Sandbox>) {
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
        let repairs = missing.into_iter().map(|call| async {
            let pod = call.pod();
            (pod, self.repair(runtime, call).await)
        });
        let mut done = futures_util::stream::iter(repairs).buffer_unordered(AT_ONCE);
        let mut repaired = 0;
        while let Some((pod, outcome)) = done.next().await {
            match outcome {
                Ok(true) => {
                    tracing::info!(%pod, "a pod that started outside of the mesh is in it now");
                    repaired += 1;
                }
                Ok(false) => {}
                Err(error) => problems.push(PodProblem { pod, error }),
            }
        }
        drop(done);
        problems.sort_by(|a, b| a.pod.cmp(&b.pod));
        let former = self.report.borrow().problems.clone();
        for problem in problems.iter().filter(|problem| !former.contains(problem)) {
            tracing::warn!(pod = %problem.pod, error = %problem.error, "a pod isn't in the mesh as it should be");
        }
        problems.truncate(REPORTED);
        self.report.send_modify(|report| {
            (report.error, report.sandboxes, report.meshed) = (None, count, meshed);
            report.repaired += repaired;
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

    /// Redirect first, then the sidecar, as with ADD. Returns whether there was anything to repair: a pod on the
    /// machine's own network is none, nor is one that has gone.
    async fn repair(&self, runtime: &Runtime, mut call: Call) -> Result<bool, String> {
        let place = runtime.place(&call.container_id).await.map_err(|error| error.to_string())?;
        let Some(Place::Own { netns, ips }) = place else { return Ok(false) };
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
        call.config.redirect = Some(intent.clone());
        let attest = move || {
            let netns = Netns::open(&netns)?;
            netns.refuse_own_or_host()?;
            netns.refuse_strangers(&expected)
        };
        let attested = tokio::task::spawn_blocking(attest).await.map_err(|error| error.to_string())?;
        attested.map_err(|error| error.with_causes())?;
        let mut spec = self.decisions.spec(&call, &self.config)?;
        spec.redirect = Some(intent);
        // Before anything is done: whoever stops the pod goes by it.
        Records::below(&self.config.run_dir)
            .write(&call)
            .map_err(|error| format!("its record can't be written: {error}"))?;
        self.supervisor.add(spec).await.map(|()| true)
    }
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
