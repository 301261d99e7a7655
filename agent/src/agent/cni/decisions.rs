//! What this agent knows of pods, and its file, by which the plugin decides while the agent is dead.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ursa_cni_protocol::{Call, decisions};
use ursa_model::injection::{
    Invalid, Knowledge, MAX_FILE, Pod, PodFacts, Rules, Verdict, decide, membership,
};
use ursa_model::labels::Labels;

use crate::agent::config::AgentConfig;
use crate::agent::workload::WorkloadSpec;
use crate::relay::write_atomic;

/// What is known of pods.
#[derive(Debug)]
pub struct Decisions {
    /// The file.
    path: PathBuf,
    /// Says that the file is older than the configuration.
    stale: PathBuf,
    known: Mutex<Known>,
}

#[derive(Debug)]
struct Known {
    knowledge: Knowledge,
    written: Written,
}

/// How the file stands.
#[derive(Debug, Default, PartialEq, Eq)]
enum Written {
    /// It wasn't tried yet.
    #[default]
    Never,
    /// It holds what is known, but for so many namespaces and pods.
    But(usize, usize),
    /// It is the one from before.
    Failed(String),
}

impl Decisions {
    /// Takes over what a former agent learned of pods; default and namespaces are what the configuration says now.
    pub fn open(config: &AgentConfig) -> Self {
        let (path, stale) = (decisions::file(&config.state_dir), decisions::stale(&config.run_dir));
        let former = read(&path).unwrap_or_else(|why| {
            tracing::warn!(path = %path.display(), %why, "what a former agent knew of pods is lost");
            Knowledge::default()
        });
        let known = Known { knowledge: config.cni.knowledge(&former), written: Written::Never };
        let decisions = Self { path, stale, known: Mutex::new(known) };
        decisions.store(&mut decisions.locked());
        decisions
    }

    fn locked(&self) -> MutexGuard<'_, Known> {
        // Nothing panics between two changes that belong together.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes the file. If that fails the one from before stays: what it says of pods is still true, and one that it
    /// doesn't know is asked about here. What it says of all others may not be.
    fn store(&self, known: &mut Known) {
        let (path, content) = (self.path.display(), known.knowledge.content());
        let written = match write_atomic(&self.path, &content.text, 0o600, None) {
            Ok(()) => Written::But(content.namespaces_left_out, content.pods_left_out),
            Err(error) => Written::Failed(error.to_string()),
        };
        let is_stale = matches!(written, Written::Failed(_))
            && !read(&self.path).is_ok_and(|former| former.agrees_on_strangers(&known.knowledge));
        if let Err(error) = mark(&self.stale, is_stale) {
            tracing::error!(path = %self.stale.display(), %error,
                "the plugin can't be told whether it may decide by {path}; make room there, or remove that file");
        }
        if written == known.written {
            return; // said already
        }
        match &written {
            Written::Never | Written::But(0, 0) => {}
            Written::But(namespaces, pods) => tracing::warn!(%path, namespaces, pods,
                "what is known of so many namespaces and pods has no room in {MAX_FILE} bytes; the plugin asks this agent about them"),
            Written::Failed(error) => tracing::error!(%path, %error, is_stale,
                "what is known of pods can't be written; the file from before stays, and the plugin asks this agent about what isn't in it; \
                 make room on that disk"),
        }
        known.written = written;
    }

    /// Completes what a call says by what is known, and goes on with that.
    fn with<T>(&self, call: &Call, then: impl FnOnce(&Pod<'_>, &Rules<'_>) -> T) -> T {
        let knowledge = &self.locked().knowledge;
        let (pod, nothing) = (call.described(), Labels::new());
        let namespace = knowledge.namespace_of(&pod);
        let rules = Rules { default: knowledge.default, ..call.config.rules() };
        then(&knowledge.complete(pod, call.uid(), namespace.as_ref(), &nothing), &rules)
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
            let mut known = this.locked();
            // A disk that was full may have room by now.
            if change(&mut known.knowledge) || matches!(known.written, Written::Failed(_)) {
                this.store(&mut known);
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
    file.take(MAX_FILE as u64 + 1).read_to_end(&mut text).map_err(|error| error.to_string())?;
    if text.len() > MAX_FILE {
        return Err(format!("it is longer than {MAX_FILE} bytes"));
    }
    Knowledge::parse(&text).map_err(|error| error.to_string())
}

/// Sees to it that the mark is there or isn't.
fn mark(path: &Path, wanted: bool) -> io::Result<()> {
    let done = if wanted { File::create(path).map(drop) } else { fs::remove_file(path) };
    done.or_else(|error| if !wanted && error.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(error) })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::Path;
    use std::thread;

    use nix::mount::{MsFlags, mount};
    use nix::sched::{CloneFlags, unshare};
    use ursa_model::injection::{Decision, INJECTION, Injection, Source};

    use super::*;

    fn config(dir: &Path) -> AgentConfig {
        AgentConfig { state_dir: dir.to_owned(), run_dir: dir.to_owned(), ..AgentConfig::default() }
    }

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
        let mut config = config(dir.path());
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
        let text = fs::read(decisions::file(dir.path())).unwrap();
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
        fs::write(decisions::file(dir.path()), "{\"version\":1,").unwrap();
        let config = config(dir.path());
        let decisions = Decisions::open(&config);
        let seen = decisions.decide(&call("1", "shop", Some(Labels::new()))).unwrap();
        assert_eq!(seen.decision, Decision::Unmeshed);
        assert!(
            Knowledge::parse(&fs::read(decisions::file(dir.path())).unwrap()).is_ok(),
            "and it is mended"
        );
    }

    /// Fills the disk.
    fn fill(ballast: &Path) {
        use std::io::Write as _;
        let mut ballast = File::create(ballast).unwrap();
        let error = loop {
            if let Err(error) = ballast.write_all(&[0; 512]) {
                break error;
            }
        };
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
    }

    /// The agent's state is on a disk of its own.
    fn on_a_full_disk(dir: &Path) {
        let (disk, run) = (dir.join("disk"), dir.join("run"));
        for dir in [&disk, &run] {
            fs::create_dir(dir).unwrap();
        }
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        mount(None::<&str>, "/", None::<&str>, private, None::<&str>).unwrap();
        mount(Some("disk"), &disk, Some("tmpfs"), MsFlags::empty(), Some("size=64k")).unwrap();
        let (file, stale, ballast) = (decisions::file(&disk), decisions::stale(&run), disk.join("ballast"));
        let mut config = AgentConfig { state_dir: disk, run_dir: run, ..AgentConfig::default() };
        let learn = |decisions: &Arc<Decisions>, uid: &str| {
            let facts = PodFacts { uid: uid.to_owned(), ..PodFacts::default() };
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            runtime.block_on(decisions.learn_all(vec![("shop".to_owned(), "web".to_owned(), facts)]));
        };
        let read = || Knowledge::parse(&fs::read(&file).unwrap()).unwrap();

        // What the file says stays true while only pods come and go.
        let decisions = Arc::new(Decisions::open(&config));
        learn(&decisions, "1");
        fill(&ballast);
        learn(&decisions, "2");
        assert!(read().pod("shop", "web", "1").is_some() && !stale.exists());
        assert!(!file.with_extension("json.tmp").exists());
        assert_eq!(decisions.decide(&call("2", "shop", None)).unwrap().decision, Decision::Unmeshed);
        // Without news it is written as soon as there is room.
        fs::remove_file(&ballast).unwrap();
        learn(&decisions, "2");
        assert!(read().pod("shop", "web", "2").is_some());

        // What the next agent's configuration says isn't in it.
        fill(&ballast);
        config.cni.default = Injection::Enabled;
        let next = Arc::new(Decisions::open(&config));
        assert!(stale.exists() && read().pod("shop", "web", "2").is_some());
        assert_eq!(next.decide(&call("3", "shop", Some(Labels::new()))).unwrap().decision, Decision::Meshed);
        // Nor in one that isn't there.
        fs::remove_file(&file).unwrap();
        fill(&ballast);
        drop(Decisions::open(&config));
        assert!(stale.exists() && !file.exists());
        fs::remove_file(&ballast).unwrap();
        learn(&next, "2");
        assert!(!stale.exists() && read().default == Some(Injection::Enabled));
    }

    #[test]
    fn a_full_disk_costs_no_pod_its_decision() {
        if !nix::unistd::Uid::effective().is_root() {
            return; // only root can mount a small disk
        }
        let dir = tempfile::tempdir().unwrap();
        // A thread of its own: so is its view of what is mounted.
        thread::scope(|scope| scope.spawn(|| on_a_full_disk(dir.path())).join().unwrap());
    }

    #[test]
    fn a_file_that_is_too_long_is_not_read() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(decisions::file(dir.path()), " ".repeat(MAX_FILE + 1)).unwrap();
        assert!(read(&decisions::file(dir.path())).unwrap_err().contains("longer"));
        drop(Decisions::open(&config(dir.path())));
        assert!(Knowledge::parse(&fs::read(decisions::file(dir.path())).unwrap()).is_ok());
    }
}
