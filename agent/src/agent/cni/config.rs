//! What the agent's configuration says of pods.

use std::collections::BTreeMap;

use serde::Deserialize;
use ursa_cni_protocol::{Network, PluginConfig, Workload};
use ursa_init::RedirectIntent;
use ursa_init::probes::KubeletProbes;
use ursa_model::injection::{INJECTION, Injection, Knowledge, NamespaceFacts};
use ursa_model::labels::Labels;

/// Part `cni` of the agent's configuration. Its keys mean what they mean in the plugin's, for pods that the agent
/// itself finds.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct CniConfig {
    /// What a pod is about which nothing says anything.
    pub default: Injection,
    /// What namespaces say: as their label `kuma.io/sidecar-injection`.
    pub namespaces: BTreeMap<String, Injection>,
    /// Namespaces whose pods are never meshed.
    pub exclude_namespaces: Vec<String>,
    /// Annotations of every pod; the pod's own win.
    pub annotations: Labels,
    /// Labels of every pod.
    pub labels: Labels,
    /// The redirect.
    pub redirect: Option<RedirectIntent>,
    /// The kubelet's connections that go past the proxy.
    pub kubelet_probes: KubeletProbes,
    /// What the operator says of the workloads.
    pub workload: Workload,
}

impl Default for CniConfig {
    fn default() -> Self {
        Self {
            default: Injection::Disabled,
            namespaces: BTreeMap::new(),
            exclude_namespaces: vec!["kube-system".to_owned()],
            annotations: Labels::new(),
            labels: Labels::new(),
            redirect: None,
            kubelet_probes: KubeletProbes::default(),
            workload: Workload::default(),
        }
    }
}

impl CniConfig {
    /// The configuration's words, and what a former agent learned of pods.
    pub(super) fn knowledge(&self, former: &Knowledge) -> Knowledge {
        let mut knowledge = Knowledge::new(Some(self.default));
        knowledge.take_pods(former);
        for (name, injection) in &self.namespaces {
            let word = match injection {
                Injection::Enabled => "enabled",
                Injection::Disabled => "disabled",
            };
            let labels = Labels::from([(INJECTION.to_owned(), word.to_owned())]);
            knowledge.learn_namespace(name, &NamespaceFacts { labels, ..NamespaceFacts::default() });
        }
        knowledge
    }

    /// The same as if the plugin had brought it.
    pub(crate) fn as_network(&self) -> PluginConfig {
        PluginConfig {
            network: Network {
                name: String::new(),
                exclude_namespaces: self.exclude_namespaces.clone(),
                annotations: self.annotations.clone(),
                labels: self.labels.clone(),
            },
            redirect: self.redirect.clone(),
            workload: self.workload.clone(),
        }
    }
}
