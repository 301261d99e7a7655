//! The plugin's part of the conflist, and the decision whether a pod is meshed.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Deserialize;
use serde_json::Value;
use ursa_init::RedirectIntent;
use ursa_init::intent::Ports;

use crate::spec::{Code, Environment, Failure, NEWEST, VERSIONS};

/// The annotation or label that puts a pod into the mesh.
pub(crate) const INJECTION: &str = "kuma.io/sidecar-injection";
const ANNOTATIONS: &str = "io.kubernetes.cri.pod-annotations";
const EXCLUDE_INBOUND: &str = "traffic.kuma.io/exclude-inbound-ports";
const EXCLUDE_OUTBOUND: &str = "traffic.kuma.io/exclude-outbound-ports";
/// The group of every proxy, which the redirect exempts where the configuration names nobody: the agent gives each
/// pod's proxy a user of its own.
const PROXY_GID: u32 = 5678;

/// What the runtime writes to standard input.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct NetConf {
    #[serde(default)]
    cni_version: String,
    /// The result of the plugin before us, never looked into beyond addresses, never changed.
    pub(crate) prev_result: Option<Value>,
    #[serde(default)]
    runtime_config: BTreeMap<String, Value>,
    /// Where the agent's socket is.
    #[serde(default = "run_dir")]
    pub(crate) run_dir: PathBuf,
    /// Kubernetes namespaces whose pods are never meshed.
    #[serde(default)]
    exclude_namespaces: Vec<String>,
    /// Annotations of every pod of this network; the pod's own win.
    #[serde(default)]
    annotations: BTreeMap<String, String>,
    /// Labels of every pod of this network.
    #[serde(default)]
    labels: BTreeMap<String, String>,
    /// The redirect; the pod's annotations add exclusions. Read only for meshed pods: a mistake in it must not
    /// stop the others.
    redirect: Option<Value>,
}

fn run_dir() -> PathBuf {
    PathBuf::from("/run/ursa")
}

/// The configuration, and the whole document for the agent.
#[derive(Debug)]
pub(crate) struct Config {
    pub(crate) conf: NetConf,
    /// The document without what only concerns the runtime.
    pub(crate) document: Value,
}

/// The version that a document asks for, for errors about the document itself.
pub(crate) fn version_of(text: &str) -> String {
    let version = serde_json::from_str::<Value>(text).ok();
    let version = version.as_ref().and_then(|d| d.get("cniVersion")).and_then(Value::as_str);
    version.filter(|v| !v.is_empty()).unwrap_or(NEWEST).to_owned()
}

impl Config {
    pub(crate) fn parse(text: &str) -> Result<Self, Failure> {
        let mut document: Value = serde_json::from_str(text).map_err(|e| {
            Failure::new(
                Code::Decode,
                "the network configuration on standard input is no JSON",
                e.to_string(),
            )
        })?;
        let conf: NetConf = serde_json::from_value(document.clone()).map_err(|e| {
            Failure::new(Code::InvalidConfig, "the configuration of ursa-cni is invalid", e.to_string())
        })?;
        if !VERSIONS.contains(&conf.cni_version.as_str()) {
            let message = format!("incompatible CNI version `{}`", conf.cni_version);
            return Err(Failure::new(
                Code::IncompatibleVersion,
                message,
                format!("supported: {}", VERSIONS.join(", ")),
            ));
        }
        if let Some(document) = document.as_object_mut() {
            document.remove("prevResult");
            document.remove("runtimeConfig");
        }
        Ok(Self { conf, document })
    }
}

impl NetConf {
    /// Whether the pod is meshed: never in an excluded namespace, else as the annotation says, else the label.
    pub(crate) fn is_meshed(&self, environment: &Environment) -> bool {
        if environment.pod_namespace().is_some_and(|ns| self.exclude_namespaces.iter().any(|e| e == ns)) {
            return false;
        }
        let annotations = self.pod_annotations();
        let decided = annotations.get(INJECTION).or_else(|| self.labels.get(INJECTION));
        decided.is_some_and(|value| matches!(value.as_str(), "enabled" | "true"))
    }

    /// The network's annotations, overridden by the pod's.
    pub(crate) fn pod_annotations(&self) -> BTreeMap<String, String> {
        let mut all = self.annotations.clone();
        if let Some(Value::Object(pod)) = self.runtime_config.get(ANNOTATIONS) {
            all.extend(pod.iter().filter_map(|(k, v)| Some((k.clone(), v.as_str()?.to_owned()))));
        }
        all
    }

    /// The pod's redirect.
    pub(crate) fn intent(&self) -> Result<RedirectIntent, Failure> {
        let given = self.redirect.clone().unwrap_or_else(|| Value::Object(serde_json::Map::new()));
        let mut intent: RedirectIntent = serde_json::from_value(given).map_err(|e| {
            Failure::new(
                Code::InvalidConfig,
                "`redirect` in ursa-cni's configuration is invalid",
                e.to_string(),
            )
        })?;
        if intent.proxy_uids.is_empty() && intent.proxy_gids.is_empty() && intent.proxy_mark.is_none() {
            intent.proxy_gids.push(PROXY_GID);
        }
        let annotations = self.pod_annotations();
        let add = |name: &str, target: &mut Vec<Ports>| match annotations.get(name).map(|t| ports(t)) {
            None => Ok(()),
            Some(Ok(ports)) => {
                target.extend(ports);
                Ok(())
            }
            Some(Err(why)) => {
                Err(Failure::new(Code::InvalidConfig, format!("the pod's annotation {name} is invalid"), why))
            }
        };
        add(EXCLUDE_INBOUND, &mut intent.inbound.exclude_ports)?;
        add(EXCLUDE_OUTBOUND, &mut intent.outbound.exclude_ports)?;
        Ok(intent)
    }

    /// The previous result; this plugin only makes sense after one that gave the pod its addresses.
    pub(crate) fn previous(&self) -> Result<&Value, Failure> {
        self.prev_result.as_ref().filter(|v| v.is_object()).ok_or_else(|| {
            let hint =
                "ursa-cni must come after the plugin that creates the interface (bridge, Calico, Cilium, …)";
            Failure::new(Code::InvalidConfig, "there is no prevResult", hint)
        })
    }

    /// The pod's addresses, without prefix lengths.
    pub(crate) fn addresses(&self) -> Vec<String> {
        let ips = self.prev_result.as_ref().and_then(|r| r.get("ips")).and_then(Value::as_array);
        let texts = ips.into_iter().flatten().filter_map(|ip| ip.get("address")?.as_str());
        texts.map(|t| t.split('/').next().unwrap_or(t).to_owned()).collect()
    }
}

fn ports(text: &str) -> Result<Vec<Ports>, String> {
    let items = text.split(',').map(str::trim).filter(|item| !item.is_empty());
    items.map(|item| item.parse().map_err(|e: ursa_init::intent::ParseSpanError| e.to_string())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    fn environment(namespace: &str) -> Environment {
        let args = format!("K8S_POD_NAMESPACE={namespace}");
        Environment::read(|name| match name {
            "CNI_COMMAND" => Some("STATUS".to_owned()),
            "CNI_ARGS" => Some(args.clone()),
            _ => None,
        })
        .unwrap()
    }

    #[rstest]
    #[case::nothing_said("{}", false)]
    #[case::pod_says_yes(
        r#"{"runtimeConfig":{"io.kubernetes.cri.pod-annotations":{"kuma.io/sidecar-injection":"enabled"}}}"#,
        true
    )]
    #[case::network_says_yes(r#"{"annotations":{"kuma.io/sidecar-injection":"enabled"}}"#, true)]
    #[case::pod_wins(r#"{"annotations":{"kuma.io/sidecar-injection":"enabled"},"runtimeConfig":{"io.kubernetes.cri.pod-annotations":{"kuma.io/sidecar-injection":"disabled"}}}"#, false)]
    #[case::label(r#"{"labels":{"kuma.io/sidecar-injection":"true"}}"#, true)]
    #[case::excluded(
        r#"{"labels":{"kuma.io/sidecar-injection":"true"},"excludeNamespaces":["shop"]}"#,
        false
    )]
    fn decides(#[case] document: &str, #[case] meshed: bool) {
        let conf: NetConf = serde_json::from_str(document).unwrap();
        assert_eq!(conf.is_meshed(&environment("shop")), meshed);
    }

    #[test]
    fn annotations_add_exclusions() {
        let conf: NetConf = serde_json::from_str(
            r#"{"redirect":{"outbound":{"excludePorts":[1]}},"annotations":{"traffic.kuma.io/exclude-outbound-ports":"22, 80-90"}}"#,
        )
        .unwrap();
        let intent = conf.intent().unwrap();
        assert_eq!(intent.outbound.exclude_ports.len(), 3);
        assert_eq!((intent.proxy_uids.len(), intent.proxy_gids), (0, vec![PROXY_GID]));
    }
}
