//! Several workloads in one namespace, each behind its own proxy.

use std::io::ErrorKind::ConnectionRefused;
use std::io::{BufRead as _, BufReader};
use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;

use ursa_init::Plan;
use ursa_init::intent::{Cgroup, Dns, Ids, Inbound, Outbound, RedirectIntent, Workload};

use crate::lab::{Namespace, PATIENCE};

/// Users of the two applications and of their proxies.
const WEB: u32 = 2001;
const SHOP: u32 = 2002;
const WEB_PROXY: u32 = 5701;
const SHOP_PROXY: u32 = 5702;
const NOBODY: u32 = 3000;

fn workload(name: &str, proxy: u32, base: u16, port: &str) -> Workload {
    Workload {
        name: name.to_owned(),
        proxy_uids: vec![proxy],
        inbound: Inbound { port: base + 6, include_ports: vec![port.parse().unwrap()], ..Inbound::default() },
        outbound: Outbound { port: base + 1, ..Outbound::default() },
        dns: Dns { port: base + 53, ..Dns::default() },
        ..Workload::default()
    }
}

fn by_user() -> RedirectIntent {
    let mut web = workload("web", WEB_PROXY, 15100, "8080");
    web.uids = vec![Ids::one(WEB)];
    let mut shop = workload("shop", SHOP_PROXY, 15200, "9090");
    shop.uids = vec![Ids::one(SHOP)];
    RedirectIntent { workloads: vec![web, shop], ..RedirectIntent::default() }
}

fn meshed(intent: &RedirectIntent) -> (Namespace, Namespace) {
    let (host, stranger) = Namespace::pair();
    host.listen(&[8080, 9090, 7070, 15101, 15106, 15201, 15206]);
    let loopback = ["127.0.0.1".parse().unwrap(), "::1".parse().unwrap()];
    host.serve_dns(&loopback, 15153);
    host.serve_dns(&loopback, 15253);
    stranger.listen(&[80]);
    stranger.serve_dns(&["10.77.0.2".parse().unwrap(), "fd77::2".parse().unwrap()], 53);
    host.run(|| ursa_init::apply(&Plan::compile(intent).unwrap())).unwrap();
    (host, stranger)
}

#[test]
fn each_workload_has_its_own_proxy() {
    let (host, stranger) = meshed(&by_user());
    for (own, far) in [("10.77.0.1", "10.77.0.2"), ("[fd77::1]", "[fd77::2]")] {
        for (app, proxy, base, mine, neighbours) in
            [(WEB, WEB_PROXY, 15100, 8080, 9090), (SHOP, SHOP_PROXY, 15200, 9090, 8080)]
        {
            assert_eq!(host.tcp(app, &format!("{far}:80")), Ok(base + 1));
            assert_eq!(host.tcp(app, "241.0.0.7:80"), Ok(base + 1), "a mesh address");
            assert_eq!(host.tcp(proxy, &format!("{far}:80")), Ok(80), "the proxy is exempt");
            assert_eq!(host.udp(app, 0, &format!("{far}:53")), Ok(base + 53));
            assert_eq!(host.tcp(app, &format!("{far}:53")), Ok(base + 53));
            assert_eq!(host.udp(proxy, 0, &format!("{far}:53")), Ok(53));
            assert_eq!(stranger.tcp(app, &format!("{own}:{mine}")), Ok(base + 6), "arriving");
            // The hairpin, and the neighbour's proxy in the way to the neighbour, whatever the address.
            assert_eq!(host.tcp(proxy, &format!("{own}:{mine}")), Ok(base + 6));
            let theirs = if base == 15100 { 15206 } else { 15106 };
            assert_eq!(host.tcp(app, &format!("{own}:{neighbours}")), Ok(base + 1));
            assert_eq!(host.tcp(app, &format!("127.0.0.1:{neighbours}")), Ok(base + 1));
            assert_eq!(host.tcp(proxy, &format!("{own}:{neighbours}")), Ok(theirs));
            assert_eq!(host.tcp(proxy, &format!("127.0.0.1:{neighbours}")), Ok(theirs));
            // Its own application is delivered to directly.
            assert_eq!(host.tcp(proxy, &format!("127.0.0.1:{mine}")), Ok(mine));
            assert_eq!(host.tcp(app, &format!("127.0.0.1:{mine}")), Ok(mine));
        }
        // Everybody else is left alone, mesh addresses apart.
        assert_eq!(host.tcp(NOBODY, &format!("{far}:80")), Ok(80));
        assert_eq!(host.udp(NOBODY, 0, &format!("{far}:53")), Ok(53));
        assert_eq!(host.tcp(NOBODY, "241.0.0.7:80"), Err(ConnectionRefused));
        assert_eq!(stranger.tcp(NOBODY, &format!("{own}:7070")), Ok(7070), "a port of no workload");
    }
    for port in [15101, 15106, 15153, 15201, 15206, 15253] {
        assert_eq!(stranger.tcp(NOBODY, &format!("10.77.0.1:{port}")), Err(ConnectionRefused), "{port}");
    }
}

/// A cgroup of the test's own; removed when dropped.
struct Slice(PathBuf);

impl Slice {
    fn root() -> PathBuf {
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        let line = mounts.lines().find(|l| l.contains(" - cgroup2 ")).expect("cgroup2 is mounted");
        PathBuf::from(line.split(' ').nth(4).unwrap())
    }

    fn new(name: &str) -> Self {
        let path = Self::root().join(name);
        std::fs::create_dir(&path).unwrap();
        Self(path)
    }

    fn cgroup(&self) -> Cgroup {
        self.0.strip_prefix(Self::root()).unwrap().to_str().unwrap().parse().unwrap()
    }

    /// Connects from inside, by a process of its own: a socket belongs to the cgroup of who makes it.
    fn tcp(&self, ns: &Namespace, to: (&str, u16)) -> Option<u16> {
        let script = format!(
            "echo $$ > {}/cgroup.procs && exec 3<>/dev/tcp/{}/{} && exec od -An -tu1 -N2 <&3",
            self.0.display(),
            to.0,
            to.1
        );
        let output = ns.run(|| Command::new("bash").args(["-c", &script]).output()).unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let bytes: Vec<u16> = text.split_whitespace().map(|n| n.parse().unwrap()).collect();
        (bytes.len() == 2).then(|| bytes[0] * 256 + bytes[1])
    }
}

impl Drop for Slice {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir(&self.0);
    }
}

#[test]
fn a_slice_tells_a_workload_and_its_end_opens_nothing() {
    let outer = Slice::new(&format!("ursatest{}.slice", std::process::id()));
    let name = format!("{}/ursatest-web.slice", outer.cgroup());
    let slice = Slice::new(&name);
    let mut web = workload("web", WEB_PROXY, 15100, "8080");
    web.slices = vec![slice.cgroup()];
    let intent = RedirectIntent { workloads: vec![web], ..RedirectIntent::default() };
    let (host, stranger) = meshed(&intent);
    assert_eq!(slice.tcp(&host, ("10.77.0.2", 80)), Some(15101));
    assert_eq!(slice.tcp(&host, ("241.0.0.7", 80)), Some(15101));
    let service = Slice::new(&format!("{name}/web.service"));
    assert_eq!(service.tcp(&host, ("10.77.0.2", 80)), Some(15101), "the service's own cgroup below it");
    assert_eq!(outer.tcp(&host, ("10.77.0.2", 80)), Some(80), "not above it");

    // The same name, another cgroup: the kernel doesn't know it any more. What is the mesh's stays closed, and what
    // arrives is told by its port.
    drop((service, slice));
    let slice = Slice::new(&name);
    assert_eq!(slice.tcp(&host, ("10.77.0.2", 80)), Some(80), "no longer told apart");
    assert_eq!(slice.tcp(&host, ("241.0.0.7", 80)), None, "a mesh address stays closed");
    assert_eq!(stranger.tcp(NOBODY, "10.77.0.1:8080"), Ok(15106), "what arrives still meets the proxy");
    // It is seen, and repaired by applying again.
    let plan = Plan::compile(&intent).unwrap();
    assert!(!host.run(|| ursa_init::diff(&plan)).unwrap().is_empty());
    assert!(host.run(|| ursa_init::apply(&plan)).unwrap().rules_changed);
    assert_eq!(slice.tcp(&host, ("10.77.0.2", 80)), Some(15101));

    // `watch` does that by itself.
    let folder = tempfile::tempdir().unwrap();
    let document = folder.path().join("redirect.json");
    std::fs::write(&document, serde_json::to_string(&intent).unwrap()).unwrap();
    let mut watch = Command::new(env!("CARGO_BIN_EXE_ursa-init"))
        .args(["watch", "--netns", host.path().to_str().unwrap(), "--config", document.to_str().unwrap()])
        .arg("--run-dir")
        .arg(folder.path())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut ready = String::new();
    BufReader::new(watch.stderr.as_mut().unwrap()).read_line(&mut ready).unwrap();
    assert!(ready.contains("watched"), "{ready}");
    drop(slice);
    let slice = Slice::new(&name);
    let deadline = Instant::now() + PATIENCE;
    while slice.tcp(&host, ("10.77.0.2", 80)) != Some(15101) {
        assert!(Instant::now() < deadline, "the new slice isn't told apart");
    }
    watch.kill().unwrap();
    watch.wait().unwrap();

    // Without its slice a workload's rules aren't put in place, and the error says what to do.
    drop(slice);
    let before = host.run(ursa_init::show).unwrap();
    let error = host.run(|| ursa_init::apply(&plan)).unwrap_err().to_string();
    assert!(error.contains(&name) && error.contains("systemctl start"), "{error}");
    let rules =
        |lines: &[String]| lines.iter().filter(|l| !l.contains("packets")).cloned().collect::<Vec<_>>();
    assert_eq!(rules(&host.run(ursa_init::show).unwrap()), rules(&before));
}
