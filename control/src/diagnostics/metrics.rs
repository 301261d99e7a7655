//! What the control plane counts.

use std::fmt;

use prometheus_client::encoding::{EncodeLabelSet, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use ursa_engine::TypeUrl;
use ursa_wire::discovery::DeltaDiscoveryResponse;

/// The content type of [`Metrics::encode`].
pub(super) const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByType {
    r#type: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByKind {
    kind: &'static str,
}

/// The counters.
pub struct Metrics {
    registry: Registry,
    streams: Gauge,
    sessions: Gauge,
    pushes: Family<ByType, Counter>,
    resources: Family<ByType, Counter>,
    removals: Family<ByType, Counter>,
    bytes: Family<ByType, Counter>,
    rejections: Family<ByType, Counter>,
    certificates: Family<ByKind, Counter>,
    refusals: Counter,
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::with_prefix("ursa_control");
        let metrics = Self {
            streams: Gauge::default(),
            sessions: Gauge::default(),
            pushes: Family::default(),
            resources: Family::default(),
            removals: Family::default(),
            bytes: Family::default(),
            rejections: Family::default(),
            certificates: Family::default(),
            refusals: Counter::default(),
            registry: Registry::default(),
        };
        registry.register("discovery_streams", "Open discovery streams", metrics.streams.clone());
        registry.register("sessions", "Open sessions of nodes", metrics.sessions.clone());
        registry.register("discovery_pushes", "Discovery responses sent", metrics.pushes.clone());
        registry.register("discovery_resources", "Resources sent", metrics.resources.clone());
        registry.register("discovery_removals", "Removals sent", metrics.removals.clone());
        registry.register(
            "discovery_pushed_bytes",
            "Bytes of resources in discovery responses",
            metrics.bytes.clone(),
        );
        registry.register(
            "discovery_rejections",
            "Resources that Envoys refused",
            metrics.rejections.clone(),
        );
        registry.register("certificates_issued", "Certificates issued", metrics.certificates.clone());
        registry.register(
            "identity_refusals",
            "Requests for an identity that were refused",
            metrics.refusals.clone(),
        );
        Self { registry, ..metrics }
    }
}

impl Metrics {
    /// A discovery stream opened.
    pub fn stream_opened(&self) {
        self.streams.inc();
    }

    /// A discovery stream closed.
    pub fn stream_closed(&self) {
        self.streams.dec();
    }

    /// A session opened.
    pub fn session_opened(&self) {
        self.sessions.inc();
    }

    /// A session closed.
    pub fn session_closed(&self) {
        self.sessions.dec();
    }

    /// A response was handed to its stream.
    pub fn pushed(&self, response: &DeltaDiscoveryResponse) {
        let Some(kind) = TypeUrl::parse(&response.type_url) else { return };
        let label = ByType { r#type: name(kind) };
        self.pushes.get_or_create(&label).inc();
        self.resources.get_or_create(&label).inc_by(count(response.resources.len()));
        self.removals.get_or_create(&label).inc_by(count(response.removed_resources.len()));
        let bytes = response.resources.iter().map(bytes::Bytes::len).sum();
        self.bytes.get_or_create(&label).inc_by(count(bytes));
    }

    /// Envoys refused resources.
    pub fn rejected(&self, kind: TypeUrl, resources: usize) {
        self.rejections.get_or_create(&ByType { r#type: name(kind) }).inc_by(count(resources));
    }

    /// A certificate was issued, to a `node` or a `workload`.
    pub fn certificate_issued(&self, kind: &'static str) {
        self.certificates.get_or_create(&ByKind { kind }).inc();
    }

    /// A request for an identity was refused.
    pub fn identity_refused(&self) {
        self.refusals.inc();
    }

    /// How many responses of a type were sent.
    pub fn pushes(&self, kind: TypeUrl) -> u64 {
        self.pushes.get_or_create(&ByType { r#type: name(kind) }).get()
    }

    /// In the OpenMetrics text format.
    pub fn encode(&self) -> Result<String, fmt::Error> {
        let mut out = String::new();
        text::encode(&mut out, &self.registry)?;
        Ok(out)
    }
}

fn count(number: usize) -> u64 {
    u64::try_from(number).unwrap_or(u64::MAX)
}

fn name(kind: TypeUrl) -> &'static str {
    match kind {
        TypeUrl::Cluster => "cluster",
        TypeUrl::Endpoint => "endpoint",
        TypeUrl::Extension => "extension",
        TypeUrl::Listener => "listener",
        TypeUrl::Route => "route",
        TypeUrl::Secret => "secret",
        TypeUrl::Name => "name",
        TypeUrl::Identity => "identity",
    }
}
