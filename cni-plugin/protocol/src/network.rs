//! What the operator says of a network's pods.

use serde::{Deserialize, Serialize};
use ursa_init::RedirectIntent;
use ursa_model::injection::{Injection, Rules};
use ursa_model::labels::{self, Labels};

/// A network, as far as it matters for the decision whether a pod is meshed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Network {
    /// Its name: attachments are counted per network.
    pub name: String,
    /// Kubernetes namespaces whose pods are never meshed.
    pub exclude_namespaces: Vec<String>,
    /// Annotations of every pod of the network; the pod's own win.
    pub annotations: Labels,
    /// Labels of every pod of the network.
    pub labels: Labels,
}

impl Network {
    /// The rules of this network; `workload` only where it is known.
    pub fn rules<'a>(&'a self, workload: Option<&'a Workload>, default: Option<Injection>) -> Rules<'a> {
        Rules {
            exclude_namespaces: &self.exclude_namespaces,
            annotations: Some(&self.annotations),
            labels: Some(&self.labels),
            default,
            mesh: workload.and_then(|workload| workload.mesh.as_deref()),
            workload: workload.and_then(|workload| workload.labels.get(labels::WORKLOAD)).map(String::as_str),
            dataplane: workload.and_then(|workload| workload.name.as_deref()),
        }
    }

    /// The network's annotations, overridden by the pod's.
    pub fn annotations_with(&self, of_pod: &Labels) -> Labels {
        let mut all = self.annotations.clone();
        all.extend(of_pod.iter().map(|(key, value)| (key.clone(), value.clone())));
        all
    }
}

/// What the operator says of the workloads of one network.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Workload {
    /// Name of the Dataplane; by default made of `K8S_POD_NAME` and `K8S_POD_NAMESPACE`.
    pub name: Option<String>,
    /// Its mesh; where it isn't set, annotation `kuma.io/mesh` says it.
    pub mesh: Option<String>,
    /// Its labels. Where `kuma.io/workload` isn't among them, the annotation of that name says it.
    pub labels: Labels,
    /// Its ports, unless annotation `ursa.io/ports` says otherwise: `8080/http,9090`.
    pub ports: Option<String>,
}

/// What concerns the agent in the plugin's configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, rename_all = "camelCase")]
pub struct PluginConfig {
    /// The network.
    #[serde(flatten)]
    pub network: Network,
    /// The pod's redirect, as it is applied.
    pub redirect: Option<RedirectIntent>,
    /// What the pod itself doesn't say.
    pub workload: Workload,
}

impl PluginConfig {
    /// The rules of this network, without a default.
    pub fn rules(&self) -> Rules<'_> {
        self.network.rules(Some(&self.workload), None)
    }
}
