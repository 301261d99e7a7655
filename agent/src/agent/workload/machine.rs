//! One workload's life: appeared → attested → redirect in place → identity → configuration → live → ready, and
//! drain → stop. The traffic is closed from the redirect on, whatever happens afterwards.

mod attach;
mod keep;
mod leave;
mod progress;
mod waiting;

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use arc_swap::ArcSwap;
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};
use tokio_util::sync::CancellationToken;

use self::attach::Attachment;
use self::keep::{keep_last_good, keep_upstream};
use self::progress::initial_status;
use super::WorkloadSpec;
use super::redirect::{self, Redirects};
use crate::agent::config::AgentConfig;
use crate::agent::control::{Link, chain};
use crate::agent::identity::{IdentityKeeper, IdentityState};
use crate::agent::retry::Backoff;
use crate::agent::session::{Offer, Registration, Session};
use crate::agent::status::{Phase, WorkloadStatus};
use crate::launcher::{Handover, Launcher, ShimState};
use crate::relay::{Cache, LastGood, Reader, Upstream, write_atomic};
use crate::shim::client::ShimClient;
use crate::shim::protocol::{DnsTable, EnvoyState, EnvoyStatus};

/// How long a step may take before the status says what it waits for.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often the status is looked at again while something is missing.
const REFRESH: Duration = Duration::from_secs(2);
/// The workload's description, kept so that a later agent can remove what this one put in place.
const SPEC_FILE: &str = "workload.json";

/// What all workloads of an agent share.
#[derive(Debug)]
pub struct Shared {
    /// The agent's configuration, as last read.
    pub config: ArcSwap<AgentConfig>,
    /// Where keys and last-good configuration are, as it was at the start.
    pub state_dir: PathBuf,
    /// Keeps shims running.
    pub launcher: Arc<dyn Launcher>,
    /// The session with control.
    pub session: Session,
    /// Whose redirects are in place.
    pub redirects: Redirects,
    /// The connection to control.
    pub links: watch::Receiver<Option<Link>>,
}

impl Shared {
    /// Where a workload's keys and last-good configuration are.
    pub fn state_dir(&self, id: &str) -> PathBuf {
        self.state_dir.join("w").join(id)
    }
}

/// A workload's task.
#[derive(Debug)]
pub struct Machine {
    specs: watch::Sender<Arc<WorkloadSpec>>,
    status: watch::Receiver<WorkloadStatus>,
    leave: CancellationToken,
    keep_redirect: Arc<AtomicBool>,
    detach: CancellationToken,
    /// Whether nothing of the workload is left.
    task: JoinHandle<bool>,
}

impl Machine {
    /// Starts a workload's life, or takes over that of a running one.
    pub fn start(shared: Arc<Shared>, spec: WorkloadSpec) -> Self {
        let (leave, detach) = (CancellationToken::new(), CancellationToken::new());
        let spec = Arc::new(spec);
        let (specs, spec_watch) = watch::channel(Arc::clone(&spec));
        let (status_sender, status) = watch::channel(initial_status(&spec));
        let keep_redirect = Arc::new(AtomicBool::new(false));
        let life = Life::new(shared, spec, spec_watch, status_sender, Arc::clone(&keep_redirect));
        let task = tokio::spawn({
            let (leave, detach) = (leave.clone(), detach.clone());
            async move {
                tokio::select! {
                    () = detach.cancelled() => false,
                    gone = life.run(leave) => gone,
                }
            }
        });
        Self { specs, status, leave, keep_redirect, detach, task }
    }

    /// The workload's description has changed in a way that a running shim can follow.
    pub fn update(&self, spec: WorkloadSpec) {
        self.specs.send_replace(Arc::new(spec));
    }

    /// The status as it changes.
    pub fn status(&self) -> watch::Receiver<WorkloadStatus> {
        self.status.clone()
    }

    /// Drains, stops and removes everything of the workload, except the redirect where a successor takes that over.
    /// Returns whether that succeeded.
    pub async fn remove(self, keep_redirect: bool) -> bool {
        self.keep_redirect.store(keep_redirect, Ordering::Relaxed);
        self.leave.cancel();
        self.task.await.unwrap_or_else(|error| {
            tracing::error!(%error, "a workload's task failed while it was removed");
            false
        })
    }

    /// Ends the task and leaves the workload running, for the next agent.
    pub async fn detach(self) {
        self.detach.cancel();
        if let Err(error) = self.task.await {
            tracing::error!(%error, "a workload's task failed");
        }
    }
}

/// What has been reached; the phase follows from it.
#[derive(Debug, Default)]
struct Facts {
    attested: bool,
    redirected: bool,
    /// Control was told that nobody is to call.
    withdrawn: bool,
    /// Why a step failed.
    failure: Option<String>,
    envoy: Option<EnvoyStatus>,
    /// The table that the shim has.
    names: Option<DnsTable>,
}

struct Life {
    id: String,
    shared: Arc<Shared>,
    spec: Arc<WorkloadSpec>,
    specs: watch::Receiver<Arc<WorkloadSpec>>,
    status: watch::Sender<WorkloadStatus>,
    keep_redirect: Arc<AtomicBool>,
    cache: Arc<Cache>,
    registration: watch::Sender<Registration>,
    upstream_error: watch::Sender<Option<String>>,
    disk_error: watch::Sender<Option<String>>,
    shim: Option<watch::Receiver<ShimState>>,
    facts: Facts,
    reported: String,
    phase_since: tokio::time::Instant,
}

impl Life {
    fn new(
        shared: Arc<Shared>,
        spec: Arc<WorkloadSpec>,
        specs: watch::Receiver<Arc<WorkloadSpec>>,
        status: watch::Sender<WorkloadStatus>,
        keep_redirect: Arc<AtomicBool>,
    ) -> Self {
        Self {
            keep_redirect,
            id: spec.id(),
            shared,
            spec,
            specs,
            status,
            cache: Arc::new(Cache::new()),
            registration: watch::Sender::new(Registration::Pending),
            upstream_error: watch::Sender::new(None),
            disk_error: watch::Sender::new(None),
            shim: None,
            facts: Facts::default(),
            reported: String::new(),
            phase_since: tokio::time::Instant::now(),
        }
    }

    async fn run(mut self, leave: CancellationToken) -> bool {
        tokio::select! {
            biased; // what is to leave at once starts nothing
            () = leave.cancelled() => {}
            () = self.live() => {}
        }
        self.tear_down().await
    }

    /// Everything up to being told to leave. Never returns by itself.
    async fn live(&mut self) {
        self.remember();
        // These end when this future does: a JoinSet aborts its tasks.
        let mut helpers = JoinSet::new();
        if self.shared.launcher.handover() == Handover::Settings {
            helpers.spawn(waiting::tell(
                Arc::clone(&self.shared.launcher),
                self.id.clone(),
                self.status.subscribe(),
            ));
        }
        self.close().await;

        let state_dir = self.shared.state_dir(&self.id);
        let reader = Some(Reader { uid: self.spec.uid, gid: self.spec.gid });
        let mut last_good = LastGood::new(state_dir.join("xds")).readable_by(reader);
        match last_good.load() {
            Ok(items) => self.cache.load(items),
            Err(error) => {
                self.disk_error.send_replace(Some(chain(&error)));
            }
        }
        let keeper = IdentityKeeper::open(
            &self.spec.mesh,
            &self.spec.name,
            state_dir.join("identity"),
            reader,
            Arc::clone(&self.cache),
        );
        let mut identity = keeper.watch();

        helpers.spawn(keeper.run(self.shared.links.clone(), self.registration.subscribe()));
        helpers.spawn(keep_upstream(
            Upstream { node_id: self.spec.node_id(), cluster: self.spec.cluster() },
            Arc::clone(&self.cache),
            self.shared.links.clone(),
            self.registration.subscribe(),
            self.upstream_error.clone(),
        ));
        helpers.spawn(keep_last_good(last_good, Arc::clone(&self.cache), self.disk_error.clone()));
        self.register().await;

        self.configured(&mut identity).await;
        self.shared.redirects.all_tried().await;
        let launcher = Arc::clone(&self.shared.launcher);
        let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(10));
        loop {
            match self.attach().await {
                Ok(attachment) => {
                    backoff.reset();
                    self.facts.failure = None;
                    self.attached(attachment, &mut identity).await;
                }
                Err(error) => self.fail(&error, &identity.borrow()),
            }
            tokio::select! {
                () = backoff.wait() => {}
                () = launcher.appeared() => backoff.reset(),
                Ok(()) = self.specs.changed() => self.respecify().await,
            }
        }
    }

    /// Keeps the description for a later agent.
    fn remember(&self) {
        let dir = self.shared.state_dir(&self.id);
        let written = fs::create_dir_all(&dir).and_then(|()| {
            let text = serde_json::to_vec_pretty(&*self.spec).map_err(std::io::Error::other)?;
            write_atomic(&dir.join(SPEC_FILE), &text, 0o600, None)
        });
        if let Err(error) = written {
            self.disk_error.send_replace(Some(format!("can't write to {}: {error}", dir.display())));
        }
    }

    /// Attests the workload and closes its traffic; tries until both have succeeded.
    async fn close(&mut self) {
        let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(10));
        loop {
            let done = if let Err(error) = redirect::attest(&self.spec) {
                Err(error)
            } else {
                self.facts.attested = true;
                self.shared.redirects.apply(&self.spec).await
            };
            self.shared.redirects.tried(&self.id);
            match done {
                Ok(applied) => {
                    if applied.is_some_and(|applied| applied.changed()) {
                        tracing::info!(workload = %self.id, "the redirect is in place; traffic is closed until Envoy is live");
                    }
                    self.facts.redirected = true;
                    self.facts.failure = None;
                    self.publish(&IdentityState::default());
                    return;
                }
                Err(error) => self.fail(&error, &IdentityState::default()),
            }
            tokio::select! {
                () = backoff.wait() => {}
                () = self.shared.redirects.news() => {}
                Ok(()) = self.specs.changed() => self.spec = self.specs.borrow_and_update().clone(),
            }
        }
    }

    async fn register(&self) {
        let offer = Offer {
            dataplane_json: self.spec.dataplane_as(!self.facts.withdrawn).to_string(),
            token_file: self.spec.dataplane_token_file.clone(),
        };
        let answer = self.registration.clone();
        self.shared.session.register(&self.spec.mesh, &self.spec.name, offer, answer).await;
    }

    /// Sends no more callers to an Envoy that drains, until another is live; the workload's own configuration stays, and
    /// with it its outbound traffic.
    async fn withdraw(&mut self) {
        let withdrawn = match self.facts.envoy.as_ref().map(|envoy| envoy.state) {
            Some(EnvoyState::Draining) => true,
            Some(EnvoyState::Live) => false,
            _ => return,
        };
        if std::mem::replace(&mut self.facts.withdrawn, withdrawn) != withdrawn {
            self.register().await;
        }
    }

    /// Follows a changed description without touching the shim.
    async fn respecify(&mut self) {
        let spec = self.specs.borrow_and_update().clone();
        let former = std::mem::replace(&mut self.spec, spec);
        self.remember();
        if former.redirect.is_some() && self.spec.redirect.is_none() {
            if let Err(error) = self.shared.redirects.remove(&former).await {
                tracing::error!(workload = %self.id, %error, "the redirect is no longer wanted, but stays");
            }
        } else if (&former.redirect, &former.uids, &former.slices)
            != (&self.spec.redirect, &self.spec.uids, &self.spec.slices)
        {
            self.close().await;
        }
        if (&former.dataplane, &former.dataplane_token_file)
            != (&self.spec.dataplane, &self.spec.dataplane_token_file)
        {
            self.register().await;
        }
    }

    /// Waits for identity and configuration; a shim that runs already has both and isn't kept waiting.
    async fn configured(&mut self, identity: &mut watch::Receiver<IdentityState>) {
        if let Ok(client) = ShimClient::connect(&self.shared.launcher.dir(&self.id)).await
            && client.hello().envoy.state != EnvoyState::Waiting
        {
            return;
        }
        let mut changes = self.cache.changes();
        let mut registration = self.registration.subscribe();
        let mut refresh = tokio::time::interval(REFRESH);
        let deadline = tokio::time::Instant::now() + PATIENCE;
        loop {
            changes.mark_unchanged();
            let state = identity.borrow_and_update().clone();
            self.publish(&state);
            let has_leaf = state.leaf.as_ref().is_some_and(|leaf| !leaf.is_expired());
            // Without a certificate Envoy refuses by itself; but with it, there is no moment of refusal.
            if self.cache.is_complete() && (has_leaf || tokio::time::Instant::now() >= deadline) {
                return;
            }
            tokio::select! {
                Ok(()) = changes.changed() => {}
                Ok(()) = identity.changed() => {}
                Ok(()) = registration.changed() => {}
                Ok(()) = self.specs.changed() => self.respecify().await,
                _ = refresh.tick() => {}
            }
        }
    }

    /// Serves until the shim is gone.
    async fn attached(&mut self, mut attachment: Attachment, identity: &mut watch::Receiver<IdentityState>) {
        let mut changes = self.cache.changes();
        let mut rejections = self.cache.rejection_changes();
        let mut registration = self.registration.subscribe();
        let mut disk_error = self.disk_error.subscribe();
        let mut refresh = tokio::time::interval(REFRESH);
        refresh.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        self.facts.names = None; // whatever the shim has, it is to hear the present table
        loop {
            changes.mark_unchanged();
            self.facts.envoy = Some(attachment.envoy.borrow_and_update().clone());
            self.write_names(Some(&attachment.client)).await;
            self.withdraw().await;
            let state = identity.borrow_and_update().clone();
            self.publish(&state);
            let settled = self.status.borrow().state == Phase::Ready;
            tokio::select! {
                () = attachment.client.closed() => break,
                ended = attachment.serving.join_next() => {
                    if let Some(Ok(Err(error))) = ended {
                        tracing::error!(workload = %self.id, error = %chain(&error), "Envoy can't be served");
                    }
                    break;
                }
                changed = attachment.envoy.changed() => if changed.is_err() { break },
                Ok(()) = changes.changed() => {}
                Ok(()) = rejections.changed() => {}
                Ok(()) = identity.changed() => {}
                Ok(()) = registration.changed() => {}
                Ok(()) = disk_error.changed() => {}
                Ok(()) = self.specs.changed() => {
                    self.respecify().await;
                    if let Err(error) = self.hand_over_settings(&attachment.client).await {
                        self.fail(&error, &state);
                    }
                }
                _ = refresh.tick(), if !settled => {}
            }
        }
        self.facts.envoy = None;
        tracing::warn!(workload = %self.id, "the connection to the shim ended; attaching again");
    }
}
