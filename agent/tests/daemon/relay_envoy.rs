//! The relay in front of the real Envoy. Needs `URSA_ENVOY`, the path of an Envoy binary; fails without it unless
//! `URSA_SKIP_ENVOY=1`.

#![allow(clippy::needless_pass_by_value, reason = "the builder reads better by value")]

use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::unix::net::UnixListener as StdUnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use prost::encoding::{WireType, encode_key, encode_varint};
use serde_json::json;
use tokio::net::{TcpStream, UnixListener};
use tokio_util::sync::CancellationToken;
use ursa_agent::relay::{
    Cache, Item, Kind, LastGood, children_of, item_from_encoded, serve, serve_last_good,
};
use ursa_wire::discovery::Resource;

/// A protobuf message, field by field: no crate but the engine knows Envoy's configuration.
#[derive(Default)]
struct Proto(Vec<u8>);

impl Proto {
    fn bytes(mut self, tag: u32, bytes: &[u8]) -> Self {
        encode_key(tag, WireType::LengthDelimited, &mut self.0);
        encode_varint(bytes.len() as u64, &mut self.0);
        self.0.extend_from_slice(bytes);
        self
    }

    fn text(self, tag: u32, text: &str) -> Self {
        self.bytes(tag, text.as_bytes())
    }

    fn message(self, tag: u32, message: Self) -> Self {
        self.bytes(tag, &message.0)
    }

    fn number(mut self, tag: u32, number: u64) -> Self {
        encode_key(tag, WireType::Varint, &mut self.0);
        encode_varint(number, &mut self.0);
        self
    }
}

fn address(port: u16) -> Proto {
    let socket = Proto::default().text(2, "127.0.0.1").number(3, port.into());
    Proto::default().message(1, socket)
}

fn cluster(name: &str) -> Proto {
    let ads = Proto::default().message(3, Proto::default()).number(6, 2);
    let eds = Proto::default().message(1, ads).text(2, &format!("{name}-endpoints"));
    Proto::default().text(1, name).number(2, 3).message(3, eds)
}

fn endpoints(name: &str, port: u16) -> Proto {
    let endpoint = Proto::default().message(1, address(port));
    let locality = Proto::default().message(2, Proto::default().message(1, endpoint));
    Proto::default().text(1, name).message(2, locality)
}

fn listener(name: &str, port: u16, cluster: &str, filter: &str) -> Proto {
    let proxy = Proto::default().text(1, "test").text(2, cluster);
    let any = Proto::default().text(1, &format!("type.googleapis.com/{filter}")).bytes(2, &proxy.0);
    let filter = Proto::default().text(1, "filter").message(4, any);
    let chain = Proto::default().message(3, filter);
    Proto::default().text(1, name).message(2, address(port)).message(3, chain)
}

const RBAC: &str = "type.googleapis.com/envoy.extensions.filters.http.rbac.v3.RBAC";
const ROUTER: &str = "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router";

fn any(type_url: &str, message: &Proto) -> Proto {
    Proto::default().text(1, type_url).bytes(2, &message.0)
}

/// Nobody passes: rules that allow, and no policy.
fn deny() -> Proto {
    Proto::default().message(1, Proto::default())
}

/// Answers 200 to whom the filter of this name lets pass.
fn http_listener(name: &str, port: u16, filter: &str) -> Proto {
    let ads = Proto::default().message(3, Proto::default()).number(6, 2);
    let discovery = Proto::default().message(1, ads).message(2, any(RBAC, &deny())).text(4, RBAC);
    let route = Proto::default()
        .message(1, Proto::default().text(1, "/"))
        .message(7, Proto::default().number(1, 200));
    let host = Proto::default().text(1, "all").text(2, "*").message(3, route);
    let manager = Proto::default()
        .text(2, "test")
        .message(4, Proto::default().message(2, host))
        .message(5, Proto::default().text(1, filter).message(5, discovery))
        .message(5, Proto::default().text(1, "router").message(4, any(ROUTER, &Proto::default())));
    let url = "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager";
    let filter = Proto::default().text(1, "manager").message(4, any(url, &manager));
    Proto::default().text(1, name).message(2, address(port)).message(3, Proto::default().message(3, filter))
}

fn permission(name: &str, version: &str, type_url: &str, config: &Proto) -> (String, Item) {
    let config = Proto::default().text(1, name).message(2, any(type_url, config));
    named(Kind::Extension, name, version, config)
}

const TCP_PROXY: &str = "envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy";

fn named(kind: Kind, name: &str, version: &str, message: Proto) -> (String, Item) {
    let value = Bytes::from(message.0);
    item_from_encoded(Resource::new(kind.type_url(), name, version, value).encoded()).unwrap()
}

struct Envoy {
    child: Child,
    log: PathBuf,
}

impl Drop for Envoy {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("{}", fs::read_to_string(&self.log).unwrap_or_default());
        }
    }
}

fn binary() -> Option<PathBuf> {
    if let Some(path) = std::env::var_os("URSA_ENVOY") {
        return Some(path.into());
    }
    assert!(
        std::env::var_os("URSA_SKIP_ENVOY").is_some(),
        "set URSA_ENVOY to an Envoy binary, or URSA_SKIP_ENVOY=1 to go without this test"
    );
    None
}

fn start(binary: &Path, dir: &Path) -> Envoy {
    let bootstrap = json!({
        "node": { "id": "default.web", "cluster": "web" },
        "admin": { "address": { "pipe": { "path": dir.join("admin.sock") } } },
        "dynamic_resources": {
            "ads_config": {
                "api_type": "DELTA_GRPC", "transport_api_version": "V3",
                "grpc_services": [{ "envoy_grpc": { "cluster_name": "system_ads" } }]
            },
            "cds_config": { "ads": {}, "resource_api_version": "V3" },
            "lds_config": { "ads": {}, "resource_api_version": "V3" }
        },
        "static_resources": { "clusters": [{
            "name": "system_ads", "type": "STATIC", "connect_timeout": "1s",
            "typed_extension_protocol_options": { "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
                "explicit_http_config": { "http2_protocol_options": {} }
            } },
            "load_assignment": { "cluster_name": "system_ads", "endpoints": [{ "lb_endpoints": [{
                "endpoint": { "address": { "pipe": { "path": dir.join("xds.sock") } } }
            }] }] }
        }] }
    });
    let file = dir.join("bootstrap.json");
    fs::write(&file, bootstrap.to_string()).unwrap();
    let log = dir.join("envoy.log");
    let child = Command::new(binary)
        .arg("-c")
        .arg(&file)
        .args(["--use-dynamic-base-id", "--concurrency", "1", "--log-level", "info"])
        .stdout(Stdio::null())
        .stderr(fs::OpenOptions::new().create(true).append(true).open(&log).unwrap())
        .spawn()
        .unwrap();
    Envoy { child, log }
}

/// An application that says its name and hangs up.
fn application(word: &'static str) -> u16 {
    let socket = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = socket.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for stream in socket.incoming().flatten() {
            use std::io::Write as _;
            let _ = (&stream).write_all(word.as_bytes());
        }
    });
    port
}

fn free_port() -> u16 {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port()
}

async fn says(port: u16) -> Option<String> {
    use tokio::io::AsyncReadExt as _;
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let exchange = async {
        let mut text = String::new();
        TcpStream::connect(address).await.ok()?.read_to_string(&mut text).await.ok()?;
        Some(text)
    };
    tokio::time::timeout(Duration::from_secs(1), exchange).await.ok()?
}

/// Polls: what happens in another process can't be awaited.
async fn until(what: &str, mut check: impl AsyncFnMut() -> bool) {
    let start = Instant::now();
    while !check().await {
        assert!(start.elapsed() < Duration::from_secs(10), "not within 10 s: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn listen(dir: &Path) -> StdUnixListener {
    let listener = StdUnixListener::bind(dir.join("xds.sock")).unwrap();
    listener.set_nonblocking(true).unwrap();
    listener
}

fn attach(listener: &StdUnixListener) -> UnixListener {
    UnixListener::from_std(listener.try_clone().unwrap()).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn envoy_follows_refuses_and_outlives() {
    let Some(binary) = binary() else { return };
    let dir = tempfile::tempdir().unwrap();
    let (old, new) = (application("old"), application("new"));
    let (front, other) = (free_port(), free_port());

    let cache = Arc::new(Cache::new());
    cache.update(Kind::Cluster, vec![named(Kind::Cluster, "app", "1", cluster("app"))], Vec::new());
    let name = "app-endpoints";
    cache.update(Kind::Endpoint, vec![named(Kind::Endpoint, name, "1", endpoints(name, old))], Vec::new());
    let front_listener = listener("front", front, "app", TCP_PROXY);
    cache.update(Kind::Listener, vec![named(Kind::Listener, "front", "1", front_listener)], Vec::new());
    for kind in Kind::ALL {
        cache.synced(kind);
    }
    let socket = listen(dir.path());
    let stop = CancellationToken::new();
    let serving = tokio::spawn(serve(
        attach(&socket),
        Arc::clone(&cache),
        children_of(own_pid(), own_uid()),
        stop.clone(),
    ));
    let envoy = start(&binary, dir.path());
    until("the listener serves", async || says(front).await.as_deref() == Some("old")).await;

    // An updated cluster warms again, and its endpoints arrive without Envoy asking for them.
    let updated = cluster("app").message(4, Proto::default().number(1, 3));
    cache.update(Kind::Cluster, vec![named(Kind::Cluster, "app", "2", updated)], Vec::new());
    until("the updated cluster is accepted", async || {
        cache.accepted(Kind::Cluster).get("app").is_some_and(|version| version == "2")
    })
    .await;
    cache.update(Kind::Endpoint, vec![named(Kind::Endpoint, name, "2", endpoints(name, new))], Vec::new());
    until("the new endpoint answers", async || says(front).await.as_deref() == Some("new")).await;

    // A listener that Envoy can't have, among one that it can.
    let broken = listener("front", front, "app", "no.such.Filter");
    let good = listener("other", other, "app", TCP_PROXY);
    let both = vec![named(Kind::Listener, "front", "2", broken), named(Kind::Listener, "other", "1", good)];
    cache.update(Kind::Listener, both, Vec::new());
    until("the good one serves", async || says(other).await.as_deref() == Some("new")).await;
    until("the broken one is reported", async || cache.rejections().len() == 1).await;
    let rejection = cache.rejections().remove(0);
    assert_eq!((rejection.name.as_str(), rejection.version.as_str()), ("front", "2"));
    assert!(rejection.message.contains("no.such.Filter"), "in Envoy's words: {}", rejection.message);
    assert_eq!(says(front).await.as_deref(), Some("new"), "the former version goes on");

    // The agent goes; Envoy keeps what it has, also while the shim answers from disk.
    let state = dir.path().join("state");
    LastGood::new(state.join("xds")).store(&cache.good()).unwrap();
    stop.cancel();
    serving.await.unwrap().unwrap();
    let stop = CancellationToken::new();
    let shim = tokio::spawn(serve_last_good(attach(&socket), state.clone(), stop.clone()));
    assert_eq!(says(front).await.as_deref(), Some("new"));

    // Envoy dies meanwhile: its successor gets what was accepted, not what was refused.
    drop(envoy);
    let _envoy = start(&binary, dir.path());
    until("the last good configuration serves", async || says(front).await.as_deref() == Some("new")).await;
    until("all of it", async || says(other).await.as_deref() == Some("new")).await;

    // A new agent knows nothing but the disk, takes over, and control takes a listener away.
    stop.cancel();
    shim.await.unwrap().unwrap();
    let cache = Arc::new(Cache::new());
    cache.load(LastGood::new(state.join("xds")).load().unwrap());
    let stop = CancellationToken::new();
    let serving = tokio::spawn(serve(
        attach(&socket),
        Arc::clone(&cache),
        children_of(own_pid(), own_uid()),
        stop.clone(),
    ));
    cache.begin_sync();
    cache.update(Kind::Listener, Vec::new(), vec!["other".to_owned()]);
    assert_eq!(says(other).await.as_deref(), Some("new"), "not before control has told everything");
    for kind in Kind::ALL {
        cache.synced(kind);
    }
    until("the removed listener is closed", async || says(other).await.is_none()).await;
    assert_eq!(says(front).await.as_deref(), Some("new"));
    stop.cancel();
    serving.await.unwrap().unwrap();
}

fn own_pid() -> i32 {
    i32::try_from(std::process::id()).unwrap()
}

fn own_uid() -> u32 {
    nix::unistd::geteuid().as_raw()
}

/// The status of one more request over a connection that stays open.
async fn asks(connection: &mut TcpStream) -> Option<u16> {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let exchange = async {
        connection.write_all(b"GET / HTTP/1.1\r\nhost: app\r\n\r\n").await.ok()?;
        let (mut head, mut byte) = (Vec::new(), [0]);
        while !head.ends_with(b"\r\n\r\n") {
            connection.read_exact(&mut byte).await.ok()?;
            head.push(byte[0]);
        }
        let head = String::from_utf8(head).ok()?.to_ascii_lowercase();
        let length = head.split_once("content-length: ").map_or("0", |(_, rest)| rest);
        let mut body = vec![0; length.lines().next()?.parse().ok()?];
        connection.read_exact(&mut body).await.ok()?;
        head.split_whitespace().nth(1)?.parse().ok()
    };
    tokio::time::timeout(Duration::from_secs(1), exchange).await.ok()?
}

async fn answers(port: u16) -> Option<u16> {
    asks(&mut TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.ok()?).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_filter_configuration_acts_on_open_connections_and_is_kept() {
    let Some(binary) = binary() else { return };
    let dir = tempfile::tempdir().unwrap();
    let port = free_port();
    let cache = Arc::new(Cache::new());
    let listener = http_listener("front", port, "rbac");
    cache.update(Kind::Listener, vec![named(Kind::Listener, "front", "1", listener)], Vec::new());
    for kind in Kind::ALL {
        cache.synced(kind);
    }
    let socket = listen(dir.path());
    let stop = CancellationToken::new();
    let serving = tokio::spawn(serve(
        attach(&socket),
        Arc::clone(&cache),
        children_of(own_pid(), own_uid()),
        stop.clone(),
    ));
    let envoy = start(&binary, dir.path());
    let put = |version: &str, type_url: &str, config: &Proto| {
        cache.update(Kind::Extension, vec![permission("rbac", version, type_url, config)], Vec::new());
    };
    let has = |version: &str| cache.accepted(Kind::Extension).get("rbac").is_some_and(|has| has == version);
    until("the listener is taken", async || cache.accepted(Kind::Listener).contains_key("front")).await;
    assert_eq!(answers(port).await, None, "closed before its permission is there");

    put("1", RBAC, &Proto::default());
    until("the permission is in force", async || answers(port).await == Some(200)).await;
    let mut open = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.unwrap();
    assert_eq!(asks(&mut open).await, Some(200));
    put("2", RBAC, &deny());
    until("it is withdrawn", async || has("2")).await;
    until("the open connection is refused", async || asks(&mut open).await == Some(403)).await;
    for _ in 0..20 {
        assert_eq!(asks(&mut open).await, Some(403), "on the same connection");
    }

    // Another filter than the listener allows under that name: refused, and the former one stays in force.
    put("3", ROUTER, &Proto::default());
    until("the refusal is reported", async || cache.rejections().len() == 1).await;
    let rejection = cache.rejections().remove(0);
    assert_eq!((rejection.name.as_str(), rejection.version.as_str()), ("rbac", "3"));
    assert!(rejection.message.contains("Router"), "in Envoy's words: {}", rejection.message);
    assert_eq!(asks(&mut open).await, Some(403));

    // The agent goes, then Envoy: its successor gets from disk what was in force.
    let state = dir.path().join("state");
    LastGood::new(state.join("xds")).store(&cache.good()).unwrap();
    stop.cancel();
    serving.await.unwrap().unwrap();
    assert_eq!(asks(&mut open).await, Some(403));
    let stop = CancellationToken::new();
    let shim = tokio::spawn(serve_last_good(attach(&socket), state.clone(), stop.clone()));
    drop(envoy);
    let _envoy = start(&binary, dir.path());
    until("the permission of before", async || match answers(port).await {
        Some(200) => panic!("open to everybody"),
        answer => answer == Some(403),
    })
    .await;
    stop.cancel();
    shim.await.unwrap().unwrap();
}
