//! What an agent knows of pods, kept on its node: enough to decide while the agent is dead.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{INJECTION, Injection, Pod};
use crate::labels::{Labels, MESH, WORKLOAD};

/// The longest file that is read or written, in bytes. The plugin reads it whole while a pod starts; it holds some 3,000
/// pods, and a node runs a few hundred at most.
pub const MAX_FILE: usize = 1 << 20;
/// The annotations and labels by which pods are decided about, and told who they are. Others aren't kept: they may be
/// secrets, and long.
const KEPT: [&str; 3] = [INJECTION, MESH, WORKLOAD];
/// What is kept of a value, in bytes: more than any that means something has (a name has 63). What is longer means nothing,
/// and its beginning means nothing as well, so that it stays the error that it is.
const MAX_VALUE: usize = 128;
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
    /// Some namespaces are left out, so that one that isn't here isn't silent.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    partial: bool,
    /// What each pod says, by `namespace/name`.
    #[serde(default)]
    pods: BTreeMap<String, PodFacts>,
}

/// What a file holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Content {
    /// The file's content, [`MAX_FILE`] bytes at most.
    pub text: Vec<u8>,
    /// Namespaces that had no room: whoever reads the file doesn't know what they say.
    pub namespaces_left_out: usize,
    /// Pods that had no room: whoever reads the file doesn't know them.
    pub pods_left_out: usize,
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

    /// The file's content, as far as it has room. Namespaces come first: what one says goes for many pods, and of a pod
    /// the runtime may tell.
    pub fn content(&self) -> Content {
        let mut held =
            Self { version: self.version, default: self.default, partial: true, ..Self::default() };
        let mut room = MAX_FILE.saturating_sub(json(&held).len());
        held.namespaces = fitting(&self.namespaces, &mut room);
        held.pods = fitting(&self.pods, &mut room);
        held.partial = self.partial || held.namespaces.len() < self.namespaces.len();
        Content {
            text: json(&held),
            namespaces_left_out: self.namespaces.len() - held.namespaces.len(),
            pods_left_out: self.pods.len() - held.pods.len(),
        }
    }

    /// Whether both say the same of pods of which nothing is known: by their namespaces and by the default.
    pub fn agrees_on_strangers(&self, other: &Self) -> bool {
        (self.default, self.partial, &self.namespaces) == (other.default, other.partial, &other.namespaces)
    }

    /// Learns what a namespace says. Returns whether that is news.
    pub fn learn_namespace(&mut self, name: &str, facts: &NamespaceFacts) -> bool {
        let facts = NamespaceFacts { labels: kept(&facts.labels), annotations: kept(&facts.annotations) };
        if self.namespaces.get(name) == Some(&facts) {
            return false;
        }
        self.namespaces.insert(name.to_owned(), facts);
        true
    }

    /// Learns what a pod says. Returns whether that is news.
    pub fn learn_pod(&mut self, namespace: &str, name: &str, facts: &PodFacts) -> bool {
        let key = format!("{namespace}/{name}");
        let facts = PodFacts {
            uid: facts.uid.clone(),
            annotations: kept(&facts.annotations),
            labels: kept(&facts.labels),
        };
        if self.pods.get(&key) == Some(&facts) {
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

    /// What a namespace says. One that isn't known says nothing; `None` where not all of them had room.
    pub fn namespace(&self, name: &str) -> Option<NamespaceFacts> {
        self.namespaces.get(name).cloned().or_else(|| (!self.partial).then(NamespaceFacts::default))
    }

    /// What a pod's namespace says; one without any has none that could.
    pub fn namespace_of(&self, pod: &Pod<'_>) -> Option<NamespaceFacts> {
        pod.namespace.map_or_else(|| Some(NamespaceFacts::default()), |name| self.namespace(name))
    }

    /// Fills in what a call doesn't say: annotations and labels of a known pod, and its namespace's words. The
    /// labels of a new pod are known to nobody on the node; it is taken to have none that speak.
    #[must_use]
    pub fn complete<'a>(
        &'a self,
        pod: Pod<'a>,
        uid: &str,
        namespace: Option<&'a NamespaceFacts>,
        nothing: &'a Labels,
    ) -> Pod<'a> {
        let known = self.pod(pod.namespace.unwrap_or_default(), pod.name.unwrap_or_default(), uid);
        Pod {
            annotations: pod.annotations.or(known.map(|facts| &facts.annotations)),
            labels: pod.labels.or(known.map(|facts| &facts.labels)).or(Some(nothing)),
            namespace_facts: pod.namespace_facts.or(namespace),
            ..pod
        }
    }
}

/// JSON of what holds nothing that JSON lacks.
fn json(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(value).unwrap_or_default()
}

/// What there is room for.
fn fitting<T: Serialize + Clone>(all: &BTreeMap<String, T>, room: &mut usize) -> BTreeMap<String, T> {
    let fits = |(key, value): &(&String, &T)| {
        const PUNCTUATION: usize = ":,".len();
        let size = json(key).len() + json(value).len() + PUNCTUATION;
        let left = room.checked_sub(size);
        *room = left.unwrap_or(*room);
        left.is_some()
    };
    all.iter().filter(fits).map(|(key, value)| (key.clone(), value.clone())).collect()
}

fn kept(words: &Labels) -> Labels {
    let begin = |value: &String| {
        let mut end = value.len().min(MAX_VALUE);
        while !value.is_char_boundary(end) {
            end -= 1;
        }
        value[..end].to_owned()
    };
    KEPT.iter()
        .filter_map(|key| words.get_key_value(*key))
        .map(|(key, value)| (key.clone(), begin(value)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::injection::{Decision, Invalid, Rules, decide};

    fn words(pairs: &[(&str, &str)]) -> Labels {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    fn pod(uid: &str, annotations: &[(&str, &str)]) -> PodFacts {
        PodFacts { uid: uid.to_owned(), annotations: words(annotations), ..PodFacts::default() }
    }

    fn decide_by(
        knowledge: &Knowledge,
        namespace: &str,
        uid: &str,
        annotations: Option<&Labels>,
    ) -> Result<Decision, Invalid> {
        let (facts, nothing) = (knowledge.namespace(namespace), Labels::new());
        let pod = Pod { name: Some("web"), namespace: Some(namespace), annotations, ..Pod::default() };
        let pod = knowledge.complete(pod, uid, facts.as_ref(), &nothing);
        let rules = Rules { default: knowledge.default, ..Rules::default() };
        decide(&pod, &rules).map(|verdict| verdict.decision)
    }

    #[test]
    fn what_was_written_is_read() {
        let mut knowledge = Knowledge::new(Some(Injection::Disabled));
        let labels = words(&[(INJECTION, "enabled"), ("team", "a")]);
        let facts = NamespaceFacts { labels, ..NamespaceFacts::default() };
        assert!(knowledge.learn_namespace("shop", &facts) && !knowledge.learn_namespace("shop", &facts));
        let others =
            [("traffic.kuma.io/exclude-inbound-ports", "1"), ("kuma.io/sidecar-env-vars", "SECRET=1")];
        let facts = pod(
            "7",
            &[&[(INJECTION, "disabled"), (WORKLOAD, "web"), ("key", "secret")], &others[..]].concat(),
        );
        assert!(knowledge.learn_pod("shop", "web", &facts) && !knowledge.learn_pod("shop", "web", &facts));
        let content = knowledge.content();
        assert_eq!((content.namespaces_left_out, content.pods_left_out), (0, 0));
        assert_eq!(Knowledge::parse(&content.text).expect("read"), knowledge);
        let text = String::from_utf8(content.text).expect("text").to_lowercase();
        assert!(!text.contains("secret") && !text.contains("team") && !text.contains("inbound"), "{text}");
        assert!(text.contains("workload") && !text.contains("partial"), "{text}");
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
            decide_by(&knowledge, namespace, uid, annotations).expect("readable")
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
    fn a_value_that_means_nothing_is_no_silence_however_long_it_is() {
        let mut knowledge = Knowledge::new(Some(Injection::Disabled));
        let long = format!("enabled{}", "\u{e4}".repeat(1 << 20));
        knowledge.learn_pod("shop", "web", &pod("7", &[(INJECTION, &long)]));
        assert!(decide_by(&knowledge, "shop", "7", None).is_err());
        assert!(knowledge.content().text.len() < 1000);
    }

    #[test]
    fn what_has_no_room_is_unknown_and_never_silent() {
        const COUNT: usize = 20_000;
        let mut knowledge = Knowledge::new(Some(Injection::Disabled));
        let enabled = words(&[(INJECTION, "enabled")]);
        let says = NamespaceFacts { labels: enabled, ..NamespaceFacts::default() };
        knowledge.learn_namespace("shop", &says);
        for i in 0..COUNT {
            knowledge.learn_pod("shop", &format!("{i:05}"), &pod("u", &[(INJECTION, "disabled")]));
        }
        let content = knowledge.content();
        let slack = MAX_FILE - content.text.len();
        assert!(slack < 200, "{slack} bytes for nothing");
        let read = Knowledge::parse(&content.text).expect("read");
        assert_eq!((content.namespaces_left_out, read.pods.len()), (0, COUNT - content.pods_left_out));
        assert!(content.pods_left_out > 0 && read.agrees_on_strangers(&knowledge));

        // A name that no namespace has, and escapes: six bytes for one.
        knowledge.learn_namespace(&"\u{1}".repeat(MAX_FILE / 2), &says);
        let content = knowledge.content();
        assert!(content.namespaces_left_out == 1 && content.text.len() <= MAX_FILE);
        let read = Knowledge::parse(&content.text).expect("read");
        assert!(!read.agrees_on_strangers(&knowledge));
        let none = Labels::new();
        let decision = |namespace| decide_by(&read, namespace, "8", Some(&none)).expect("readable");
        assert_eq!((decision("shop"), decision("other")), (Decision::Meshed, Decision::Undecided));
    }
}
