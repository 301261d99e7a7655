//! A workload can't get another's identity: each attempt is refused with a reason, and yields no certificate.

use std::collections::HashMap;
use std::time::Duration;

use crate::support::{Key, Node, PATIENCE, Plane, dataplane, join};
use serde_json::json;
use tonic::Code;
use ursa_control::identity::ca;
use ursa_control::tokens::{DataplaneClaims, TokenKind};
use ursa_wire::session::{ControlEvent, NodeEvent, Register};
use ursa_wire::{tls, type_url};
use x509_parser::prelude::{FromDer as _, X509Certificate};

/// Nobody takes a message for so long: nobody will.
const STUCK: Duration = Duration::from_secs(1);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ticket_belongs_to_the_first_key_that_uses_it() {
    let plane = Plane::start().await;
    let ticket = plane.ticket(&["web"]).await;
    let (owner, thief) = (Key::new(), Key::new());
    let first = join(&ticket, &owner).await.unwrap();
    let again = join(&ticket, &owner).await.unwrap();
    assert_eq!(first.node_id, again.node_id, "a retry is the same node");
    let refused = join(&ticket, &thief).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
    assert!(refused.message().contains("already used by another key"), "{refused}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wrong_tickets_and_wrong_control_planes_are_refused() {
    let plane = Plane::start().await;
    let mut ticket = plane.ticket(&["web"]).await;
    ticket.secret = "made up".into();
    let refused = join(&ticket, &Key::new()).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
    assert!(refused.message().contains("not known here"), "{refused}");

    let mut ticket = plane.ticket(&["web"]).await;
    ticket.fingerprint = ca::hex_digest(b"another CA");
    assert!(join(&ticket, &Key::new()).await.is_err(), "the node trusts only the ticket's CA");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_registers_only_what_it_was_granted() {
    let plane = Plane::start().await;
    let node = plane.node(&["web"]).await;
    let mut session = node.session().await;
    for (attempt, wanted) in [
        (dataplane("backend-1", "backend", "10.0.0.2"), "not granted"),
        (
            serde_json::json!({"type": "Dataplane", "mesh": "default", "name": "x", "networking": {"address": "10.0.0.2"}}),
            "not granted",
        ),
        (serde_json::json!({"type": "Mesh", "name": "x"}), "registers Dataplanes"),
        (
            serde_json::json!({"type": "Dataplane", "mesh": "default", "name": "web-1", "labels": {"kuma.io/workload": "web"}}),
            "not valid",
        ),
    ] {
        let event = session.register(attempt.clone()).await;
        let ControlEvent::Refused(refused) = event else { panic!("{attempt} was taken") };
        assert!(refused.reason.contains(wanted), "{attempt}: {}", refused.reason);
        assert!(refused.permanent);
    }
    assert!(plane.get("Dataplane", "backend-1").await.is_none());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_gets_no_identity_configuration_or_name_of_anothers_workload() {
    let plane = Plane::start().await;
    let (backend, stranger) = (plane.node(&["backend"]).await, plane.node(&["web"]).await);
    let mut session = backend.session().await;
    session.registered("backend-1", "backend", "10.0.0.2").await;

    let refused = stranger.issue("backend-1", Key::new().csr()).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
    assert!(refused.message().contains("not registered by this node"), "{refused}");

    let mut ads = stranger.ads("backend-1").await;
    ads.subscribe(type_url::LISTENER, HashMap::new()).await;
    assert_eq!(ads.receive().await.unwrap_err().code(), Code::PermissionDenied);

    // Neither while its owner is there, nor by relabelling the name while it is away.
    let mut other = stranger.session().await;
    let event = other.register(dataplane("backend-1", "web", "10.0.0.9")).await;
    assert!(matches!(event, ControlEvent::Refused(_)), "{event:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_of_a_request_but_its_key_is_believed() {
    let plane = Plane::start().await;
    let node = plane.node(&["web"]).await;
    let mut session = node.session().await;
    session.registered("web-1", "web", "10.0.0.1").await;
    let key = Key::new();
    let forged = key.forged_csr("spiffe://default.default.mesh.local/workload/backend");
    let issued = plane
        .until("the world knows web-1", || async { node.issue("web-1", forged.clone()).await.ok() })
        .await;
    assert_eq!(issued.spiffe_id, "spiffe://default.default.mesh.local/workload/web");
    assert_eq!(issued.secret_name, "kri_mid_default_default__identity_");
    let leaf = pem::parse(&issued.chain_pem).unwrap();
    assert_eq!(ca::subject_of(leaf.contents()).unwrap().0, issued.spiffe_id);
    let (_, parsed) = X509Certificate::from_der(leaf.contents()).unwrap();
    assert_eq!(parsed.subject_alternative_name().unwrap().unwrap().value.general_names.len(), 1);
    let root = pem::parse(&issued.bundle_pem).unwrap();
    let (_, root) = X509Certificate::from_der(root.contents()).unwrap();
    parsed.verify_signature(Some(root.public_key())).unwrap();
    let life = parsed.validity().not_after.timestamp() - time::OffsetDateTime::now_utc().unix_timestamp();
    assert!((47 * 3600..=48 * 3600).contains(&life), "{life}");

    let refused = node.issue("web-1", b"nonsense".to_vec()).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn workload_certificates_and_none_at_all_open_nothing() {
    let plane = Plane::start().await;
    let node = plane.node(&["web"]).await;
    let mut session = node.session().await;
    session.registered("web-1", "web", "10.0.0.1").await;
    let key = Key::new();
    let issued =
        plane.until("the world knows web-1", || async { node.issue("web-1", key.csr()).await.ok() }).await;

    // A mesh certificate is not signed by the control CA: the handshake fails.
    let certificate =
        ursa_wire::join::NodeCertificate { chain_pem: issued.chain_pem, ..node.certificate.clone() };
    let workload = Node::with(certificate, key, &node.address);
    assert!(workload.issue("web-1", Key::new().csr()).await.is_err());

    let fingerprint = plane.rooms.identity.authority().fingerprint();
    let channel = tls::channel(&node.address, tls::joining_config(&fingerprint).unwrap()).unwrap();
    let anonymous = Node {
        channel,
        certificate: node.certificate.clone(),
        key: Key::new(),
        address: node.address.clone(),
    };
    let refused = anonymous.issue("web-1", Key::new().csr()).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated);
    assert!(refused.message().contains("ursa join"), "{refused}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_renews_itself_and_nobody_else() {
    let plane = Plane::start().await;
    let (node, other) = (plane.node(&["web"]).await, plane.node(&["backend"]).await);
    let renewed = node.renew(node.key.csr()).await.unwrap();
    assert_eq!(renewed.node_id, node.certificate.node_id);
    let refused = node.renew(other.key.csr()).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);

    // Without its (ended) certificate the unchanged key is proof enough; an unknown key is none.
    let fingerprint = plane.rooms.identity.authority().fingerprint();
    let channel = tls::channel(&node.address, tls::joining_config(&fingerprint).unwrap()).unwrap();
    let anonymous =
        Node { channel, certificate: renewed.clone(), key: Key::new(), address: node.address.clone() };
    assert_eq!(anonymous.renew(node.key.csr()).await.unwrap().node_id, renewed.node_id);
    assert_eq!(anonymous.renew(Key::new().csr()).await.unwrap_err().code(), Code::PermissionDenied);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_vouches_until_it_is_revoked() {
    let plane = Plane::start().await;
    let tokens = &plane.control.tokens;
    tokens.ensure_signing_key(&TokenKind::Dataplane { mesh: "default".into() }).await.unwrap();
    let claims =
        DataplaneClaims { mesh: "default".into(), workload: "api".into(), ..DataplaneClaims::default() };
    let token = tokens.dataplane_token(claims, time::Duration::hours(1)).await.unwrap();
    let node = plane.node(&["web"]).await;
    let mut session = node.session().await;

    // Wrong for this workload, though the ticket would do without it.
    let event = session.register_with(dataplane("web-1", "web", "10.0.0.1"), &token).await;
    let ControlEvent::Refused(refused) = event else { panic!("{event:?}") };
    assert!(refused.reason.contains("not allowed with this token"), "{}", refused.reason);

    let event = session.register_with(dataplane("api-1", "api", "10.0.0.3"), &token).await;
    assert!(matches!(event, ControlEvent::Registered(_)), "{event:?}");
    let csr = Key::new().csr();
    let issued = plane.until("an identity", || async { node.issue("api-1", csr.clone()).await.ok() }).await;
    assert_eq!(issued.spiffe_id, "spiffe://default.default.mesh.local/workload/api");

    let jti = tokens.verify_dataplane("default", &token).await.unwrap().registered.jti;
    let list = base64::Engine::encode(&base64::engine::general_purpose::STANDARD, &jti);
    plane
        .apply(serde_json::json!({
            "type": "Secret", "mesh": "default", "name": "dataplane-token-revocations-default", "data": list,
        }))
        .await;
    let refused = node.issue("api-1", csr).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
    assert!(refused.message().contains("is revoked"), "{refused}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_does_not_read_can_not_outlive_its_revocation() {
    let plane = Plane::start().await;
    let node = plane.node(&["web"]).await;
    let mut session = node.session().await;
    session.registered("web-1", "web", "10.0.0.1").await;

    // Answers that nobody reads fill the way back, and then the control plane takes no more either.
    let stuck = async {
        let nonsense = Register {
            dataplane_json: json!({"type": "x".repeat(16 << 10)}).to_string(),
            ..Register::default()
        };
        let event = NodeEvent::Register(nonsense);
        while tokio::time::timeout(STUCK, session.sender.send(event.clone().into())).await.is_ok() {}
    };
    tokio::time::timeout(PATIENCE, stuck).await.expect("it is stuck in the end");

    let id = &node.certificate.node_id;
    assert!(plane.rooms.is_connected(id));
    plane.rooms.set_revoked(id, true, "the operator").await.unwrap();
    let ended = async {
        while plane.rooms.is_connected(id) {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, ended).await.expect("the session ends");
}
