//! The redirect on the real kernel, with real packets, in namespaces of the tests' own.

#![allow(clippy::unwrap_used, reason = "a test that can't go on has failed")]

mod lab;
mod options;
mod reused;
mod several;
mod tproxy;

use std::io::ErrorKind::{ConnectionRefused, NetworkUnreachable};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::process::Command;

use lab::{APP, Namespace, PATIENCE, PROXY, landed};
use ursa_init::intent::{Ids, Outbound, RedirectIntent};
use ursa_init::{Plan, nft};

const EXCLUDED: u32 = 33;
const VIP4: &str = "241.0.0.7:80";
const VIP6: &str = "[fd75:7273:6100::f100:7]:80";

fn intent() -> RedirectIntent {
    RedirectIntent {
        proxy_uids: vec![PROXY, PROXY + 1],
        outbound: Outbound {
            exclude_ports: vec!["5432".parse().unwrap()],
            exclude_cidrs: vec!["10.88.0.0/16".parse().unwrap()],
            exclude_uids: vec![Ids::one(EXCLUDED)],
            ..Outbound::default()
        },
        ..RedirectIntent::default()
    }
}

fn plan(intent: &RedirectIntent) -> Plan {
    Plan::compile(intent).unwrap()
}

fn loopbacks() -> [IpAddr; 2] {
    ["127.0.0.1".parse().unwrap(), "::1".parse().unwrap()]
}

/// A workload with its proxy's ports listening, and a stranger across the link; the redirect is in place.
fn meshed(intent: &RedirectIntent) -> (Namespace, Namespace) {
    let (web, stranger) = Namespace::pair();
    web.listen(&[15001, 15006, 8080, 22, 9000]);
    web.serve_dns(&loopbacks(), 15053);
    stranger.listen(&[80, 5432, 8080]);
    stranger.serve_dns(&["10.77.0.2".parse().unwrap(), "fd77::2".parse().unwrap()], 53);
    stranger.ip("addr add 10.88.0.1/32 dev lo");
    web.run(|| ursa_init::apply(&plan(intent))).unwrap();
    (web, stranger)
}

#[test]
fn outbound_goes_to_the_proxy() {
    let (web, _stranger) = meshed(&intent());
    for to in ["10.77.0.2:80", "[fd77::2]:80", VIP4, VIP6, "198.51.100.1:443"] {
        assert_eq!(web.tcp(APP, to), Ok(15001), "{to}");
        assert_eq!(web.tcp(0, to), Ok(15001), "{to} as root");
    }
    // Exclusions by port, range of addresses and user.
    assert_eq!(web.tcp(APP, "10.77.0.2:5432"), Ok(5432));
    assert_eq!(web.tcp(APP, "10.88.0.1:8080"), Ok(8080));
    assert_eq!(web.tcp(EXCLUDED, "10.77.0.2:80"), Ok(80));
    // Inside the namespace nothing is redirected.
    for to in ["127.0.0.1:8080", "[::1]:8080", "10.77.0.1:8080", "[fd77::1]:8080"] {
        assert_eq!(web.tcp(APP, to), Ok(8080), "{to}");
    }
}

#[test]
fn the_proxy_is_exempt_and_hairpins() {
    let (web, _stranger) = meshed(&intent());
    for proxy in [PROXY, PROXY + 1] {
        assert_eq!(web.tcp(proxy, "10.77.0.2:80"), Ok(80));
        assert_eq!(web.tcp(proxy, "[fd77::2]:80"), Ok(80));
        // Its own workload is reached through the inbound listener, for each of its users.
        assert_eq!(web.tcp(proxy, "10.77.0.1:8080"), Ok(15006));
        assert_eq!(web.tcp(proxy, "[fd77::1]:8080"), Ok(15006));
        assert_eq!(web.tcp(proxy, "127.0.0.1:8080"), Ok(8080));
        assert_eq!(web.tcp(proxy, "[::1]:8080"), Ok(8080));
    }
    for (source, to) in [("127.0.0.6:0", "10.77.0.1:8080"), ("[::6]:0", "[fd77::1]:8080")] {
        let (source, to): (SocketAddr, SocketAddr) = (source.parse().unwrap(), to.parse().unwrap());
        let delivered = web.run(|| {
            nix::unistd::setfsuid(PROXY.into());
            landed(connect_from(source, to))
        });
        assert_eq!(delivered, Ok(8080), "delivery from {source}");
    }
}

/// std can't bind before connecting.
fn connect_from(source: SocketAddr, to: SocketAddr) -> std::io::Result<TcpStream> {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrStorage, bind, connect, socket};
    use std::os::fd::AsRawFd as _;
    let family = if to.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let fd = socket(family, SockType::Stream, SockFlag::empty(), None)?;
    bind(fd.as_raw_fd(), &SockaddrStorage::from(source))?;
    connect(fd.as_raw_fd(), &SockaddrStorage::from(to))?;
    Ok(TcpStream::from(fd))
}

#[test]
fn lookups_go_to_the_shim() {
    let (web, _stranger) = meshed(&intent());
    for resolver in ["10.77.0.2:53", "[fd77::2]:53"] {
        assert_eq!(web.udp(APP, 0, resolver), Ok(15053), "{resolver}");
        assert_eq!(web.tcp(APP, resolver), Ok(15053), "{resolver}");
        assert_eq!(web.udp(PROXY, 0, resolver), Ok(53), "{resolver}");
        assert_eq!(web.tcp(PROXY, resolver), Ok(53), "{resolver}");
        assert_eq!(web.udp(EXCLUDED, 0, resolver), Ok(53), "{resolver}");
        // The shim used this very port before: its exemption must not carry the application's lookup past it.
        assert_eq!(web.udp(PROXY, 40053, resolver), Ok(53), "{resolver}");
        assert_eq!(web.udp(APP, 40053, resolver), Ok(15053), "{resolver}");
        assert_eq!(web.udp(PROXY, 40053, resolver), Ok(53), "{resolver}");
    }
    assert_eq!(web.udp(APP, 0, "127.0.0.53:53"), Ok(15053), "a resolver on loopback");
}

#[test]
fn only_listed_resolvers_are_captured() {
    let mut intent = intent();
    intent.dns.capture = ursa_init::intent::DnsCapture::Resolvers;
    intent.dns.resolvers = vec!["127.0.0.53".parse().unwrap()];
    let (web, _stranger) = meshed(&intent);
    assert_eq!(web.udp(APP, 0, "127.0.0.53:53"), Ok(15053));
    assert_eq!(web.udp(APP, 0, "10.77.0.2:53"), Ok(53));
}

#[test]
fn inbound_goes_to_the_proxy() {
    let mut intent = intent();
    intent.inbound.exclude_ports = vec!["22".parse().unwrap()];
    let (web, stranger) = meshed(&intent);
    for to in ["10.77.0.1:8080", "[fd77::1]:8080", "10.77.0.1:9999"] {
        assert_eq!(stranger.tcp(APP, to), Ok(15006), "{to}");
    }
    assert_eq!(stranger.tcp(APP, "10.77.0.1:22"), Ok(22));
    assert_eq!(stranger.tcp(APP, "[fd77::1]:22"), Ok(22));
    // The proxy's own ports are closed to the outside, and mesh addresses exist nowhere on the wire.
    for port in [15001, 15006, 15053] {
        assert_eq!(stranger.tcp(APP, &format!("10.77.0.1:{port}")), Err(ConnectionRefused), "{port}");
    }
    stranger.ip("route add 241.0.0.0/8 via 10.77.0.1");
    let before = dropped(&web);
    let to: SocketAddr = VIP4.parse().unwrap();
    let short = std::time::Duration::from_millis(300);
    assert!(stranger.run(|| TcpStream::connect_timeout(&to, short)).is_err());
    assert!(dropped(&web) > before);

    intent.inbound.include_ports = vec!["8080".parse().unwrap()];
    web.run(|| ursa_init::apply(&plan(&intent))).unwrap();
    assert_eq!(stranger.tcp(APP, "10.77.0.1:8080"), Ok(15006));
    assert_eq!(stranger.tcp(APP, "10.77.0.1:9000"), Ok(9000));
}

/// Packets that were discarded because they came from the wire for a mesh address.
fn dropped(ns: &Namespace) -> u64 {
    let rules = ns.run(nft::read_back).unwrap().unwrap();
    rules
        .counters()
        .filter(|(chain, why, _)| *chain == "guard_in" && why.contains("wire"))
        .map(|(.., n)| n)
        .sum()
}

#[test]
fn mesh_addresses_are_closed_whatever_fails() {
    let (web, stranger) = Namespace::pair();
    // A stranger who would answer if anything left.
    stranger.ip("addr add 241.0.0.7/32 dev lo");
    stranger.ip("addr add fd75:7273:6100::f100:7/128 dev lo nodad");
    stranger.listen(&[80]);
    assert_eq!(web.tcp(APP, VIP4), Ok(80), "without Ursa it leaves by the default route");

    web.run(|| ursa_init::apply(&plan(&intent()))).unwrap();
    for uid in [APP, PROXY, EXCLUDED, 0] {
        // No proxy listens; the proxy itself and excluded users are refused too.
        assert_eq!(web.tcp(uid, VIP4), Err(ConnectionRefused), "uid {uid}");
        assert_eq!(web.tcp(uid, VIP6), Err(ConnectionRefused), "uid {uid}");
    }
    assert!(web.udp(APP, 0, "241.0.0.7:9999").is_err(), "datagrams are refused as well");
    assert_eq!(web.tcp(APP, "10.77.0.2:80"), Err(ConnectionRefused), "a dead proxy closes everything");

    // Rules gone, routes there: as after `nft flush ruleset`.
    assert!(web.run(nft::remove).unwrap());
    assert_eq!(web.tcp(APP, VIP4), Err(ConnectionRefused));
    assert_eq!(web.tcp(APP, VIP6), Err(ConnectionRefused));

    // Routes gone, rules there: as after somebody tidied up.
    web.run(|| ursa_init::apply(&plan(&intent()))).unwrap();
    web.ip("route del local 241.0.0.0/8 dev lo table local");
    assert_eq!(web.tcp(PROXY, VIP4), Err(ConnectionRefused));
    assert_eq!(web.tcp(EXCLUDED, VIP4), Err(ConnectionRefused));
}

#[test]
fn apply_is_idempotent_and_remove_leaves_no_trace() {
    // Without a link, whose own state would change meanwhile.
    let web = Namespace::new();
    web.ip("link set lo up");
    let before = web.network();
    let plan = plan(&intent());
    let first = web.run(|| ursa_init::apply(&plan)).unwrap();
    assert!(first.rules_changed && first.routes_changed == 5, "{first:?}");
    let rules = || web.run(nft::read_back).unwrap().unwrap().lines(nft::Counters::Hide);
    let shown = rules();
    assert!(!web.run(|| ursa_init::apply(&plan)).unwrap().changed());
    assert_eq!(rules(), shown);
    assert_eq!(web.run(|| ursa_init::diff(&plan)).unwrap(), Vec::<String>::new());

    assert!(web.run(ursa_init::remove).unwrap());
    assert!(!web.run(ursa_init::remove).unwrap());
    assert_eq!(web.network(), before);
    assert!(web.run(ursa_init::show).unwrap().is_empty());
}

#[test]
fn a_changed_intent_replaces_the_old_one() {
    let (web, _stranger) = meshed(&intent());
    let mut other = intent();
    other.outbound.port = 9000;
    other.vip_ranges = vec!["242.0.0.0/8".parse().unwrap()];
    assert!(web.run(|| ursa_init::diff(&plan(&other))).unwrap().iter().any(|line| line.contains("9000")));
    assert!(web.run(|| ursa_init::apply(&plan(&other))).unwrap().changed());
    assert_eq!(web.tcp(APP, "10.77.0.2:80"), Ok(9000));
    assert_eq!(web.run(|| ursa_init::diff(&plan(&other))).unwrap(), Vec::<String>::new());
    assert!(!web.network().contains("241.0.0.0/8"), "ranges that are no longer the mesh's are gone");
}

#[test]
fn a_route_of_somebody_else_stays() {
    let web = Namespace::new();
    web.ip("link set lo up");
    web.ip("route add local 242.0.0.0/8 dev lo table local proto static");
    web.run(|| ursa_init::apply(&plan(&intent()))).unwrap();
    web.run(ursa_init::remove).unwrap();
    assert!(web.network().contains("242.0.0.0/8"));
}

#[test]
fn concurrent_applies_end_in_one_of_the_plans() {
    let web = Namespace::new();
    let plans: Vec<_> = (0..4u16)
        .map(|i| {
            let mut intent = intent();
            intent.outbound.port = 15101 + i;
            plan(&intent)
        })
        .collect();
    for _ in 0..10 {
        std::thread::scope(|scope| {
            for plan in &plans {
                scope.spawn(|| web.run(|| ursa_init::apply(plan)).unwrap());
            }
        });
        let equal = plans.iter().filter(|plan| web.run(|| ursa_init::diff(plan)).unwrap().is_empty()).count();
        assert_eq!(equal, 1);
    }
}

#[test]
fn without_ipv6_the_rest_works() {
    let web = Namespace::new();
    web.run(|| std::fs::write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1")).unwrap();
    web.listen(&[15001]);
    let plan = plan(&intent());
    assert!(web.run(|| ursa_init::apply(&plan)).unwrap().changed());
    assert!(!web.run(|| ursa_init::apply(&plan)).unwrap().changed());
    assert_eq!(web.tcp(APP, VIP4), Ok(15001));
    assert!(web.run(ursa_init::remove).unwrap());
}

#[test]
fn families_that_are_off_are_left_alone() {
    let mut intent = intent();
    intent.ipv6 = false;
    let (web, _stranger) = meshed(&intent);
    assert_eq!(web.tcp(APP, "10.77.0.2:80"), Ok(15001));
    assert_eq!(web.tcp(APP, "[fd77::2]:80"), Ok(80));
    assert_eq!(web.tcp(APP, VIP6), Err(ConnectionRefused), "closed all the same");
}

#[test]
fn the_machines_own_namespace_is_refused() {
    let output = Command::new(env!("CARGO_BIN_EXE_ursa-init"))
        .args(["apply", "--proxy-uid", "5678"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.contains("machine's own network namespace") && text.contains("--host"), "{text}");
}

#[test]
fn the_binary_applies_shows_and_removes() {
    let web = Namespace::new();
    let run = |args: &[&str]| {
        let mut all = args.to_vec();
        all.extend(["--netns", web.path().to_str().unwrap()]);
        let output = Command::new(env!("CARGO_BIN_EXE_ursa-init")).args(all).output().unwrap();
        (output.status.code().unwrap(), String::from_utf8(output.stdout).unwrap())
    };
    let proxy = ["--proxy-uid", "5678"];
    assert_eq!(run(&["apply", "--proxy-uid", "5678"]), (0, "the redirect is in place\n".to_owned()));
    assert_eq!(run(&["apply", "--proxy-uid", "5678"]), (0, "the redirect was in place already\n".to_owned()));
    assert_eq!(run(&[&["diff"], &proxy[..]].concat()), (0, String::new()));
    assert_eq!(run(&["diff", "--proxy-uid", "5679"]).0, 3);
    assert!(run(&["show"]).1.contains("redirect to :15001"));
    assert_eq!(run(&["apply"]).0, 2, "no proxy is named");
    assert_eq!(run(&["remove"]), (0, "the redirect is removed\n".to_owned()));
    assert_eq!(run(&["remove"]), (0, "there was no redirect\n".to_owned()));
}

#[test]
fn nothing_is_half_done_without_rights() {
    let web = Namespace::new();
    web.ip("link set lo up");
    let before = web.network();
    let path = web.path().to_owned();
    // A thread may drop a capability for itself alone.
    let failed = web.run(|| {
        caps::drop(None, caps::CapSet::Effective, caps::Capability::CAP_NET_ADMIN).unwrap();
        ursa_init::apply(&plan(&intent()))
    });
    let text = failed.unwrap_err().to_string();
    assert!(text.contains("CAP_NET_ADMIN"), "{text}");
    assert_eq!(web.network(), before, "{}", path.display());
}

#[test]
fn ids_of_another_user_namespace_are_refused() {
    // A pod with `hostUsers: false`: its namespaces belong to users of its own.
    let mut pod = Command::new("unshare")
        .args(["--user", "--map-root-user", "--net", "sh", "-c", "echo ready; exec sleep 60"])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut ready = [0; 5];
    std::io::Read::read_exact(pod.stdout.as_mut().unwrap(), &mut ready).unwrap();
    let path = format!("/proc/{}/ns/net", pod.id());
    let failed = ursa_init::in_netns(path.as_ref(), || ursa_init::apply(&plan(&intent()))).unwrap();
    let left = ursa_init::in_netns(path.as_ref(), ursa_init::show).unwrap().unwrap();
    // From inside the ids mean what they say.
    let inside = Command::new("nsenter")
        .args(["--user", "--net", "--target", &pod.id().to_string()])
        .args([env!("CARGO_BIN_EXE_ursa-init"), "apply", "--proxy-uid", "5678"])
        .output()
        .unwrap();
    pod.kill().unwrap();
    pod.wait().unwrap();
    let text = failed.unwrap_err().to_string();
    assert!(text.contains("hostUsers: false"), "{text}");
    assert_eq!(left, Vec::<String>::new(), "nothing was changed");
    assert!(inside.status.success(), "{}", String::from_utf8_lossy(&inside.stderr));
}

#[test]
fn an_unroutable_address_stays_unroutable() {
    let web = Namespace::new();
    web.ip("link set lo up");
    web.run(|| ursa_init::apply(&plan(&intent()))).unwrap();
    let to = SocketAddr::from((Ipv4Addr::new(203, 0, 113, 9), 80));
    let error = web.run(|| TcpStream::connect_timeout(&to, PATIENCE)).unwrap_err();
    assert_eq!(error.kind(), NetworkUnreachable);
}

#[test]
fn a_dead_shim_refuses_lookups_at_once() {
    let (web, _stranger) = Namespace::pair();
    web.run(|| ursa_init::apply(&plan(&intent()))).unwrap();
    for resolver in ["10.77.0.2:53", "[fd77::2]:53"] {
        assert_eq!(web.tcp(APP, resolver), Err(ConnectionRefused), "{resolver}");
        assert_eq!(web.udp(APP, 0, resolver), Err(ConnectionRefused), "{resolver}");
    }
}

#[test]
fn a_killed_apply_leaves_the_old_rules_or_the_new() {
    const KILLS: u32 = 80;
    let web = Namespace::new();
    let binary = env!("CARGO_BIN_EXE_ursa-init");
    let path = web.path().to_str().unwrap();
    let plans: Vec<_> = [15101, 15102]
        .into_iter()
        .map(|port| {
            let outbound = Outbound { port, ..Outbound::default() };
            plan(&RedirectIntent { proxy_uids: vec![PROXY], outbound, ..RedirectIntent::default() })
        })
        .collect();
    let command = |port| {
        let args = ["apply", "--netns", path, "--proxy-uid", "5678", "--outbound-port", port];
        let mut command = Command::new(binary);
        command.args(args).stdout(std::process::Stdio::null());
        command
    };
    let start = std::time::Instant::now();
    assert!(command("15101").status().unwrap().success());
    let whole = start.elapsed();
    let mut seen = [0, 0];
    for i in 0..KILLS {
        let port = if i % 2 == 0 { "15102" } else { "15101" };
        let mut child = command(port).spawn().unwrap();
        // Spread over the whole run of the program: where it hits is the point of the test. The last two finish.
        if i < KILLS - 2 {
            std::thread::sleep(whole * i / KILLS);
            child.kill().unwrap();
        }
        child.wait().unwrap();
        let equal: Vec<_> = plans.iter().map(|p| web.run(|| nft::diff(p)).unwrap().is_empty()).collect();
        assert_eq!(equal.iter().filter(|e| **e).count(), 1, "after {i} kills");
        seen[usize::from(equal[1])] += 1;
    }
    assert!(seen.iter().all(|n| *n > 0), "{seen:?}");
}
