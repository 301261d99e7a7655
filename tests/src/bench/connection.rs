//! What a redirect costs a TCP connection: the same connections with no proxy, with one that is addressed directly, and
//! with the same one behind REDIRECT and TPROXY. So the kernel's part is told from the proxy's.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::time::{Duration, Instant};
use std::{fs, thread};

use anyhow::{Context as _, bail};
use nix::sched::{CloneFlags, setns};
use serde_json::{Value, json};
use ursa_init::intent::InboundMode;
use ursa_init::{Plan, RedirectIntent, in_netns};

use super::process;
use super::space::Times;
use crate::lab::daemon::Daemon;
use crate::lab::net::Host;
use crate::lab::{Lab, Programs, wait};

/// The proxy's user.
const PROXY: u32 = 5678;
/// Where the application answers byte by byte, and where it only reads.
const ECHO: u16 = 8080;
const SINK: u16 = 8081;
/// Where the proxy is addressed directly in place of [`ECHO`] and [`SINK`]; the first is its inbound port.
const INBOUND: u16 = 15006;
const INBOUND_SINK: u16 = 15007;
/// Connections that are kept.
const KEPT: usize = 16;
const CHUNK: usize = 64 << 10;
const PATIENCE: Duration = Duration::from_secs(20);

/// How much to do.
#[derive(Debug, Clone, Copy)]
pub struct Effort {
    /// Connections one after the other.
    pub connections: usize,
    /// How long requests and bytes are sent.
    pub sending: Duration,
}

/// One way to the application.
#[derive(Debug)]
pub struct Passage {
    /// What it is.
    pub name: &'static str,
    /// Connect, one byte there, one byte back.
    pub connect: Times,
    /// Bytes there and back over [`KEPT`] connections, each second.
    pub requests: u64,
    /// Bytes each second over one connection.
    pub bytes: u64,
}

/// Who stands in the way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Proxy {
    Nobody,
    Relay,
    Envoy,
}

/// How connections come to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lead {
    Direct,
    Redirect,
    Tproxy,
    /// The rules are there and leave the application's ports alone.
    Excluded,
}

const WAYS: [(&str, Proxy, Lead); 8] = [
    ("no proxy, no rules", Proxy::Nobody, Lead::Direct),
    ("no proxy, rules that exclude the port", Proxy::Nobody, Lead::Excluded),
    ("relay, addressed directly", Proxy::Relay, Lead::Direct),
    ("relay behind REDIRECT", Proxy::Relay, Lead::Redirect),
    ("relay behind TPROXY", Proxy::Relay, Lead::Tproxy),
    ("Envoy, addressed directly", Proxy::Envoy, Lead::Direct),
    ("Envoy behind REDIRECT", Proxy::Envoy, Lead::Redirect),
    ("Envoy behind TPROXY", Proxy::Envoy, Lead::Tproxy),
];

/// Measures every way. `relay` is the program that becomes the relay when it is called with `--relay`.
pub fn measure(relay: &Path, effort: Effort, say: fn(&str)) -> anyhow::Result<Vec<Passage>> {
    let mut lab = Lab::new(&Programs::discover()?)?;
    let client = lab.net.host("client")?;
    let server = lab.net.host("server")?;
    application(&server)?;
    let relay = executable(relay, lab.dir())?;
    let mut passages = Vec::new();
    for (name, proxy, lead) in WAYS {
        say(&format!("a redirected connection: {name}"));
        let passage = one(&lab, &client, &server, &relay, (name, proxy, lead), effort);
        passages.push(passage.with_context(|| format!("{name} cannot be measured"))?);
    }
    Ok(passages)
}

fn one(
    lab: &Lab,
    client: &Host,
    server: &Host,
    relay: &Path,
    (name, proxy, lead): (&'static str, Proxy, Lead),
    effort: Effort,
) -> anyhow::Result<Passage> {
    let _daemon = match proxy {
        Proxy::Nobody => None,
        Proxy::Relay => Some(start_relay(lab, server, relay, lead)?),
        Proxy::Envoy => Some(start_envoy(lab, server, lead)?),
    };
    if lead != Lead::Direct {
        let mut intent = RedirectIntent { proxy_uids: vec![PROXY], ..RedirectIntent::default() };
        match lead {
            Lead::Tproxy => intent.inbound.mode = InboundMode::Tproxy,
            Lead::Excluded => {
                intent.inbound.exclude_ports = vec![ECHO.to_string().parse()?, SINK.to_string().parse()?];
            }
            Lead::Redirect | Lead::Direct => {}
        }
        let plan = Plan::compile(&intent)?;
        in_netns(&server.path(), || ursa_init::apply(&plan))??;
    }
    let (echo, sink) = match (proxy, lead) {
        (Proxy::Relay | Proxy::Envoy, Lead::Direct) => (INBOUND, INBOUND_SINK),
        _ => (ECHO, SINK),
    };
    let address: Ipv4Addr = server.v4.parse()?;
    let (echo, sink) = (SocketAddr::from((address, echo)), SocketAddr::from((address, sink)));
    let measured = inside(client, || {
        process::pin_load();
        wait::until("the way to the application to be open", PATIENCE, || {
            round_trip(echo).map_err(|error| format!("{error:#}"))
        })?;
        for _ in 0..effort.connections / 10 {
            round_trip(echo)?;
        }
        let connect = (0..effort.connections).map(|_| round_trip(echo)).collect::<anyhow::Result<_>>()?;
        let requests = requests(echo, effort.sending)?;
        let bytes = bytes(sink, effort.sending)?;
        Ok(Passage { name, connect, requests, bytes })
    });
    in_netns(&server.path(), ursa_init::remove)??;
    measured
}

/// Works on a thread of its own in the host's namespace.
fn inside<T: Send>(host: &Host, work: impl FnOnce() -> anyhow::Result<T> + Send) -> anyhow::Result<T> {
    in_netns(&host.path(), work)?
}

/// A new connection, one byte there and back.
fn round_trip(to: SocketAddr) -> anyhow::Result<Duration> {
    let start = Instant::now();
    let mut stream = TcpStream::connect_timeout(&to, PATIENCE)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(&[1])?;
    stream.read_exact(&mut [0])?;
    Ok(start.elapsed())
}

/// One byte there and back over each kept connection, again and again.
fn requests(to: SocketAddr, sending: Duration) -> anyhow::Result<u64> {
    let mut streams = Vec::new();
    for _ in 0..KEPT {
        let stream = TcpStream::connect(to)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        streams.push(stream);
    }
    let (start, mut answered) = (Instant::now(), 0);
    while start.elapsed() < sending {
        for stream in &mut streams {
            stream.write_all(&[1])?;
        }
        for stream in &mut streams {
            stream.read_exact(&mut [0])?;
            answered += 1;
        }
    }
    Ok(per_second(answered, start.elapsed()))
}

/// Bytes over one connection, until the application has read the last.
fn bytes(to: SocketAddr, sending: Duration) -> anyhow::Result<u64> {
    let mut stream = TcpStream::connect(to)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let chunk = vec![7; CHUNK];
    let (start, mut sent) = (Instant::now(), 0);
    while start.elapsed() < sending {
        stream.write_all(&chunk)?;
        sent += chunk.len() as u64;
    }
    stream.shutdown(std::net::Shutdown::Write)?;
    let mut count = [0; 8];
    stream.read_exact(&mut count)?;
    if u64::from_be_bytes(count) != sent {
        bail!("of {sent} bytes {} arrived", u64::from_be_bytes(count));
    }
    Ok(per_second(sent, start.elapsed()))
}

fn per_second(count: u64, time: Duration) -> u64 {
    let nanos = time.as_nanos().max(1);
    u64::try_from(u128::from(count) * 1_000_000_000 / nanos).unwrap_or(u64::MAX)
}

/// The application: its threads last as long as this program, and end with the last of their connections.
fn application(server: &Host) -> anyhow::Result<()> {
    let file = fs::File::open(server.path())?;
    let (ready, is_ready) = std::sync::mpsc::channel();
    thread::spawn(move || {
        process::pin_load();
        let listen = || {
            setns(&file, CloneFlags::CLONE_NEWNET)?;
            anyhow::Ok((TcpListener::bind(("0.0.0.0", ECHO))?, TcpListener::bind(("0.0.0.0", SINK))?))
        };
        let (echo, sink) = match listen() {
            Ok(listeners) => listeners,
            Err(error) => {
                let _ = ready.send(Err(error));
                return;
            }
        };
        let _ = ready.send(Ok(()));
        thread::spawn(move || serve(&sink, sink_one));
        serve(&echo, echo_one);
    });
    is_ready.recv().context("the application has ended")?
}

fn serve(listener: &TcpListener, one: fn(TcpStream) -> std::io::Result<()>) {
    for stream in listener.incoming().flatten() {
        // A client that went away ends its connection, and nothing else.
        thread::spawn(move || one(stream));
    }
}

fn echo_one(mut stream: TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut byte = [0];
    while stream.read(&mut byte)? > 0 {
        stream.write_all(&byte)?;
    }
    Ok(())
}

fn sink_one(mut stream: TcpStream) -> std::io::Result<()> {
    let (mut buffer, mut count) = (vec![0; CHUNK], 0_u64);
    loop {
        match stream.read(&mut buffer)? {
            0 => return stream.write_all(&count.to_be_bytes()),
            read => count += read as u64,
        }
    }
}

/// The program where the proxy's user may execute it.
fn executable(program: &Path, dir: &Path) -> anyhow::Result<std::path::PathBuf> {
    let copy = dir.join("relay");
    fs::copy(program, &copy).with_context(|| format!("cannot copy {}", program.display()))?;
    Ok(copy)
}

/// Runs a proxy as its own user, with the one capability that a transparent one needs, on the first processor.
fn start(
    lab: &Lab,
    server: &Host,
    name: &str,
    program: &Path,
    args: &[String],
    lead: Lead,
) -> anyhow::Result<Daemon> {
    let uid = PROXY.to_string();
    let mut all: Vec<String> =
        ["--reuid", &uid, "--regid", &uid, "--clear-groups"].map(str::to_owned).to_vec();
    let capabilities: &[&str] = match lead {
        Lead::Tproxy => {
            &["--inh-caps", "+net_admin", "--ambient-caps", "+net_admin", "--bounding-set", "-all,+net_admin"]
        }
        _ => &["--bounding-set", "-all"],
    };
    all.extend(capabilities.iter().map(ToString::to_string));
    all.extend(["taskset", "-c", "0"].map(str::to_owned));
    all.push(program.to_string_lossy().into_owned());
    all.extend(args.iter().cloned());
    Daemon::start(name, server, "setpriv".into(), all, Vec::new(), lab.log(name))
}

fn start_relay(lab: &Lab, server: &Host, relay: &Path, lead: Lead) -> anyhow::Result<Daemon> {
    let ports = match lead {
        Lead::Direct => vec![format!("{INBOUND}={ECHO}"), format!("{INBOUND_SINK}={SINK}")],
        Lead::Tproxy => vec![format!("{INBOUND}=tproxy")],
        Lead::Redirect | Lead::Excluded => vec![format!("{INBOUND}=redirect")],
    };
    start(lab, server, "relay", relay, &["--relay".to_owned(), ports.join(",")], lead)
}

fn start_envoy(lab: &Lab, server: &Host, lead: Lead) -> anyhow::Result<Daemon> {
    let file = lab.dir().join("envoy.json");
    fs::write(&file, envoy_config(server, lead).to_string())?;
    let args = ["-c", &file.to_string_lossy(), "--use-dynamic-base-id", "--concurrency", "1", "-l", "warn"]
        .map(str::to_owned);
    start(lab, server, "envoy", &lab.programs.envoy, &args, lead)
}

/// A TCP proxy and nothing else.
fn envoy_config(server: &Host, lead: Lead) -> Value {
    let typed = |name: &str, kind: &str, mut value: Value| {
        value["@type"] = json!(format!("type.googleapis.com/{kind}"));
        json!({"name": name, "typed_config": value})
    };
    let proxy = |cluster: &str| {
        let kind = "envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy";
        let filter = typed("tcp", kind, json!({"stat_prefix": "in", "cluster": cluster}));
        json!([{"filters": [filter]}])
    };
    let address =
        |address: &str, port: u16| json!({"socket_address": {"address": address, "port_value": port}});
    let bind = json!({"source_address": {"address": "127.0.0.6", "port_value": 0}});
    if lead == Lead::Direct {
        let ports = [(INBOUND, ECHO, "echo"), (INBOUND_SINK, SINK, "sink")];
        let listeners = ports.map(|(port, _, name)| {
            json!({"name": name, "address": address("0.0.0.0", port), "filter_chains": proxy(name)})
        });
        let clusters = ports.map(|(_, port, name)| {
            json!({"name": name, "type": "STATIC", "upstream_bind_config": bind, "load_assignment": {
                "cluster_name": name,
                "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address(&server.v4, port)}}]}]}})
        });
        return json!({"static_resources": {"listeners": listeners, "clusters": clusters}});
    }
    let mut filters = vec![typed(
        "original_dst",
        "envoy.extensions.filters.listener.original_dst.v3.OriginalDst",
        json!({}),
    )];
    let mut cluster = json!({
        "name": "app", "type": "ORIGINAL_DST", "lb_policy": "CLUSTER_PROVIDED", "connect_timeout": "5s",
    });
    if lead == Lead::Tproxy {
        let kind = "envoy.extensions.filters.listener.original_src.v3.OriginalSrc";
        filters.push(typed("original_src", kind, json!({"mark": 1337})));
    } else {
        cluster["upstream_bind_config"] = bind;
    }
    let listener = json!({
        "name": "in", "address": address("0.0.0.0", INBOUND), "transparent": lead == Lead::Tproxy,
        "listener_filters": filters, "filter_chains": proxy("app"),
    });
    json!({"static_resources": {"listeners": [listener], "clusters": [cluster]}})
}
