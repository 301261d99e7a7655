//! Whether a pod is meshed, and how: the one decision that the CNI plugin, the agent's repair, the command line and
//! control share.
//!
//! The first of these that says something decides:
//!
//! 1. an excluded namespace, and the machine's own network: never meshed
//! 2. the pod's annotation `kuma.io/sidecar-injection`
//! 3. the CNI network's configuration: its `annotations`, then its `labels`
//! 4. the pod's label of that name
//! 5. its namespace's label, then its namespace's annotation
//! 6. the configured default
//!
//! Peers read a pod's label before its annotation. A plugin is given annotations and nothing else, so here the
//! annotation is first: who knows more must never decide otherwise than who knew less. What isn't known (`None`) is
//! not what is empty: an unknown source ends the walk with [`Decision::Undecided`].

mod knowledge;

use std::fmt;

use serde::{Deserialize, Serialize};

pub use self::knowledge::{Content, Knowledge, KnowledgeError, MAX_FILE, NamespaceFacts, PodFacts};
use crate::labels::{self, Labels};
use crate::names;

/// The annotation or label that puts a pod into the mesh or keeps it out.
pub const INJECTION: &str = "kuma.io/sidecar-injection";
/// The mesh of a pod about which nothing says another.
pub const DEFAULT_MESH: &str = "default";

/// A word about membership.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Injection {
    /// Meshed.
    #[serde(alias = "true")]
    Enabled,
    /// Left alone.
    #[serde(alias = "false")]
    Disabled,
}

impl Injection {
    /// Reads the value of [`INJECTION`]; `None` is a value that means neither.
    pub fn parse(text: &str) -> Option<Self> {
        match text {
            "enabled" | "true" => Some(Self::Enabled),
            "disabled" | "false" => Some(Self::Disabled),
            _ => None,
        }
    }
}

/// What is known about a pod.
#[derive(Debug, Clone, Copy, Default)]
pub struct Pod<'a> {
    /// Its name.
    pub name: Option<&'a str>,
    /// Its namespace's name.
    pub namespace: Option<&'a str>,
    /// Whether it uses the machine's own network.
    pub host_network: bool,
    /// Its annotations; `None` when nobody has told them.
    pub annotations: Option<&'a Labels>,
    /// Its labels; `None` when nobody has told them.
    pub labels: Option<&'a Labels>,
    /// What its namespace says; `None` when nobody has told it.
    pub namespace_facts: Option<&'a NamespaceFacts>,
}

/// What the operator of a node or of a CNI network says of all its pods.
#[derive(Debug, Clone, Copy, Default)]
pub struct Rules<'a> {
    /// Namespaces whose pods are never meshed.
    pub exclude_namespaces: &'a [String],
    /// Annotations of every pod of the network; the pod's own win.
    pub annotations: Option<&'a Labels>,
    /// Labels of every pod of the network.
    pub labels: Option<&'a Labels>,
    /// What a pod is about which nothing else says anything. `None` leaves it undecided.
    pub default: Option<Injection>,
    /// The mesh, whatever the pod says.
    pub mesh: Option<&'a str>,
    /// The workload, whatever the pod says.
    pub workload: Option<&'a str>,
    /// The name of the Dataplane, whatever the pod is called.
    pub dataplane: Option<&'a str>,
}

/// Who decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Source {
    /// The list of excluded namespaces.
    ExcludedNamespace,
    /// The pod's use of the machine's own network.
    HostNetwork,
    /// The pod's annotation.
    PodAnnotation,
    /// `annotations` in the network's configuration.
    NetworkAnnotation,
    /// `labels` in the network's configuration.
    NetworkLabel,
    /// The pod's label.
    PodLabel,
    /// Its namespace's label.
    NamespaceLabel,
    /// Its namespace's annotation.
    NamespaceAnnotation,
    /// The configured default.
    Default,
    /// The operator's word on who the pods of a network are.
    Configuration,
    /// The pod's own name.
    PodName,
    /// Nobody.
    Nobody,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ExcludedNamespace => "the excluded namespaces",
            Self::HostNetwork => "hostNetwork",
            Self::PodAnnotation => "the pod's annotation",
            Self::NetworkAnnotation => "an annotation in the network's configuration",
            Self::NetworkLabel => "a label in the network's configuration",
            Self::PodLabel => "the pod's label",
            Self::NamespaceLabel => "the namespace's label",
            Self::NamespaceAnnotation => "the namespace's annotation",
            Self::Default => "the default",
            Self::Configuration => "`workload` in the plugin's configuration",
            Self::PodName => "the pod's name",
            Self::Nobody => "nobody",
        })
    }
}

/// Who a meshed pod is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Membership {
    /// Its mesh.
    pub mesh: String,
    /// Name of its Dataplane: the configured one, or `pod.namespace`.
    pub dataplane: String,
    /// What its identity is made of: the value of label `kuma.io/workload`.
    pub workload: String,
}

/// The decision.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Decision {
    /// It is meshed; [`membership`] says as whom.
    Meshed,
    /// It is left alone.
    Unmeshed,
    /// What is known isn't enough.
    Undecided,
}

/// A decision, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// The decision.
    pub decision: Decision,
    /// Who made it.
    pub source: Source,
    /// The source and what it says, in words.
    pub reason: String,
}

/// What a source says can't be read. It is neither a yes nor a no.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Invalid {
    /// A value of [`INJECTION`].
    #[error(
        "{place} {INJECTION} is `{value}`, which is neither yes nor no; write `enabled` or `disabled`, or remove it"
    )]
    Injection {
        /// Who says it.
        place: Source,
        /// What.
        value: String,
    },
    /// A name.
    #[error("{what} `{value}` (from {place}) can't be used: {why}; correct it there")]
    Name {
        /// The mesh, the workload or the Dataplane.
        what: &'static str,
        /// Who says it.
        place: Source,
        /// What.
        value: String,
        /// What is wrong with it.
        why: String,
    },
    /// Nothing names the pod.
    #[error(
        "nothing says what the workload is called: neither K8S_POD_NAME in CNI_ARGS nor `workload.name` in the \
         plugin's configuration; set `workload.name` for a network outside of Kubernetes"
    )]
    Nameless,
}

/// Decides about a pod.
pub fn decide(pod: &Pod<'_>, rules: &Rules<'_>) -> Result<Verdict, Invalid> {
    if let Some(namespace) = pod.namespace
        && rules.exclude_namespaces.iter().any(|excluded| excluded == namespace)
    {
        let reason = format!("namespace {namespace} is excluded by the configuration");
        return Ok(Verdict { decision: Decision::Unmeshed, source: Source::ExcludedNamespace, reason });
    }
    if pod.host_network {
        let reason = "it uses the machine's own network (hostNetwork), which is never redirected".to_owned();
        return Ok(Verdict { decision: Decision::Unmeshed, source: Source::HostNetwork, reason });
    }
    let Some(annotations) = pod.annotations else {
        return Ok(undecided(
            "the pod's annotations aren't known: the runtime didn't deliver them, and nothing else has told them",
        ));
    };
    let empty = Labels::new();
    let configured = [
        (Source::PodAnnotation, annotations),
        (Source::NetworkAnnotation, rules.annotations.unwrap_or(&empty)),
        (Source::NetworkLabel, rules.labels.unwrap_or(&empty)),
    ];
    if let Some(verdict) = first(configured)? {
        return Ok(verdict);
    }
    let Some(labels) = pod.labels else {
        return Ok(undecided("its annotations say nothing, and its labels aren't known"));
    };
    if let Some(verdict) = first([(Source::PodLabel, labels)])? {
        return Ok(verdict);
    }
    let Some(namespace) = pod.namespace_facts else {
        return Ok(undecided("the pod itself says nothing, and what its namespace says isn't known"));
    };
    let of_namespace =
        [(Source::NamespaceLabel, &namespace.labels), (Source::NamespaceAnnotation, &namespace.annotations)];
    if let Some(verdict) = first(of_namespace)? {
        return Ok(verdict);
    }
    Ok(match rules.default {
        None => undecided("neither the pod nor its namespace says anything, and there is no default"),
        Some(injection) => {
            let word = if injection == Injection::Enabled { "enabled" } else { "disabled" };
            let reason = format!("neither the pod nor its namespace says anything; the default is {word}");
            verdict(injection, Source::Default, reason)
        }
    })
}

/// Who a meshed pod is. What the operator says is what it is: whoever may write a pod must not choose its identity.
pub fn membership(pod: &Pod<'_>, rules: &Rules<'_>) -> Result<Membership, Invalid> {
    let dataplane = match (rules.dataplane, pod.name, pod.namespace) {
        (None, Some(name), Some(namespace)) => format!("{name}.{namespace}"),
        (Some(name), _, _) | (None, Some(name), None) => name.to_owned(),
        (None, None, _) => return Err(Invalid::Nameless),
    };
    if let Some(why) = names::dns_1123_subdomain(&dataplane).into_iter().next() {
        let place = if rules.dataplane.is_some() { Source::Configuration } else { Source::PodName };
        return Err(Invalid::Name { what: "the Dataplane's name", place, value: dataplane, why });
    }
    let of_pod = [
        (Source::PodAnnotation, pod.annotations),
        (Source::NetworkAnnotation, rules.annotations),
        (Source::PodLabel, pod.labels),
        (Source::NetworkLabel, rules.labels),
    ];
    let of_namespace = [
        (Source::NamespaceLabel, pod.namespace_facts.map(|facts| &facts.labels)),
        (Source::NamespaceAnnotation, pod.namespace_facts.map(|facts| &facts.annotations)),
    ];
    let (place, mesh) = rules
        .mesh
        .map(|mesh| (Source::Configuration, mesh))
        .or_else(|| find(labels::MESH, of_pod.into_iter().chain(of_namespace)))
        .unwrap_or((Source::Default, DEFAULT_MESH));
    if let Some(why) = names::dns_1035_label(mesh).into_iter().next() {
        return Err(Invalid::Name { what: "mesh", place, value: mesh.to_owned(), why });
    }
    let (place, workload) = rules
        .workload
        .map(|workload| (Source::Configuration, workload))
        .or_else(|| find(labels::WORKLOAD, of_pod))
        .map_or_else(|| (Source::PodName, as_workload(&dataplane)), |(place, text)| (place, text.to_owned()));
    let mesh = mesh.to_owned();
    let why = names::dns_1035_label(&workload).into_iter().next();
    if let Some(why) = why {
        return Err(Invalid::Name { what: "workload", place, value: workload, why });
    }
    Ok(Membership { mesh, dataplane, workload })
}

/// A workload's name made of a pod's: a label of DNS-1035 has no dots, begins with a letter and holds 63 bytes.
fn as_workload(name: &str) -> String {
    const LONGEST: usize = 63;
    let mut label = name.replace('.', "-");
    if !label.starts_with(|c: char| c.is_ascii_lowercase()) {
        label.insert_str(0, "w-");
    }
    if label.len() <= LONGEST {
        return label;
    }
    let hashed = names::of_copy("", name, "", "");
    let hash = hashed.rsplit('-').next().unwrap_or_default();
    let mut end = LONGEST - 1 - hash.len();
    while !label.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}-{hash}", &label[..end])
}

/// The first of the sources that has the key.
fn find<'a>(
    key: &str,
    sources: impl IntoIterator<Item = (Source, Option<&'a Labels>)>,
) -> Option<(Source, &'a str)> {
    sources.into_iter().find_map(|(source, words)| Some((source, words?.get(key)?.as_str())))
}

/// The word of the first source that has one.
fn first<'a>(sources: impl IntoIterator<Item = (Source, &'a Labels)>) -> Result<Option<Verdict>, Invalid> {
    let sources = sources.into_iter().map(|(source, words)| (source, Some(words)));
    let Some((source, value)) = find(INJECTION, sources) else { return Ok(None) };
    match Injection::parse(value) {
        Some(injection) => Ok(Some(verdict(injection, source, format!("{source} {INJECTION} is `{value}`")))),
        None => Err(Invalid::Injection { place: source, value: value.to_owned() }),
    }
}

fn verdict(injection: Injection, source: Source, reason: String) -> Verdict {
    let decision = match injection {
        Injection::Enabled => Decision::Meshed,
        Injection::Disabled => Decision::Unmeshed,
    };
    Verdict { decision, source, reason }
}

fn undecided(reason: &str) -> Verdict {
    Verdict { decision: Decision::Undecided, source: Source::Nobody, reason: reason.to_owned() }
}

#[cfg(test)]
mod tests;
