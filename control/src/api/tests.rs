use http::{HeaderValue, Request, StatusCode, header};
use http_body_util::BodyExt as _;
use serde_json::{Value, json};
use tower::ServiceExt as _;
use ursa_model::Resource;

use super::*;
use crate::{
    access::Peer,
    config::Config,
    store::{Store, StoreOptions},
    tokens::TokenKind,
};

struct Fixture {
    router: Router,
    control: Arc<ControlPlane>,
    _dir: tempfile::TempDir,
}

fn fixture_with(config: Config) -> Fixture {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&StoreOptions::in_dir(dir.path())).unwrap();
    let control = Arc::new(ControlPlane::new(config, store));
    Fixture { router: router(ApiState::new(control.clone())), control, _dir: dir }
}

fn fixture() -> Fixture {
    fixture_with(Config::default())
}

const OPERATOR: Peer = Peer::Unix { uid: 0 };

impl Fixture {
    async fn raw(&self, request: http::request::Builder, body: impl Into<Body>) -> (StatusCode, Value) {
        let response = self.router.clone().oneshot(request.body(body.into()).unwrap()).await.unwrap();
        let status = response.status();
        let bytes = response.into_body().collect().await.unwrap().to_bytes();
        (status, serde_json::from_slice(&bytes).unwrap_or_default())
    }

    async fn send(&self, method: &str, path: &str, body: Value) -> (StatusCode, Value) {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        self.raw(Request::builder().method(method).uri(path).extension(OPERATOR), body).await
    }

    async fn with_mesh(self) -> Self {
        let (status, _) =
            self.send("PUT", "/meshes/default", json!({ "type": "Mesh", "name": "default" })).await;
        assert_eq!(status, StatusCode::CREATED);
        self
    }
}

fn local() -> Peer {
    Peer::Tcp("127.0.0.1:40000".parse().unwrap())
}

#[tokio::test]
async fn nobody_is_asked_who_they_are() {
    let api = fixture();
    for path in ["/config", "/meshes", "/who-am-i", "/policies", "/secrets", "/nothing"] {
        let request = Request::builder().uri(path).header(header::HOST, "localhost").extension(local());
        let (status, body) = api.raw(request, Body::empty()).await;
        assert_eq!(status, StatusCode::UNAUTHORIZED, "{path}: {body}");
    }
    let (status, _) = api.raw(Request::builder().uri("/").extension(local()), Body::empty()).await;
    assert_eq!(status, StatusCode::OK);
}

#[tokio::test]
async fn only_root_and_the_own_user_are_operators_on_the_socket() {
    let api = fixture();
    let ask = |uid| Request::builder().uri("/who-am-i").extension(Peer::Unix { uid });
    assert_eq!(api.raw(ask(0), Body::empty()).await.0, StatusCode::OK);
    assert_eq!(api.raw(ask(nix::unistd::Uid::effective().as_raw()), Body::empty()).await.0, StatusCode::OK);
    assert_eq!(api.raw(ask(12_345), Body::empty()).await.0, StatusCode::UNAUTHORIZED);
}

#[tokio::test]
async fn a_user_may_read_but_no_secrets() {
    let api = fixture().with_mesh().await;
    api.control.tokens.ensure_signing_key(&TokenKind::User).await.unwrap();
    let token = api.control.tokens.user_token("john", &[], time::Duration::hours(1)).await.unwrap();
    let ask = |path: &str| {
        Request::builder()
            .uri(path)
            .header(header::AUTHORIZATION, format!("Bearer {token}"))
            .extension(local())
    };
    assert_eq!(api.raw(ask("/meshes"), Body::empty()).await.0, StatusCode::OK);
    let (status, body) = api.raw(ask("/secrets"), Body::empty()).await;
    assert_eq!(status, StatusCode::FORBIDDEN);
    assert_eq!(
        body["detail"],
        "user \"john/mesh-system:authenticated\" cannot access the resource of type \"Secret\""
    );
    // Credentials that don't hold are no reason to fall back to others.
    let broken =
        Request::builder().uri("/meshes").header(header::AUTHORIZATION, "Bearer x").extension(OPERATOR);
    assert_eq!(api.raw(broken, Body::empty()).await.0, StatusCode::UNAUTHORIZED);
}

#[tokio::test]
async fn a_long_body_is_refused_unread() {
    let api = fixture().with_mesh().await;
    let request =
        || Request::builder().method("PUT").uri("/meshes/default/meshtimeouts/t").extension(OPERATOR);
    let announced = request().header(header::CONTENT_LENGTH, 11 * 1024 * 1024);
    let (status, body) = api.raw(announced, Body::empty()).await;
    assert_eq!(status, StatusCode::PAYLOAD_TOO_LARGE);
    assert!(body["detail"].as_str().unwrap().contains("apiServer.maxBodyBytes"), "{body}");
    let (status, _) = api.raw(request(), vec![b' '; 11 * 1024 * 1024]).await;
    assert_eq!(status, StatusCode::PAYLOAD_TOO_LARGE);
}

#[tokio::test]
async fn bad_input_is_named() {
    let api = fixture().with_mesh().await;
    let request = Request::builder().method("PUT").uri("/meshes/m").extension(OPERATOR);
    let (status, body) = api.raw(request, "{\"type\":").await;
    assert_eq!((status, &body["title"]), (StatusCode::BAD_REQUEST, &json!("Bad Request")));
    let (status, body) = api.send("PUT", "/meshes/m", json!({ "type": "Mesh", "name": "other" })).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    assert_eq!(body["invalid_parameters"][0]["reason"], "name from the URL has to be the same as in body");
    let (status, body) = api.send("GET", "/meshes/absent/dataplanes", Value::Null).await;
    assert_eq!((status, &body["title"]), (StatusCode::NOT_FOUND, &json!("Failed to retrieve Mesh")));
    let (status, _) = api.send("GET", "/meshtimeoutz", Value::Null).await;
    assert_eq!(status, StatusCode::NOT_FOUND);
    let (status, _) = api.send("POST", "/meshes", json!({})).await;
    assert_eq!(status, StatusCode::METHOD_NOT_ALLOWED);
    let (status, _) = api.send("GET", "/meshes/a%00b", Value::Null).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
}

#[tokio::test]
async fn a_spec_is_an_object() {
    let api = fixture().with_mesh().await;
    let timeout = json!({ "type": "MeshTimeout", "mesh": "default", "name": "t", "spec": [] });
    let (status, body) = api.send("PUT", "/meshes/default/meshtimeouts/t", timeout).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    let expected = json!([{ "field": "spec", "reason": "in body must be of type object: \"array\"" }]);
    assert_eq!(body["invalid_parameters"], expected);
}

#[tokio::test]
async fn the_ids_of_an_identity_stay() {
    let api = fixture().with_mesh().await;
    let identity = |path: &str| {
        json!({
            "type": "MeshIdentity", "mesh": "default", "name": "i",
            "spec": {
                "spiffeID": { "path": path },
                "provider": { "type": "Bundled", "bundled": { "autogenerate": { "enabled": true } } },
            },
        })
    };
    let path = "/meshes/default/meshidentities/i";
    assert_eq!(api.send("PUT", path, identity("/a")).await.0, StatusCode::CREATED);
    assert_eq!(api.send("PUT", path, identity("/a")).await.0, StatusCode::OK);
    let (status, body) = api.send("PUT", path, identity("/b")).await;
    assert_eq!((status, &body["title"]), (StatusCode::BAD_REQUEST, &json!("Could not update a resource")));
    assert_eq!(body["invalid_parameters"][0]["field"], "spec.spiffeID.path");
}

#[tokio::test]
async fn what_only_the_control_plane_writes_is_told_before_anything_else() {
    let api = fixture();
    let (status, _) = api.send("PUT", "/meshes/absent/dataplane-insights/d", json!([])).await;
    assert_eq!(status, StatusCode::METHOD_NOT_ALLOWED);
}

#[tokio::test]
async fn what_a_zone_wrote_is_not_deleted_on_global() {
    let api = fixture_with(Config::default().with(&[("mode".to_owned(), json!("global"))]).unwrap())
        .with_mesh()
        .await;
    let timeout = json!({
        "type": "MeshTimeout", "mesh": "default", "name": "t", "labels": { "kuma.io/origin": "zone" },
        "spec": { "to": [] },
    });
    api.control.store.create(Resource::from_json(&timeout).unwrap()).await.unwrap();
    let (status, body) = api.send("DELETE", "/meshes/default/meshtimeouts/t", Value::Null).await;
    assert_eq!((status, &body["title"]), (StatusCode::BAD_REQUEST, &json!("Could not delete a resource")));
    let expected =
        json!([{ "field": "[\"kuma.io/origin\"]", "reason": "the origin label must be set to 'global'" }]);
    assert_eq!(body["invalid_parameters"], expected);
}

#[tokio::test]
async fn a_deleted_mesh_takes_its_resources_along() {
    let api = fixture().with_mesh().await;
    let workload = json!({ "type": "Workload", "mesh": "default", "name": "web", "spec": {} });
    assert_eq!(api.send("PUT", "/meshes/default/workloads/web", workload).await.0, StatusCode::CREATED);
    assert_eq!(api.send("DELETE", "/meshes/default", Value::Null).await.0, StatusCode::OK);
    assert_eq!(api.send("GET", "/workloads", Value::Null).await.1["total"], 0);
}

#[tokio::test]
async fn a_read_only_server_refuses_writes() {
    let setting = ("apiServer.readOnly".to_owned(), json!(true));
    let api = fixture_with(Config::default().with(&[setting]).unwrap());
    let (status, _) = api.send("PUT", "/meshes/m", json!({ "type": "Mesh", "name": "m" })).await;
    assert_eq!(status, StatusCode::METHOD_NOT_ALLOWED);
}

#[tokio::test]
async fn the_configuration_shows_no_secret() {
    let api = fixture();
    let (status, body) = api.send("GET", "/config", Value::Null).await;
    assert_eq!((status, &body["mode"]), (StatusCode::OK, &json!("zone")));
}

#[tokio::test]
async fn what_was_asked_for_is_named() {
    let api = fixture().with_mesh().await;
    for (method, path, named) in [
        ("GET", "/meshes/absent/dataplanes", "Mesh \"absent\""),
        ("GET", "/meshes/absent", "Mesh \"absent\""),
        ("DELETE", "/meshes/absent", "Mesh \"absent\""),
        ("GET", "/meshes/default/meshtimeouts/absent", "MeshTimeout \"absent\" in mesh \"default\""),
        ("DELETE", "/meshes/default/meshtimeouts/absent", "MeshTimeout \"absent\" in mesh \"default\""),
        ("GET", "/meshes/default/meshtimeouts/absent/_resources/dataplanes", "MeshTimeout \"absent\""),
        ("GET", "/meshes/default/dataplanes/absent/_overview", "Dataplane \"absent\" in mesh \"default\""),
        ("GET", "/meshes/default/meshservices/absent/_dataplanes", "MeshService \"absent\""),
        ("GET", "/meshes/default/meshservices/absent/_hostnames", "MeshService \"absent\""),
        ("GET", "/meshes/default/service-insights/absent", "ServiceInsight \"absent\""),
        ("GET", "/_kri/kri_mt_default_default__absent_", "kri_mt_default_default__absent_"),
    ] {
        let (status, body) = api.send(method, path, Value::Null).await;
        assert_eq!(status, StatusCode::NOT_FOUND, "{path}: {body}");
        let detail = body["detail"].as_str().unwrap();
        assert!(detail.starts_with("Not found: ") && detail.contains(named), "{method} {path}: {body}");
    }
}

#[tokio::test]
async fn pages_of_listed_origins_may_ask() {
    let domains = json!(["https://ui.example.com", "https://[a-z]+\\.corp\\.example"]);
    let setting = ("apiServer.corsAllowedDomains".to_owned(), domains);
    let api = fixture_with(Config::default().with(&[setting]).unwrap());
    let ask = async |method: &str, origin: &str| {
        let request = Request::builder()
            .method(method)
            .uri("/meshes")
            .header(header::ORIGIN, origin)
            .header(header::ACCESS_CONTROL_REQUEST_METHOD, "PUT")
            .extension(local());
        let response = api.router.clone().oneshot(request.body(Body::empty()).unwrap()).await.unwrap();
        let allowed = response.headers().get(header::ACCESS_CONTROL_ALLOW_ORIGIN).cloned();
        (response.status(), allowed)
    };
    for origin in ["https://ui.example.com", "https://abc.corp.example"] {
        let (status, allowed) = ask("OPTIONS", origin).await;
        assert_eq!((status, allowed.unwrap()), (StatusCode::NO_CONTENT, HeaderValue::from_static(origin)));
        // Being allowed to ask is no right to be answered.
        let (status, allowed) = ask("GET", origin).await;
        assert_eq!((status, allowed.unwrap()), (StatusCode::UNAUTHORIZED, HeaderValue::from_static(origin)));
    }
    for origin in [
        "https://evil.example",
        "https://uiXexample.com",
        "https://ui.example.com.evil",
        "http://a.corp.example.evil",
        "null",
    ] {
        let (status, allowed) = ask("OPTIONS", origin).await;
        assert_eq!((status, allowed), (StatusCode::UNAUTHORIZED, None), "{origin}");
    }
    // By default nobody from elsewhere.
    let api = fixture();
    let request =
        Request::builder().method("OPTIONS").uri("/").header(header::ORIGIN, "https://ui.example.com");
    let response = api.router.oneshot(request.body(Body::empty()).unwrap()).await.unwrap();
    assert!(!response.headers().contains_key(header::ACCESS_CONTROL_ALLOW_ORIGIN));
}

#[tokio::test]
async fn only_a_page_that_exists_is_advertised() {
    let ask = async |api: Fixture| api.send("GET", "/", Value::Null).await.1;
    assert_eq!(ask(fixture()).await.get("gui"), None);
    let page = ("apiServer.gui.rootUrl".to_owned(), json!("https://ui.example.com/gui"));
    let api = fixture_with(Config::default().with(&[page]).unwrap());
    assert_eq!(ask(api).await["gui"], "https://ui.example.com/gui");
}

#[tokio::test]
async fn what_is_ignored_is_said_in_a_header() {
    let api = fixture().with_mesh().await;
    let body = json!({
        "type": "MeshTimeout", "mesh": "default", "name": "t",
        "spec": {"to": [{"targetRef": {"kind": "Mesh"}, "default": {"idleTimeout": "5s"}}], "nonsense": 1},
    });
    let request = Request::builder().method("PUT").uri("/meshes/default/meshtimeouts/t").extension(OPERATOR);
    let request = request.body(Body::from(body.to_string())).unwrap();
    let response = api.router.clone().oneshot(request).await.unwrap();
    assert_eq!(response.status(), StatusCode::CREATED);
    let warning = response.headers()[header::WARNING].to_str().unwrap();
    assert!(warning.starts_with("299 ursa \"") && warning.contains("nonsense"), "{warning}");
}

#[tokio::test]
async fn a_taken_port_says_what_to_do() {
    let taken = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = taken.local_addr().unwrap().port();
    let error = server::listen("127.0.0.1", port, "apiServer.http.port").await.unwrap_err().to_string();
    assert!(error.contains("set apiServer.http.port to another port"), "{error}");
}

#[tokio::test]
async fn a_mesh_is_counted_when_it_is_asked_for() {
    let api = fixture().with_mesh().await;
    for (path, body) in [
        (
            "dataplanes/web-1",
            json!({ "type": "Dataplane", "mesh": "default", "name": "web-1",
                "networking": { "address": "10.0.0.1", "inbound": [{ "port": 80 }] } }),
        ),
        (
            "meshtimeouts/t",
            json!({ "type": "MeshTimeout", "mesh": "default", "name": "t",
                "spec": { "to": [{ "targetRef": { "kind": "Mesh" }, "default": { "connectionTimeout": "1s" } }] } }),
        ),
    ] {
        let (status, body) = api.send("PUT", &format!("/meshes/default/{path}"), body).await;
        assert_eq!(status, StatusCode::CREATED, "{body}");
    }
    let (_, list) = api.send("GET", "/mesh-insights", Value::Null).await;
    assert_eq!((&list["total"], &list["items"][0]["name"]), (&json!(1), &json!("default")));
    let (status, insight) = api.send("GET", "/mesh-insights/default", Value::Null).await;
    assert_eq!((status, &insight["type"]), (StatusCode::OK, &json!("MeshInsight")));
    assert_eq!((&insight["dataplanes"]["total"], &insight["dataplanes"]["offline"]), (&json!(1), &json!(1)));
    assert_eq!(insight["policies"], json!({ "MeshTimeout": { "total": 1 } }));
    assert_eq!(api.send("GET", "/mesh-insights/other", Value::Null).await.0, StatusCode::NOT_FOUND);
}

#[tokio::test]
async fn the_own_zone_is_online_and_others_are_not() {
    let api = fixture();
    for name in ["default", "other"] {
        let zone = json!({ "type": "Zone", "name": name });
        assert_eq!(api.send("PUT", &format!("/zones/{name}"), zone).await.0, StatusCode::CREATED);
    }
    let (_, own) = api.send("GET", "/zones/default/_overview", Value::Null).await;
    assert!(own["zoneInsight"]["subscriptions"][0]["connectTime"].is_string(), "{own}");
    let (_, other) = api.send("GET", "/zones/other/_overview", Value::Null).await;
    assert!(other["zoneInsight"].is_null(), "{other}");
    let (_, all) = api.send("GET", "/global-insight", Value::Null).await;
    assert_eq!(all["zones"]["controlPlanes"], json!({ "total": 2, "online": 1 }));
}
