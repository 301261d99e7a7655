//! Several workloads in one namespace, each behind its own proxy.

use std::io::ErrorKind::ConnectionRefused;
use std::io::{BufRead as _, BufReader};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use ursa_init::intent::{Cgroup, Dns, Ids, Inbound, Outbound, RedirectIntent, Workload};
use ursa_init::{Backend, Plan};

use crate::lab::Namespace;

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
    let (host, stranger) = prepared();
    host.run(|| ursa_init::apply(&Plan::compile(intent).unwrap())).unwrap();
    (host, stranger)
}

/// Everybody serves, and nothing is redirected yet.
fn prepared() -> (Namespace, Namespace) {
    let (host, stranger) = Namespace::pair();
    host.listen(&[8080, 9090, 7070, 15101, 15106, 15201, 15206]);
    let loopback = ["127.0.0.1".parse().unwrap(), "::1".parse().unwrap()];
    host.serve_dns(&loopback, 15153);
    host.serve_dns(&loopback, 15253);
    stranger.listen(&[80]);
    stranger.serve_dns(&["10.77.0.2".parse().unwrap(), "fd77::2".parse().unwrap()], 53);
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
    // It is seen and said, and repaired by applying again.
    assert!(host.run(ursa_init::show).unwrap().iter().any(|line| line.contains("doesn't exist now")));
    let plan = Plan::compile(&intent).unwrap();
    assert!(!host.run(|| ursa_init::diff(&plan)).unwrap().is_empty());
    assert!(host.run(|| ursa_init::apply(&plan)).unwrap().rules_changed);
    assert_eq!(slice.tcp(&host, ("10.77.0.2", 80)), Some(15101));
}

/// Workload `web` told by a slice, its neighbour `shop` by a user.
fn by_slice_and_user(slice: &str) -> RedirectIntent {
    let mut intent = by_user();
    intent.workloads[0].uids.clear();
    intent.workloads[0].slices = vec![slice.parse().unwrap()];
    intent
}

/// What holds whether the slice of `web` exists or not: nothing of the neighbour's, nothing that arrives, and no mesh
/// address is open.
fn closed_without_slice(host: &Namespace, stranger: &Namespace) {
    for (own, far) in [("10.77.0.1", "10.77.0.2"), ("[fd77::1]", "[fd77::2]")] {
        assert_eq!(host.tcp(SHOP, &format!("{far}:80")), Ok(15201), "the neighbour is redirected");
        assert_eq!(host.udp(SHOP, 0, &format!("{far}:53")), Ok(15253));
        assert_eq!(host.tcp(SHOP, "241.0.0.7:80"), Ok(15201));
        assert_eq!(
            host.tcp(SHOP, &format!("{own}:8080")),
            Ok(15201),
            "a call to web is one through the mesh"
        );
        assert_eq!(host.tcp(SHOP_PROXY, &format!("{own}:8080")), Ok(15106), "and arrives at its proxy");
        assert_eq!(host.tcp(WEB_PROXY, &format!("{own}:8080")), Ok(15106), "web's hairpin");
        assert_eq!(stranger.tcp(NOBODY, &format!("{own}:8080")), Ok(15106), "what arrives at web's port");
        assert_eq!(stranger.tcp(NOBODY, &format!("{own}:9090")), Ok(15206));
    }
    // Who runs beside the slice is nobody's, and gets to no mesh address.
    assert_eq!(host.tcp(NOBODY, "241.0.0.7:80"), Err(ConnectionRefused));
    assert_eq!(host.tcp(NOBODY, "[fd75:7273:6100::7]:80"), Err(ConnectionRefused));
}

#[test]
fn a_missing_slice_keeps_nothing_else_open_by_any_backend() {
    for backend in [Backend::Nftables, Backend::IptablesNft, Backend::IptablesLegacy] {
        let outer = Slice::new(&format!("ursatest{}m{backend:?}.slice", std::process::id()));
        let name = format!("{}/inner.slice", outer.cgroup());
        let intent = by_slice_and_user(&name);
        let plan = Plan::compile(&intent).unwrap();
        let (host, stranger) = prepared();
        let apply = || host.run(|| ursa_init::apply_with(&plan, backend)).unwrap();
        let same =
            || assert_eq!(host.run(|| ursa_init::diff_with(&plan, backend)).unwrap(), [""; 0], "{backend}");
        assert!(apply().rules_changed);
        assert!(!apply().changed(), "nothing to do, {backend}");
        same();
        let missing = ursa_init::slices::missing(&plan);
        assert_eq!(missing.len(), 1);
        assert!(missing[0].to_string().contains(&name), "{}", missing[0]);
        // What waits for it is read back as what it is: it hinders no explanation.
        assert!(host.run(ursa_init::InPlace::read).unwrap().is_some());
        let shown = host.run(ursa_init::show).unwrap().join("\n");
        assert!(shown.contains(&format!("waits for slice {name}")), "{backend}: {shown}");
        closed_without_slice(&host, &stranger);
        let answer = stranger.tcp(NOBODY, "10.77.0.1:15106");
        assert!(answer.is_err(), "web's proxy itself: {answer:?}");

        // It comes: a difference, and the next apply makes it the workload's.
        let slice = Slice::new(&name);
        assert_eq!(ursa_init::slices::missing(&plan), []);
        assert!(!host.run(|| ursa_init::diff_with(&plan, backend)).unwrap().is_empty());
        assert!(apply().rules_changed);
        same();
        assert_eq!(slice.tcp(&host, ("10.77.0.2", 80)), Some(15101), "{backend}");
        closed_without_slice(&host, &stranger);

        // It goes: back to waiting for it.
        drop(slice);
        assert!(apply().rules_changed);
        same();
        closed_without_slice(&host, &stranger);
    }
}

#[test]
fn a_slice_that_never_can_be_hinders_nobody() {
    // Longer than what fits beside a rule, and in no folder that exists.
    let part = format!("{}.slice", "a".repeat(90));
    let intent = by_slice_and_user(&format!("{part}/{part}/{part}/{part}"));
    let (host, stranger) = meshed(&intent);
    closed_without_slice(&host, &stranger);
    assert_eq!(host.run(|| ursa_init::diff(&Plan::compile(&intent).unwrap())).unwrap(), [""; 0]);
}

#[test]
fn commands_report_a_missing_slice() {
    let name = format!("ursatest{}c.slice", std::process::id());
    let intent = by_slice_and_user(&name);
    let (host, _stranger) = prepared();
    let document = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(&document, serde_json::to_string(&intent).unwrap()).unwrap();
    let run = |command: &str| {
        let mut init = Command::new(env!("CARGO_BIN_EXE_ursa-init"));
        init.args([command, "--netns", host.path().to_str().unwrap()]);
        if command != "show" {
            init.arg("--config").arg(document.path());
        }
        let output = init.output().unwrap();
        let said = [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap()).concat();
        (output.status.code(), said)
    };
    for (command, code) in [("apply", 4), ("apply", 4), ("diff", 3), ("check", 4), ("show", 0)] {
        let (found, said) = run(command);
        assert_eq!(found, Some(code), "{command}: {said}");
        assert!(said.contains(&name), "{command}: {said}");
        assert!(command == "show" || said.contains(&format!("systemctl start {name}")), "{command}: {said}");
    }
    let _slice = Slice::new(&name);
    for (command, code) in [("diff", 3), ("apply", 0), ("diff", 0)] {
        let (found, said) = run(command);
        assert_eq!(found, Some(code), "{command}: {said}");
        assert!(!said.contains("doesn't exist") || command == "diff", "{command}: {said}");
    }
}

#[test]
fn watch_takes_a_slice_in_as_soon_as_it_is_there() {
    let outer = format!("ursatest{}w.slice", std::process::id());
    let name = format!("{outer}/inner.slice");
    let intent = by_slice_and_user(&name);
    let (host, stranger) = prepared();
    let folder = tempfile::tempdir().unwrap();
    let document = folder.path().join("redirect.json");
    std::fs::write(&document, serde_json::to_string(&intent).unwrap()).unwrap();
    let watch = Watch(
        Command::new(env!("CARGO_BIN_EXE_ursa-init"))
            .args(["watch", "--interval", "3600", "--netns", host.path().to_str().unwrap()])
            .arg("--config")
            .arg(&document)
            .arg("--status")
            .arg(folder.path().join("status.json"))
            .arg("--run-dir")
            .arg(folder.path())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap(),
    );
    let mut watch = watch;
    let mut lines = BufReader::new(watch.0.stderr.take().unwrap()).lines().map(Result::unwrap);
    let mut says = |words: &str| lines.by_ref().find(|line| line.contains(words)).expect(words);
    let status = || -> serde_json::Value {
        serde_json::from_slice(&std::fs::read(folder.path().join("status.json")).unwrap()).unwrap()
    };
    says("doesn't exist");
    says("watched");
    assert_eq!(status()["missingSlices"][0]["slice"], name);
    assert!(status()["message"].as_str().unwrap().contains(&name), "{}", status());
    closed_without_slice(&host, &stranger);

    let outer = Slice::new(&outer);
    let mut took = Vec::new();
    for _ in 0..20 {
        let start = Instant::now();
        let slice = Slice::new(&name);
        says("exists now");
        took.push(start.elapsed());
        assert_eq!(slice.tcp(&host, ("10.77.0.2", 80)), Some(15101));
        assert!(status().get("missingSlices").is_none(), "{}", status());
        // Made again under the same name.
        drop(slice);
        let start = Instant::now();
        let slice = Slice::new(&name);
        says("exists now");
        took.push(start.elapsed());
        assert_eq!(slice.tcp(&host, ("10.77.0.2", 80)), Some(15101));
        drop(slice);
        says("doesn't exist");
    }
    closed_without_slice(&host, &stranger);
    took.sort();
    eprintln!("a slice was taken in after {:?} (median), {:?} (longest)", took[took.len() / 2], took.last());
    assert!(took.last().unwrap() < &Duration::from_secs(1), "{took:?}");
    // Who looked every second would need half of one.
    assert!(took[took.len() / 2] < Duration::from_millis(250), "{took:?}");
    assert_eq!(
        (status()["repairs"].as_u64(), status()["state"].as_str()),
        (Some(0), Some("inPlace")),
        "no fight"
    );
    drop(outer);
}

/// Ends with the test.
struct Watch(std::process::Child);

impl Drop for Watch {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
