//! Behind TPROXY an application sees who calls it, and everything else is as behind REDIRECT.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use socket2::{Domain, Socket, Type};
use ursa_tests::lab::daemon::{Daemon, kill_pid};
use ursa_tests::lab::mesh::{Control, Node, PORT, Workload};
use ursa_tests::lab::net::Host;
use ursa_tests::lab::pair::{PLAINTEXT, SOON, URL, until};
use ursa_tests::lab::program::{self, Answer, Client, Load};
use ursa_tests::lab::{Lab, Programs, wait};

use crate::cni::call_for;

const URL6: &str = "http://backend6.svc.mesh.local:8080/orders";
/// Where deliveries come from in the other mode.
const PASSTHROUGH: &str = "127.0.0.6";
const EVERYBODY: &str = "
type: MeshTrafficPermission
mesh: default
name: everybody
spec: {rules: [{default: {allow: [{spiffeID: {type: Prefix, value: 'spiffe://default.lab.mesh.local'}}]}}]}
---
type: MeshTLS
mesh: default
name: permissive
spec: {rules: [{default: {mode: Permissive}}]}
";
const DENY_WEB: &str = "
type: MeshTrafficPermission
mesh: default
name: deny-web
spec: {rules: [{default: {deny: [{spiffeID: {type: Exact, value: 'spiffe://default.lab.mesh.local/workload/web'}}]}}]}
";

/// `web`, which is redirected as usual, and two that keep clients' addresses: `backend` has an IPv4 address, `backend6`
/// an IPv6 one. Fields are dropped in their order.
struct Mesh {
    control: Control,
    node: Node,
    far: Node,
    web: Host,
    backend: Workload,
    backend6: Workload,
    stranger: Host,
    _servers: [Daemon; 2],
    lab: Lab,
}

fn tproxy(file: &mut Value) {
    file["ursa"]["redirect"] = json!({"inbound": {"mode": "tproxy"}});
}

impl Mesh {
    fn start(protocol: &str) -> Self {
        let mut lab = Lab::new(&Programs::discover().unwrap()).unwrap();
        let control = Control::start(&mut lab).unwrap();
        let hosts = ["web", "backend", "backend6", "stranger"].map(|name| lab.net.host(name).unwrap());
        let [web, backend, backend6, stranger] = hosts;
        let servers = [&backend, &backend6].map(|host| program::serve(&lab, host, "backend", PORT).unwrap());
        let tickets = (control.ticket(&["web"]).unwrap(), control.ticket(&["backend", "backend6"]).unwrap());
        let mut node = Node::join(&mut lab, "node-a", &tickets.0).unwrap();
        let mut far = Node::join(&mut lab, "node-b", &tickets.1).unwrap();
        node.add("web", &web).unwrap();
        let speaks = |file: &mut Value| {
            file["networking"]["inbound"][0]["protocol"] = protocol.into();
            tproxy(file);
        };
        let backend = far.add_with("backend", &backend, speaks).unwrap();
        let v6 = backend6.v6.clone();
        let backend6 = far
            .add_with("backend6", &backend6, |file| {
                speaks(file);
                file["networking"]["address"] = v6.into();
            })
            .unwrap();
        far.wait_ready("backend", SOON).unwrap();
        far.wait_ready("backend6", SOON).unwrap();
        node.wait_ready("web", SOON).unwrap();
        Self { control, node, far, web, backend, backend6, stranger, _servers: servers, lab }
    }

    /// Where somebody outside of the mesh would look for both.
    fn plain(&self) -> [String; 2] {
        let (v4, v6) = (&self.backend.host.v4, &self.backend6.host.v6);
        [format!("http://{v4}:{PORT}/plain"), format!("http://[{v6}]:{PORT}/plain")]
    }
}

/// The address that the application saw.
fn seen(answer: &Answer) -> String {
    let body: Value =
        serde_json::from_str(&answer.text).unwrap_or_else(|e| panic!("{e}: {}", answer.brief()));
    let peer: SocketAddr = body["peer"].as_str().unwrap().parse().unwrap();
    peer.ip().to_canonical().to_string()
}

/// Asks until the application sees this caller.
fn until_seen(client: &mut Client, url: &str, caller: &str) {
    until(client, url, &format!("{url} to see {caller}"), |answer| answer.ok() && seen(answer) == caller)
        .unwrap();
    for _ in 0..20 {
        let answer = client.get(url).unwrap();
        assert!(answer.ok(), "{url}: {}", answer.brief());
        assert_eq!(seen(&answer), caller, "{url}");
    }
}

/// Asks in plaintext all the time, each time from a port that it hasn't used before: a connection that is known from the
/// time of other rules is another matter.
struct Strangers {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<(usize, Vec<String>)>,
}

impl Strangers {
    fn start(from: &Host, to: IpAddr) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (told, netns, to) = (Arc::clone(&stop), from.path(), SocketAddr::new(to, PORT));
        let ask = move |port: u16| -> std::io::Result<String> {
            let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
            socket.bind(&SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)).into())?;
            socket.connect_timeout(&to.into(), SOON)?;
            socket.set_read_timeout(Some(SOON))?;
            let mut stream = TcpStream::from(socket);
            stream.write_all(b"GET /plain HTTP/1.1\r\n\r\n")?;
            let mut answer = [0; 512];
            let length = stream.read(&mut answer)?;
            Ok(String::from_utf8_lossy(&answer[..length]).into_owned())
        };
        let ask_on = move || {
            let mut answers = Vec::new();
            let mut attempts = 0;
            for port in 1024..u16::MAX {
                if told.load(Ordering::Relaxed) {
                    break;
                }
                attempts += 1;
                answers.extend(ask(port).ok().filter(|answer| !answer.is_empty()));
            }
            (attempts, answers)
        };
        let thread = std::thread::spawn(move || ursa_init::in_netns(&netns, ask_on).unwrap());
        Self { stop, thread }
    }

    /// How often they tried, and what they heard.
    fn finish(self) -> (usize, Vec<String>) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}

fn capabilities(host: &Host) -> Vec<String> {
    let of = |pid: i32| {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        status.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap().trim().to_owned()
    };
    host.running("envoy").into_iter().map(of).collect()
}

#[test]
fn the_application_sees_the_client_and_nothing_else_changes() {
    let mut mesh = Mesh::start("http");
    let plain = mesh.plain();
    let mut web = Client::start(&mesh.lab, &mesh.web).unwrap();
    let mut stranger = Client::start(&mesh.lab, &mesh.stranger).unwrap();
    let (v4, v6) = (mesh.web.v4.clone(), mesh.web.v6.clone());

    // Nobody is allowed yet.
    for url in [URL, URL6] {
        until(&mut web, url, "web to be refused", |answer| answer.status == Some(403)).unwrap();
    }
    mesh.control.ursa(&["allow", "web", "backend"]).unwrap();
    mesh.control.ursa(&["allow", "web", "backend6"]).unwrap();
    until_seen(&mut web, URL, &v4);
    until_seen(&mut web, URL6, &v6);
    let answer = web.get(URL).unwrap();
    assert!(answer.text.contains("spiffe://default.lab.mesh.local/workload/web"), "{}", answer.text);
    for url in &plain {
        let answer = stranger.get(url).unwrap();
        assert_eq!(answer.status, None, "strict: {}", answer.brief());
    }
    // One right, and only for those who need it.
    assert_eq!(capabilities(&mesh.web), ["0000000000000000"]);
    for host in [&mesh.backend.host, &mesh.backend6.host] {
        assert_eq!(capabilities(host), ["0000000000002000"], "CAP_NET_RAW");
    }

    // It calls itself by its name: the call goes through its Envoy twice, and not round and round.
    for (workload, url, own) in [
        (&mesh.backend, URL, mesh.backend.host.v4.clone()),
        (&mesh.backend6, URL6, mesh.backend6.host.v6.clone()),
    ] {
        let mut itself = Client::start(&mesh.lab, &workload.host).unwrap();
        until(&mut itself, url, "its own policy to refuse it", |answer| answer.status == Some(403)).unwrap();
        mesh.control.ursa(&["allow", &workload.name, &workload.name]).unwrap();
        until_seen(&mut itself, url, &own);
    }

    // To deny still denies, whoever is allowed.
    mesh.control.apply(DENY_WEB).unwrap();
    for url in [URL, URL6] {
        until(&mut web, url, "web to be denied", |answer| answer.status == Some(403)).unwrap();
    }
    mesh.control.ursa(&["delete", "meshtrafficpermission", "deny-web"]).unwrap();
    until_seen(&mut web, URL, &v4);

    // Somebody outside of the mesh, where plaintext is taken.
    mesh.control.apply(EVERYBODY).unwrap();
    for (url, address) in plain.iter().zip([mesh.stranger.v4.clone(), mesh.stranger.v6.clone()]) {
        until_seen(&mut stranger, url, &address);
    }
    until_seen(&mut web, URL6, &v6);
    mesh.node.wait_ready("web", SOON).unwrap();
    mesh.far.wait_ready("backend", SOON).unwrap();
    mesh.far.wait_ready("backend6", SOON).unwrap();
}

#[test]
fn nothing_passes_a_dead_envoy_behind_tproxy() {
    let mut mesh = Mesh::start("http");
    let plain = mesh.plain();
    mesh.control.ursa(&["allow", "web", "backend"]).unwrap();
    let mut web = Client::start(&mesh.lab, &mesh.web).unwrap();
    until_seen(&mut web, URL, &mesh.web.v4);
    let since = Instant::now();
    // From two sides, kept connections among them.
    let loads: Vec<Load> = [&mesh.stranger, &mesh.web]
        .into_iter()
        .flat_map(|from| plain.iter().map(move |url| (from, url)))
        .map(|(from, url)| Load::start(&mesh.lab, from, url, Duration::from_millis(1)).unwrap())
        .collect();
    // Now and then it comes back, and is killed while it starts.
    for _ in 0..8 {
        for host in [&mesh.backend.host, &mesh.backend6.host] {
            let envoy =
                wait::until("an Envoy", SOON, || host.running("envoy").first().copied().ok_or("none".into()));
            kill_pid(envoy.unwrap().0).unwrap();
        }
    }
    // And now it doesn't.
    mesh.far.agent.kill();
    for host in [&mesh.backend.host, &mesh.backend6.host] {
        for pid in host.running("ursa-shim") {
            kill_pid(pid).unwrap();
        }
        wait::until("Envoy to end", SOON, || match host.running("envoy") {
            pids if pids.is_empty() => Ok(()),
            pids => Err(format!("{pids:?}")),
        })
        .unwrap();
    }
    let many: Vec<usize> = loads.iter().map(|load| load.count() + 20).collect();
    wait::until("more attempts", SOON, || {
        match loads.iter().zip(&many).all(|(load, many)| load.count() >= *many) {
            true => Ok(()),
            false => Err("not yet".to_owned()),
        }
    })
    .unwrap();
    for load in loads {
        let tally = load.tally(since);
        assert!(tally.bad.len() > 20, "only {} attempts", tally.bad.len());
        assert_eq!(tally.good, 0, "somebody was let in");
        assert!(tally.bad.iter().all(|answer| !answer.text.contains(PLAINTEXT)), "the application answered");
    }
    mesh.far.agent.restart().unwrap();
    mesh.far.wait_ready("backend", SOON).unwrap();
    until_seen(&mut web, URL, &mesh.web.v4);
}

#[test]
fn a_workload_changes_between_both_modes_and_is_closed_meanwhile() {
    let mut mesh = Mesh::start("http");
    mesh.control.ursa(&["allow", "web", "backend"]).unwrap();
    let mut web = Client::start(&mesh.lab, &mesh.web).unwrap();
    until_seen(&mut web, URL, &mesh.web.v4);
    let strangers = Strangers::start(&mesh.stranger, mesh.backend.host.v4.parse().unwrap());
    let uid = mesh.backend.uid;
    let same_user = |file: &mut Value| {
        file["ursa"]["proxyUid"] = uid.into();
        file["ursa"]["proxyGid"] = uid.into();
    };
    for _ in 0..2 {
        mesh.far.add_with("backend", &mesh.backend.host, same_user).unwrap();
        until_seen(&mut web, URL, PASSTHROUGH);
        assert_eq!(capabilities(&mesh.backend.host), ["0000000000000000"]);
        let changed = |file: &mut Value| {
            same_user(file);
            tproxy(file);
        };
        mesh.far.add_with("backend", &mesh.backend.host, changed).unwrap();
        until_seen(&mut web, URL, &mesh.web.v4);
        assert_eq!(capabilities(&mesh.backend.host), ["0000000000002000"]);
    }
    let (attempts, answers) = strangers.finish();
    assert!(attempts > 100, "only {attempts}");
    assert_eq!(answers, Vec::<String>::new());
    mesh.node.wait_ready("web", SOON).unwrap();
}

/// Envoy calls the application from the client's address, in the namespace in which the client's own connections end:
/// were a port the same, two connections would be one. docs/redirect.md says what keeps the ports apart.
#[test]
fn many_connections_of_one_client_do_not_meet() {
    const MANY: usize = 900; // Envoy's own limit is 1,024
    let mesh = Mesh::start("tcp");
    mesh.control.apply(EVERYBODY).unwrap();
    let mut stranger = Client::start(&mesh.lab, &mesh.stranger).unwrap();
    for host in [&mesh.backend.host, &mesh.backend6.host] {
        let odd_first = || std::fs::write("/proc/sys/net/ipv4/ip_local_port_range", "32769 60999");
        ursa_init::in_netns(&host.path(), odd_first).unwrap().unwrap();
    }
    let addresses = [&mesh.backend.host.v4, &mesh.backend6.host.v6];
    for (url, from) in mesh.plain().iter().zip([&mesh.stranger.v4, &mesh.stranger.v6]) {
        until_seen(&mut stranger, url, from);
    }
    for address in addresses {
        let to = SocketAddr::new(address.parse::<IpAddr>().unwrap(), PORT);
        let ask = |mut stream: &TcpStream| -> std::io::Result<String> {
            stream.write_all(b"GET /many HTTP/1.1\r\n\r\n")?;
            let mut input = BufReader::new(stream);
            let (mut line, mut length) = (String::new(), 0);
            while line != "\r\n" {
                line.clear();
                input.read_line(&mut line)?;
                if let Some(text) = line.strip_prefix("content-length:") {
                    length = text.trim().parse().unwrap();
                }
            }
            let mut body = vec![0; length];
            input.read_exact(&mut body)?;
            Ok(String::from_utf8(body).unwrap())
        };
        let outcome = ursa_init::in_netns(&mesh.stranger.path(), || {
            let mut open = Vec::new();
            let (mut failures, mut met) = (Vec::new(), 0);
            for _ in 0..MANY {
                let done = TcpStream::connect_timeout(&to, SOON).and_then(|stream| {
                    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
                    let body: Value = serde_json::from_str(&ask(&stream)?).unwrap();
                    let peer: SocketAddr = body["peer"].as_str().unwrap().parse().unwrap();
                    met += usize::from(peer.port() % 2 == stream.local_addr()?.port() % 2);
                    Ok(stream)
                });
                match done {
                    Ok(stream) => open.push(stream),
                    Err(error) => failures.push(error.to_string()),
                }
            }
            // All at once: nobody's connection was disturbed by a later one's.
            failures
                .extend(open.iter().filter_map(|stream| ask(stream).err()).map(|error| error.to_string()));
            (failures, met)
        });
        let (failures, met) = outcome.unwrap();
        assert_eq!(failures, Vec::<String>::new(), "{address}");
        // Two kernels might choose the same port, where this one of both sides never does.
        assert_eq!(met, 0, "{address}: Envoy chooses among the client's ports");
    }
}

#[test]
fn a_pod_asks_for_it_by_an_annotation() {
    let mut lab = Lab::new(&Programs::discover().unwrap()).unwrap();
    let control = Control::start(&mut lab).unwrap();
    let (web, pod) = (lab.net.host("web").unwrap(), lab.net.host("backend").unwrap());
    let tickets = (control.ticket(&["web"]).unwrap(), control.ticket(&["backend"]).unwrap());
    let mut node = Node::join(&mut lab, "node-a", &tickets.0).unwrap();
    let far = Node::join(&mut lab, "node-b", &tickets.1).unwrap();
    node.add("web", &web).unwrap();
    node.wait_ready("web", SOON).unwrap();
    let annotations = json!({
        "kuma.io/sidecar-injection": "enabled", "ursa.io/ports": "8080/http", "ursa.io/inbound-mode": "tproxy",
        "kuma.io/workload": "backend",
    });
    call_for(&lab, &far, &pod, "ADD", ("backend", annotations.clone())).unwrap();
    let _server = program::serve(&lab, &pod, "backend", PORT).unwrap();
    assert_eq!(capabilities(&pod), ["0000000000002000"]);
    control.ursa(&["allow", "web", "backend"]).unwrap();
    let mut client = Client::start(&lab, &web).unwrap();
    until_seen(&mut client, URL, &web.v4);
    call_for(&lab, &far, &pod, "CHECK", ("backend", annotations.clone())).unwrap();
    call_for(&lab, &far, &pod, "DEL", ("backend", annotations)).unwrap();
}
