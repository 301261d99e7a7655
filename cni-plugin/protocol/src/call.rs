//! A container as the plugin describes it.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use ursa_model::injection::Pod;
use ursa_model::labels::Labels;

use crate::network::PluginConfig;
use crate::records::Attachment;

/// The runtime's call for a container, with all that was found out about it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default)]
pub struct Call {
    /// `CNI_CONTAINERID`.
    pub container_id: String,
    /// `CNI_IFNAME`; empty where the agent found the pod by itself.
    pub ifname: String,
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

impl Call {
    /// The attachment that it is about.
    pub fn attachment(&self) -> Attachment {
        Attachment {
            container_id: self.container_id.clone(),
            network: self.config.network.name.clone(),
            ifname: self.ifname.clone(),
        }
    }

    /// The pod as far as the call describes it.
    pub fn described(&self) -> Pod<'_> {
        Pod {
            name: self.argument("K8S_POD_NAME"),
            namespace: self.argument("K8S_POD_NAMESPACE"),
            annotations: self.annotations.as_ref(),
            labels: self.labels.as_ref(),
            ..Pod::default()
        }
    }

    /// Its UID, or nothing.
    pub fn uid(&self) -> &str {
        self.argument("K8S_POD_UID").unwrap_or_default()
    }

    /// For logs.
    pub fn pod(&self) -> String {
        let part = |key: &str| self.argument(key).unwrap_or("?");
        format!("{}/{}", part("K8S_POD_NAMESPACE"), part("K8S_POD_NAME"))
    }

    fn argument(&self, key: &str) -> Option<&str> {
        self.args.get(key).map(String::as_str).filter(|value| !value.is_empty())
    }
}
