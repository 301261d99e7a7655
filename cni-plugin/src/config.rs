//! The plugin's part of the conflist, and what the runtime puts into it.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Deserializer};
use serde_json::{Value, json};
use ursa_cni_protocol::{Attachment, Call, Network, PluginConfig, Records, Workload};
use ursa_init::RedirectIntent;
use ursa_init::intent::kuma::for_pod;
use ursa_init::probes::KubeletProbes;
use ursa_model::injection::{Injection, Pod, Rules};
use ursa_model::labels::Labels;

use crate::json;
use crate::spec::{Code, Environment, Failure, NEWEST, VERSIONS};

/// The runtime's capability that delivers a pod's annotations.
pub const ANNOTATIONS: &str = "io.kubernetes.cri.pod-annotations";
/// The group of every proxy, which the redirect exempts where the configuration names nobody: the agent gives each
/// pod's proxy a user of its own.
const PROXY_GID: u32 = 5678;

/// What the runtime writes to standard input, apart from the previous result.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct NetConf {
    cni_version: String,
    /// The network.
    #[serde(skip)]
    pub network: Network,
    /// What the operator wants of the runtime.
    capabilities: BTreeMap<String, Value>,
    runtime_config: RuntimeConfig,
    /// Where the agent's socket is, and what is known of each container.
    pub run_dir: PathBuf,
    /// Where the agent keeps what outlives it.
    pub state_dir: PathBuf,
    /// What a pod is about which nothing says anything.
    pub default: Option<Silent>,
    /// The redirect; the pod's annotations win. Read only for meshed pods: a mistake in it must not
    /// stop the others.
    redirect: Option<Value>,
    /// The kubelet's connections that go past the proxy.
    kubelet_probes: KubeletProbes,
    /// Likewise.
    workload: Option<Value>,
    /// The attachments that exist, with GC.
    #[serde(rename = "cni.dev/valid-attachments")]
    valid_attachments: Option<Vec<ValidAttachment>>,
    /// The same under the name that the specification's text had for a while.
    #[serde(rename = "cni.dev/attachments")]
    attachments: Option<Vec<ValidAttachment>>,
}

impl Default for NetConf {
    fn default() -> Self {
        Self {
            cni_version: String::new(),
            network: Network::default(),
            capabilities: BTreeMap::new(),
            runtime_config: RuntimeConfig::default(),
            run_dir: PathBuf::from("/run/ursa"),
            state_dir: PathBuf::from("/var/lib/ursa/agent"),
            default: None,
            redirect: None,
            kubelet_probes: KubeletProbes::default(),
            workload: None,
            valid_attachments: None,
            attachments: None,
        }
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct RuntimeConfig {
    /// `null` is a pod without annotations; a runtime that delivers none doesn't write the key.
    #[serde(rename = "io.kubernetes.cri.pod-annotations", deserialize_with = "delivered")]
    annotations: Option<Labels>,
}

fn delivered<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Labels>, D::Error> {
    Option::<Labels>::deserialize(from).map(|words| Some(words.unwrap_or_default()))
}

/// What a pod is that says nothing, in a namespace of which nothing is known either.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Silent {
    /// Meshed.
    Enabled,
    /// Left alone.
    Disabled,
    /// Whatever the agent says; without it, the pod waits.
    Ask,
}

/// One of `cni.dev/valid-attachments`: they are of the network that the call is about.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct ValidAttachment {
    #[serde(rename = "containerID")]
    container_id: String,
    /// Runtimes name it; where one doesn't, all of the container's are meant.
    #[serde(default)]
    ifname: String,
}

impl ValidAttachment {
    /// Whether it is this one.
    pub fn is(&self, attachment: &Attachment) -> bool {
        self.container_id == attachment.container_id
            && (self.ifname.is_empty() || self.ifname == attachment.ifname)
    }
}

/// The configuration, and the result of the plugin before us.
#[derive(Debug)]
pub struct Config {
    /// The plugin's part.
    pub conf: NetConf,
    /// As it was written, so that it goes on untouched.
    previous: Option<String>,
}

/// The version that a document asks for, for errors about the document itself.
pub fn version_of(text: &str) -> String {
    let version = json::member(text, "cniVersion").and_then(|raw| serde_json::from_str::<String>(raw).ok());
    version.filter(|version| !version.is_empty()).unwrap_or_else(|| NEWEST.to_owned())
}

/// The previous result of a document as it was written there, whatever else is in it.
pub fn previous_of(text: &str) -> Result<&str, Failure> {
    json::member(text, "prevResult").filter(|raw| raw.starts_with('{')).ok_or_else(without_previous)
}

fn without_previous() -> Failure {
    let hint = "ursa-cni must come after the plugin that creates the interface (bridge, Calico, Cilium, …)";
    Failure::new(Code::InvalidConfig, "there is no prevResult", hint)
}

impl Config {
    /// Whether the document is JSON at all.
    pub fn check_syntax(text: &str) -> Result<(), Failure> {
        serde_json::from_str::<serde::de::IgnoredAny>(text).map(drop).map_err(|e| {
            Failure::new(
                Code::Decode,
                "the network configuration on standard input is no JSON",
                e.to_string(),
            )
        })
    }

    /// Reads the document.
    pub fn parse(text: &str) -> Result<Self, Failure> {
        Self::check_syntax(text)?;
        let conf = NetConf::read(text).map_err(|e| {
            Failure::new(
                Code::InvalidConfig,
                "the configuration of ursa-cni is invalid",
                format!("{e}; `ursa-cni --help` shows every key"),
            )
        })?;
        if !VERSIONS.contains(&conf.cni_version.as_str()) {
            let message = format!("incompatible CNI version `{}`", conf.cni_version);
            return Err(Failure::new(
                Code::IncompatibleVersion,
                message,
                format!("supported: {}", VERSIONS.join(", ")),
            ));
        }
        let previous = json::member(text, "prevResult").filter(|raw| *raw != "null").map(str::to_owned);
        Ok(Self { conf, previous })
    }

    /// Reads what can be read: for a pod that goes, whatever became of the configuration.
    pub fn for_departure(text: &str) -> Self {
        Self::parse(text).unwrap_or_else(|failure| {
            eprintln!("ursa-cni: {failure}; going on without it");
            let word = |name: &str| serde_json::from_str::<String>(json::member(text, name)?).ok();
            let mut conf = NetConf::default();
            conf.run_dir = word("runDir").map_or(conf.run_dir, PathBuf::from);
            conf.state_dir = word("stateDir").map_or(conf.state_dir, PathBuf::from);
            conf.network.name = word("name").unwrap_or_default();
            Self { conf, previous: None }
        })
    }

    /// The previous result as it was written; this plugin only makes sense after one that gave the pod its addresses.
    pub fn previous(&self) -> Result<&str, Failure> {
        self.previous.as_deref().filter(|raw| raw.starts_with('{')).ok_or_else(without_previous)
    }

    /// The pod's addresses, without prefix lengths.
    pub fn addresses(&self) -> Result<Vec<String>, Failure> {
        #[derive(Deserialize)]
        struct Ip {
            address: String,
        }
        #[derive(Deserialize)]
        struct Previous {
            #[serde(default)]
            ips: Vec<Ip>,
        }
        let previous: Previous = serde_json::from_str(self.previous()?).map_err(|e| {
            Failure::new(Code::InvalidConfig, "`ips` in prevResult can't be read", e.to_string())
        })?;
        let texts = previous.ips.into_iter().map(|ip| ip.address);
        Ok(texts.map(|t| t.split('/').next().unwrap_or(&t).to_owned()).collect())
    }
}

impl NetConf {
    /// Reads the plugin's part.
    pub fn read(text: &str) -> serde_json::Result<Self> {
        // One after the other: a flattened part would have numbers read that concern nobody, however odd.
        let mut conf: Self = serde_json::from_str(text)?;
        conf.network = serde_json::from_str(text)?;
        Ok(conf)
    }

    /// The pod as far as the call describes it.
    pub fn pod<'a>(&'a self, environment: &'a Environment, nothing: &'a Labels) -> Pod<'a> {
        Pod {
            name: environment.argument("K8S_POD_NAME"),
            namespace: environment.argument("K8S_POD_NAMESPACE"),
            annotations: self.delivered_annotations(nothing),
            ..Pod::default()
        }
    }

    /// The pod's annotations. `None` when the operator wants them and the runtime doesn't deliver them: then nobody
    /// knows what they say. A network that doesn't ask for them has pods without.
    fn delivered_annotations<'a>(&'a self, nothing: &'a Labels) -> Option<&'a Labels> {
        let wanted = self.capabilities.get(ANNOTATIONS) == Some(&Value::Bool(true));
        self.runtime_config.annotations.as_ref().or((!wanted).then_some(nothing))
    }

    /// What the operator says.
    pub fn rules<'a>(&'a self, workload: Option<&'a Workload>) -> Rules<'a> {
        let default = match self.default {
            Some(Silent::Enabled) => Some(Injection::Enabled),
            Some(Silent::Disabled) => Some(Injection::Disabled),
            Some(Silent::Ask) | None => None,
        };
        self.network.rules(workload, default)
    }

    /// What the operator says of the network's workloads.
    pub fn workload(&self) -> Result<Workload, Failure> {
        let Some(given) = &self.workload else { return Ok(Workload::default()) };
        Workload::deserialize(given).map_err(|e| {
            Failure::new(
                Code::InvalidConfig,
                "`workload` in ursa-cni's configuration is invalid",
                e.to_string(),
            )
        })
    }

    /// What the runtime delivered, with the network's annotations; `None` when nobody knows.
    fn annotations_for_agent(&self) -> Option<Labels> {
        let nothing = Labels::new();
        self.delivered_annotations(&nothing).map(|words| self.network.annotations_with(words))
    }

    /// The pod's redirect.
    pub fn intent(&self, of_pod: Option<&Labels>) -> Result<RedirectIntent, Failure> {
        let given = self.redirect.clone().unwrap_or_else(|| json!({}));
        let intent: RedirectIntent = serde_json::from_value(given).map_err(|e| {
            Failure::new(
                Code::InvalidConfig,
                "`redirect` in ursa-cni's configuration is invalid",
                e.to_string(),
            )
        })?;
        let annotations = self.network.annotations_with(of_pod.unwrap_or(&Labels::new()));
        for_pod(intent, PROXY_GID, &annotations).map_err(|faults| {
            let faults: Vec<_> =
                faults.iter().map(|fault| format!("{} {}", fault.field, fault.message)).collect();
            Failure::new(
                Code::InvalidConfig,
                "the pod's annotations describe no redirect",
                format!("{}; correct them and create the pod again", faults.join("; ")),
            )
        })
    }

    /// The redirect of a pod with these addresses.
    pub fn intent_at(&self, addresses: &[String]) -> Result<RedirectIntent, Failure> {
        let mut intent = self.intent(self.own_annotations())?;
        let addresses: Vec<_> = addresses.iter().filter_map(|address| address.parse().ok()).collect();
        self.kubelet_probes.exempt(&mut intent, &addresses);
        Ok(intent)
    }

    /// The annotations that the runtime delivered.
    pub fn own_annotations(&self) -> Option<&Labels> {
        self.runtime_config.annotations.as_ref()
    }

    /// What was done for containers.
    pub fn records(&self) -> Records {
        Records::below(&self.run_dir)
    }

    /// The call as the agent is told of it: of a meshed pod with its redirect and addresses, and what the operator says
    /// of the network's workloads; of any other only what decides.
    pub fn call(&self, environment: &Environment) -> Call {
        Call {
            container_id: environment.container_id.clone(),
            ifname: environment.ifname.clone(),
            netns: environment.netns.clone().unwrap_or_default(),
            args: environment.args.clone(),
            annotations: self.annotations_for_agent(),
            config: PluginConfig { network: self.network.clone(), ..PluginConfig::default() },
            ..Call::default()
        }
    }

    /// The same of a meshed pod.
    pub fn meshed_call(
        &self,
        environment: &Environment,
        ips: Vec<String>,
        redirect: RedirectIntent,
    ) -> Result<Call, Failure> {
        let mut call = self.call(environment);
        call.ips = ips;
        call.config.workload = self.workload()?;
        // The agent runs the sidecar as the user that the redirect exempts, wherever it was named.
        call.config.redirect = Some(redirect);
        Ok(call)
    }

    /// The attachments that exist. Without the list nothing may be freed: an absent list isn't an empty one.
    pub fn valid_attachments(&self) -> Result<&[ValidAttachment], Failure> {
        self.valid_attachments.as_deref().or(self.attachments.as_deref()).ok_or_else(|| {
            Failure::new(
                Code::InvalidConfig,
                "GC without cni.dev/valid-attachments",
                "the runtime must list the attachments that exist; nothing was freed",
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pods_word_on_its_redirect_wins_but_not_on_its_proxys_user() {
        let conf = NetConf::read(
            r#"{"redirect":{"outbound":{"excludePorts":[1]},"inbound":{"excludePorts":[2]}},
                "annotations":{"traffic.kuma.io/exclude-outbound-ports":"22, 80-90"}}"#,
        )
        .unwrap();
        let of_pod = [("kuma.io/sidecar-uid".to_owned(), "33".to_owned())].into();
        let intent = conf.intent(Some(&of_pod)).unwrap();
        assert_eq!((intent.outbound.exclude_ports.len(), intent.inbound.exclude_ports.len()), (2, 1));
        let owners = serde_json::to_value(&intent).unwrap();
        assert_eq!((&owners["proxyUids"], &owners["proxyGids"]), (&json!([]), &json!([PROXY_GID])));
    }

    #[test]
    fn empty_annotations_are_known_and_undelivered_ones_are_not() {
        let nothing = Labels::new();
        let known = |text: &str| NetConf::read(text).unwrap().delivered_annotations(&nothing).is_some();
        let wanted = r#""capabilities":{"io.kubernetes.cri.pod-annotations":true}"#;
        assert!(known("{}"), "nobody asked for them");
        assert!(!known(&format!("{{{wanted}}}")));
        assert!(!known(&format!(r#"{{{wanted},"runtimeConfig":{{"portMappings":[]}}}}"#)));
        for value in ["{}", "null", r#"{"a":"b"}"#] {
            let text = format!(r#"{{{wanted},"runtimeConfig":{{"{ANNOTATIONS}":{value}}}}}"#);
            assert!(known(&text), "{text}");
        }
    }

    #[test]
    fn what_is_left_of_a_broken_configuration_serves_a_departure() {
        let config = Config::for_departure(
            r#"{"cniVersion":"1.0.0","name":"pods","runDir":"/r","excludeNamespaces":7}"#,
        );
        assert_eq!((config.conf.run_dir, config.conf.network.name), (PathBuf::from("/r"), "pods".to_owned()));
        assert_eq!(Config::for_departure("{").conf.run_dir, PathBuf::from("/run/ursa"));
    }
}
