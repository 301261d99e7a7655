//! What operators see of a proxy: how much it was sent, and how far its Envoy has come.

use std::time::Duration;

use crate::support::{Node, PATIENCE, Plane};
use tonic::Code;
use ursa_model::types::dataplane_insight::{Count, DataplaneInsight, TypeSync};
use ursa_model::types::mesh_service::{MeshService, TlsStatus};
use ursa_wire::discovery::{Applied, DeltaDiscoveryRequest, DeltaDiscoveryResponse, Rejection};
use ursa_wire::type_url;

async fn insight(plane: &Plane) -> Option<DataplaneInsight> {
    plane.get("DataplaneInsight", "web-1").await?.spec_as().ok()
}

fn of<'a>(insight: &'a DataplaneInsight, type_url: &str) -> Option<&'a TypeSync> {
    insight.sync.iter().find(|sync| sync.type_url == type_url)
}

fn about(response: &DeltaDiscoveryResponse, applied: Applied) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest {
        type_url: response.type_url.clone(),
        response_nonce: response.nonce.clone(),
        applied: Some(Applied { through: response.nonce.clone(), ..applied }),
        ..DeltaDiscoveryRequest::default()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agents_acknowledgement_is_not_its_envoys() {
    let plane = Plane::start().await;
    let node = plane.node(&["web"]).await;
    let mut session = node.session().await;
    session.registered("web-1", "web", "10.0.0.1").await;
    plane
        .until("MeshService web is complete", || async {
            let service = plane.get("MeshService", "web").await?;
            let status = service.status_as::<MeshService>().ok()?;
            let ready = status.tls.is_some_and(|tls| tls.status == TlsStatus::Ready);
            (ready && !status.vips.is_empty() && !status.addresses.is_empty()).then_some(())
        })
        .await;
    let mut ads = node.ads("web-1").await;
    ads.send(DeltaDiscoveryRequest {
        type_url: type_url::LISTENER.into(),
        resource_names_subscribe: vec!["*".into()],
        applied: Some(Applied::default()),
        ..DeltaDiscoveryRequest::default()
    })
    .await;
    // Stored, but no Envoy there. What the new Dataplane brings about arrives in more than one response.
    let no_envoy = || Applied { no_envoy: true, ..Applied::default() };
    let mut response = ads.receive().await.unwrap();
    ads.send(about(&response, no_envoy())).await;
    while let Ok(next) = tokio::time::timeout(Duration::from_millis(500), ads.receive()).await {
        response = next.unwrap();
        ads.send(about(&response, no_envoy())).await;
    }
    let ((_, name), version) = ads.held.iter().next().unwrap();
    let (name, version) = (name.clone(), version.clone());
    plane
        .until("listeners are pending", || async {
            let insight = insight(&plane).await?;
            let listeners = of(&insight, type_url::LISTENER)?;
            let status = insight.subscriptions.last()?.status.clone()?;
            let lds = status.lds?;
            (insight.envoy_disconnected
                && listeners.pending == listeners.total
                && lds.responses_sent >= Count(1)
                && lds.responses_acknowledged == Count(0)
                && status.last_update_time.is_some())
            .then_some(())
        })
        .await;
    // It came, and refused one.
    let refusal = Rejection { name: name.clone(), version, message: "no".into() };
    ads.send(about(&response, Applied { refused: vec![refusal], ..Applied::default() })).await;
    plane
        .until("the refusal", || async {
            let insight = insight(&plane).await?;
            let listeners = of(&insight, type_url::LISTENER)?;
            let lds = insight.subscriptions.last()?.status.clone()?.lds?;
            (!insight.envoy_disconnected
                && listeners.refused == 1
                && listeners.pending == 0
                && lds.responses_rejected >= Count(1)
                && insight.rejections.first()?.name == name)
                .then_some(())
        })
        .await;
    // A new Envoy takes it: nothing was sent anew, and yet the refusal is over.
    ads.send(about(&response, Applied::default())).await;
    plane
        .until("nothing is refused any more", || async {
            let insight = insight(&plane).await?;
            (insight.rejections.is_empty() && of(&insight, type_url::LISTENER)?.refused == 0).then_some(())
        })
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_secrets_acknowledged_version_is_known_and_pushes_cost_few_writes() {
    let plane = Plane::start().await;
    let node = plane.node(&["*"]).await;
    let mut session = node.session().await;
    session.registered("web-1", "web", "10.0.0.1").await;
    let mut ads = node.ads("web-1").await;
    ads.subscribe_all().await;
    ads.sync().await;
    ads.until("web has a trust bundle", |held| held.keys().any(|(kind, _)| kind == type_url::SECRET)).await;
    ads.settle().await;
    let held: Vec<_> = ads.held.iter().filter(|((kind, _), _)| kind == type_url::SECRET).collect();
    assert!(!held.is_empty());
    plane
        .until("control knows which version of the bundle is acknowledged", || async {
            let insight = insight(&plane).await?;
            let secrets = of(&insight, type_url::SECRET)?;
            held.iter()
                .all(|((_, name), version)| secrets.acknowledged.get(name) == Some(*version))
                .then_some(())
        })
        .await;

    let before = plane.get("DataplaneInsight", "web-1").await.unwrap().meta.version;
    let started = std::time::Instant::now();
    for round in 0..40 {
        session.registered("backend-1", "backend", &format!("10.0.1.{round}")).await;
        ads.take().await;
    }
    let after = plane.get("DataplaneInsight", "web-1").await.unwrap().meta.version;
    let most = started.elapsed().as_secs() + 2;
    assert!(after - before <= most, "{} writes in {:?}", after - before, started.elapsed());
    // And a write of an insight pushes nothing.
    ads.settle().await;
    plane
        .until("the counts are written", || async {
            let status = insight(&plane).await?.subscriptions.last()?.status.clone()?;
            (status.total?.responses_sent > Count(20)).then_some(())
        })
        .await;
    assert!(ads.settle().await.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_revoked_node_is_out_at_once_and_a_restored_one_comes_back() {
    let plane = Plane::start().await;
    let node = plane.node(&["web"]).await;
    let mut session = node.session().await;
    session.registered("web-1", "web", "10.0.0.1").await;
    let mut ads = node.ads("web-1").await;
    ads.subscribe(type_url::CLUSTER, std::collections::HashMap::new()).await;
    ads.take().await;

    let id = &node.certificate.node_id;
    let revoked = plane.rooms.set_revoked(id, true, "the operator").await.unwrap().unwrap();
    assert!(revoked.revoked && revoked.revoked_at.is_some());
    let ended = tokio::time::timeout(PATIENCE, async {
        loop {
            if let Err(status) = ads.receive().await {
                return status;
            }
        }
    });
    let ended = ended.await.unwrap();
    assert!(ended.message().contains("revoked") || ended.message().contains("not registered"), "{ended}");
    let farewell = tokio::time::timeout(PATIENCE, tokio_stream::StreamExt::next(&mut session.answers));
    let farewell = farewell.await.unwrap().unwrap().unwrap_err();
    assert!(farewell.message().contains("revoked"), "{farewell}");
    plane
        .until("its Dataplane is offline", || async {
            insight(&plane).await?.subscriptions.last()?.disconnect_time.as_ref().map(|_| ())
        })
        .await;

    let refused = node.renew(node.key.csr()).await.unwrap_err();
    assert!(refused.message().contains("revoked"), "{refused}");
    let refused = node.issue("web-1", node.key.csr()).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated);
    // Not with a new ticket either: whoever stole the key would have the new certificate too.
    let ticket = plane.ticket(&["web"]).await;
    let refused = crate::support::join(&ticket, &node.key).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
    let again = Node::join(&ticket, crate::support::Key::new()).await.unwrap();
    assert_ne!(&again.certificate.node_id, id);

    // A revocation outlives the control plane.
    let id = id.clone();
    let plane = plane.restart().await;
    assert!(plane.rooms.identity.nodes().get(&id).unwrap().revoked);
    plane.rooms.set_revoked(&id, false, "the operator").await.unwrap();
    assert!(!plane.rooms.identity.nodes().get(&id).unwrap().revoked);
}
