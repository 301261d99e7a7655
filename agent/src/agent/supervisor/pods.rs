//! Pods: how they come, whose user their proxies are, and how they go.

use std::collections::BTreeMap;
use std::path::Path;

use ursa_cni_protocol::Records;

use super::users::user_of_pod;
use super::{Answer, Task, persist};
use crate::agent::workload::{Origin, WorkloadSpec};

impl Task {
    /// Finds pods that went while nobody told this agent, and lets them leave. Returns how many.
    pub(super) fn sweep(&mut self) -> usize {
        let records = Records::below(&self.shared.config.load().run_dir);
        let missing = |path: &Path| matches!(path.try_exists(), Ok(false));
        let gone: Vec<String> = self
            .cni
            .iter()
            .filter(|(container, spec)| {
                records.has_none(container) || spec.netns.as_deref().is_some_and(missing)
            })
            .map(|(container, _)| container.clone())
            .collect();
        for container in &gone {
            if let Some(spec) = self.cni.remove(container) {
                self.depart(&spec.id(), None, Vec::new());
            }
            if let Err(error) = records.remove_all(container) {
                tracing::warn!(%container, %error, "the records of a container stay");
            }
        }
        // Their plugin was killed before it could tell this agent anything.
        let is_orphan = |container: &String| {
            let call = records.of(container).first().and_then(|first| records.read(first));
            !self.cni.contains_key(container) && call.is_some_and(|call| missing(&call.netns))
        };
        for container in records.containers().iter().filter(|container| is_orphan(container)) {
            if let Err(error) = records.remove_all(container) {
                tracing::warn!(%container, %error, "the records of a container stay");
            }
        }
        if !gone.is_empty() {
            tracing::info!(count = gone.len(), "pods have gone without a word; their sidecars stop");
        }
        gone.len()
    }

    /// The user of a pod's proxy: the one it had, the one that the plugin's configuration names, or a free one.
    fn user_of(&self, container: &str, spec: &WorkloadSpec) -> Result<u32, String> {
        if let Some(former) = self.cni.get(container) {
            return Ok(former.uid);
        }
        let pods = self.cni.values().map(|pod| (pod.uid, pod.id()));
        let running = self.machines.iter().map(|(id, running)| (running.spec.uid, id.clone()));
        let leaving = self.leaving.iter().map(|(id, leaving)| (leaving.uid, id.clone()));
        user_of_pod(spec.uid, &pods.chain(running).chain(leaving).collect())
    }

    pub(super) fn add(&mut self, specs: Vec<WorkloadSpec>) -> Vec<Answer> {
        let admitted: Vec<_> = specs.into_iter().map(|spec| self.admit(spec)).collect();
        let ids = || admitted.iter().flatten();
        // Before any machine starts.
        self.shared.redirects.expect_together(ids().cloned());
        self.reconcile(&BTreeMap::new());
        for id in ids().filter(|id| !self.machines.contains_key(*id)) {
            self.shared.redirects.tried(id);
        }
        let status = |id: String| {
            let running = self.machines.get(&id).map(|running| running.machine.status());
            running.ok_or_else(|| "the former workload of that name is still leaving; try again".to_owned())
        };
        admitted.into_iter().map(|admitted| admitted.and_then(status)).collect()
    }

    /// Takes a pod in, if nobody is in its way; the workload's id.
    fn admit(&mut self, mut spec: WorkloadSpec) -> Result<String, String> {
        let Origin::Cni(container) = spec.origin.clone() else {
            return Err("only CNI adds workloads; a file is put into the workloads directory".to_owned());
        };
        spec.uid = self.user_of(&container, &spec)?;
        let id = spec.id();
        if self.is_leaving(&id) {
            return Err(format!("the former {} is still draining; try again", spec.node_id()));
        }
        let others = self.machines.get(&id).map(|running| &running.spec);
        let others = others.into_iter().chain(self.cni.values().filter(|pod| pod.id() == id));
        if let Some(other) = others.into_iter().find(|other| other.origin != spec.origin) {
            return Err(format!("{} already runs here, from {}", spec.node_id(), other.origin));
        }
        // Before anything starts: an agent that dies now must find it again.
        let dir = self.shared.state_dir(&id);
        persist(&dir, &spec).map_err(|error| format!("can't write to {}: {error}", dir.display()))?;
        self.cni.insert(container, spec);
        Ok(id)
    }
}
