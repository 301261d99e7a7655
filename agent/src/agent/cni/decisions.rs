//! What this agent knows of pods, and its file, by which the plugin decides while the agent is dead.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ursa_cni_protocol::Call;
use ursa_model::injection::{
    Invalid, Knowledge, MAX_FILE, NamespaceFacts, Pod, PodFacts, Rules, Verdict, decide, membership,
};
use ursa_model::labels::Labels;

use crate::agent::config::AgentConfig;
use crate::agent::workload::WorkloadSpec;
use crate::relay::write_atomic;

/// The file in the state directory: not in the run directory, because it must outlive a reboot.
const FILE: &str = "decisions.json";

/// What is known of pods.
#[derive(Debug)]
pub struct Decisions {
    path: PathBuf,
    knowledge: Mutex<Knowledge>,
}

impl Decisions {
    /// Takes over what a former agent learned of pods; default and namespaces are what the configuration says now.
    pub fn open(config: &AgentConfig) -> Self {
        let path = config.state_dir.join(FILE);
        let former = read(&path).unwrap_or_else(|why| {
            tracing::warn!(path = %path.display(), %why, "what a former agent knew of pods is lost");
            Knowledge::default()
        });
        let decisions = Self { path, knowledge: Mutex::new(config.cni.knowledge(&former)) };
        decisions.store(&decisions.locked());
        decisions
    }

    fn locked(&self) -> MutexGuard<'_, Knowledge> {
        // Nothing panics between two changes that belong together.
        self.knowledge.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn store(&self, knowledge: &Knowledge) {
        if let Err(error) = write_atomic(&self.path, &knowledge.to_json(), 0o600, None) {
            tracing::error!(path = %self.path.display(), %error,
                "what is known of pods can't be written; without this agent, pods that say nothing themselves are decided by older knowledge");
        }
    }

    /// Completes what a call says by what is known, and goes on with that.
    fn with<T>(&self, call: &Call, then: impl FnOnce(&Pod<'_>, &Rules<'_>) -> T) -> T {
        let knowledge = self.locked();
        let (pod, nothing) = (call.described(), Labels::new());
        let namespace = pod.namespace.map_or_else(NamespaceFacts::default, |name| knowledge.namespace(name));
        let rules = Rules { default: knowledge.default, ..call.config.rules() };
        then(&knowledge.complete(pod, call.uid(), &namespace, &nothing), &rules)
    }

    /// Whether a pod is meshed.
    pub fn decide(&self, call: &Call) -> Result<Verdict, Invalid> {
        self.with(call, decide)
    }

    /// The workload of a pod about which the plugin has decided.
    pub fn spec(&self, call: &Call, config: &AgentConfig) -> Result<WorkloadSpec, String> {
        let who = self.with(call, membership).map_err(|error| error.to_string())?;
        super::spec(call, who, config)
    }

    /// Learns what the runtime says of all its pods, and forgets those that it doesn't know.
    pub async fn learn_all(self: &Arc<Self>, pods: Vec<(String, String, PodFacts)>) {
        self.change(move |knowledge| {
            let uids: BTreeSet<&str> = pods.iter().map(|(_, _, facts)| facts.uid.as_str()).collect();
            let mut news = knowledge.retain_pods(|_, _, uid| uids.contains(uid));
            for (namespace, name, facts) in &pods {
                news |= !facts.uid.is_empty() && knowledge.learn_pod(namespace, name, facts);
            }
            news
        })
        .await;
    }

    async fn change(self: &Arc<Self>, change: impl FnOnce(&mut Knowledge) -> bool + Send + 'static) {
        let this = Arc::clone(self);
        let work = move || {
            let mut knowledge = this.locked();
            if change(&mut knowledge) {
                this.store(&knowledge);
            }
        };
        if let Err(error) = tokio::task::spawn_blocking(work).await {
            tracing::error!(%error, "what is known of pods couldn't be changed");
        }
    }
}

fn read(path: &Path) -> Result<Knowledge, String> {
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Knowledge::default()),
        file => file.map_err(|error| error.to_string())?,
    };
    let mut text = Vec::new();
    file.take(MAX_FILE).read_to_end(&mut text).map_err(|error| error.to_string())?;
    Knowledge::parse(&text).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::fs;

    use ursa_model::injection::{Decision, INJECTION, Injection, Source};

    use super::*;

    fn call(uid: &str, namespace: &str, annotations: Option<Labels>) -> Call {
        let args = [("K8S_POD_NAME", "web"), ("K8S_POD_NAMESPACE", namespace), ("K8S_POD_UID", uid)];
        Call {
            args: args.map(|(key, value)| (key.to_owned(), value.to_owned())).into(),
            annotations,
            ..Call::default()
        }
    }

    #[tokio::test]
    async fn the_next_agent_and_the_plugin_know_what_this_one_learned() {
        let dir = tempfile::tempdir().unwrap();
        let mut config = AgentConfig { state_dir: dir.path().to_owned(), ..AgentConfig::default() };
        config.cni.namespaces = BTreeMap::from([("shop".to_owned(), Injection::Enabled)]);
        let decisions = Arc::new(Decisions::open(&config));
        let seen = decisions.decide(&call("1", "shop", Some(Labels::new()))).unwrap();
        assert_eq!((seen.decision, seen.source), (Decision::Meshed, Source::NamespaceLabel));
        let seen = decisions.decide(&call("1", "else", Some(Labels::new()))).unwrap();
        assert_eq!((seen.decision, seen.source), (Decision::Unmeshed, Source::Default));
        assert_eq!(decisions.decide(&call("1", "shop", None)).unwrap().decision, Decision::Undecided);
        let off = Labels::from([(INJECTION.to_owned(), "disabled".to_owned())]);
        let facts = PodFacts { uid: "1".to_owned(), annotations: off, ..PodFacts::default() };
        decisions.learn_all(vec![("shop".to_owned(), "web".to_owned(), facts)]).await;

        // The file is there before any pod asks, and what a namespace says is what the configuration says now.
        config.cni.namespaces.clear();
        config.cni.default = Injection::Enabled;
        let next = Arc::new(Decisions::open(&config));
        assert_eq!(next.decide(&call("1", "shop", None)).unwrap().decision, Decision::Unmeshed);
        assert_eq!(next.decide(&call("2", "shop", Some(Labels::new()))).unwrap().source, Source::Default);
        let text = fs::read(dir.path().join(FILE)).unwrap();
        assert!(Knowledge::parse(&text).unwrap().pod("shop", "web", "1").is_some());
        next.learn_all(vec![("shop".to_owned(), "other".to_owned(), PodFacts::default())]).await;
        assert_eq!(
            next.decide(&call("1", "shop", None)).unwrap().decision,
            Decision::Undecided,
            "it is gone"
        );
    }

    #[test]
    fn a_damaged_file_costs_what_it_held_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(FILE), "{\"version\":1,").unwrap();
        let config = AgentConfig { state_dir: dir.path().to_owned(), ..AgentConfig::default() };
        let decisions = Decisions::open(&config);
        let seen = decisions.decide(&call("1", "shop", Some(Labels::new()))).unwrap();
        assert_eq!(seen.decision, Decision::Unmeshed);
        assert!(Knowledge::parse(&fs::read(dir.path().join(FILE)).unwrap()).is_ok(), "and it is mended");
    }
}
