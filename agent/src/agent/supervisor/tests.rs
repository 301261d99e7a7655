use std::sync::Mutex;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use serde_json::Value;

use super::*;
use crate::agent::config::AgentConfig;
use crate::agent::session::{Inspector, Session};
use crate::agent::workload::Redirects;
use crate::launcher::{Found, LaunchError, Launcher, ShimSpec, ShimState};

const PATIENCE: Duration = Duration::from_secs(20);

/// A host without shims. The first stop fails if `refuse` says so.
#[derive(Debug)]
struct NoShims {
    dir: PathBuf,
    refuse: Mutex<bool>,
    /// Whether the description was there when a shim was stopped.
    stops: mpsc::UnboundedSender<(String, bool)>,
}

impl Launcher for NoShims {
    fn dir(&self, id: &str) -> PathBuf {
        self.dir.join("run").join(id)
    }

    fn ensure(&self, spec: ShimSpec) -> BoxFuture<'_, Result<watch::Receiver<ShimState>, LaunchError>> {
        async move { Err(LaunchError::Start { id: spec.id, reason: "not here".into() }) }.boxed()
    }

    fn stop<'a>(&'a self, id: &'a str, _: Duration) -> BoxFuture<'a, Result<(), LaunchError>> {
        let described = self.dir.join("w").join(id).join(SPEC_FILE).exists();
        self.stops.send((id.to_owned(), described)).unwrap();
        let refused = std::mem::take(&mut *self.refuse.lock().unwrap());
        let error = LaunchError::Stop { id: id.to_owned(), reason: "it lives".into() };
        async move { if refused { Err(error) } else { Ok(()) } }.boxed()
    }

    fn admission(&self, spec: &ShimSpec, shim: i32) -> crate::relay::Admit {
        crate::relay::children_of(shim, spec.uid)
    }

    fn list(&self) -> BoxFuture<'_, Result<Vec<Found>, LaunchError>> {
        async { Ok(Vec::new()) }.boxed()
    }
}

#[derive(Debug)]
struct NoEnvoys;

impl Inspector for NoEnvoys {
    fn inspect(&self, _: &str, _: Value) -> BoxFuture<'static, Result<Value, String>> {
        async { Err("none".to_owned()) }.boxed()
    }
}

struct Agent {
    dir: tempfile::TempDir,
    supervisor: Supervisor,
    stops: mpsc::UnboundedReceiver<(String, bool)>,
    stop: CancellationToken,
}

impl Agent {
    /// One whose predecessor left `default.a` with user 7. `file` is what describes it now.
    fn after_another(file: Option<&str>, refuse: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (workloads, config) = (
            dir.path().join("workloads"),
            AgentConfig { state_dir: dir.path().to_owned(), drain_seconds: 0, ..AgentConfig::default() },
        );
        let path = workloads.join("a.yaml");
        let left =
            WorkloadSpec::from_yaml(&text(7), Origin::File(path.display().to_string()), &config).unwrap();
        persist(&dir.path().join("w").join(left.id()), &left).unwrap();
        // And what it was removing when it was killed.
        fs::create_dir_all(dir.path().join("w/default.gone/identity")).unwrap();
        let files = WorkloadFiles::watch(&workloads).unwrap();
        if let Some(file) = file {
            fs::write(path, file).unwrap();
        }
        let (sender, stops) = mpsc::unbounded_channel();
        let launcher = NoShims { dir: dir.path().to_owned(), refuse: Mutex::new(refuse), stops: sender };
        let stop = CancellationToken::new();
        let links = watch::Sender::new(None).subscribe();
        let (session, _) = Session::start(links.clone(), Arc::new(NoEnvoys), stop.clone());
        let shared = Arc::new(Shared {
            state_dir: config.state_dir.clone(),
            config: arc_swap::ArcSwap::from_pointee(config),
            launcher: Arc::new(launcher),
            session,
            redirects: Redirects::new(dir.path().join("run")),
            links,
        });
        let (supervisor, _) = Supervisor::start(shared, files, stop.clone());
        Self { dir, supervisor, stops, stop }
    }

    async fn stopped(&mut self) -> (String, bool) {
        tokio::time::timeout(PATIENCE, self.stops.recv()).await.expect("nothing is stopped").unwrap()
    }

    async fn until(&self, what: &str, reached: impl Fn(&[WorkloadStatus]) -> bool) {
        let looking = async {
            while !reached(&self.supervisor.status().await.0) {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(PATIENCE, looking).await.unwrap_or_else(|_| panic!("{what}"));
    }
}

fn text(uid: u32) -> String {
    format!(
        "type: Dataplane\nmesh: default\nname: a\nnetworking: {{address: 10.0.0.1, inbound: [{{port: 80}}]}}\n\
         ursa: {{proxyUid: {uid}}}\n"
    )
}

#[tokio::test]
async fn what_changed_while_no_agent_ran_is_removed_before_it_starts_anew() {
    let mut agent = Agent::after_another(Some(&text(8)), false);
    assert_eq!(agent.stopped().await, ("default.a".to_owned(), true));
    agent.until("it doesn't start anew", |all| all.iter().any(|one| one.origin.ends_with("a.yaml"))).await;
    agent.stop.cancel();
}

#[tokio::test]
async fn what_cannot_be_stopped_keeps_its_description_and_is_stopped_again() {
    let mut agent = Agent::after_another(None, true);
    assert_eq!(agent.stopped().await, ("default.a".to_owned(), true));
    let told =
        |one: &WorkloadStatus| one.error.as_ref().is_some_and(|error| error.contains("its rules stay"));
    agent.until("status doesn't say so", |all| all.iter().any(told)).await;
    assert_eq!(agent.stopped().await, ("default.a".to_owned(), true));
    agent.until("it isn't gone", <[_]>::is_empty).await;
    assert!(!agent.dir.path().join("w/default.a").exists());
    agent.stop.cancel();
}

#[tokio::test]
async fn what_was_half_removed_is_removed() {
    let agent = Agent::after_another(Some(&text(7)), false);
    let remains = agent.dir.path().join("w/default.gone");
    agent.until("it stays", |_| !remains.exists()).await;
    assert!(agent.dir.path().join("w/default.a").exists(), "what is described stays");
    agent.stop.cancel();
}
