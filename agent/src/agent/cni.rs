//! Pods, as the CNI plugin describes them.

mod config;
mod decisions;
pub(crate) mod records;

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use ursa_init::RedirectIntent;
use ursa_model::injection::{Membership, Pod, Rules};
use ursa_model::labels::{self, Labels};

pub use self::config::CniConfig;
pub use self::decisions::Decisions;
use super::config::AgentConfig;
use super::workload::{Origin, POD_UIDS, WorkloadSpec};

/// One of `cni.dev/valid-attachments`.
#[derive(Debug, Deserialize, Serialize)]
pub struct Attachment {
    /// `CNI_CONTAINERID`.
    #[serde(rename = "containerID")]
    pub container_id: String,
}

/// A container as the CNI plugin describes it. The plugin has put the redirect in place.
#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct CniAdd {
    /// `CNI_CONTAINERID`.
    pub container_id: String,
    /// `CNI_NETNS`.
    pub netns: PathBuf,
    /// `CNI_ARGS`.
    pub args: BTreeMap<String, String>,
    /// The pod's annotations, with the network's; `None` when the runtime didn't deliver them.
    pub annotations: Option<Labels>,
    /// The pod's labels, where somebody knows them.
    pub labels: Option<Labels>,
    /// Addresses of `prevResult`, with or without a prefix length.
    pub ips: Vec<String>,
    /// The plugin's configuration.
    pub config: PluginConfig,
}

/// What concerns the agent in the plugin's configuration.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default, rename_all = "camelCase")]
pub struct PluginConfig {
    /// The network's name.
    pub name: String,
    /// Namespaces whose pods are never meshed.
    pub exclude_namespaces: Vec<String>,
    /// Annotations of every pod of the network.
    pub annotations: Labels,
    /// Labels of every pod of the network.
    pub labels: Labels,
    /// The redirect as the plugin applied it.
    pub redirect: Option<RedirectIntent>,
    /// What the pod itself doesn't say.
    pub workload: Workload,
}

/// What the operator says of the workloads of one CNI network.
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

impl PluginConfig {
    /// The rules of this network.
    pub(crate) fn rules(&self) -> Rules<'_> {
        Rules {
            exclude_namespaces: &self.exclude_namespaces,
            annotations: Some(&self.annotations),
            labels: Some(&self.labels),
            default: None,
            mesh: self.workload.mesh.as_deref(),
            workload: self.workload.labels.get(labels::WORKLOAD).map(String::as_str),
            dataplane: self.workload.name.as_deref(),
        }
    }
}

impl CniAdd {
    /// The pod as far as the call describes it.
    pub(crate) fn described(&self) -> Pod<'_> {
        Pod {
            name: self.argument("K8S_POD_NAME"),
            namespace: self.argument("K8S_POD_NAMESPACE"),
            annotations: self.annotations.as_ref(),
            labels: self.labels.as_ref(),
            ..Pod::default()
        }
    }

    /// Its UID, or nothing.
    pub(crate) fn uid(&self) -> &str {
        self.argument("K8S_POD_UID").unwrap_or_default()
    }

    /// For logs.
    pub(crate) fn pod(&self) -> String {
        let part = |key: &str| self.argument(key).unwrap_or("?");
        format!("{}/{}", part("K8S_POD_NAMESPACE"), part("K8S_POD_NAME"))
    }

    fn argument(&self, key: &str) -> Option<&str> {
        self.args.get(key).map(String::as_str).filter(|value| !value.is_empty())
    }

    /// The workload of this container.
    pub(crate) fn spec(&self, who: Membership, config: &AgentConfig) -> Result<WorkloadSpec, String> {
        if self.container_id.is_empty() {
            return Err("field `container_id` is missing".to_owned());
        }
        let mut dataplane = self.dataplane(who)?;
        // The redirect exempts this user or group, so shim and Envoy must run as it.
        let redirect = self.config.redirect.as_ref();
        let uid = redirect.and_then(|intent| intent.proxy_uids.first().copied()).unwrap_or(*POD_UIDS.start());
        let gid = redirect.and_then(|intent| intent.proxy_gids.first().copied());
        // Envoy and the shim listen where the redirect leads to.
        let redirect = redirect.cloned().unwrap_or_default();
        dataplane["ursa"] =
            json!({ "netns": self.netns, "proxyUid": uid, "proxyGid": gid, "redirect": redirect });
        let origin = Origin::Cni(self.container_id.clone());
        let mut spec =
            WorkloadSpec::from_value(dataplane, origin, config).map_err(|error| error.to_string())?;
        spec.redirect = None;
        spec.network = Some(self.config.name.clone());
        Ok(spec)
    }

    fn dataplane(&self, who: Membership) -> Result<Value, String> {
        let given = &self.config.workload;
        let address = self
            .ips
            .first()
            .and_then(|address| address.split('/').next())
            .ok_or("`ips` is empty; the plugin must be chained after one that assigns an address")?;
        let annotation = |key: &str| self.annotations.as_ref()?.get(key).map(String::as_str);
        let ports = annotation("ursa.io/ports").or(given.ports.as_deref()).unwrap_or_default();
        let mut labels = given.labels.clone();
        labels.insert(labels::WORKLOAD.to_owned(), who.workload);
        Ok(json!({
            "type": "Dataplane",
            "mesh": who.mesh,
            "name": who.dataplane,
            "labels": labels,
            "networking": { "address": address, "inbound": inbounds(ports)? }
        }))
    }
}

fn inbounds(ports: &str) -> Result<Vec<Value>, String> {
    ports
        .split(',')
        .map(str::trim)
        .filter(|port| !port.is_empty())
        .map(|port| {
            let (number, protocol) = port.split_once('/').unwrap_or((port, "tcp"));
            let number: u16 = number
                .parse()
                .map_err(|_| format!("`{port}` is no port; write ports as in `8080/http,9090`"))?;
            Ok(json!({ "name": number.to_string(), "port": number, "protocol": protocol }))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(request: Value) -> Result<WorkloadSpec, String> {
        let add: CniAdd = serde_json::from_value(request).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let config = AgentConfig { state_dir: dir.path().to_owned(), ..AgentConfig::default() };
        Decisions::open(&config).spec(&add, &config)
    }

    #[test]
    fn a_pod_becomes_a_dataplane() {
        let spec = pod(json!({
            "container_id": "c1", "netns": "/run/netns/x", "ifname": "eth0",
            "args": {"K8S_POD_NAME": "web-0", "K8S_POD_NAMESPACE": "shop"},
            "annotations": {"kuma.io/workload": "web", "ursa.io/ports": "8080/http, 9090"},
            "ips": ["10.0.0.9"], "type": "ursa-cni",
            "config": {"redirect": {"proxyUids": [77], "inbound": {"port": 15106}, "dns": {"port": 15153}}}
        }))
        .unwrap();
        assert_eq!((spec.name.as_str(), spec.mesh.as_str(), spec.uid), ("web-0.shop", "default", 77));
        assert_eq!(spec.cluster(), "web");
        assert_eq!(spec.dataplane["networking"]["inbound"].as_array().unwrap().len(), 2);
        assert!(spec.redirect.is_none(), "the plugin's work");
        let inbound = spec.dataplane.pointer("/networking/transparentProxying/redirectPortInbound");
        assert_eq!((inbound, spec.dns_port), (Some(&15106.into()), 15153), "where the redirect leads to");
    }

    #[test]
    fn a_pod_that_says_nothing_has_a_valid_workload() {
        let spec = pod(json!({
            "container_id": "c1", "netns": "/run/netns/x", "ips": ["10.0.0.9"],
            "args": {"K8S_POD_NAME": "web-0", "K8S_POD_NAMESPACE": "shop"},
        }))
        .unwrap();
        assert_eq!((spec.name.as_str(), spec.cluster().as_str()), ("web-0.shop", "web-0-shop"));
    }

    #[test]
    fn the_operator_says_who_a_pod_is() {
        let add = |workload: Value| {
            pod(json!({
                "container_id": "c1", "netns": "/run/netns/x",
                "args": {"K8S_POD_NAME": "web-0"}, "ips": ["10.0.0.9"],
                "annotations": {"kuma.io/workload": "bank", "kuma.io/mesh": "money"},
                "config": {"workload": workload}
            }))
            .unwrap()
        };
        let spec = add(json!({"mesh": "shops", "labels": {"kuma.io/workload": "web"}}));
        assert_eq!((spec.mesh.as_str(), spec.cluster().as_str()), ("shops", "web"));
        let spec = add(json!({}));
        assert_eq!((spec.mesh.as_str(), spec.cluster().as_str()), ("money", "bank"), "the habit");
    }

    #[test]
    fn what_is_missing_is_named() {
        let error = pod(json!({"container_id": "c1", "netns": "/n"})).unwrap_err();
        assert!(error.contains("K8S_POD_NAME"), "{error}");
        let error = pod(json!({"container_id": "c1", "args": {"K8S_POD_NAME": "a"}})).unwrap_err();
        assert!(error.contains("ips"), "{error}");
    }
}
