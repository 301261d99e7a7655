//! What an agent knows of pods, kept on its node: enough to decide while the agent is dead.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{Injection, Pod};
use crate::labels::Labels;

/// The longest file that is read or written, in bytes.
pub const MAX_FILE: u64 = 4 << 20;
/// How many pods are remembered; a node runs a few hundred at most.
pub const MAX_PODS: usize = 4096;
const MAX_NAMESPACES: usize = 8192;
/// Of annotations and labels only those of these domains are kept: others may be secrets, and long.
const KEPT: [&str; 2] = ["kuma.io", "ursa.io"];
/// The longest value that is kept, in bytes.
const MAX_VALUE: usize = 4096;
const VERSION: u32 = 1;

/// What a namespace says of its pods.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct NamespaceFacts {
    /// Its labels.
    #[serde(skip_serializing_if = "Labels::is_empty")]
    pub labels: Labels,
    /// Its annotations.
    #[serde(skip_serializing_if = "Labels::is_empty")]
    pub annotations: Labels,
}

/// What a pod says of itself.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PodFacts {
    /// Its UID: the next pod of the same name is another.
    pub uid: String,
    /// Its annotations.
    #[serde(skip_serializing_if = "Labels::is_empty")]
    pub annotations: Labels,
    /// Its labels.
    #[serde(skip_serializing_if = "Labels::is_empty")]
    pub labels: Labels,
}

/// The file can't be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KnowledgeError {
    /// It isn't what an agent writes.
    #[error("it is damaged ({0}); the agent writes it again when it starts")]
    Damaged(String),
    /// It is of another format.
    #[error("its format is {0}, and this program reads format 1; use plugin and agent of one version")]
    Version(u32),
}

/// All that is known. It holds facts and no decisions: those are made of them by the one function, here as there.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Knowledge {
    version: u32,
    /// What a pod is about which nothing says anything.
    #[serde(default)]
    pub default: Option<Injection>,
    /// What each namespace says.
    #[serde(default)]
    namespaces: BTreeMap<String, NamespaceFacts>,
    /// What each pod says, by `namespace/name`.
    #[serde(default)]
    pods: BTreeMap<String, PodFacts>,
}

/// The one field that every format has.
#[derive(Deserialize)]
struct Format {
    version: u32,
}

impl Knowledge {
    /// Nothing but a default.
    pub fn new(default: Option<Injection>) -> Self {
        Self { version: VERSION, default, ..Self::default() }
    }

    /// Reads the file's content.
    pub fn parse(text: &[u8]) -> Result<Self, KnowledgeError> {
        let damaged = |error: serde_json::Error| KnowledgeError::Damaged(error.to_string());
        // The version first, so that a newer file isn't called damaged.
        let format: Format = serde_json::from_slice(text).map_err(damaged)?;
        if format.version != VERSION {
            return Err(KnowledgeError::Version(format.version));
        }
        serde_json::from_slice(text).map_err(damaged)
    }

    /// The file's content.
    pub fn to_json(&self) -> Vec<u8> {
        // Maps of texts hold nothing that JSON lacks.
        serde_json::to_vec(self).unwrap_or_default()
    }

    /// Learns what a namespace says. Returns whether that is news.
    pub fn learn_namespace(&mut self, name: &str, facts: &NamespaceFacts) -> bool {
        let facts = NamespaceFacts { labels: kept(&facts.labels), annotations: kept(&facts.annotations) };
        let is_full = self.namespaces.len() >= MAX_NAMESPACES && !self.namespaces.contains_key(name);
        if self.namespaces.get(name) == Some(&facts) || is_full {
            return false;
        }
        self.namespaces.insert(name.to_owned(), facts);
        true
    }

    /// Learns what a pod says. Returns whether that is news. With too many pods the newcomer isn't remembered: it
    /// is decided by what the runtime delivers, as before.
    pub fn learn_pod(&mut self, namespace: &str, name: &str, facts: &PodFacts) -> bool {
        let key = format!("{namespace}/{name}");
        let facts = PodFacts {
            uid: facts.uid.clone(),
            annotations: kept(&facts.annotations),
            labels: kept(&facts.labels),
        };
        let is_full = self.pods.len() >= MAX_PODS && !self.pods.contains_key(&key);
        if self.pods.get(&key) == Some(&facts) || is_full {
            return false;
        }
        self.pods.insert(key, facts);
        true
    }

    /// Takes over what is known of pods elsewhere.
    pub fn take_pods(&mut self, other: &Self) {
        self.pods.clone_from(&other.pods);
    }

    /// Forgets the pods for which `keep` (of namespace, name and UID) is false. Returns whether there were any.
    pub fn retain_pods(&mut self, keep: impl Fn(&str, &str, &str) -> bool) -> bool {
        let before = self.pods.len();
        self.pods.retain(|key, facts| {
            key.split_once('/').is_some_and(|(namespace, name)| keep(namespace, name, &facts.uid))
        });
        self.pods.len() != before
    }

    /// What is known of a pod. Without its UID nothing: another pod may have its name by now.
    pub fn pod(&self, namespace: &str, name: &str, uid: &str) -> Option<&PodFacts> {
        self.pods.get(&format!("{namespace}/{name}")).filter(|facts| facts.uid == uid && !uid.is_empty())
    }

    /// What is known of a namespace; one of which nothing is known says nothing.
    pub fn namespace(&self, name: &str) -> NamespaceFacts {
        self.namespaces.get(name).cloned().unwrap_or_default()
    }

    /// Fills in what a call doesn't say: annotations and labels of a known pod, and its namespace's words. The
    /// labels of a new pod are known to nobody on the node; it is taken to have none that speak.
    #[must_use]
    pub fn complete<'a>(
        &'a self,
        pod: Pod<'a>,
        uid: &str,
        namespace: &'a NamespaceFacts,
        nothing: &'a Labels,
    ) -> Pod<'a> {
        let known = self.pod(pod.namespace.unwrap_or_default(), pod.name.unwrap_or_default(), uid);
        Pod {
            annotations: pod.annotations.or(known.map(|facts| &facts.annotations)),
            labels: pod.labels.or(known.map(|facts| &facts.labels)).or(Some(nothing)),
            namespace_facts: pod.namespace_facts.or(Some(namespace)),
            ..pod
        }
    }
}

fn kept(words: &Labels) -> Labels {
    let is_ours = |key: &str| {
        let domain = key.split_once('/').map_or("", |(domain, _)| domain);
        KEPT.iter()
            .any(|ours| domain.strip_suffix(ours).is_some_and(|rest| rest.is_empty() || rest.ends_with('.')))
    };
    let kept = words.iter().filter(|(key, value)| is_ours(key) && value.len() <= MAX_VALUE);
    kept.map(|(key, value)| (key.clone(), value.clone())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::injection::{Decision, INJECTION, Rules, decide};

    fn words(pairs: &[(&str, &str)]) -> Labels {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    fn pod(uid: &str, annotations: &[(&str, &str)]) -> PodFacts {
        PodFacts { uid: uid.to_owned(), annotations: words(annotations), ..PodFacts::default() }
    }

    #[test]
    fn what_was_written_is_read() {
        let mut knowledge = Knowledge::new(Some(Injection::Disabled));
        let labels = words(&[(INJECTION, "enabled"), ("team", "a")]);
        let facts = NamespaceFacts { labels, ..NamespaceFacts::default() };
        assert!(knowledge.learn_namespace("shop", &facts) && !knowledge.learn_namespace("shop", &facts));
        let ports = "traffic.kuma.io/exclude-inbound-ports";
        let facts =
            pod("7", &[(INJECTION, "disabled"), ("key", "secret"), ("notkuma.io/x", "y"), (ports, "1")]);
        assert!(knowledge.learn_pod("shop", "web", &facts) && !knowledge.learn_pod("shop", "web", &facts));
        let text = knowledge.to_json();
        assert_eq!(Knowledge::parse(&text).expect("read"), knowledge);
        let text = String::from_utf8(text).expect("text");
        assert!(!text.contains("secret") && !text.contains("team") && !text.contains("notkuma"), "{text}");
        assert!(text.contains("exclude-inbound"), "{text}");
        assert!(knowledge.retain_pods(|_, _, uid| uid != "7") && knowledge.pod("shop", "web", "7").is_none());
    }

    #[test]
    fn a_damaged_file_and_a_newer_one_are_told_apart() {
        assert!(matches!(Knowledge::parse(b"{"), Err(KnowledgeError::Damaged(_))));
        assert!(matches!(Knowledge::parse(b"{\"version\":1,\"pods\":3}"), Err(KnowledgeError::Damaged(_))));
        assert_eq!(Knowledge::parse(b"{\"version\":2,\"pods\":3}"), Err(KnowledgeError::Version(2)));
    }

    #[test]
    fn a_pod_is_known_by_its_uid_and_others_by_their_namespace() {
        let mut knowledge = Knowledge::new(Some(Injection::Disabled));
        let enabled = words(&[(INJECTION, "enabled")]);
        let facts = NamespaceFacts { labels: enabled.clone(), ..NamespaceFacts::default() };
        knowledge.learn_namespace("shop", &facts);
        knowledge.learn_pod("shop", "web", &pod("7", &[(INJECTION, "disabled")]));
        let decision = |namespace: &str, uid: &str, annotations: Option<&Labels>| {
            let facts = knowledge.namespace(namespace);
            let nothing = Labels::new();
            let pod = Pod { name: Some("web"), namespace: Some(namespace), annotations, ..Pod::default() };
            let pod = knowledge.complete(pod, uid, &facts, &nothing);
            let rules = Rules { default: knowledge.default, ..Rules::default() };
            decide(&pod, &rules).expect("readable").decision
        };
        let none = Labels::new();
        assert_eq!(decision("shop", "7", None), Decision::Unmeshed, "remembered");
        assert_eq!(decision("shop", "8", None), Decision::Undecided, "another pod of that name");
        assert_eq!(decision("shop", "", None), Decision::Undecided);
        assert_eq!(decision("shop", "8", Some(&none)), Decision::Meshed, "its namespace's word");
        assert_eq!(decision("other", "8", Some(&none)), Decision::Unmeshed, "the default");
        assert_eq!(decision("shop", "7", Some(&enabled)), Decision::Meshed, "the runtime's word is newer");
    }

    #[test]
    fn it_stays_bounded() {
        let mut knowledge = Knowledge::new(None);
        for i in 0..=MAX_PODS {
            assert_eq!(knowledge.learn_pod("n", &i.to_string(), &pod("u", &[])), i < MAX_PODS);
        }
    }
}
