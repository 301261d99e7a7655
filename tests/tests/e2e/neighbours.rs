//! Two workloads in one network namespace, each with a user or a slice, an Envoy and an identity of its own.

use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use ursa_tests::lab::daemon::Daemon;
use ursa_tests::lab::mesh::{Control, Node, PORT};
use ursa_tests::lab::net::Host;
use ursa_tests::lab::pair::{SOON, URL, until};
use ursa_tests::lab::program::{Answer, Client, Load};
use ursa_tests::lab::{Lab, Programs, wait};

/// The applications' users; the last one belongs to no workload.
const WEB: u32 = 2001;
const BACKEND: u32 = 2002;
const NOBODY: u32 = 3000;
/// The port on which `web` listens.
const WEB_PORT: u16 = 8081;

fn serve(lab: &Lab, host: &Host, name: &str, uid: u32, port: u16) -> Daemon {
    let args = ["serve", "--name", name, "--port", &port.to_string(), "--uid", &uid.to_string()];
    let args = args.map(str::to_owned).to_vec();
    Daemon::start(name, host, lab.programs.path("lab-app"), args, Vec::new(), lab.log(name)).unwrap()
}

fn client(lab: &Lab, host: &Host, uid: u32) -> Client {
    let mut command = host.command(&lab.programs.path("lab-app"));
    Client::spawn(command.args(["client", "--uid", &uid.to_string()])).unwrap()
}

/// The file of a workload that shares its namespace.
fn shares(file: &mut Value, uid: u32, base: u16, port: u16) {
    file["networking"]["inbound"][0]["port"] = port.into();
    file["ursa"]["uids"] = json!([uid]);
    file["ursa"]["redirect"] = json!({
        "inbound": {"port": base + 6}, "outbound": {"port": base + 1}, "dns": {"port": base + 53},
    });
}

#[test]
fn neighbours_in_a_namespace_meet_only_by_their_proxies() {
    let mut lab = Lab::new(&Programs::discover().unwrap()).unwrap();
    let control = Control::start(&mut lab).unwrap();
    let ticket = control.ticket(&["web", "backend"]).unwrap();
    let mut node = Node::join(&mut lab, "node", &ticket).unwrap();
    let (host, outside) = (lab.net.host("box").unwrap(), lab.net.host("outside").unwrap());
    let _web = serve(&lab, &host, "web", WEB, WEB_PORT);
    let _backend = serve(&lab, &host, "backend", BACKEND, PORT);
    node.add_with("web", &host, |file| shares(file, WEB, 15100, WEB_PORT)).unwrap();
    node.add_with("backend", &host, |file| shares(file, BACKEND, 15200, PORT)).unwrap();
    node.wait_ready("web", SOON).unwrap();
    node.wait_ready("backend", SOON).unwrap();
    assert_eq!(host.running("envoy").len(), 2, "an Envoy each");

    let mut of_web = client(&lab, &host, WEB);
    let mut of_backend = client(&lab, &host, BACKEND);
    let mut of_nobody = client(&lab, &host, NOBODY);
    let mut stranger = Client::start(&lab, &outside).unwrap();
    until(&mut of_web, URL, "web to be refused", |answer| answer.status == Some(403)).unwrap();
    control.ursa(&["allow", "web", "backend"]).unwrap();
    until(&mut of_web, URL, "web to be served", Answer::ok).unwrap();
    // Each has the other's policy to fear, not its own.
    let back = format!("http://web.svc.mesh.local:{WEB_PORT}/");
    until(&mut of_backend, &back, "backend to be refused", |answer| answer.status == Some(403)).unwrap();
    // No way round on loopback or by the host's address: it is the neighbour's proxy that answers, and it wants TLS.
    for address in ["127.0.0.1", "[::1]", &host.v4] {
        let answer = of_web.get(&format!("http://{address}:{PORT}/orders")).unwrap();
        assert!(!answer.ok(), "{address}: {}", answer.brief());
    }
    assert!(of_backend.get(&format!("http://127.0.0.1:{PORT}/")).unwrap().ok(), "its own port is its own");
    // Who belongs to no workload is left alone, and the mesh is closed to it.
    assert!(!of_nobody.get(URL).unwrap().ok());
    let vip = of_web.resolve("backend.svc.mesh.local").unwrap().text;
    let vip = vip.split_whitespace().next().unwrap().to_owned();
    assert_eq!(of_nobody.get(&format!("http://{vip}:{PORT}/")).unwrap().failed, "connect");

    // The agent comes back and one workload after the other: the rules of one never open the other.
    let since = Instant::now();
    let plain = [PORT, WEB_PORT].map(|port| format!("http://{}:{port}/plain", host.v4));
    let loads = plain.clone().map(|url| Load::start(&lab, &outside, &url, Duration::from_millis(1)).unwrap());
    for _ in 0..3 {
        node.agent.kill();
        node.agent.restart().unwrap();
        node.wait_ready("web", SOON).unwrap();
        node.wait_ready("backend", SOON).unwrap();
    }
    for load in loads {
        let tally = load.tally(since);
        assert!(tally.good == 0 && tally.bad.len() > 20, "{} of {}", tally.good, tally.bad.len());
    }

    // One goes: its port is as it was before the mesh, its neighbour's isn't.
    node.remove("backend").unwrap();
    wait::until("backend's redirect to go", SOON, || match stranger.get(&plain[0]).unwrap() {
        answer if answer.ok() => Ok(()),
        answer => Err(answer.brief()),
    })
    .unwrap();
    let answer = stranger.get(&plain[1]).unwrap();
    assert!(!answer.ok(), "{}", answer.brief());
    node.remove("web").unwrap();
    wait::until("the last redirect to go", SOON, || {
        match ursa_init::in_netns(&host.path(), ursa_init::show).unwrap() {
            Ok(lines) if lines.is_empty() => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .unwrap();
}

/// A cgroup of the test's own. It ends with the processes in it; the lab sweeps what is left.
struct Slice {
    path: PathBuf,
    name: String,
}

impl Slice {
    /// Where it will be; its name begins as all that is the lab's.
    fn of(host: &Host, workload: &str) -> Self {
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        let line = mounts.lines().find(|line| line.contains(" - cgroup2 ")).expect("cgroup2 is mounted");
        let name = format!("{}-{workload}.slice", host.netns);
        Self { path: PathBuf::from(line.split(' ').nth(4).unwrap()).join(&name), name }
    }

    fn make(&self) {
        std::fs::create_dir(&self.path).unwrap();
    }

    fn remove(&self) {
        // A process that has just ended still counts for a moment.
        wait::until("the slice to be empty", SOON, || {
            std::fs::remove_dir(&self.path).map_err(|error| error.to_string())
        })
        .unwrap();
    }

    /// The shell's words for running what follows in it.
    fn entered(&self) -> String {
        format!("echo $$ > {}/cgroup.procs && exec \"$0\" \"$@\"", self.path.display())
    }

    /// A client that runs in it, as root.
    fn client(&self, lab: &Lab, host: &Host) -> Client {
        let mut command = Command::new("sh");
        command.args(["-c", &self.entered(), "ip", "netns", "exec", &host.netns]);
        Client::spawn(command.arg(lab.programs.path("lab-app")).args(["client", "--uid", "0"])).unwrap()
    }

    /// A server that runs in it, as root.
    fn serve(&self, lab: &Lab, host: &Host, name: &str, port: u16) -> Daemon {
        let app = lab.programs.path("lab-app").display().to_string();
        let port = port.to_string();
        let args = ["-c", &self.entered(), &app, "serve", "--name", name, "--port", &port, "--uid", "0"];
        let args = args.map(str::to_owned).to_vec();
        Daemon::start(name, host, "/bin/sh".into(), args, Vec::new(), lab.log(name)).unwrap()
    }
}

/// The file of a workload that is known by its slice.
fn in_slice(file: &mut Value, slice: &Slice, base: u16, port: u16) {
    shares(file, 0, base, port);
    let ursa = file["ursa"].as_object_mut().unwrap();
    ursa.remove("uids");
    ursa.insert("slices".to_owned(), json!([slice.name]));
}

#[test]
fn slices_tell_neighbours_apart_from_the_moment_they_exist() {
    let mut lab = Lab::new(&Programs::discover().unwrap()).unwrap();
    let control = Control::start(&mut lab).unwrap();
    let ticket = control.ticket(&["web", "backend"]).unwrap();
    let mut node = Node::join(&mut lab, "node", &ticket).unwrap();
    let (host, outside) = (lab.net.host("box").unwrap(), lab.net.host("outside").unwrap());
    let (web, backend) = (Slice::of(&host, "web"), Slice::of(&host, "backend"));
    // As after a reboot: the slice of `web` isn't there yet, its neighbour's is, and the agent starts.
    backend.make();
    let _backend = backend.serve(&lab, &host, "backend", PORT);
    node.add_with("web", &host, |file| in_slice(file, &web, 15100, WEB_PORT)).unwrap();
    node.add_with("backend", &host, |file| in_slice(file, &backend, 15200, PORT)).unwrap();
    node.wait_ready("backend", SOON).unwrap();
    node.wait_ready("web", SOON).unwrap();
    assert_eq!(host.running("envoy").len(), 2, "an Envoy each");
    let named = |text: String| if text.contains(&web.name) { Ok(()) } else { Err(text) };
    wait::until("the status to name the slice", SOON, || {
        node.status_text().map_err(|error| error.to_string()).and_then(named)
    })
    .unwrap();
    node.agent.wait_said(&[&web.name, "doesn't exist"], SOON).unwrap();

    // The neighbour is redirected and guarded, and so are the ports of who isn't told apart.
    let back = format!("http://web.svc.mesh.local:{WEB_PORT}/");
    let mut of_backend = backend.client(&lab, &host);
    until(&mut of_backend, &back, "backend to be refused", |answer| answer.status == Some(403)).unwrap();
    let mut stranger = Client::start(&lab, &outside).unwrap();
    let mut of_nobody = client(&lab, &host, 0);
    for port in [PORT, WEB_PORT] {
        let answer = stranger.get(&format!("http://{}:{port}/plain", host.v4)).unwrap();
        assert!(!answer.ok(), "{port}: {}", answer.brief());
    }
    let vip = of_backend.resolve("web.svc.mesh.local").unwrap().text;
    let vip = vip.split_whitespace().next().unwrap().to_owned();
    assert_eq!(of_nobody.get(&format!("http://{vip}:{WEB_PORT}/")).unwrap().failed, "connect");

    // It comes, and is `web` within a second; and so is the one that is made again in its place.
    control.ursa(&["allow", "web", "backend"]).unwrap();
    for round in 0..5 {
        web.make();
        let number = std::fs::metadata(&web.path).unwrap().ino();
        let rule = format!("socket cgroupv2 level 1 {number} ");
        let (_, took) = wait::until("the rules for the slice", SOON, || {
            let rules = ursa_init::in_netns(&host.path(), ursa_init::show).unwrap().unwrap();
            if rules.iter().any(|line| line.contains(&rule)) { Ok(()) } else { Err(rules.join("\n")) }
        })
        .unwrap();
        eprintln!("slice {round}: redirected {took:?} after it was made");
        assert!(took < Duration::from_secs(1), "{took:?}");
        let serving = web.serve(&lab, &host, "web", WEB_PORT);
        let mut of_web = web.client(&lab, &host);
        until(&mut of_web, URL, "web to be served", Answer::ok).unwrap();
        // Its own identity, not its neighbour's: who may call whom goes one way.
        let answer = of_backend.get(&back).unwrap();
        assert_eq!(answer.status, Some(403), "{}", answer.brief());
        for address in ["127.0.0.1", "[::1]", &host.v4] {
            let answer = of_web.get(&format!("http://{address}:{PORT}/orders")).unwrap();
            assert!(!answer.ok(), "{address}: {}", answer.brief());
        }
        assert_eq!(of_nobody.get(&format!("http://{vip}:{WEB_PORT}/")).unwrap().failed, "connect");
        drop((of_web, serving));
        web.remove();
    }
    let answer = stranger.get(&format!("http://{}:{WEB_PORT}/plain", host.v4)).unwrap();
    assert!(!answer.ok(), "{}", answer.brief());
    let status = node.status_text().unwrap();
    assert!(!status.contains("somebody keeps changing"), "{status}");
}
