//! What control writes by itself: defaults of a new mesh, identities' authorities, MeshServices with their
//! addresses and names, Workloads.
//!
//! One task follows the world and turns each changed key into the [`Job`]s that depend on it. A job is a
//! reconcile: it reads what is stored, computes what should be, and writes only a difference, so running it
//! twice changes nothing and a lost race is a repeat. Nothing polls; what must happen later (a deletion's
//! grace) has a deadline.

mod defaults;
mod hostnames;
mod identities;
mod mesh_services;
mod vips;
mod workloads;

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use time::{Duration, OffsetDateTime};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use ursa_model::labels::{self, Context};
use ursa_model::{Resource, ResourceKey, vip};

use crate::identity::mesh_ca::MeshAuthorities;
use crate::store::{Store, StoreError};
use crate::tokens::Tokens;
use crate::world::World;
use hostnames::Hostnames;
use vips::Vips;

/// How long an offline Dataplane is kept.
const OFFLINE_FOR: Duration = Duration::hours(72);

/// How long after a failure a job is tried again.
const RETRY: std::time::Duration = std::time::Duration::from_secs(1);

/// What generators work with.
#[derive(Debug)]
pub struct Generators {
    /// Where results go.
    pub store: Store,
    /// What is known.
    pub world: World,
    /// Mesh CAs.
    pub authorities: Arc<MeshAuthorities>,
    /// Signing keys.
    pub tokens: Tokens,
    /// For computing labels.
    pub labels: Context,
    /// This zone.
    pub zone: String,
    /// Where the addresses of MeshServices come from.
    pub service_addresses: vip::Range,
    /// How long a MeshService without Dataplanes is kept.
    pub deletion_grace: Duration,
    /// Don't make the mesh `default`.
    pub skip_mesh: bool,
    /// Don't make HostnameGenerators.
    pub skip_hostname_generators: bool,
}

/// Something to reconcile.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Job {
    Mesh(String),
    Identity(ResourceKey),
    Service(ResourceKey),
    Workload(ResourceKey),
    Offline(ResourceKey),
}

/// Why a job isn't done.
#[derive(Debug)]
enum Failure {
    /// Somebody else wrote in between; try again at once.
    Conflict,
    /// Try again later.
    Store(StoreError),
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        if error.is_conflict() || matches!(error, StoreError::NotFound(_)) {
            Self::Conflict
        } else {
            Self::Store(error)
        }
    }
}

/// When a job is to be looked at again, if it is.
type Outcome = Result<Option<OffsetDateTime>, Failure>;

/// Runs all generators until `shutdown`.
pub async fn run(generators: Generators, shutdown: CancellationToken) {
    let follower = generators.world.follow();
    let mut runner = Runner {
        vips: generators.world.read(|index| Vips::load(index, generators.service_addresses)),
        hostnames: generators.world.read(Hostnames::load),
        generators,
        workload_of: HashMap::new(),
        connections: HashMap::new(),
        jobs: BTreeSet::new(),
        deadlines: BTreeSet::new(),
    };
    let known = runner.generators.world.read(|index| index.keys().cloned().collect::<Vec<_>>());
    runner.note(known);
    loop {
        runner.work(&shutdown).await;
        let next = runner.deadlines.first().map(|(at, _)| *at);
        tokio::select! {
            keys = follower.next() => runner.note(keys),
            () = sleep_until(next) => runner.expire(),
            () = shutdown.cancelled() => return,
        }
    }
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

struct Runner {
    generators: Generators,
    vips: Vips,
    hostnames: Hostnames,
    /// Dataplane → workload as it was when last seen, so that a change reaches both the old and the new.
    workload_of: HashMap<(String, String), String>,
    /// Dataplane → when its connection began and ended.
    connections: HashMap<(String, String), String>,
    jobs: BTreeSet<Job>,
    deadlines: BTreeSet<(Instant, Job)>,
}

impl Runner {
    /// Finds the jobs that depend on changed keys.
    fn note(&mut self, keys: impl IntoIterator<Item = ResourceKey>) {
        for key in keys {
            match key.kind {
                "Mesh" => {
                    self.jobs.insert(Job::Mesh(key.name));
                }
                "Dataplane" => self.note_dataplane(&key),
                "DataplaneInsight" if !self.notice_connection(&key) => {}
                "DataplaneInsight" => {
                    self.note_workload_of(&key.mesh, &key.name);
                    self.note_chosen_services(&key.mesh);
                    self.jobs.insert(Job::Offline(key));
                }
                "MeshService" => {
                    self.jobs.insert(Job::Service(key));
                }
                "MeshIdentity" => {
                    self.note_services(Some(&key.mesh));
                    self.jobs.insert(Job::Identity(key));
                }
                "MeshTrust" => {
                    self.note_services(Some(&key.mesh));
                    self.jobs.insert(Job::Identity(ResourceKey { kind: "MeshIdentity", ..key }));
                }
                "Secret" => {
                    let identities: Vec<_> = self.generators.world.read(|index| {
                        index.list("MeshIdentity", &key.mesh).map(|identity| identity.key()).collect()
                    });
                    self.jobs.extend(identities.into_iter().map(Job::Identity));
                }
                "HostnameGenerator" => self.note_services(None),
                "Workload" => {
                    self.jobs.insert(Job::Workload(key));
                }
                _ => {}
            }
        }
    }

    /// Whether a proxy's connection is another than when it was last looked at. Its counters change all the time,
    /// and nothing depends on them.
    fn notice_connection(&mut self, key: &ResourceKey) -> bool {
        let insight = self.generators.world.get(key);
        let place = (key.mesh.clone(), key.name.clone());
        let last = insight.as_ref().and_then(|insight| insight.spec.get("subscriptions")?.as_array()?.last());
        let time = |name: &str| last.and_then(|last| last.get(name)?.as_str()).unwrap_or_default();
        let connection = format!("{} {}", time("connectTime"), time("disconnectTime"));
        if insight.is_none() {
            self.connections.remove(&place);
            return true;
        }
        let former = self.connections.insert(place, connection.clone());
        former.as_ref() != Some(&connection)
    }

    fn note_dataplane(&mut self, key: &ResourceKey) {
        self.note_workload_of(&key.mesh, &key.name);
        let place = (key.mesh.clone(), key.name.clone());
        let workload = self
            .generators
            .world
            .get(key)
            .and_then(|dataplane| dataplane.meta.label(labels::WORKLOAD).map(str::to_owned));
        match workload {
            Some(workload) => self.workload_of.insert(place, workload),
            None => self.workload_of.remove(&place),
        };
        self.note_workload_of(&key.mesh, &key.name);
        self.note_chosen_services(&key.mesh);
    }

    fn note_workload_of(&mut self, mesh: &str, dataplane: &str) {
        if let Some(name) = self.workload_of.get(&(mesh.to_owned(), dataplane.to_owned())) {
            let key = |kind| ResourceKey { kind, mesh: mesh.to_owned(), name: name.clone() };
            self.jobs.insert(Job::Service(key("MeshService")));
            self.jobs.insert(Job::Workload(key("Workload")));
        }
    }

    /// MeshServices that people wrote may select any Dataplane of their mesh.
    fn note_chosen_services(&mut self, mesh: &str) {
        let services: Vec<_> = self.generators.world.read(|index| {
            index
                .list("MeshService", mesh)
                .filter(|service| !mesh_services::is_managed(service))
                .map(|service| service.key())
                .collect()
        });
        self.jobs.extend(services.into_iter().map(Job::Service));
    }

    fn note_services(&mut self, mesh: Option<&str>) {
        let services: Vec<_> = self.generators.world.read(|index| match mesh {
            Some(mesh) => index.list("MeshService", mesh).map(|service| service.key()).collect(),
            None => index.list_all("MeshService").map(|service| service.key()).collect(),
        });
        self.jobs.extend(services.into_iter().map(Job::Service));
    }

    fn expire(&mut self) {
        let now = Instant::now();
        while self.deadlines.first().is_some_and(|(at, _)| *at <= now) {
            self.jobs.extend(self.deadlines.pop_first().map(|(_, job)| job));
        }
    }

    /// Does all jobs that are there now.
    async fn work(&mut self, shutdown: &CancellationToken) {
        while let Some(job) = self.jobs.pop_first() {
            if shutdown.is_cancelled() {
                return;
            }
            let outcome = match &job {
                Job::Mesh(mesh) => self.generators.mesh(mesh).await,
                Job::Identity(key) => self.generators.identity(key).await,
                Job::Service(key) => self.generators.service(key, &mut self.vips, &mut self.hostnames).await,
                Job::Workload(key) => self.generators.workload(key).await,
                Job::Offline(key) => self.generators.offline(key).await,
            };
            match outcome {
                Ok(None) => {}
                Ok(Some(at)) => {
                    let wait = (at - OffsetDateTime::now_utc()).max(Duration::ZERO).unsigned_abs();
                    self.deadlines.insert((Instant::now() + wait, job));
                }
                Err(Failure::Conflict) => {
                    self.jobs.insert(job);
                    // Let the other writer, and the world's task, go on.
                    tokio::task::yield_now().await;
                }
                Err(Failure::Store(error)) => {
                    tracing::error!("can't reconcile {job:?}: {error}; trying again in {RETRY:?}");
                    self.deadlines.insert((Instant::now() + RETRY, job));
                }
            }
        }
    }
}

impl Generators {
    /// Gives a resource its computed labels.
    fn label(&self, resource: &mut Resource) {
        match labels::compute(resource, &Context { privileged: true, ..self.labels.clone() }) {
            Ok(labels) => resource.meta.labels = labels,
            Err(violations) => {
                tracing::warn!("labels of {} can't be computed: {violations}", resource.key());
            }
        }
    }

    /// Writes a resource that must not exist yet; whether it did not.
    async fn create(&self, mut resource: Resource) -> Result<bool, StoreError> {
        self.label(&mut resource);
        let key = resource.key();
        match self.store.create(resource).await {
            Ok(_) => {
                tracing::info!("made {key}");
                Ok(true)
            }
            Err(StoreError::Exists(_)) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Deletes a resource in the version that was read.
    async fn delete(&self, resource: &Resource) -> Result<(), Failure> {
        match self.store.delete(&resource.key(), Some(resource.meta.version)).await {
            Ok(()) => {
                tracing::info!("removed {}", resource.key());
                Ok(())
            }
            Err(StoreError::NotFound(_)) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}
