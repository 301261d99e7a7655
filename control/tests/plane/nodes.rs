//! From a ticket to a changed policy at a node: join, registration, discovery, over real TLS connections.

use std::collections::HashMap;

use crate::support::{Plane, dataplane};
use ursa_model::types::dataplane_insight::DataplaneInsight;
use ursa_model::types::mesh_service::MeshService;
use ursa_wire::discovery::{Rejection, Resource};
use ursa_wire::session::{ControlEvent, NodeEvent, ProxyRef};
use ursa_wire::type_url;

const BACKEND_PERMISSION: &str = "self_inbound_dp_main_rbac";

fn cluster_of(service: &str) -> String {
    format!("kri_msvc_default_default__{service}_main")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_policy_reaches_exactly_the_proxy_that_it_is_about() {
    let plane = Plane::start().await;
    let node = plane.node(&["web", "backend"]).await;
    let mut session = node.session().await;
    session.registered("web-1", "web", "10.0.0.1").await;
    session.registered("backend-1", "backend", "10.0.0.2").await;

    let (mut web, mut backend) = (node.ads("web-1").await, node.ads("backend-1").await);
    for ads in [&mut web, &mut backend] {
        ads.subscribe_all().await;
        ads.sync().await;
    }
    web.until("web knows backend", |held| {
        held.contains_key(&(type_url::CLUSTER.into(), cluster_of("backend")))
            && held.contains_key(&(type_url::ENDPOINT.into(), cluster_of("backend")))
            && held.keys().any(|(kind, name)| kind == type_url::NAME && name.contains("backend"))
    })
    .await;
    assert!(web.names(type_url::WORKLOAD_IDENTITY).len() == 1, "{:?}", web.held.keys());
    web.settle().await;
    backend.settle().await;

    plane.allow("web", "backend").await;
    let change = backend.take().await;
    assert_eq!(change.type_url, type_url::EXTENSION);
    let names: Vec<_> =
        change.resources.iter().map(|resource| Resource::parse(resource).unwrap().name).collect();
    assert_eq!(names, [BACKEND_PERMISSION]);
    assert!(change.removed_resources.is_empty());
    assert!(backend.settle().await.is_empty(), "nothing else changes for backend");
    assert!(web.settle().await.is_empty(), "nothing changes for web");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_endpoint_pushes_one_load_assignment_to_its_subscribers_and_nothing_to_others() {
    let plane = Plane::start().await;
    let node = plane.node(&["*"]).await;
    let mut session = node.session().await;
    session.registered("web-1", "web", "10.0.0.1").await;
    session.registered("backend-1", "backend", "10.0.0.2").await;
    let (mut subscriber, mut other) = (node.ads("web-1").await, node.ads("web-1").await);
    subscriber.subscribe_all().await;
    subscriber.sync().await;
    // The other stream wants clusters and listeners, but not endpoints.
    for kind in [type_url::CLUSTER, type_url::LISTENER, type_url::SECRET, type_url::NAME] {
        other.subscribe(kind, HashMap::new()).await;
    }
    subscriber
        .until("web knows backend", |held| {
            held.contains_key(&(type_url::ENDPOINT.into(), cluster_of("backend")))
        })
        .await;
    subscriber.settle().await;
    other.settle().await;

    session.registered("backend-2", "backend", "10.0.0.3").await;
    let change = subscriber.take().await;
    assert_eq!(change.type_url, type_url::ENDPOINT);
    assert_eq!(change.resources.len(), 1);
    assert_eq!(Resource::parse(&change.resources[0]).unwrap().name, cluster_of("backend"));
    assert!(subscriber.settle().await.is_empty(), "one push and no more");
    assert!(other.settle().await.is_empty(), "who has no endpoints hears nothing");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reconnect_sends_nothing_again() {
    let plane = Plane::start().await;
    let node = plane.node(&["web"]).await;
    let mut session = node.session().await;
    session.registered("web-1", "web", "10.0.0.1").await;
    let mut first = node.ads("web-1").await;
    first.subscribe_all().await;
    first.sync().await;
    first
        .until("web has its own listener", |held| held.keys().any(|(kind, _)| kind == type_url::LISTENER))
        .await;
    first.settle().await;
    let held = first.held.clone();
    drop(first);

    let mut second = node.ads("web-1").await;
    for kind in type_url::ADD_ORDER {
        let mut initial: HashMap<String, String> = held
            .iter()
            .filter(|((other, _), _)| other == kind)
            .map(|((_, name), version)| (name.clone(), version.clone()))
            .collect();
        if kind == type_url::CLUSTER {
            initial.insert("long gone".into(), "1".into());
        }
        second.subscribe(kind, initial).await;
    }
    let responses = second.sync().await;
    let sent: usize = responses.iter().map(|response| response.resources.len()).sum();
    assert_eq!(sent, 0, "everything was held already");
    let removed = second.take().await;
    assert_eq!(
        (removed.type_url.as_str(), removed.removed_resources),
        (type_url::CLUSTER, vec!["long gone".into()])
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_envoy_refuses_stands_in_the_insight_in_its_words() {
    let plane = Plane::start().await;
    let node = plane.node(&["web"]).await;
    let mut session = node.session().await;
    session.registered("web-1", "web", "10.0.0.1").await;
    let mut ads = node.ads("web-1").await;
    ads.subscribe(type_url::LISTENER, HashMap::new()).await;
    let response = ads.receive().await.unwrap();
    let resource = Resource::parse(&response.resources[0]).unwrap();
    let words = "error adding listener: no such filter";
    let rejection =
        Rejection { name: resource.name.clone(), version: resource.version, message: words.into() };
    ads.answer(&response, Some(&Rejection::encode_all(&[rejection]))).await;
    plane
        .until("the insight holds the rejection", || async {
            let insight: DataplaneInsight = plane.get("DataplaneInsight", "web-1").await?.spec_as().unwrap();
            let known = insight.rejections.first()?;
            (known.message == words && known.name == resource.name).then_some(())
        })
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_service_is_made_of_its_workload() {
    let plane = Plane::start().await;
    let node = plane.node(&["backend"]).await;
    let mut session = node.session().await;
    session.registered("backend-1", "backend", "10.0.0.2").await;
    let service = plane
        .until("MeshService backend is complete", || async {
            let service = plane.get("MeshService", "backend").await?;
            let status = service.status_as::<MeshService>().unwrap();
            let connected = status.dataplane_proxies.as_ref()?.connected == 1;
            (connected && !status.addresses.is_empty()).then_some(service)
        })
        .await;
    let (spec, status): (MeshService, _) =
        (service.spec_as().unwrap(), service.status_as::<MeshService>().unwrap());
    assert_eq!(status.addresses[0].hostname, "backend.svc.mesh.local");
    assert_eq!(status.vips.len(), 2);
    assert_eq!(spec.identities[0].value, "spiffe://default.default.mesh.local/workload/backend");
    plane.until("its Workload", || async { plane.get("Workload", "backend").await }).await;

    // The address stays when the control plane starts again.
    drop((session, node));
    let plane = plane.restart().await;
    let again = plane.get("MeshService", "backend").await.unwrap().status_as::<MeshService>().unwrap();
    assert_eq!(again.vips, status.vips);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_gone_for_good_takes_its_endpoints_along() {
    let plane = Plane::start_with_grace("100ms").await;
    let node = plane.node(&["*"]).await;
    let other = plane.node(&["*"]).await;
    let mut session = node.session().await;
    session.registered("web-1", "web", "10.0.0.1").await;
    let mut leaving = other.session().await;
    leaving.registered("backend-1", "backend", "10.0.0.2").await;
    let mut web = node.ads("web-1").await;
    web.subscribe_all().await;
    web.sync().await;
    let endpoint = (type_url::ENDPOINT.to_owned(), cluster_of("backend"));
    web.until("web knows backend", |held| held.contains_key(&endpoint)).await;
    web.settle().await;
    let before = web.held[&endpoint].clone();

    drop((leaving, other));
    web.until("backend's endpoint is withdrawn", |held| held.get(&endpoint) != Some(&before)).await;
    plane
        .until("the insight says offline", || async {
            let insight: DataplaneInsight =
                plane.get("DataplaneInsight", "backend-1").await?.spec_as().unwrap();
            insight.subscriptions.last()?.disconnect_time.as_ref().map(|_| ())
        })
        .await;
    assert!(plane.get("Dataplane", "backend-1").await.is_some(), "it is deleted much later");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deregistered_dataplane_is_gone() {
    let plane = Plane::start().await;
    let node = plane.node(&["web"]).await;
    let mut session = node.session().await;
    session.registered("web-1", "web", "10.0.0.1").await;
    plane.until("its insight", || async { plane.get("DataplaneInsight", "web-1").await }).await;
    let proxy = ProxyRef { mesh: "default".into(), name: "web-1".into() };
    session.sender.send(NodeEvent::Deregister(proxy).into()).await.unwrap();
    plane
        .until("everything about it is gone", || async {
            let left = plane.get("Dataplane", "web-1").await.is_some()
                || plane.get("DataplaneInsight", "web-1").await.is_some();
            (!left).then_some(())
        })
        .await;
    let event = session.register(dataplane("web-1", "web", "10.0.0.1")).await;
    assert!(matches!(event, ControlEvent::Registered(_)), "it may come back");
}
