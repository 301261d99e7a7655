//! Puts the parts that serve nodes together: world, identity, sessions, discovery, generators, diagnostics.

use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::Context as _;
use time::{Duration, OffsetDateTime};
use tokio::net::TcpListener;
use ursa_engine::{EngineConfig, ProxyKey};
use ursa_wire::ticket::Ticket;

use crate::ControlPlane;
use crate::api;
use crate::api::server::listen;
use crate::config::Config;
use crate::diagnostics::{self, Metrics};
use crate::discovery::{self, Discovery, NodeServices};
use crate::generators::{self, Generators};
use crate::identity::mesh_ca::MeshAuthorities;
use crate::identity::nodes::{Grant, NodeRecord};
use crate::identity::service::IdentityService;
use crate::identity::tickets::TicketRequest;
use crate::identity::workload::WorkloadIssuer;
use crate::identity::{ControlIdentity, IdentityError, tls};
use crate::session::{self, AskError, Insights, Registry, Requests, SessionService, Sessions};
use crate::world::{self, World};

/// How long clients have to end their connections on shutdown.
const FAREWELL: std::time::Duration = std::time::Duration::from_secs(3);

/// What others may ask of the running rooms.
#[derive(Debug, Clone)]
pub struct Rooms {
    /// What is known right now.
    pub world: World,
    /// Nodes, tickets, the control CA.
    pub identity: Arc<ControlIdentity>,
    /// Which node has which Dataplane.
    pub registry: Arc<Registry>,
    /// Counts.
    pub metrics: Arc<Metrics>,
    /// Where nodes are served.
    pub nodes_address: SocketAddr,
    /// Where diagnostics are served.
    pub diagnostics_address: SocketAddr,
    public_address: String,
    sessions: Arc<Sessions>,
}

impl Rooms {
    /// Shuts a node out at once, or lets it in again, by the word of `user`. Nothing if there is no such node.
    /// The certificates that its workloads hold stay good until they end; there is no list of revoked ones.
    pub async fn set_revoked(
        &self,
        id: &str,
        revoked: bool,
        user: &str,
    ) -> Result<Option<Arc<NodeRecord>>, IdentityError> {
        let (identity, sessions) = (Arc::clone(&self.identity), Arc::clone(&self.sessions));
        let (id, user) = (id.to_owned(), user.to_owned());
        crate::identity::to_the_end(async move {
            let Some((node, news)) = identity.nodes().set_revoked(&id, revoked).await? else {
                return Ok(None);
            };
            if news {
                let what = if revoked { "revoked" } else { "restored" };
                tracing::warn!(node = node.id, name = node.name, user, "a node was {what}");
            }
            if revoked {
                sessions.expel(&node.id);
            }
            Ok(Some(node))
        })
        .await
    }

    /// Whether a node has an open session.
    pub fn is_connected(&self, node: &str) -> bool {
        self.sessions.requests.is_connected(node)
    }

    /// Asks the agent of a Dataplane for something that its Envoy knows.
    pub async fn ask(
        &self,
        mesh: &str,
        name: &str,
        kind: &str,
        parameters: &serde_json::Value,
    ) -> Result<serde_json::Value, AskError> {
        let proxy = ProxyKey { mesh: mesh.to_owned(), name: name.to_owned() };
        let node = self.registry.owner(&proxy).ok_or(AskError::NotConnected)?;
        self.sessions.requests.ask(&node, kind, parameters).await
    }

    /// Makes a join ticket that leads to this control plane.
    pub async fn create_ticket(
        &self,
        grant: Grant,
        valid_for: Duration,
        uses: u32,
    ) -> Result<Ticket, IdentityError> {
        let address = self.public_address.clone();
        self.identity.create_ticket(&TicketRequest { grant, valid_for, uses, address }).await
    }
}

/// The listeners of the rooms, bound before anything is written: what can't listen doesn't start.
#[derive(Debug)]
pub struct Listeners {
    nodes: TcpListener,
    diagnostics: TcpListener,
}

impl Listeners {
    /// Binds what the configuration asks for. Nothing is served yet.
    pub async fn bind(config: &Config) -> anyhow::Result<Self> {
        let (nodes, diagnostics) = (&config.dp_server, &config.diagnostics);
        Ok(Self {
            nodes: listen(&nodes.interface, nodes.port, "dpServer.port").await?,
            diagnostics: listen(&diagnostics.interface, diagnostics.server_port, "diagnostics.serverPort")
                .await?,
        })
    }
}

impl api::TicketStore for Rooms {
    fn create(&self, request: api::TicketRequest) -> api::TicketFuture<'_> {
        Box::pin(async move {
            let api::TicketRequest { mesh, workloads, valid_for, uses } = request;
            let ticket = self
                .create_ticket(Grant { mesh, workloads }, valid_for, uses)
                .await
                .map_err(|error| error.to_string())?;
            let expires =
                OffsetDateTime::from_unix_timestamp(ticket.expires).map_err(|error| error.to_string())?;
            Ok(api::Ticket { ticket: ticket.to_string(), expires })
        })
    }
}

/// Starts everything that serves nodes. Returns when the store has been read; the tasks end with
/// `control.shutdown`.
pub async fn start(control: &ControlPlane, listeners: Listeners) -> anyhow::Result<Rooms> {
    let config = &control.config;
    let (store, shutdown, tasks) = (&control.store, &control.shutdown, &control.tasks);
    let zone = config.zone().to_owned();
    let node_validity = duration("identity.nodeValidity", &config.identity.node_validity)?;
    let grace = duration("identity.sessionGrace", &config.identity.session_grace)?;
    let deletion_grace =
        duration("meshService.deletionGracePeriod", &config.mesh_service.deletion_grace_period)?;

    let Listeners { nodes, diagnostics } = listeners;
    let nodes_address = nodes.local_addr()?;
    let diagnostics_address = diagnostics.local_addr()?;
    let metrics = Arc::new(Metrics::default());

    let (world, world_task) = World::new(EngineConfig { zone: zone.clone() });
    spawn(control, "world", world::run(world_task, store.clone(), shutdown.clone()));
    spawn(
        control,
        "diagnostics",
        diagnostics::serve(diagnostics, world.clone(), Arc::clone(&metrics), shutdown.clone()),
    );
    let identity = ControlIdentity::open(store.clone(), &zone, node_validity)
        .await
        .context("can't load the zone's control CA")?;
    world.ready().await?;

    let (insights, insight_task) = Insights::new();
    tasks.spawn(session::run_insights(
        insight_task,
        store.clone(),
        world.clone(),
        control.instance_id.clone(),
        shutdown.clone(),
    ));
    let registry = Arc::new(Registry::default());
    let authorities = Arc::new(MeshAuthorities::new(store.clone(), &zone));
    let sessions = Arc::new(Sessions {
        identity: Arc::clone(&identity),
        store: store.clone(),
        world: world.clone(),
        registry: Arc::clone(&registry),
        requests: Requests::default(),
        insights: insights.clone(),
        labels: control.label_context(),
        tokens: control.tokens.clone(),
        token_required: config.token_required(),
        grace: grace.unsigned_abs(),
        shutdown: shutdown.clone(),
        metrics: Arc::clone(&metrics),
    });
    sessions.restore();
    let generators = Generators {
        store: store.clone(),
        world: world.clone(),
        authorities: Arc::clone(&authorities),
        tokens: control.tokens.clone(),
        labels: control.label_context(),
        zone: zone.clone(),
        deletion_grace,
        service_addresses: config.ipam.mesh_service_range(),
        skip_mesh: config.defaults.skip_mesh_creation,
        skip_hostname_generators: config.defaults.skip_hostname_generators,
    };
    generators.zone_defaults().await;
    tasks.spawn(generators::run(generators, shutdown.clone()));

    let issuer = WorkloadIssuer::new(
        world.clone(),
        Arc::clone(&registry),
        authorities,
        insights.clone(),
        control.tokens.clone(),
        config.token_required(),
        &zone,
    );
    let services = NodeServices {
        discovery: Arc::new(Discovery {
            identity: Arc::clone(&identity),
            registry: Arc::clone(&registry),
            world: world.clone(),
            insights,
            metrics: Arc::clone(&metrics),
            shutdown: shutdown.clone(),
        }),
        identity: Arc::new(IdentityService::new(Arc::clone(&identity), issuer, Arc::clone(&metrics))),
        sessions: Arc::new(SessionService::new(Arc::clone(&sessions))),
    };
    let tls = tls::server_config(&identity)?;
    spawn(control, "discovery", discovery::serve(services, nodes, tls, shutdown.clone()));
    let public_address = if config.dp_server.public_address.is_empty() {
        reachable(nodes_address)
    } else {
        config.dp_server.public_address.clone()
    };
    tracing::info!(address = %nodes_address, announced = public_address, zone, "serving nodes");
    Ok(Rooms {
        world,
        identity,
        registry,
        metrics,
        nodes_address,
        diagnostics_address,
        public_address,
        sessions,
    })
}

/// Runs a part; if it fails, the whole control plane ends rather than live on in part.
fn spawn<E: std::fmt::Display + Send + 'static>(
    control: &ControlPlane,
    what: &'static str,
    part: impl Future<Output = Result<(), E>> + Send + 'static,
) {
    let (shutdown, failure) = (control.shutdown.clone(), Arc::clone(&control.failure));
    control.tasks.spawn(async move {
        let result = tokio::select! {
            result = part => result,
            // Each part ends by itself on shutdown; one that waits for a client to go is not waited for long.
            () = async {
                shutdown.cancelled().await;
                tokio::time::sleep(FAREWELL).await;
            } => Ok(()),
        };
        if let Err(error) = result
            && !shutdown.is_cancelled()
        {
            tracing::error!("{what} failed, so this control plane ends: {error}");
            // The first one is the cause.
            let _ = failure.set(format!("{what} failed: {error}"));
            shutdown.cancel();
        }
    });
}

fn duration(key: &str, text: &str) -> anyhow::Result<Duration> {
    let parsed: ursa_model::GoDuration = text
        .parse()
        .map_err(|error| anyhow::anyhow!("configuration key {key:?}: {text:?} is no duration: {error}"))?;
    Ok(Duration::try_from(parsed.to_std())?)
}

/// The address to announce where none was configured: the one that is bound, or this host's name.
fn reachable(bound: SocketAddr) -> String {
    if !bound.ip().is_unspecified() {
        return bound.to_string();
    }
    let host = nix::unistd::gethostname()
        .ok()
        .and_then(|name| name.into_string().ok())
        .filter(|name| !name.is_empty())
        .unwrap_or_else(|| "localhost".to_owned());
    format!("{host}:{}", bound.port())
}
