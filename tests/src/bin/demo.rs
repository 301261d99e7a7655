//! `make demo`: the main job, end to end on real parts, each claim measured.

use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use clap::Parser;
use ursa_tests::lab::capture::Capture;
use ursa_tests::lab::daemon::{Daemon, kill_pid};
use ursa_tests::lab::mesh::{Control, Node, PORT, Workload};
use ursa_tests::lab::net::Host;
use ursa_tests::lab::program::{self, Answer, Client, Load};
use ursa_tests::lab::{Lab, Programs, wait};

#[derive(Parser)]
struct Args {
    /// Folder of our programs [default: where this one is]
    #[arg(long)]
    bin_dir: Option<PathBuf>,
    /// Envoy's binary [default: URSA_ENVOY]
    #[arg(long)]
    envoy: Option<PathBuf>,
    /// Leave it running and print commands worth trying
    #[arg(long)]
    keep: bool,
    /// Remove what a demo of this name left running
    #[arg(long, value_name = "NAME")]
    remove: Option<String>,
}

impl Args {
    fn programs(&self) -> anyhow::Result<Programs> {
        match (&self.bin_dir, &self.envoy) {
            (Some(bin_dir), Some(envoy)) => {
                Programs { bin_dir: bin_dir.clone(), envoy: envoy.clone() }.checked()
            }
            _ => Programs::discover(),
        }
    }
}

const URL: &str = "http://backend.svc.mesh.local:8080/orders";
/// What the server says to whoever may hear it; its absence on the wire is what encryption means here.
const PLAINTEXT: &str = "which nobody on the way may read";
const SOON: Duration = Duration::from_secs(10);
/// How long all of it may take; `make demo` builds before.
const LIMIT: Duration = Duration::from_secs(30);

fn main() -> ExitCode {
    let args = Args::parse();
    let start = Instant::now();
    if let Some(name) = &args.remove {
        let problems = Lab::remove(name);
        for problem in &problems {
            eprintln!("{problem}");
        }
        return if problems.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    }
    let mut lab = match args.programs().and_then(|programs| Lab::new(&programs)) {
        Ok(lab) => lab,
        Err(error) => {
            eprintln!("demo: {error:#}");
            return ExitCode::FAILURE;
        }
    };
    clean_up_on_signal(lab.prefix.clone());
    match Demo::run(&mut lab, args.keep) {
        Ok(()) if args.keep => {
            lab.keep();
            in_time(start)
        }
        Ok(()) => remove(lab, start),
        Err(error) => {
            println!("  FAILED  {error:#}");
            if let Some(logs) = lab.save_logs() {
                println!("          look at the logs in {}", logs.display());
            }
            drop(lab);
            println!(
                "\nThe demo failed after {:.1} s; everything it made is removed.",
                start.elapsed().as_secs_f64()
            );
            ExitCode::FAILURE
        }
    }
}

/// An interrupted demo leaves nothing either.
fn clean_up_on_signal(prefix: String) {
    std::thread::spawn(move || {
        let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else { return };
        runtime.block_on(async {
            let terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate());
            let Ok(mut terminate) = terminate else { return };
            tokio::select! {
                _ = tokio::signal::ctrl_c() => {}
                _ = terminate.recv() => {}
            }
            eprintln!("interrupted: removing everything");
            for problem in Lab::remove(&prefix) {
                eprintln!("{problem}");
            }
            std::process::exit(130);
        });
    });
}

fn stage(number: u32, title: &str) {
    println!("\n{number}. {title}");
}

fn held(what: &str, measured: impl std::fmt::Display) {
    println!("  ok  {what:<62} {measured}");
}

fn ms(duration: Duration) -> String {
    format!("{:.0} ms", duration.as_secs_f64() * 1e3)
}

/// The last stage: what was made is gone, as the system says, not as we believe.
fn remove(lab: Lab, start: Instant) -> ExitCode {
    stage(4, "Everything is removed");
    let (prefix, dir) = (lab.prefix.clone(), lab.dir().to_owned());
    drop(lab);
    let left = |folder: &str| {
        let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
        entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(&prefix)).count()
    };
    let namespaces = left("/run/netns") + left("/etc/netns");
    let processes = std::fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| {
            std::fs::read(entry.path().join("cmdline"))
                .is_ok_and(|line| String::from_utf8_lossy(&line).contains(prefix.as_str()))
        })
        .count();
    let shared = left("/dev/shm");
    if namespaces + processes + shared > 0 || dir.exists() {
        println!(
            "  FAILED  expected nothing to be left; seen: {namespaces} namespaces, {processes} processes, \
             {shared} pieces of shared memory, folder {}: {}",
            dir.display(),
            dir.exists()
        );
        return ExitCode::FAILURE;
    }
    held("namespaces, processes and files of this demo that are left", "0");
    in_time(start)
}

/// Every step held; whether that was soon enough.
fn in_time(start: Instant) -> ExitCode {
    let took = start.elapsed();
    if took > LIMIT {
        println!(
            "  FAILED  expected every step to hold within {} s; seen: {:.1} s. Look at the times above, and at \
             what else runs on this machine.",
            LIMIT.as_secs(),
            took.as_secs_f64()
        );
        return ExitCode::FAILURE;
    }
    println!("\nEvery step held, in {:.1} s.", took.as_secs_f64());
    ExitCode::SUCCESS
}

struct Demo<'a> {
    lab: &'a Lab,
    control: Control,
    nodes: [Node; 2],
    web: Workload,
    backend: Workload,
    stranger: Host,
    client: Client,
    servers: Vec<Daemon>,
}

impl<'a> Demo<'a> {
    fn run(lab: &'a mut Lab, keep: bool) -> anyhow::Result<()> {
        let mut demo = Self::set_up(lab)?;
        stage(3, "web calls http://backend.svc.mesh.local:8080");
        demo.refused_then_allowed()?;
        demo.strangers_and_wires()?;
        demo.deaths()?;
        if keep {
            demo.keep();
        }
        Ok(())
    }

    fn set_up(lab: &'a mut Lab) -> anyhow::Result<Self> {
        stage(1, "A control plane, two machines, three programs that know nothing of a mesh");
        let begin = Instant::now();
        let control = Control::start(lab)?;
        held("ursa-control serves, embedded store", ms(begin.elapsed()));
        let [web, backend, stranger] = ["web", "backend", "stranger"].map(|name| lab.net.host(name));
        let (web, backend, stranger) = (web?, backend?, stranger?);
        let servers = vec![program::serve(lab, &backend, "backend", PORT)?];
        let mut outsider = Client::start(lab, &stranger)?;
        let direct = format!("http://{}:{PORT}/", backend.v4);
        wait::until("backend's program to answer", SOON, || match outsider.get(&direct) {
            Ok(answer) if answer.ok() => Ok(()),
            Ok(answer) => Err(answer.brief()),
            Err(error) => Err(error.to_string()),
        })?;
        held("before the mesh, anybody reads backend in plaintext", "HTTP 200 for stranger");

        stage(2, "Both workloads join");
        let begin = Instant::now();
        let tickets = (control.ticket(&["web"])?, control.ticket(&["backend"])?);
        let mut nodes = [Node::join(lab, "node-a", &tickets.0)?, Node::join(lab, "node-b", &tickets.1)?];
        held("node-a and node-b joined: ticket, CSR, certificate", ms(begin.elapsed()));
        let begin = Instant::now();
        let web = nodes[0].add("web", &web)?;
        let backend = nodes[1].add("backend", &backend)?;
        nodes[1].wait_ready("backend", SOON)?;
        nodes[0].wait_ready("web", SOON)?;
        held("web and backend: redirected, identified, Envoy live", ms(begin.elapsed()));
        for workload in [&web, &backend] {
            let envoys = workload.host.running("envoy");
            ensure!(envoys.len() == 1, "expected one Envoy beside {}; seen: {envoys:?}", workload.name);
            let (uid, caps) = credentials(envoys[0])?;
            ensure!(
                uid == workload.uid && caps == 0,
                "expected {}'s Envoy as uid {} without capabilities; seen: uid {uid}, capabilities {caps:x}",
                workload.name,
                workload.uid
            );
        }
        ensure!(
            web.uid != backend.uid,
            "expected a user of its own for each Envoy; seen: both run as uid {}",
            web.uid
        );
        held("each Envoy runs as a user of its own, capabilities", "none");
        let client = Client::start(lab, &web.host)?;
        Ok(Self { lab, control, nodes, web, backend, stranger, client, servers })
    }

    fn get(&mut self) -> anyhow::Result<Answer> {
        self.client.get(URL)
    }

    fn refused_then_allowed(&mut self) -> anyhow::Result<()> {
        let (answer, _) =
            wait::until("web's request refused by policy (HTTP 403)", SOON, || match self.client.get(URL) {
                Ok(answer) if answer.status == Some(403) => Ok(answer),
                Ok(answer) => Err(answer.brief()),
                Err(error) => Err(error.to_string()),
            })?;
        held("refused: no policy allows it", answer.brief());

        let begin = Instant::now();
        let said = self.control.ursa(&["allow", "web", "backend"])?;
        let wrote = begin.elapsed();
        // Twenty in a row, so that each of Envoy's workers has heard of it.
        let (mut first, mut streak) = (Duration::ZERO, 0);
        wait::until("web's requests to succeed after `ursa allow web backend`", SOON, || {
            match self.client.get(URL) {
                Ok(answer) if answer.ok() => {
                    if streak == 0 {
                        first = begin.elapsed();
                    }
                    streak += 1;
                    if streak == 20 { Ok(()) } else { Err(format!("{streak} successes in a row")) }
                }
                Ok(answer) => {
                    streak = 0;
                    Err(answer.brief())
                }
                Err(error) => Err(error.to_string()),
            }
        })?;
        let took = first.saturating_sub(wrote);
        held("ursa allow web backend", said.trim());
        held("allowed: the same request succeeds, after the write", ms(took));
        println!("      (the command itself took {})", ms(wrote));

        let answer = self.get()?;
        let body: serde_json::Value = serde_json::from_str(&answer.text)
            .with_context(|| format!("expected JSON from backend; seen: {}", answer.brief()))?;
        let seen = body["headers"]["x-forwarded-client-cert"].as_str().unwrap_or_default();
        ensure!(
            seen.contains("URI=spiffe://default.lab.mesh.local/workload/web"),
            "expected backend to see web's certificate; seen: x-forwarded-client-cert {seen:?}"
        );
        held("the certificate that backend saw", seen.split(';').next_back().unwrap_or_default());
        let names = self.client.resolve("backend.svc.mesh.local")?;
        ensure!(names.ok(), "expected the name to resolve; seen: {}", names.brief());
        held("backend.svc.mesh.local in web's namespace", names.text);
        Ok(())
    }

    fn strangers_and_wires(&mut self) -> anyhow::Result<()> {
        let mut stranger = Client::start(self.lab, &self.stranger)?;
        for address in [self.backend.host.v4.clone(), format!("[{}]", self.backend.host.v6)] {
            let answer = stranger.get(&format!("http://{address}:{PORT}/"))?;
            ensure!(
                answer.status.is_none(),
                "expected stranger to be refused at {address}; seen: {}",
                answer.brief()
            );
            held(&format!("stranger is refused at {address}"), answer.failed + ": " + answer.text.trim());
        }

        let capture = Capture::start(&self.lab.net.bridge())?;
        let begin = Instant::now();
        for _ in 0..20 {
            let answer = self.get()?;
            ensure!(answer.ok(), "expected each request to succeed; seen: {}", answer.brief());
        }
        let each = begin.elapsed() / 20;
        let packets = capture.finish()?;
        let file = self.lab.log("wire").with_extension("pcap");
        packets.save(&file)?;
        let (web, backend): (Ipv4Addr, Ipv4Addr) = (self.web.host.v4.parse()?, self.backend.host.v4.parse()?);
        let between = packets.between(web, backend);
        ensure!(
            between > 0,
            "expected packets between web and backend; seen: none of {} ({})",
            packets.len(),
            file.display()
        );
        let leaked = packets.containing(PLAINTEXT) + packets.containing("GET /orders");
        ensure!(
            leaked == 0,
            "expected no plaintext on the link; seen: {leaked} packets ({})",
            file.display()
        );
        held("plaintext in a capture of 20 requests", format!("0 of {between} packets ({} each)", ms(each)));
        Ok(())
    }

    fn deaths(&mut self) -> anyhow::Result<()> {
        let mut load = Load::start(self.lab, &self.web.host, URL, Duration::from_millis(5))?;
        enough(&load, 50)?;

        self.control.daemon.kill();
        let since = Instant::now();
        enough(&load, load.count() + 200)?;
        let tally = load.tally(since);
        ensure!(
            tally.bad.is_empty(),
            "expected requests to go on without the control plane; seen: {} of {} failed, first {}",
            tally.bad.len(),
            tally.good + tally.bad.len(),
            tally.bad[0].brief()
        );
        held("control plane killed: requests that failed", format!("0 of {}", tally.good));

        let [envoy] = self.web.host.running("envoy")[..] else { anyhow::bail!("web has no Envoy to kill") };
        kill_pid(envoy)?;
        let ((), took) = wait::until("web's Envoy to come back with its last configuration", SOON, || {
            let envoys = self.web.host.running("envoy");
            if envoys.is_empty() || envoys.contains(&envoy) {
                return Err(format!("Envoys: {envoys:?}"));
            }
            match self.client.get(URL) {
                Ok(answer) if answer.ok() => Ok(()),
                Ok(answer) => Err(answer.brief()),
                Err(error) => Err(error.to_string()),
            }
        })?;
        drop(load);
        held("web's Envoy killed, still no control plane: serves again after", ms(took));
        let took = self.control.restart()?;
        held("control plane started again, serves after", ms(took));

        load = Load::start(self.lab, &self.web.host, URL, Duration::from_millis(5))?;
        enough(&load, 50)?;
        let shims = self.web.host.running("ursa-shim");
        self.nodes[0].agent.kill();
        let since = Instant::now();
        enough(&load, load.count() + 200)?;
        let tally = load.tally(since);
        ensure!(
            tally.bad.is_empty() && tally.kept > 0,
            "expected no request to fail while the agent is dead; seen: {} good, {} dropped connections, first {}",
            tally.good,
            tally.drops,
            tally.bad.first().map(Answer::brief).unwrap_or_default()
        );
        held(
            "agent killed: connections that dropped",
            format!("0 ({} requests, {} over one connection)", tally.good, tally.kept),
        );
        self.nodes[0].agent.restart()?;
        let took = self.nodes[0].wait_ready("web", SOON)?;
        let tally = load.tally(since);
        let now = self.web.host.running("ursa-shim");
        ensure!(
            shims == now && tally.bad.is_empty(),
            "expected the new agent to adopt shim {shims:?}; seen: shim {now:?}, {} failed requests",
            tally.bad.len()
        );
        held("agent started again: adopted what runs, nothing dropped", ms(took));
        Ok(())
    }

    fn keep(mut self) {
        let socket = self.control.socket.display().to_string();
        let bin = self.lab.programs.bin_dir.display().to_string();
        let (web, backend) = (&self.web.host.netns, &self.backend.host.netns);
        stage(4, "Left running, because KEEP=1. Worth trying:");
        println!("  export PATH={bin}:$PATH URSA_SOCKET={socket}");
        println!("  ip netns exec {web} curl -v {URL}");
        println!("  ursa inspect dataplanes");
        println!("  ursa get meshtrafficpermission allow-web-to-backend -o yaml");
        println!("  ursa-agent status --config {}", self.nodes[0].config.display());
        println!("  ursa-init show --netns /run/netns/{backend}");
        // Not from `bin`, which may be the lab's own copy.
        let demo =
            std::env::current_exe().map_or_else(|_| "demo".to_owned(), |path| path.display().to_string());
        println!("Remove it: {demo} --remove {}", self.lab.prefix);
        self.control.daemon.detach();
        for node in &mut self.nodes {
            node.agent.detach();
        }
        for server in &mut self.servers {
            server.detach();
        }
    }
}

/// Waits until the load has this many answers.
fn enough(load: &Load, count: usize) -> anyhow::Result<()> {
    wait::until(&format!("{count} answers"), SOON, || {
        if load.count() >= count { Ok(()) } else { Err(format!("{} answers", load.count())) }
    })
    .map(drop)
}

/// The user of a process, and its permitted capabilities.
fn credentials(pid: i32) -> anyhow::Result<(u32, u64)> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).context("Envoy's /proc entry")?;
    let field =
        |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default().trim();
    let uid = field("Uid:").split_whitespace().next().unwrap_or_default().parse()?;
    let caps = u64::from_str_radix(field("CapPrm:"), 16)?;
    Ok((uid, caps))
}
