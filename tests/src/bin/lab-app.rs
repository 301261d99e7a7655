//! The lab's ordinary program: plain HTTP over std's sockets, names by libc, no idea of a mesh.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{Ipv4Addr, TcpListener, TcpStream, ToSocketAddrs as _, UdpSocket};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, bail};
use clap::Parser;
use ursa_tests::lab::program::Answer;

#[derive(Parser)]
enum Verb {
    /// Answers every request with what it saw of it; `?delay=MILLISECONDS` at the end of its path makes it slow.
    Serve {
        #[arg(long)]
        name: String,
        #[arg(long)]
        port: u16,
        #[arg(long, default_value_t = NOBODY)]
        uid: u32,
    },
    /// Reads `get URL [HEADER: VALUE]`, `keep URL` and `name NAME` from standard input and prints one JSON line each.
    Client {
        #[arg(long, default_value_t = NOBODY)]
        uid: u32,
    },
    /// Asks all the time, and prints one JSON line per request.
    Load {
        #[arg(long)]
        url: String,
        #[arg(long)]
        interval_ms: u64,
    },
    /// Connects to a Unix socket as some user, sends one line, and prints what came of it.
    Connect {
        #[arg(long)]
        uid: u32,
        #[arg(long)]
        path: std::path::PathBuf,
    },
    /// Resolves names all the time, each in a thread of its own, and prints one JSON line per lookup.
    Lookups {
        #[arg(long, required = true)]
        name: Vec<String>,
        #[arg(long)]
        interval_ms: u64,
    },
    /// Becomes another program, for which the kernel has no nf_tables.
    WithoutNfTables {
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<std::ffi::OsString>,
    },
    /// Is the first process of a machine: mounts what is the machine's own, prints `up`, and collects orphans until its
    /// input ends.
    Machine {
        /// What it has as `/var/lib`; the rest of its files are those of the machine that runs the lab.
        #[arg(long)]
        disk: std::path::PathBuf,
    },
    /// Is the parent of a machine with systemd; see [`ursa_tests::lab::vm::guard`].
    Vm(ursa_tests::lab::vm::guard::Args),
    /// Removes a lab when its own input ends; see [`ursa_tests::lab::sweep`].
    Sweep {
        #[arg(long)]
        prefix: String,
    },
    /// Is a name server: every name has the address 192.0.2.53 and no other record.
    Resolver {
        #[arg(long)]
        address: Ipv4Addr,
    },
}

const TIMEOUT: Duration = Duration::from_secs(3);
/// Whom programs run as that needn't be somebody.
const NOBODY: u32 = 65534;

fn main() -> anyhow::Result<()> {
    let name = std::env::args_os().next().map(std::path::PathBuf::from).unwrap_or_default();
    if name.ends_with(ursa_tests::lab::runtime::network::PREPARED) {
        return prepared();
    }
    let verb = Verb::parse();
    if let Verb::WithoutNfTables { command } = &verb {
        use std::os::unix::process::CommandExt as _;
        ursa_tests::lab::fault::forbid_nf_tables().context("cannot install the filter")?;
        let (program, args) = command.split_first().context("which program?")?;
        return Err(std::process::Command::new(program).args(args).exec().into());
    }
    if let Verb::Machine { disk } = &verb {
        return machine(disk);
    }
    if let Verb::Vm(args) = &verb {
        std::process::exit(ursa_tests::lab::vm::guard::run(args)?);
    }
    if let Verb::Sweep { prefix } = &verb {
        return ursa_tests::lab::sweep::run(prefix);
    }
    // Only root may have the port of names.
    let resolver = match &verb {
        Verb::Resolver { address } => Some(UdpSocket::bind((*address, 53)).context("cannot bind port 53")?),
        _ => None,
    };
    // An ordinary program isn't root. Group and user, in that order.
    let uid = match &verb {
        Verb::Connect { uid, .. } | Verb::Serve { uid, .. } | Verb::Client { uid } => *uid,
        _ => NOBODY,
    };
    nix::unistd::setgroups(&[])?;
    nix::unistd::setgid(uid.into())?;
    nix::unistd::setuid(uid.into())?;
    match verb {
        Verb::Serve { name, port, .. } => serve(&name, port),
        Verb::Client { .. } => client(),
        Verb::Load { url, interval_ms } => load(&url, Duration::from_millis(interval_ms)),
        Verb::Connect { path, .. } => {
            println!("{}", intrude(&path).unwrap_or_else(|error| format!("refused: {error}")));
            Ok(())
        }
        Verb::Lookups { name, interval_ms } => {
            lookups(&name, Duration::from_millis(interval_ms));
            Ok(())
        }
        Verb::WithoutNfTables { .. } => bail!("invariant: it became another program above"),
        Verb::Machine { .. } | Verb::Vm(_) | Verb::Sweep { .. } => bail!("invariant: it never ends"),
        Verb::Resolver { .. } => resolver.map_or(Ok(()), |socket| answer_lookups(&socket)),
    }
}

/// A CNI plugin; see [`ursa_tests::lab::runtime::network::PREPARED`].
fn prepared() -> anyhow::Result<()> {
    let config: serde_json::Value = serde_json::from_reader(std::io::stdin())?;
    match std::env::var("CNI_COMMAND")?.as_str() {
        "ADD" => println!("{}", config["result"]),
        "VERSION" => {
            println!(
                "{}",
                serde_json::json!({"cniVersion": "1.1.0", "supportedVersions": ["1.0.0", "1.1.0"]})
            );
        }
        _ => {}
    }
    Ok(())
}

/// The first process of a machine, whose end is that of all the others.
fn machine(disk: &std::path::Path) -> anyhow::Result<()> {
    use nix::mount::{MsFlags, mount};
    use nix::sys::signal::{SigSet, Signal};
    use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
    let none = None::<&str>;
    for dir in ["/run", "/dev/shm"] {
        mount(Some("tmpfs"), dir, Some("tmpfs"), MsFlags::empty(), none)
            .with_context(|| format!("cannot mount an empty {dir}"))?;
    }
    for dir in ["/run/netns", "/run/lock"] {
        std::fs::create_dir_all(dir).with_context(|| format!("cannot create {dir}"))?;
    }
    mount(Some(disk), "/var/lib", none, MsFlags::MS_BIND, none).context("cannot mount over /var/lib")?;
    let mut orphans = SigSet::empty();
    orphans.add(Signal::SIGCHLD);
    orphans.thread_block().context("cannot block a signal")?;
    println!("up");
    std::thread::spawn(|| {
        let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
        std::process::exit(0);
    });
    loop {
        orphans.wait().context("cannot wait for a signal")?;
        while !matches!(waitpid(None, Some(WaitPidFlag::WNOHANG)), Ok(WaitStatus::StillAlive) | Err(_)) {}
    }
}

/// What a socket gives to whoever asks, up to its first answer: `refused: …`, `closed`, or the bytes as text.
fn intrude(path: &std::path::Path) -> std::io::Result<String> {
    use std::io::Read as _;
    let mut stream = std::os::unix::net::UnixStream::connect(path)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    // A line for our own sockets, and HTTP/2's first bytes (with an empty SETTINGS frame) for gRPC.
    let greeting = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0\n";
    // Whoever is turned away may find the socket closed already.
    let _ = stream.write_all(greeting);
    let mut answer = [0; 4096];
    match stream.read(&mut answer) {
        Ok(0) => Ok("closed".to_owned()),
        Ok(length) => Ok(format!("answered: {}", String::from_utf8_lossy(&answer[..length]).trim_end())),
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => Ok("closed".to_owned()),
        Err(error) => Err(error),
    }
}

fn lookups(names: &[String], interval: Duration) {
    std::thread::scope(|scope| {
        for name in names {
            scope.spawn(move || -> anyhow::Result<()> {
                loop {
                    let mut answer = resolve(name);
                    if !answer.ok() {
                        answer.text = format!("{name}: {}", answer.text);
                    }
                    print(&answer)?;
                    std::thread::sleep(interval);
                }
            });
        }
    });
}

/// One question per datagram, as every stub resolver asks.
fn answer_lookups(socket: &UdpSocket) -> anyhow::Result<()> {
    const HEADER: usize = 12;
    let mut packet = [0_u8; 512];
    loop {
        let (length, peer) = socket.recv_from(&mut packet)?;
        let Some(labels) =
            packet.get(HEADER..length).and_then(|rest| rest.iter().position(|byte| *byte == 0))
        else {
            continue;
        };
        let question = HEADER + labels + 1..HEADER + labels + 5;
        if question.end > length {
            continue;
        }
        let is_a = packet[question.start..question.end] == [0, 1, 0, 1];
        // A response to a query of opcode 0, recursion available, no error; one question, perhaps one answer.
        let mut response = vec![packet[0], packet[1], 0x81, 0x80, 0, 1, 0, u8::from(is_a), 0, 0, 0, 0];
        response.extend_from_slice(&packet[HEADER..question.end]);
        if is_a {
            response.extend_from_slice(&[0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 5, 0, 4, 192, 0, 2, 53]);
        }
        socket.send_to(&response, peer)?;
    }
}

/// Seconds since 1970: what programs of one machine can compare.
fn now() -> f64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

fn serve(name: &str, port: u16) -> anyhow::Result<()> {
    let listener =
        TcpListener::bind(("::", port)).with_context(|| format!("cannot listen on port {port}"))?;
    for stream in listener.incoming() {
        let (stream, name) = (stream?, name.to_owned());
        std::thread::spawn(move || answer_all(&stream, &name));
    }
    Ok(())
}

/// Requests without bodies, one after the other.
fn answer_all(stream: &TcpStream, name: &str) -> anyhow::Result<()> {
    stream.set_nodelay(true)?;
    let peer = stream.peer_addr()?;
    let mut input = BufReader::new(stream);
    loop {
        let mut line = String::new();
        if input.read_line(&mut line)? == 0 {
            return Ok(());
        }
        let path = line.split_whitespace().nth(1).unwrap_or("/").to_owned();
        let headers = read_headers(&mut input)?;
        if let Some(delay) = path.split_once("?delay=").and_then(|(_, delay)| delay.parse().ok()) {
            std::thread::sleep(Duration::from_millis(delay));
        }
        let body =
            serde_json::json!({"name": name, "path": path, "peer": peer.to_string(), "headers": headers,
            "plaintext": format!("hello from {name}, which nobody on the way may read")})
            .to_string();
        let mut output = stream;
        write!(
            output,
            "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        )?;
    }
}

fn read_headers(input: &mut impl std::io::BufRead) -> anyhow::Result<BTreeMap<String, String>> {
    let mut headers = BTreeMap::new();
    loop {
        let mut line = String::new();
        if input.read_line(&mut line)? == 0 {
            bail!("the connection was closed within the headers");
        }
        let Some((key, value)) = line.trim_end().split_once(':') else { return Ok(headers) };
        headers.insert(key.to_ascii_lowercase(), value.trim().to_owned());
    }
}

fn print(answer: &Answer) -> anyhow::Result<()> {
    println!("{}", serde_json::to_string(answer)?);
    Ok(())
}

fn client() -> anyhow::Result<()> {
    let mut kept = None;
    for line in std::io::stdin().lines() {
        let line = line?;
        let (verb, what) = line.split_once(' ').context("verb and what, please")?;
        let answer = match verb {
            "get" => request(what, &mut None),
            "keep" => request(what, &mut kept),
            "name" => resolve(what),
            other => bail!("unknown verb {other:?}"),
        };
        print(&answer)?;
    }
    Ok(())
}

fn load(url: &str, interval: Duration) -> anyhow::Result<()> {
    let target = url.to_owned();
    std::thread::spawn(move || -> anyhow::Result<()> {
        let mut kept = None;
        loop {
            let was_open = kept.is_some();
            let mut answer = request(&target, &mut kept);
            // A connection that can't be opened was not dropped; the other thread reports that.
            if was_open || answer.ok() {
                answer.kept = true;
                print(&answer)?;
            }
            std::thread::sleep(interval);
        }
    });
    loop {
        print(&request(url, &mut None))?;
        std::thread::sleep(interval);
    }
}

fn resolve(name: &str) -> Answer {
    let (start, began) = (Instant::now(), now());
    let done = |status, text, failed: &str| Answer {
        began,
        status,
        text,
        ms: start.elapsed().as_secs_f64() * 1e3,
        kept: false,
        failed: failed.to_owned(),
    };
    match (name, 80).to_socket_addrs() {
        Ok(addresses) => {
            let addresses: Vec<String> = addresses.map(|address| address.ip().to_string()).collect();
            done(Some(200), addresses.join(" "), "")
        }
        Err(error) => done(None, error.to_string(), "name"),
    }
}

/// One request; the connection stays in `kept` when it went well.
fn request(url: &str, kept: &mut Option<TcpStream>) -> Answer {
    let (start, began) = (Instant::now(), now());
    let reused = kept.is_some();
    let (status, text, failed) = match exchange(url, kept) {
        Ok((status, body)) => (Some(status), body, ""),
        Err((step, error)) => {
            *kept = None;
            (None, format!("{error:#}"), step)
        }
    };
    let ms = start.elapsed().as_secs_f64() * 1e3;
    Answer { status, text, began, ms, kept: reused, failed: failed.to_owned() }
}

fn exchange(url: &str, kept: &mut Option<TcpStream>) -> Result<(u16, String), (&'static str, anyhow::Error)> {
    let (url, header) =
        url.split_once(' ').map_or((url, String::new()), |(url, header)| (url, format!("{header}\r\n")));
    let rest = url.strip_prefix("http://").unwrap_or(url);
    let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
    let target = if authority.contains("]:") || (authority.contains(':') && !authority.ends_with(']')) {
        authority.to_owned()
    } else {
        format!("{authority}:80")
    };
    let mut stream = match kept.take() {
        Some(stream) => stream,
        None => connect(&target)?,
    };
    let mut http = || -> anyhow::Result<(u16, String, bool)> {
        write!(stream, "GET /{path} HTTP/1.1\r\nhost: {authority}\r\nuser-agent: lab-app\r\n{header}\r\n")?;
        let mut input = BufReader::new(&stream);
        let mut line = String::new();
        if input.read_line(&mut line)? == 0 {
            bail!("the connection was closed without a response");
        }
        let status = line.split_whitespace().nth(1).and_then(|code| code.parse().ok());
        let status = status.with_context(|| format!("not an HTTP response: {line:?}"))?;
        let headers = read_headers(&mut input)?;
        let body = read_body(&mut input, &headers)?;
        let body = String::from_utf8_lossy(&body).into_owned();
        let closing = headers.get("connection").is_some_and(|value| value.eq_ignore_ascii_case("close"));
        Ok((status, body, closing))
    };
    let (status, body, closing) = http().map_err(|error| ("http", error))?;
    // A server that says so closes; a request after it would fail for a reason that the client was told.
    *kept = Some(stream).filter(|_| !closing);
    Ok((status, body))
}

/// A body with a length, or in chunks.
fn read_body(
    input: &mut impl std::io::BufRead,
    headers: &BTreeMap<String, String>,
) -> anyhow::Result<Vec<u8>> {
    let mut body = Vec::new();
    if headers.get("transfer-encoding").is_none_or(|value| value != "chunked") {
        let length = headers.get("content-length").and_then(|text| text.parse().ok()).unwrap_or(0);
        body.resize(length, 0);
        input.read_exact(&mut body)?;
        return Ok(body);
    }
    loop {
        let mut line = String::new();
        input.read_line(&mut line)?;
        let length =
            usize::from_str_radix(line.trim(), 16).with_context(|| format!("not a chunk: {line:?}"))?;
        let start = body.len();
        body.resize(start + length, 0);
        input.read_exact(&mut body[start..])?;
        line.clear();
        input.read_line(&mut line)?;
        if length == 0 {
            return Ok(body);
        }
    }
}

fn connect(target: &str) -> Result<TcpStream, (&'static str, anyhow::Error)> {
    let addresses = target.to_socket_addrs().map_err(|error| ("name", error.into()))?;
    let mut last = anyhow::anyhow!("{target} has no address");
    for address in addresses {
        match TcpStream::connect_timeout(&address, TIMEOUT) {
            Ok(stream) => {
                let set = stream.set_nodelay(true).and_then(|()| stream.set_read_timeout(Some(TIMEOUT)));
                return set.map(|()| stream).map_err(|error| ("connect", error.into()));
            }
            Err(error) => last = anyhow::anyhow!("{address}: {error}"),
        }
    }
    Err(("connect", last))
}
