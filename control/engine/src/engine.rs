//! The engine itself: takes changes, keeps derived values current, says what changed for whom.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use ursa_model::{Resource, ResourceKey};

use crate::{
    encoded::{Encoded, TypeUrl},
    envoy::encode,
    graph::Mesh,
    input::{self, Backends, Object},
    own::{self, Own},
    policy::Selected,
    snapshot::{Names, ProxyKey, Snapshot},
    touched::Touched,
    view::{self, Store, View, ViewKey, Workshop},
    views::{ServiceKey, ViewId, Views},
    xds::{endpoint, secret, tls::TRUST_BUNDLE},
};

/// Names by proxy.
type Dirty = BTreeMap<ProxyKey, Names>;

/// What the engine must know of its surroundings.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// The name of this zone.
    pub zone: String,
}

/// One change of the world.
#[derive(Clone, Debug)]
pub enum Change {
    /// An object was created or updated (or read again: an equal one changes nothing).
    Put(Arc<Resource>),
    /// An object is gone.
    Delete(ResourceKey),
    /// Whether a proxy's node is connected. Endpoints of proxies that went offline are withdrawn; a proxy of
    /// which nothing was said counts as online.
    Liveness {
        /// The proxy.
        proxy: ProxyKey,
        /// Whether it is there.
        online: bool,
    },
}

/// What a batch of changes meant.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Names of resources that were added, changed or removed, for each connected proxy that has any.
    pub dirty: Vec<(ProxyKey, Names)>,
    /// What could not be used, by object.
    pub warnings: Vec<(ResourceKey, String)>,
}

/// How often values were derived, for tests and metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Changes that had an equal projection and ended there.
    pub unchanged_inputs: u64,
    /// Load assignments that were computed.
    pub endpoints: u64,
    /// Pairs of cluster and listener of a service's port that were computed.
    pub outbounds: u64,
    /// Pairs of cluster and listener of a proxy's own port that were computed.
    pub inbounds: u64,
    /// Permissions that were computed, each for all ports that have the same.
    pub permissions: u64,
    /// Trust bundles that were computed.
    pub secrets: u64,
}

/// An object as it was last put.
#[derive(Debug)]
struct Input {
    hash: u128,
    object: Option<Object>,
}

/// A connected proxy.
#[derive(Debug, Default)]
struct Connected {
    /// None while its Dataplane doesn't exist.
    view: Option<ViewId>,
    own: Own,
}

/// Load assignments of one mesh, by service and cluster.
type Assignments = BTreeMap<String, Arc<BTreeMap<Arc<str>, Arc<Encoded>>>>;

/// Resources in, configuration out. One owner, no interior locks.
#[derive(Debug)]
pub struct Engine {
    config: EngineConfig,
    inputs: HashMap<ResourceKey, Input>,
    meshes: BTreeMap<String, Mesh>,
    offline: BTreeSet<ProxyKey>,
    proxies: BTreeMap<ProxyKey, Connected>,
    views: Views,
    assignments: BTreeMap<String, Assignments>,
    /// Trust bundles by mesh; none where nobody is trusted, because Envoy takes no empty one.
    secrets: BTreeMap<String, Option<Arc<Encoded>>>,
    store: Store,
    own_store: own::Store,
    counters: Counters,
}

impl Engine {
    /// An engine that knows nothing yet.
    pub fn new(config: EngineConfig) -> Self {
        Self {
            config,
            inputs: HashMap::new(),
            meshes: BTreeMap::new(),
            offline: BTreeSet::new(),
            proxies: BTreeMap::new(),
            views: Views::default(),
            assignments: BTreeMap::new(),
            secrets: BTreeMap::new(),
            store: Store::default(),
            own_store: own::Store::default(),
            counters: Counters::default(),
        }
    }

    /// Takes changes and recomputes what depends on them.
    pub fn apply(&mut self, changes: Vec<Change>) -> Outcome {
        let mut outcome = Outcome::default();
        let mut touched = Touched::default();
        for change in changes {
            match change {
                Change::Put(resource) => self.put(&resource, &mut touched, &mut outcome.warnings),
                Change::Delete(key) => {
                    if let Some(input) = self.inputs.remove(&key) {
                        self.replace(&key, input.object.as_ref(), None, &mut touched);
                    }
                }
                Change::Liveness { proxy, online } => self.liveness(&proxy, online, &mut touched),
            }
        }
        let dirty = self.recompute(&touched, &mut outcome.warnings);
        outcome.dirty = dirty.into_iter().collect();
        // Each view that meets an object warns of it.
        outcome.warnings.sort_unstable();
        outcome.warnings.dedup();
        self.meshes.retain(|_, mesh| !mesh.is_empty());
        outcome
    }

    /// Starts to keep a proxy's resources current.
    pub fn connect(&mut self, proxy: &ProxyKey) {
        if self.proxies.contains_key(proxy) {
            return;
        }
        self.proxies.insert(proxy.clone(), Connected::default());
        // The same warnings came with the objects or come again with their next change.
        let mut warnings = Vec::new();
        self.settle(proxy, &mut BTreeSet::new(), &mut warnings);
    }

    /// Forgets a proxy's resources.
    pub fn disconnect(&mut self, proxy: &ProxyKey) {
        if let Some(id) = self.proxies.remove(proxy).and_then(|connected| connected.view) {
            if let Some(view) = self.views.get_mut(id) {
                view.members.remove(proxy);
            }
            self.finish(&BTreeSet::from([id]));
        }
    }

    /// What a connected proxy has now. `None` when it isn't connected or its Dataplane doesn't exist.
    pub fn snapshot(&self, proxy: &ProxyKey) -> Option<Arc<Snapshot>> {
        let connected = self.proxies.get(proxy)?;
        let view = self.views.get(connected.view?)?;
        Some(Arc::new(Snapshot { view: Arc::clone(&view.layer), own: Arc::clone(&connected.own.layer) }))
    }

    /// A proxy's resources as canonical proto JSON: type URL → name → resource.
    pub fn config_dump(&self, proxy: &ProxyKey) -> serde_json::Value {
        let Some(snapshot) = self.snapshot(proxy) else { return serde_json::Value::Null };
        let mut dump = serde_json::Map::new();
        for kind in TypeUrl::ALL {
            let resources: serde_json::Map<_, _> = snapshot
                .iter(kind)
                .filter_map(|resource| Some((resource.name.to_string(), encode::json(kind, resource)?)))
                .collect();
            if !resources.is_empty() {
                dump.insert(kind.as_str().to_owned(), resources.into());
            }
        }
        dump.into()
    }

    /// Who shares what: for each group of connected proxies with equal outbound resources its size.
    pub fn layout(&self) -> Vec<usize> {
        self.views.iter().map(|view| view.members.len()).collect()
    }

    /// How much was computed so far.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    fn put(
        &mut self,
        resource: &Arc<Resource>,
        touched: &mut Touched,
        warnings: &mut Vec<(ResourceKey, String)>,
    ) {
        if !input::is_relevant(resource.descriptor.name) {
            return;
        }
        let key = resource.key();
        let hash = input::hash(&resource.projection());
        if self.inputs.get(&key).is_some_and(|known| known.hash == hash) {
            self.counters.unchanged_inputs += 1;
            return;
        }
        let object = input::read(resource, hash).unwrap_or_else(|reason| {
            warnings.push((key.clone(), format!("left out of all configuration: {reason}")));
            None
        });
        let old = self.inputs.insert(key.clone(), Input { hash, object: object.clone() });
        let old = old.and_then(|input| input.object);
        self.replace(&key, old.as_ref(), object.as_ref(), touched);
    }

    /// Changes the graph, and notes who depends on what was there and on what is there now.
    fn replace(
        &mut self,
        key: &ResourceKey,
        old: Option<&Object>,
        new: Option<&Object>,
        touched: &mut Touched,
    ) {
        let mesh = self.meshes.entry(key.mesh.clone()).or_default();
        if let Some(old) = old {
            touched.depends_on(mesh, &key.mesh, old);
            match old {
                Object::Proxy(_) => mesh.remove_proxy(&key.name),
                Object::Service(_) => mesh.remove_service(&key.name),
                Object::Identity(_) => mesh.remove_identity(&key.name),
                Object::Trust(_) => mesh.remove_trust(&key.name),
                Object::Policy(_) => mesh.remove_policy(key.kind, &key.name),
            }
        }
        if let Some(new) = new {
            match new {
                Object::Proxy(proxy) => mesh.put_proxy(Arc::clone(proxy)),
                Object::Service(service) => mesh.put_service(Arc::clone(service)),
                Object::Identity(identity) => mesh.put_identity(Arc::clone(identity)),
                Object::Trust(trust) => mesh.put_trust(Arc::clone(trust)),
                Object::Policy(policy) => mesh.put_policy(Arc::clone(policy)),
            }
            touched.depends_on(mesh, &key.mesh, new);
        }
    }

    fn liveness(&mut self, proxy: &ProxyKey, online: bool, touched: &mut Touched) {
        let changed = if online { self.offline.remove(proxy) } else { self.offline.insert(proxy.clone()) };
        let Some(mesh) = self.meshes.get(&proxy.mesh).filter(|_| changed) else { return };
        if let Some(known) = mesh.proxy(&proxy.name) {
            touched
                .endpoints
                .extend(mesh.services_of(known).into_iter().map(|name| (proxy.mesh.clone(), name)));
        }
    }

    fn recompute(&mut self, touched: &Touched, warnings: &mut Vec<(ResourceKey, String)>) -> Dirty {
        let mut views = BTreeSet::new();
        for mesh in &touched.trust {
            if !self.views.is_watched(mesh) {
                continue;
            }
            self.secrets.insert(mesh.clone(), derive_secret(self.meshes.get(mesh), &mut self.counters));
            for id in self.views.of_mesh(mesh) {
                if let (Some(view), Some(secret)) = (self.views.get_mut(id), self.secrets.get(mesh)) {
                    view.put_secret(secret.as_ref());
                    views.insert(id);
                }
            }
        }
        self.recompute_services(touched, &mut views, warnings);
        for service in touched.endpoints.union(&touched.services) {
            if self.views.is_watched(&service.0) {
                self.derive_endpoints(service);
            }
            let watching = self.views.watching(service);
            self.put_endpoints(service, &watching, &mut views);
        }

        // Proxies whose own situation changed; the rest follow their view.
        let mut dirty = Dirty::new();
        for proxy in &touched.proxies {
            if let Some(names) = self.settle(proxy, &mut views, warnings).filter(|names| !names.is_empty()) {
                dirty.insert(proxy.clone(), names);
            }
        }
        for id in &views {
            let Some((changed, members)) = self.views.changes(*id) else { continue };
            // Those who settled were compared with all that they had before.
            for member in members.iter().filter(|member| !touched.proxies.contains(member)) {
                dirty.insert(member.clone(), changed.clone());
            }
        }
        self.finish(&views);
        dirty
    }

    /// Lets every view of a mesh look at the services that changed.
    fn recompute_services(
        &mut self,
        touched: &Touched,
        views: &mut BTreeSet<ViewId>,
        warnings: &mut Vec<(ResourceKey, String)>,
    ) {
        let mut services: BTreeMap<&str, BTreeSet<ServiceKey>> = BTreeMap::new();
        for service in &touched.services {
            services.entry(&service.0).or_default().insert(service.clone());
        }
        // Where routes lead from one service to another, all may look different; most derive to what they were.
        for mesh in &touched.routes {
            let all = self.meshes.get(mesh).into_iter().flat_map(Mesh::services);
            let all = all.map(|service| (mesh.clone(), service.name.clone()));
            services.entry(mesh).or_default().extend(all);
        }
        let empty = Mesh::default();
        for (mesh_name, services) in services {
            let mesh = self.meshes.get(mesh_name).unwrap_or(&empty);
            let ids = self.views.of_mesh(mesh_name);
            for id in &ids {
                if let Some(view) = self.views.get_mut(*id) {
                    let (store, counters) = (&mut self.store, &mut self.counters);
                    let names = services.iter().map(|(_, name)| name.as_str());
                    view.refresh(names, &mut Workshop { mesh, store, counters, warnings });
                }
                for service in &services {
                    self.views.note(*id, service);
                }
            }
            for service in &services {
                self.put_endpoints(service, &ids, views);
            }
            views.extend(ids);
        }
    }

    fn put_endpoints(&mut self, service: &ServiceKey, ids: &[ViewId], views: &mut BTreeSet<ViewId>) {
        let known = self.assignments.get(&service.0).and_then(|of_mesh| of_mesh.get(&service.1));
        for id in ids {
            if let (Some(known), Some(view)) = (known, self.views.get_mut(*id)) {
                view.put_endpoints(&service.1, known);
                views.insert(*id);
            }
        }
    }

    /// Brings a connected proxy's view and own resources up to date. Returns the names that differ from what it
    /// had before the changes that are being applied.
    fn settle(
        &mut self,
        key: &ProxyKey,
        views: &mut BTreeSet<ViewId>,
        warnings: &mut Vec<(ResourceKey, String)>,
    ) -> Option<Names> {
        let connected = self.proxies.get(key)?;
        let (old_view, old_own) = (connected.view, connected.own.clone());
        let had = old_view
            .and_then(|id| self.views.get(id))
            .map(|view| Arc::clone(view.before.as_ref().unwrap_or(&view.layer)));
        let (new_view, new_own) = self.situation(key, &old_own, warnings);
        if old_view != new_view {
            if let Some(view) = new_view.and_then(|id| self.views.get_mut(id)) {
                view.members.insert(key.clone());
            }
            if let Some(view) = old_view.and_then(|id| self.views.get_mut(id)) {
                view.members.remove(key);
            }
            views.extend(old_view);
        }
        let has = new_view.and_then(|id| self.views.get(id)).map(|view| Arc::clone(&view.layer));
        let nothing = Arc::default();
        let mut changed = had.as_ref().unwrap_or(&nothing).diff(has.as_ref().unwrap_or(&nothing));
        changed.extend(old_own.layer.diff(&new_own.layer));
        if let Some(connected) = self.proxies.get_mut(key) {
            connected.view = new_view;
            connected.own = new_own;
        }
        Some(changed)
    }

    /// Which view a proxy belongs to, made if there is none yet, and its own resources.
    fn situation(
        &mut self,
        key: &ProxyKey,
        old: &Own,
        warnings: &mut Vec<(ResourceKey, String)>,
    ) -> (Option<ViewId>, Own) {
        let Some(mesh) = self.meshes.get(&key.mesh) else { return (None, Own::default()) };
        let Some(proxy) = mesh.proxy(&key.name) else { return (None, Own::default()) };
        let selected = mesh.select(proxy);
        let trust_domains = mesh.trust_domains();
        let hash = own::hash(mesh, proxy, &selected, &trust_domains);
        let own = if hash == old.hash {
            old.clone()
        } else {
            let mut workshop = own::Workshop {
                zone: &self.config.zone,
                store: &mut self.own_store,
                counters: &mut self.counters,
                warnings,
            };
            own::build(mesh, proxy, &selected, &trust_domains, (hash, old), &mut workshop)
        };
        let view = ViewKey {
            mesh: key.mesh.clone(),
            identity: own::secret_name(mesh, proxy, &self.config.zone),
            policies: view::outbound_hash(&selected),
            redirect: proxy.redirect,
            reachable: proxy.reachable.clone(),
        };
        let id = match self.views.id(&view) {
            Some(id) => Some(id),
            None => self.create_view(view, selected, warnings),
        };
        (id, own)
    }

    fn create_view(
        &mut self,
        key: ViewKey,
        selected: Selected,
        warnings: &mut Vec<(ResourceKey, String)>,
    ) -> Option<ViewId> {
        let mesh_name = key.mesh.clone();
        let mesh = self.meshes.get(&mesh_name)?;
        let secret = self
            .secrets
            .entry(mesh_name.clone())
            .or_insert_with(|| derive_secret(Some(mesh), &mut self.counters));
        let names = mesh.reachable(key.reachable.as_ref().map(Backends::refs));
        let mut view = View::new(key, selected, &mut self.store);
        view.put_secret(secret.as_ref());
        let (store, counters) = (&mut self.store, &mut self.counters);
        let mut workshop = Workshop { mesh, store, counters, warnings };
        view.refresh(names.iter().map(String::as_str), &mut workshop);
        for name in names {
            let service = (mesh_name.clone(), name);
            let known = |engine: &Self| engine.assignments.get(&service.0)?.get(&service.1).cloned();
            if known(self).is_none() {
                self.derive_endpoints(&service);
            }
            if let Some(known) = known(self) {
                view.put_endpoints(&service.1, &known);
            }
        }
        view.before = None;
        Some(self.views.insert(view))
    }

    /// Ends a batch: views without members go, and with the last of a mesh what was kept for them.
    fn finish(&mut self, views: &BTreeSet<ViewId>) {
        for id in views {
            if let Some(view) = self.views.get_mut(*id) {
                view.before = None;
            }
            let mesh = self.views.get(*id).map(|view| view.key.mesh.clone());
            self.views.drop_if_empty(*id);
            if let Some(mesh) = mesh.filter(|mesh| !self.views.is_watched(mesh)) {
                self.assignments.remove(&mesh);
                self.secrets.remove(&mesh);
            }
        }
    }

    fn derive_endpoints(&mut self, (mesh_name, service_name): &ServiceKey) {
        let known = self.assignments.entry(mesh_name.clone()).or_default();
        let mesh = self.meshes.get(mesh_name);
        let Some((mesh, service)) = mesh.and_then(|mesh| Some((mesh, mesh.service(service_name)?))) else {
            known.remove(service_name);
            return;
        };
        let offline = &self.offline;
        let ports = service.ports.iter().map(|port| {
            let instances = mesh.instances(service, port, |proxy| !offline.contains(&proxy.key));
            let assignment = endpoint::discovered(&port.resource, &self.config.zone, instances);
            let encoded = encode::resource(TypeUrl::Endpoint, &port.resource, &assignment);
            (Arc::clone(&port.resource), encoded)
        });
        let ports: BTreeMap<_, _> = ports.collect();
        self.counters.endpoints += ports.len() as u64;
        known.insert(service_name.clone(), Arc::new(ports));
    }
}

fn derive_secret(mesh: Option<&Mesh>, counters: &mut Counters) -> Option<Arc<Encoded>> {
    counters.secrets += 1;
    let bundles = mesh.map(Mesh::bundles).filter(|bundles| !bundles.is_empty())?;
    Some(encode::resource(TypeUrl::Secret, TRUST_BUNDLE, &secret::trust_bundle(&bundles)))
}
