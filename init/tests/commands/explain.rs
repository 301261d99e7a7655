//! What `explain` says is what the kernel does: it names the very rules that count a real packet.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::process::CommandExt as _;

use serde_json::Value;
use ursa_init::nft;

use crate::lab::{APP, Namespace, PROXY};
use crate::tool::{init, init_in, ok, run};

const DOCUMENT: &str =
    "{proxyUids: [5678], dropInvalid: true, inbound: {excludePorts: [22], excludeCidrs: [10.77.0.9/32]},
    outbound: {excludePorts: [5432], excludeCidrs: [10.88.0.0/15], excludeUids: [33],
               excludeOwners: [{uids: [44], protocol: tcp, ports: [80]}]}}";

/// Packets that each rule has counted, by chain and position from 1.
fn counters(ns: &Namespace) -> BTreeMap<(String, u64), u64> {
    let rules = ns.run(nft::read_back).unwrap().unwrap();
    let mut positions: BTreeMap<String, u64> = BTreeMap::new();
    let numbered = rules.counters().map(|(chain, _, packets)| {
        let position = positions.entry(chain.to_owned()).or_default();
        *position += 1;
        ((chain.to_owned(), *position), packets)
    });
    numbered.collect()
}

fn explain(ns: &Namespace, args: &[&str]) -> Value {
    serde_json::from_str(&ok(init_in(ns, &["explain", "--json"]).args(args))).unwrap()
}

fn rules_of(explained: &Value) -> BTreeSet<(String, u64)> {
    let rules = explained["rules"].as_array().unwrap().iter();
    rules
        .map(|rule| (rule["chain"].as_str().unwrap().to_owned(), rule["position"].as_u64().unwrap()))
        .collect()
}

#[test]
fn the_explained_rules_are_those_that_count_the_packet() {
    let (web, stranger) = Namespace::pair();
    web.listen(&[15001, 15006, 8080, 22]);
    web.serve_dns(&["127.0.0.1".parse().unwrap(), "::1".parse().unwrap()], 15053);
    stranger.listen(&[80, 5432, 8080]);
    stranger.ip("addr add 10.88.0.1/32 dev lo");
    let done = crate::tool::run_with(&mut init_in(&web, &["apply", "-c", "-"]), DOCUMENT);
    assert_eq!(done.code, 0, "{}", done.err);
    let redirected = |port: u16| format!("redirected {port}");
    let passes = || "passes".to_owned();
    // Sender, destination, what becomes of it.
    let cases: &[(u32, &str, String)] = &[
        (APP, "10.77.0.2:80", redirected(15001)),
        (APP, "[fd77::2]:80", redirected(15001)),
        (APP, "10.77.0.2:5432", passes()),
        (APP, "10.88.0.1:8080", passes()),
        (APP, "10.77.0.2:53", redirected(15053)),
        (APP, "[fd77::2]:53", redirected(15053)),
        (APP, "241.0.0.7:80", redirected(15001)),
        (APP, "10.77.0.1:8080", passes()),
        (33, "10.77.0.2:80", passes()),
        (33, "241.0.0.7:80", "refused".to_owned()),
        (44, "10.77.0.2:80", passes()),
        (44, "10.77.0.2:8080", redirected(15001)),
        (PROXY, "10.77.0.2:80", passes()),
        (PROXY, "10.77.0.1:8080", redirected(15006)),
        (PROXY, "[fd77::1]:22", passes()),
    ];
    for (uid, to, expected) in cases {
        let explained = explain(&web, &["--from", "uid", &uid.to_string(), "--to", &format!("{to}/tcp")]);
        let port = explained["port"].as_u64().map(|port| format!(" {port}")).unwrap_or_default();
        assert_eq!(
            format!("{}{port}", explained["verdict"].as_str().unwrap()),
            *expected,
            "uid {uid} to {to}"
        );
        let before = counters(&web);
        let landed = web.tcp(*uid, to);
        match expected.as_str() {
            "refused" => assert_eq!(landed, Err(std::io::ErrorKind::ConnectionRefused)),
            "passes" => assert_eq!(landed, Ok(to.rsplit(':').next().unwrap().parse().unwrap())),
            other => assert_eq!(landed, Ok(other.rsplit(' ').next().unwrap().parse().unwrap())),
        }
        counted(&web, &before, &explained, &format!("uid {uid} to {to}"), "output");
    }
    for (to, expected) in [("10.77.0.1:8080", 15006), ("[fd77::1]:9", 15006), ("10.77.0.1:22", 22)] {
        let from = if to.starts_with('[') { "fd77::2" } else { "10.77.0.2" };
        let explained = explain(&web, &["--from", from, "--to", to]);
        let before = counters(&web);
        assert_eq!(stranger.tcp(APP, to), Ok(expected));
        assert_eq!(explained["port"].as_u64().unwrap_or(22), u64::from(expected), "{to}");
        counted(&web, &before, &explained, to, "prerouting");
    }
}

/// Every explained rule has counted, and of the chain that translates addresses, which sees only the first packet, no
/// other one has.
fn counted(ns: &Namespace, before: &BTreeMap<(String, u64), u64>, explained: &Value, what: &str, nat: &str) {
    let after = counters(ns);
    let counted: BTreeSet<_> =
        after.iter().filter(|(rule, n)| before.get(rule) != Some(n)).map(|(rule, _)| rule.clone()).collect();
    let explained_rules = rules_of(explained);
    let missed: Vec<_> = explained_rules.difference(&counted).collect();
    assert!(missed.is_empty(), "{what}: {missed:?} didn't count; {explained:#}");
    let of_nat = |rules: &BTreeSet<(String, u64)>| -> Vec<_> {
        rules.iter().filter(|(chain, _)| chain == nat).cloned().collect()
    };
    assert_eq!(of_nat(&counted), of_nat(&explained_rules), "{what}");
}

#[test]
fn a_document_is_explained_without_rights() {
    let mut command = init();
    command.args([
        "explain",
        "--from",
        "uid",
        "1000",
        "--to",
        "198.51.100.1:5432/tcp",
        "--proxy-uid",
        "5678",
    ]);
    command.args(["--exclude-outbound-ports", "5432"]).uid(65534).gid(65534);
    let text = ok(&mut command);
    for words in
        ["It passes", "excluded port", "outbound.excludePorts", "it is redirected to local port 15001"]
    {
        assert!(text.contains(words), "{words}: {text}");
    }
}

#[test]
fn without_rules_it_says_what_to_do() {
    let ns = Namespace::new();
    let done = run(&mut init_in(&ns, &["explain", "--from", "uid", "1", "--to", "10.0.0.1:1"]));
    assert!(done.code == 2 && done.err.contains("name a document"), "{}", done.err);
    let done = run(&mut init_in(&ns, &["explain", "--from", "uid", "root", "--to", "10.0.0.1:1"]));
    assert!(done.code == 2 && done.err.contains("id -u root"), "{}", done.err);
}
