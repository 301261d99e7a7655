//! A machine that speaks control's protocol by itself, and asks for what isn't its own.

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, SanType};
use serde_json::{Value, json};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Code, Status};
use ursa_tests::lab::mesh::{Control, Node};
use ursa_tests::lab::net::Host;
use ursa_tests::lab::pair::SOON;
use ursa_tests::lab::{Lab, Programs};
use ursa_wire::discovery::{self, AggregatedDiscoveryClient, DeltaDiscoveryRequest};
use ursa_wire::identity::{IdentityClient, IssueRequest, IssuedIdentity};
use ursa_wire::join::{JoinClient, RenewRequest};
use ursa_wire::session::{ControlEvent, NodeEvent, NodeMessage, Register, SessionClient};
use ursa_wire::{tls, type_url};
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};

const BACKEND: &str = "spiffe://default.lab.mesh.local/workload/backend";
const WEB: &str = "spiffe://default.lab.mesh.local/workload/web";

/// What an agent keeps of its node.
#[derive(Clone)]
struct Credentials {
    node_id: String,
    address: String,
    ca: String,
    chain: String,
    key: String,
}

impl Credentials {
    fn of(node: &Node) -> Self {
        let dir = node.state_dir().join("node");
        let stored: Value = serde_json::from_slice(&std::fs::read(dir.join("node.json")).unwrap()).unwrap();
        let text = |field: &str| stored[field].as_str().unwrap().to_owned();
        Self {
            node_id: text("nodeId"),
            address: text("address"),
            ca: text("caPem"),
            chain: text("chainPem"),
            key: std::fs::read_to_string(dir.join("key.pem")).unwrap(),
        }
    }

    fn channel(&self) -> Channel {
        tls::channel(&self.address, tls::node_config(&self.ca, &self.chain, &self.key).unwrap()).unwrap()
    }
}

/// A request with every name that its sender would like to have.
fn forged(key: &KeyPair) -> Vec<u8> {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, BACKEND);
    params.subject_alt_names = vec![
        SanType::URI(BACKEND.try_into().unwrap()),
        SanType::URI("spiffe://lab.ursa.local/node/another".try_into().unwrap()),
        SanType::DnsName("backend.svc.mesh.local".try_into().unwrap()),
        SanType::DnsName("control.ursa.local".try_into().unwrap()),
    ];
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.serialize_request(key).unwrap().der().to_vec()
}

async fn issue(channel: Channel, name: &str, csr_der: Vec<u8>) -> Result<IssuedIdentity, Status> {
    let request = IssueRequest { mesh: "default".into(), dataplane: name.into(), csr_der };
    IdentityClient::new(channel).issue(request).await
}

/// The answer to a registration.
async fn register(channel: Channel, dataplane: Value) -> anyhow::Result<ControlEvent> {
    let (sender, messages) = tokio::sync::mpsc::channel(4);
    let register = Register { dataplane_json: dataplane.to_string(), token: String::new() };
    sender.send(NodeMessage::from(NodeEvent::Register(register))).await?;
    let mut answers = SessionClient::new(channel).open(ReceiverStream::new(messages)).await?.into_inner();
    let answer = answers.message().await?.and_then(|message| message.event);
    answer.ok_or_else(|| anyhow::anyhow!("no answer"))
}

/// What a discovery stream for a Dataplane ends with, unless it has an answer.
async fn discover(channel: Channel, name: &str) -> Result<(), Status> {
    let (sender, requests) = tokio::sync::mpsc::channel(4);
    let request = DeltaDiscoveryRequest {
        node: Some(discovery::Node { id: format!("default.{name}"), ..discovery::Node::default() }),
        type_url: type_url::SECRET.into(),
        resource_names_subscribe: vec!["*".into()],
        ..DeltaDiscoveryRequest::default()
    };
    sender.send(request).await.map_err(|error| Status::internal(error.to_string()))?;
    let mut client = AggregatedDiscoveryClient::new(channel);
    client.delta(ReceiverStream::new(requests)).await?.into_inner().message().await.map(drop)
}

fn dataplane(name: &str, workload: &str, host: &Host) -> Value {
    json!({
        "type": "Dataplane", "mesh": "default", "name": name, "labels": {"kuma.io/workload": workload},
        "networking": {"address": host.v4, "inbound": [{"name": "http", "port": 8080, "protocol": "http"}]},
    })
}

/// Control, with web on one node and backend on another.
struct Setting {
    control: Control,
    a: Node,
    b: Node,
    lab: Lab,
}

fn setting() -> Setting {
    let mut lab = Lab::new(&Programs::discover().unwrap()).unwrap();
    let control = Control::start(&mut lab).unwrap();
    let tickets = (control.ticket(&["web"]).unwrap(), control.ticket(&["backend"]).unwrap());
    let mut a = Node::join(&mut lab, "node-a", &tickets.0).unwrap();
    let mut b = Node::join(&mut lab, "node-b", &tickets.1).unwrap();
    for (node, name) in [(&mut a, "web"), (&mut b, "backend")] {
        let host = lab.net.host(name).unwrap();
        node.add(name, &host).unwrap();
        node.wait_ready(name, SOON).unwrap();
    }
    Setting { control, a, b, lab }
}

/// Every name in a certificate, whatever its kind.
fn names(pem: &str) -> Vec<String> {
    let block = pem::parse(pem).unwrap();
    let (_, certificate) = X509Certificate::from_der(block.contents()).unwrap();
    assert!(!certificate.is_ca(), "a CA was issued");
    let subject = certificate.subject().iter_attributes().map(|name| format!("{name:?}"));
    let san = certificate.subject_alternative_name().unwrap().unwrap();
    let others = san.value.general_names.iter().map(|name| match name {
        GeneralName::URI(uri) => (*uri).to_owned(),
        other => format!("{other:?}"),
    });
    subject.chain(others).collect()
}

#[test]
fn names_in_a_request_are_not_believed() {
    let setting = setting();
    let web = Credentials::of(&setting.a);
    let host = &setting.a.host;
    let issued = host
        .within(async || {
            let key = KeyPair::generate()?;
            Ok(issue(web.channel(), "web", forged(&key)).await?)
        })
        .unwrap();
    assert_eq!(issued.spiffe_id, WEB);
    assert_eq!(names(&issued.chain_pem), [WEB], "the certificate has other names than control's");
    let log = setting.control.daemon.wait_said(&["issued a workload certificate", "web"], SOON).unwrap();
    assert!(log.contains(WEB) && log.contains(&web.node_id), "{log}");

    // The node's own certificate is no better: names in its renewal are those of the node, whatever is asked for.
    let renewed = host
        .within(async || {
            let csr_der = forged(&KeyPair::from_pem(&web.key)?);
            Ok(JoinClient::new(web.channel()).renew(RenewRequest { csr_der }).await?)
        })
        .unwrap();
    assert_eq!(names(&renewed.chain_pem), [format!("spiffe://lab.ursa.local/node/{}", web.node_id)]);

    // A request that its key didn't sign proves nothing.
    let refused = host
        .within(async || {
            let mut csr = forged(&KeyPair::generate()?);
            let last = csr.len() - 1;
            csr[last] ^= 1;
            Ok(issue(web.channel(), "web", csr).await)
        })
        .unwrap()
        .unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
    setting.control.daemon.wait_said(&["WARN", "refused a certificate for", "web"], SOON).unwrap();
}

#[test]
fn a_nodes_certificate_opens_nothing_of_another_node() {
    let setting = setting();
    let (stranger, host) = (Credentials::of(&setting.a), &setting.a.host);
    let log = &setting.control.daemon;
    host.within(async || {
        let refused = issue(stranger.channel(), "backend", forged(&KeyPair::generate()?)).await.unwrap_err();
        assert_eq!(refused.code(), Code::PermissionDenied, "{refused}");
        assert!(refused.message().contains("not registered by this node"), "{refused}");

        let refused = discover(stranger.channel(), "backend").await.unwrap_err();
        assert_eq!(refused.code(), Code::PermissionDenied, "{refused}");

        // Backend's name as its own workload's, backend's workload under a name of its own, and both.
        for (name, workload) in [("backend", "web"), ("mine", "backend"), ("backend", "backend")] {
            let event = register(stranger.channel(), dataplane(name, workload, host)).await?;
            let ControlEvent::Refused(refused) = event else { panic!("{name} as {workload}: {event:?}") };
            assert!(!refused.reason.is_empty());
        }

        // Another node's key: a renewal is for the key of the connection only.
        let other = Credentials::of(&setting.b);
        let csr_der = forged(&KeyPair::from_pem(&other.key)?);
        let refused = JoinClient::new(stranger.channel()).renew(RenewRequest { csr_der }).await.unwrap_err();
        assert_eq!(refused.code(), Code::PermissionDenied, "{refused}");
        Ok(())
    })
    .unwrap();
    log.wait_said(&["WARN", "refused a certificate for", "backend", &stranger.node_id], SOON).unwrap();
    log.wait_said(&["WARN", "refused a discovery stream", "backend", &stranger.node_id], SOON).unwrap();
    log.wait_said(&["WARN", "refused a registration", "mine", &stranger.node_id], SOON).unwrap();
    log.wait_said(&["WARN", "refused a node's renewal"], SOON).unwrap();
    assert!(setting.control.get("dataplane", "mine").is_err());
    let backend = setting.control.get("dataplane", "backend").unwrap();
    assert_eq!(backend["labels"]["kuma.io/workload"], "backend");
    drop(setting.lab);
}

#[test]
fn certificates_that_control_did_not_sign_end_at_the_handshake() {
    let setting = setting();
    let (real, host) = (Credentials::of(&setting.a), &setting.a.host);

    // All names right, and signed by an authority that has the right name too.
    let (ca_key, key) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.distinguished_name.push(DnType::OrganizationName, "Ursa");
    params.distinguished_name.push(DnType::CommonName, "lab.ursa.local");
    let ca = Issuer::new(params, ca_key);
    let mut params = CertificateParams::default();
    params.subject_alt_names =
        vec![SanType::URI(format!("spiffe://lab.ursa.local/node/{}", real.node_id).try_into().unwrap())];
    let made = params.signed_by(&key, &ca).unwrap().pem();
    let self_made = Credentials { chain: made, key: key.serialize_pem(), ..real.clone() };

    // A workload's certificate is the mesh's, not control's.
    let (leaf, key) = host
        .within(async || {
            let key = KeyPair::generate()?;
            let issued = issue(real.channel(), "web", forged(&key)).await?;
            Ok((issued.chain_pem, key.serialize_pem()))
        })
        .unwrap();
    let workload = Credentials { chain: leaf, key, ..real.clone() };

    let log = &setting.control.daemon;
    for (number, impostor) in [self_made, workload].into_iter().enumerate() {
        let refused = host
            .within(async || Ok(issue(impostor.channel(), "web", forged(&KeyPair::generate()?)).await))
            .unwrap()
            .unwrap_err();
        // No answer of control's: the connection ended, at which moment of the client's view is chance.
        assert!(matches!(refused.code(), Code::Unavailable | Code::Cancelled | Code::Unknown), "{refused}");
        log.wait_said(&["WARN", "TLS handshake failed", &host.v4], SOON).unwrap();
        assert!(log.times_said("TLS handshake failed") > number, "nothing said of impostor {number}");
    }

    // None at all gets through the handshake, as for a join, and no further.
    let fingerprint = tls::fingerprint(pem::parse(&real.ca).unwrap().contents());
    let refused = host
        .within(async || {
            let channel = tls::channel(&real.address, tls::joining_config(&fingerprint)?)?;
            Ok(issue(channel, "web", forged(&KeyPair::generate()?)).await)
        })
        .unwrap()
        .unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated, "{refused}");
    assert!(refused.message().contains("ursa join"), "{refused}");
    log.wait_said(&["WARN", "refused: this needs a node certificate"], SOON).unwrap();
}
