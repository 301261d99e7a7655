//! A control plane on ephemeral loopback ports, and a node that talks to it as an agent does.

use std::collections::{BTreeMap, HashMap};
use std::future::Future;
use std::time::Duration;

use rcgen::{CertificateParams, KeyPair, PKCS_ECDSA_P256_SHA256};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Status, Streaming};
use ursa_control::identity::nodes::Grant;
use ursa_control::rooms::{self, Rooms};
use ursa_control::{ControlPlane, config, store::Store};
use ursa_model::{Resource, ResourceKey, labels};
use ursa_wire::discovery::{
    self, AggregatedDiscoveryClient, DeltaDiscoveryRequest, DeltaDiscoveryResponse, ErrorDetail,
};
use ursa_wire::identity::{IdentityClient, IssueRequest, IssuedIdentity};
use ursa_wire::join::{JoinClient, JoinRequest, NodeCertificate, RenewRequest};
use ursa_wire::session::{ControlEvent, ControlMessage, NodeEvent, NodeMessage, Register, SessionClient};
use ursa_wire::ticket::Ticket;
use ursa_wire::{tls, type_url};

/// Longer than anything takes; only a failing test waits for it.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) struct Plane {
    pub(crate) control: ControlPlane,
    pub(crate) rooms: Rooms,
    dir: tempfile::TempDir,
}

impl Plane {
    pub(crate) async fn start() -> Self {
        Self::start_in(tempfile::tempdir().unwrap(), "30s").await
    }

    pub(crate) async fn start_with_grace(grace: &str) -> Self {
        Self::start_in(tempfile::tempdir().unwrap(), grace).await
    }

    async fn start_in(dir: tempfile::TempDir, grace: &str) -> Self {
        let flags: Vec<(String, String)> = [
            ("general.workDir", dir.path().to_str().unwrap()),
            ("dpServer.interface", "127.0.0.1"),
            ("dpServer.port", "0"),
            ("diagnostics.serverPort", "0"),
            ("identity.sessionGrace", grace),
        ]
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .into();
        let config = config::load(None, [], &flags).unwrap();
        let listeners = rooms::Listeners::bind(&config).await.unwrap();
        // The last tasks of the one before may still let go of it; a real restart is another process.
        let options = config.store_options();
        let opened = async {
            loop {
                match Store::open(&options) {
                    Ok(store) => return store,
                    Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
                }
            }
        };
        let store = tokio::time::timeout(PATIENCE, opened).await.expect("the store opens");
        let control = ControlPlane::new(config, store);
        let rooms = rooms::start(&control, listeners).await.unwrap();
        let plane = Self { control, rooms, dir };
        plane
            .until("the mesh is ready", || async {
                let identity = plane.get("MeshIdentity", "identity").await?;
                let ready = identity.to_json().to_string().contains("\"type\":\"Ready\"");
                ready.then_some(())
            })
            .await;
        plane
    }

    /// Ends the control plane as a crash would find it, and starts another on the same store.
    pub(crate) async fn restart(self) -> Self {
        self.control.shutdown.cancel();
        self.control.tasks.close();
        self.control.tasks.wait().await;
        drop((self.control, self.rooms));
        Self::start_in(self.dir, "30s").await
    }

    pub(crate) async fn get(&self, kind: &'static str, name: &str) -> Option<std::sync::Arc<Resource>> {
        let mesh = if kind == "Mesh" { "" } else { "default" };
        let key = ResourceKey { kind, mesh: mesh.into(), name: name.into() };
        self.control.store.get(&key).await.unwrap()
    }

    /// Writes a resource as the API would.
    pub(crate) async fn apply(&self, value: Value) {
        let mut resource = Resource::from_json(&value).unwrap();
        resource.meta.labels = labels::compute(&resource, &self.control.label_context()).unwrap();
        let violations = resource.validate();
        assert!(violations.is_empty(), "{violations}");
        match self.control.store.get(&resource.key()).await.unwrap() {
            Some(old) => {
                resource.meta.version = old.meta.version;
                self.control.store.update(resource).await.unwrap();
            }
            None => {
                self.control.store.create(resource).await.unwrap();
            }
        }
    }

    pub(crate) async fn allow(&self, from: &str, to: &str) {
        self.apply(json!({
            "type": "MeshTrafficPermission", "mesh": "default", "name": format!("{from}-{to}"),
            "spec": {
                "targetRef": {"kind": "Dataplane", "labels": {"kuma.io/workload": to}},
                "rules": [{"default": {"allow": [{"spiffeID": {
                    "type": "Exact", "value": format!("spiffe://default.default.mesh.local/workload/{from}")}}]}}],
            },
        }))
        .await;
    }

    pub(crate) async fn until<T, F>(&self, what: &str, mut look: impl FnMut() -> F) -> T
    where
        F: Future<Output = Option<T>>,
    {
        let mut hints = self.control.store.hints();
        let search = async {
            loop {
                if let Some(found) = look().await {
                    return found;
                }
                hints.changed().await.unwrap();
            }
        };
        tokio::time::timeout(PATIENCE, search).await.unwrap_or_else(|_| panic!("never: {what}"))
    }

    pub(crate) async fn ticket(&self, workloads: &[&str]) -> Ticket {
        let grant = Grant {
            mesh: "default".into(),
            workloads: workloads.iter().map(|name| (*name).to_owned()).collect(),
        };
        self.rooms.create_ticket(grant, time::Duration::hours(1), 1).await.unwrap()
    }

    pub(crate) async fn node(&self, workloads: &[&str]) -> Node {
        let ticket = self.ticket(workloads).await;
        Node::join(&ticket, Key::new()).await.unwrap()
    }
}

pub(crate) struct Key(pub KeyPair);

impl Key {
    #[allow(clippy::new_without_default, reason = "a test")]
    pub(crate) fn new() -> Self {
        Self(KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap())
    }

    pub(crate) fn csr(&self) -> Vec<u8> {
        CertificateParams::default().serialize_request(&self.0).unwrap().der().to_vec()
    }

    pub(crate) fn forged_csr(&self, uri: &str) -> Vec<u8> {
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![rcgen::SanType::URI(uri.try_into().unwrap())];
        params.serialize_request(&self.0).unwrap().der().to_vec()
    }
}

pub(crate) async fn join(ticket: &Ticket, key: &Key) -> Result<NodeCertificate, Status> {
    let channel = tls::channel(&ticket.address, tls::joining_config(&ticket.fingerprint).unwrap()).unwrap();
    JoinClient::new(channel)
        .join(JoinRequest { ticket: ticket.secret.clone(), csr_der: key.csr(), node_name: "test".into() })
        .await
}

pub(crate) struct Node {
    pub(crate) certificate: NodeCertificate,
    pub(crate) key: Key,
    pub(crate) address: String,
    pub(crate) channel: Channel,
}

impl Node {
    pub(crate) async fn join(ticket: &Ticket, key: Key) -> Result<Self, Status> {
        let certificate = join(ticket, &key).await?;
        Ok(Self::with(certificate, key, &ticket.address))
    }

    pub(crate) fn with(certificate: NodeCertificate, key: Key, address: &str) -> Self {
        let config =
            tls::node_config(&certificate.ca_pem, &certificate.chain_pem, &key.0.serialize_pem()).unwrap();
        let channel = tls::channel(address, config).unwrap();
        Self { certificate, key, address: address.to_owned(), channel }
    }

    pub(crate) async fn session(&self) -> Session {
        let (sender, receiver) = mpsc::channel(16);
        let answers = SessionClient::new(self.channel.clone())
            .open(ReceiverStream::new(receiver))
            .await
            .unwrap()
            .into_inner();
        Session { sender, answers }
    }

    pub(crate) async fn issue(&self, dataplane: &str, csr: Vec<u8>) -> Result<IssuedIdentity, Status> {
        IdentityClient::new(self.channel.clone())
            .issue(IssueRequest { mesh: "default".into(), dataplane: dataplane.into(), csr_der: csr })
            .await
    }

    pub(crate) async fn renew(&self, csr: Vec<u8>) -> Result<NodeCertificate, Status> {
        JoinClient::new(self.channel.clone()).renew(RenewRequest { csr_der: csr }).await
    }

    pub(crate) async fn ads(&self, dataplane: &str) -> Ads {
        let (sender, receiver) = mpsc::channel(64);
        let responses = AggregatedDiscoveryClient::new(self.channel.clone())
            .delta(ReceiverStream::new(receiver))
            .await
            .unwrap()
            .into_inner();
        Ads {
            sender,
            responses,
            node: Some(discovery::Node { id: format!("default.{dataplane}"), ..discovery::Node::default() }),
            held: BTreeMap::new(),
        }
    }
}

pub(crate) struct Session {
    pub(crate) sender: mpsc::Sender<NodeMessage>,
    pub(crate) answers: Streaming<ControlMessage>,
}

impl Session {
    pub(crate) async fn register(&mut self, dataplane: Value) -> ControlEvent {
        self.register_with(dataplane, "").await
    }

    /// Registers with a dataplane token.
    pub(crate) async fn register_with(&mut self, dataplane: Value, token: &str) -> ControlEvent {
        let register = Register { dataplane_json: dataplane.to_string(), token: token.to_owned() };
        self.sender.send(NodeEvent::Register(register).into()).await.unwrap();
        self.next().await
    }

    pub(crate) async fn next(&mut self) -> ControlEvent {
        let message = tokio::time::timeout(PATIENCE, self.answers.next()).await.unwrap();
        message.unwrap().unwrap().event.unwrap()
    }

    pub(crate) async fn registered(&mut self, name: &str, workload: &str, address: &str) {
        let event = self.register(dataplane(name, workload, address)).await;
        assert!(matches!(&event, ControlEvent::Registered(_)), "{event:?}");
    }
}

pub(crate) fn dataplane(name: &str, workload: &str, address: &str) -> Value {
    json!({
        "type": "Dataplane", "mesh": "default", "name": name,
        "labels": {"kuma.io/workload": workload},
        "networking": {
            "address": address,
            "inbound": [{"name": "main", "port": 8080, "protocol": "http"}],
        },
    })
}

/// A delta stream that subscribes and acknowledges like the agent.
pub(crate) struct Ads {
    sender: mpsc::Sender<DeltaDiscoveryRequest>,
    pub(crate) responses: Streaming<DeltaDiscoveryResponse>,
    node: Option<discovery::Node>,
    /// Type and name → version.
    pub(crate) held: BTreeMap<(String, String), String>,
}

impl Ads {
    pub(crate) async fn send(&mut self, request: DeltaDiscoveryRequest) {
        let request = DeltaDiscoveryRequest { node: self.node.take(), ..request };
        self.sender.send(request).await.unwrap();
    }

    pub(crate) async fn subscribe(&mut self, type_url: &str, initial: HashMap<String, String>) {
        self.send(DeltaDiscoveryRequest {
            type_url: type_url.into(),
            resource_names_subscribe: vec!["*".into()],
            initial_resource_versions: initial,
            ..DeltaDiscoveryRequest::default()
        })
        .await;
    }

    pub(crate) async fn subscribe_all(&mut self) {
        for type_url in type_url::ADD_ORDER {
            self.subscribe(type_url, HashMap::new()).await;
        }
    }

    /// The next response, not acknowledged.
    pub(crate) async fn receive(&mut self) -> Result<DeltaDiscoveryResponse, Status> {
        let response = tokio::time::timeout(PATIENCE, self.responses.next()).await.expect("a response");
        let response = response.expect("an open stream")?;
        for resource in &response.resources {
            let resource = discovery::Resource::parse(resource).unwrap();
            self.held.insert((response.type_url.clone(), resource.name), resource.version);
        }
        for name in &response.removed_resources {
            self.held.remove(&(response.type_url.clone(), name.clone()));
        }
        Ok(response)
    }

    pub(crate) async fn answer(&mut self, response: &DeltaDiscoveryResponse, error: Option<&str>) {
        self.send(DeltaDiscoveryRequest {
            type_url: response.type_url.clone(),
            response_nonce: response.nonce.clone(),
            error_detail: error.map(|message| ErrorDetail { code: 13, message: message.into() }),
            ..DeltaDiscoveryRequest::default()
        })
        .await;
    }

    /// The next response, acknowledged.
    pub(crate) async fn take(&mut self) -> DeltaDiscoveryResponse {
        let response = self.receive().await.unwrap();
        self.answer(&response, None).await;
        response
    }

    /// Takes responses until every type is synced; returns them.
    pub(crate) async fn sync(&mut self) -> Vec<DeltaDiscoveryResponse> {
        let mut missing: Vec<&str> = type_url::ADD_ORDER.into();
        let mut all = Vec::new();
        while !missing.is_empty() {
            let response = self.take().await;
            if response.is_synced() {
                missing.retain(|wanted| *wanted != response.type_url);
            }
            all.push(response);
        }
        all
    }

    /// Takes responses until `done` holds of what is held.
    pub(crate) async fn until(
        &mut self,
        what: &str,
        done: impl Fn(&BTreeMap<(String, String), String>) -> bool,
    ) -> Vec<DeltaDiscoveryResponse> {
        let mut all = Vec::new();
        while !done(&self.held) {
            let response = tokio::time::timeout(PATIENCE, self.take())
                .await
                .unwrap_or_else(|_| panic!("never: {what}; held: {:?}", self.held.keys()));
            all.push(response);
        }
        all
    }

    /// Everything that was sent and not yet read has been read when this returns: a round trip behind it.
    pub(crate) async fn settle(&mut self) -> Vec<DeltaDiscoveryResponse> {
        let mut all = Vec::new();
        while let Ok(response) = tokio::time::timeout(Duration::from_millis(300), self.take()).await {
            all.push(response);
        }
        all
    }

    pub(crate) fn names(&self, type_url: &str) -> Vec<&str> {
        self.held.keys().filter(|(kind, _)| kind == type_url).map(|(_, name)| name.as_str()).collect()
    }
}
