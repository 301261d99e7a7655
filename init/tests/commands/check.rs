//! `check` finds what is missing, and names it.

use std::io::Write as _;
use std::net::TcpListener;

use ursa_init::intent::{Outbound, RedirectIntent};
use ursa_init::{Plan, nft};

use crate::lab::{Namespace, PROXY};
use crate::tool::{Done, init_in, inside, run};

fn intent() -> RedirectIntent {
    RedirectIntent { proxy_uids: vec![PROXY], ..RedirectIntent::default() }
}

fn apply(ns: &Namespace, intent: &RedirectIntent) {
    let plan = Plan::compile(intent).unwrap();
    ns.run(|| ursa_init::apply(&plan)).unwrap();
}

fn check(ns: &Namespace) -> Done {
    run(init_in(ns, &["check", "--proxy-uid", &PROXY.to_string(), "--timeout", "300"])
        .stdin(std::process::Stdio::null()))
}

/// What is missing, in order.
fn missing(done: &Done) -> Vec<&str> {
    let lines = done.out.lines().filter_map(|line| line.strip_prefix("MISSING  "));
    lines.map(|line| line.split(": ").next().unwrap()).collect()
}

const EVERYTHING: [&str; 10] = [
    "outbound TCP over IPv4",
    "DNS by UDP over IPv4",
    "DNS by TCP over IPv4",
    "inbound TCP (hairpin) over IPv4",
    "arriving TCP over IPv4",
    "outbound TCP over IPv6",
    "DNS by UDP over IPv6",
    "DNS by TCP over IPv6",
    "inbound TCP (hairpin) over IPv6",
    "arriving TCP over IPv6",
];

#[test]
fn a_whole_redirect_passes_before_the_proxy_runs() {
    let (web, _stranger) = Namespace::pair();
    apply(&web, &intent());
    let done = check(&web);
    assert_eq!((done.code, missing(&done)), (0, vec![]), "{}{}", done.out, done.err);
    for what in EVERYTHING {
        assert!(done.out.contains(&format!("ok       {what}: ")), "{what}: {}", done.out);
    }
    assert!(done.out.contains("token came back") && done.out.contains("The redirect works"));
}

#[test]
fn a_lonely_namespace_is_checked_by_mesh_addresses() {
    let web = Namespace::new();
    apply(&web, &intent());
    let done = check(&web);
    assert_eq!((done.code, missing(&done)), (0, vec![]), "{}{}", done.out, done.err);
    assert!(done.out.contains("ok       outbound TCP over IPv6: [fd75:"), "{}", done.out);
    assert!(done.out.contains("skipped  inbound TCP (hairpin)"), "{}", done.out);
}

#[test]
fn no_rules() {
    let (web, stranger) = Namespace::pair();
    // A stranger who answers isn't the proxy.
    stranger.ip("addr add 192.0.2.2/32 dev lo");
    stranger.listen(&[80]);
    let done = check(&web);
    assert_eq!((done.code, missing(&done)), (4, EVERYTHING.to_vec()), "{}{}", done.out, done.err);
    assert!(
        done.out.contains("answered by a stranger") && done.out.contains("no rules of Ursa's are in place"),
        "{}",
        done.out
    );
}

#[test]
fn rules_to_a_wrong_port() {
    let (web, _stranger) = Namespace::pair();
    apply(&web, &RedirectIntent { outbound: Outbound { port: 15101, ..Outbound::default() }, ..intent() });
    let done = check(&web);
    assert_eq!(missing(&done), ["outbound TCP over IPv4", "outbound TCP over IPv6"], "{}", done.out);
    assert!(done.code == 4 && done.out.contains("lead to port 15101, not to 15001"), "{}", done.out);
    // To another port of the proxy's own.
    let mut swapped = intent();
    (swapped.outbound.port, swapped.inbound.port) = (15006, 15001);
    apply(&web, &swapped);
    let done = check(&web);
    assert!(
        done.code == 4 && done.out.contains("landed on port 15006 (inbound), not on 15001"),
        "{}",
        done.out
    );
}

#[test]
fn only_ipv6_missing() {
    let (web, _stranger) = Namespace::pair();
    apply(&web, &RedirectIntent { ipv6: false, ..intent() });
    let done = check(&web);
    assert_eq!((done.code, missing(&done)), (4, EVERYTHING[5..].to_vec()), "{}", done.out);
}

#[test]
fn only_dns_missing() {
    let (web, _stranger) = Namespace::pair();
    let mut without = intent();
    without.dns.enabled = false;
    apply(&web, &without);
    let done = check(&web);
    let dns: Vec<_> = EVERYTHING.into_iter().filter(|what| what.starts_with("DNS")).collect();
    assert_eq!((done.code, missing(&done)), (4, dns), "{}", done.out);
}

#[test]
fn only_arriving_connections_missing() {
    let (web, _stranger) = Namespace::pair();
    apply(&web, &intent());
    assert_eq!(inside(&web, "nft", &["flush", "chain", "inet", "ursa", "prerouting"], "").code, 0);
    let done = check(&web);
    assert_eq!((done.code, missing(&done)), (4, vec![EVERYTHING[4], EVERYTHING[9]]), "{}", done.out);
}

#[test]
fn a_proxy_that_holds_its_ports_is_told_by_counters() {
    let (web, _stranger) = Namespace::pair();
    apply(&web, &intent());
    web.serve_dns(&["127.0.0.1".parse().unwrap(), "::1".parse().unwrap()], 15053);
    for port in [15001, 15006] {
        let listener = web.run(|| TcpListener::bind(("::", port))).unwrap();
        std::thread::spawn(move || {
            while let Ok((mut stream, _)) = listener.accept() {
                let _ = stream.write_all(b"an answer that is no token of ours");
            }
        });
    }
    let done = check(&web);
    assert_eq!((done.code, missing(&done)), (0, vec![]), "{}{}", done.out, done.err);
    assert!(done.out.contains("was counted by rule"), "{}", done.out);
    web.run(nft::remove).unwrap();
    assert_eq!(check(&web).code, 4);
}

#[test]
fn rules_of_iptables_are_checked_by_what_they_do() {
    let (web, _stranger) = Namespace::pair();
    let plan = Plan::compile(&intent()).unwrap();
    web.run(|| ursa_init::apply_with(&plan, ursa_init::Backend::IptablesNft)).unwrap();
    let done = check(&web);
    assert_eq!((done.code, missing(&done)), (0, vec![]), "{}{}", done.out, done.err);
    assert_eq!(inside(&web, "ip6tables", &["-t", "nat", "-F"], "").code, 0);
    let done = check(&web);
    assert_eq!(done.code, 4, "{}", done.out);
    assert!(missing(&done).contains(&"outbound TCP over IPv6"), "{}", done.out);
    assert!(!missing(&done).contains(&"outbound TCP over IPv4"), "{}", done.out);
}

#[test]
fn an_init_container_without_rights_can_check() {
    use std::os::unix::process::CommandExt as _;
    let (web, _stranger) = Namespace::pair();
    let as_app = || {
        let mut command = crate::tool::init();
        command.args(["check", "--proxy-uid", &PROXY.to_string(), "--timeout", "300"]).uid(1000).gid(1000);
        web.run(|| run(&mut command))
    };
    let done = as_app();
    assert_eq!(done.code, 4, "{}{}", done.out, done.err);
    apply(&web, &intent());
    let done = as_app();
    assert_eq!((done.code, missing(&done)), (0, vec![]), "{}{}", done.out, done.err);
    assert!(done.out.contains("ok       DNS by UDP over IPv6"), "{}", done.out);
    assert!(done.out.contains("skipped  inbound TCP (hairpin) over IPv4: acting as uid"), "{}", done.out);
}
