//! What `explain` says is what the kernel does: it names the very rules that count a real packet.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::process::CommandExt as _;

use serde_json::Value;
use ursa_init::nft;

use crate::lab::{APP, Namespace, PROXY};
use crate::tool::{init, init_in, inside, ok, run};

const DOCUMENT: &str =
    "{proxyUids: [5678], dropInvalid: true, inbound: {excludePorts: [22], excludeCidrs: [10.77.0.9/32]},
    outbound: {excludePorts: [5432], excludeCidrs: [10.88.0.0/15], excludeUids: [33],
               excludeOwners: [{uids: [44], protocol: tcp, ports: [80]}]}}";

/// Packets that each rule has counted, by chain and position from 1; a chain of iptables with its table before it.
type Counters = BTreeMap<(String, u64), u64>;

fn counters(ns: &Namespace, backend: &str, v4: bool) -> Counters {
    let mut positions: BTreeMap<String, u64> = BTreeMap::new();
    let mut numbered = |chain: &str, packets| {
        let position = positions.entry(chain.to_owned()).or_default();
        *position += 1;
        ((chain.to_owned(), *position), packets)
    };
    if backend == "nftables" {
        let rules = ns.run(nft::read_back).unwrap().unwrap();
        return rules.counters().map(|(chain, _, packets)| numbered(chain, packets)).collect();
    }
    let program = format!("{}-save", if v4 { backend.to_owned() } else { backend.replace("ip", "ip6") });
    let (mut all, mut table) = (Counters::new(), String::new());
    for line in inside(ns, &program, &["-c"], "").out.lines() {
        if let Some(name) = line.strip_prefix('*') {
            name.clone_into(&mut table);
        }
        if let Some((packets, rule)) = line.strip_prefix('[').and_then(|rest| rest.split_once("] -A ")) {
            let chain = rule.split(' ').next().unwrap();
            let packets = packets.split(':').next().unwrap().parse().unwrap();
            all.extend([numbered(&format!("{table} {chain}"), packets)]);
        }
    }
    all
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
    agrees("nftables");
}

#[test]
fn the_explained_rules_of_iptables_are_those_that_count_the_packet() {
    agrees("iptables-nft");
}

#[test]
fn the_explained_rules_of_old_iptables_are_those_that_count_the_packet() {
    agrees("iptables-legacy");
}

fn agrees(backend: &str) {
    let (web, stranger) = Namespace::pair();
    web.listen(&[15001, 15006, 8080, 22]);
    let loopback = ["127.0.0.1".parse().unwrap(), "::1".parse().unwrap()];
    web.serve_dns(&loopback, 15053);
    web.serve_dns(&["10.77.0.1".parse().unwrap(), "fd77::1".parse().unwrap()], 9053);
    stranger.listen(&[80, 5432, 8080]);
    let there = ["10.77.0.2".parse().unwrap(), "fd77::2".parse().unwrap()];
    stranger.serve_dns(&there, 53);
    stranger.serve_dns(&there, 9053);
    stranger.ip("addr add 10.88.0.1/32 dev lo");
    let done =
        crate::tool::run_with(&mut init_in(&web, &["apply", "--backend", backend, "-c", "-"]), DOCUMENT);
    assert_eq!(done.code, 0, "{}", done.err);
    let redirected = |port: u16| format!("redirected {port}");
    let passes = || "passes".to_owned();
    let refused = || "refused".to_owned();
    // Sender, destination, what becomes of it.
    let cases: &[(u32, &str, String)] = &[
        (APP, "10.77.0.2:80/tcp", redirected(15001)),
        (APP, "[fd77::2]:80/tcp", redirected(15001)),
        (APP, "10.77.0.2:5432/tcp", passes()),
        (APP, "10.88.0.1:8080/tcp", passes()),
        (APP, "10.77.0.2:53/tcp", redirected(15053)),
        (APP, "[fd77::2]:53/tcp", redirected(15053)),
        (APP, "241.0.0.7:80/tcp", redirected(15001)),
        (APP, "[fd75:7273:6100::7]:80/tcp", redirected(15001)),
        (APP, "10.77.0.1:8080/tcp", passes()),
        (33, "10.77.0.2:80/tcp", passes()),
        (33, "241.0.0.7:80/tcp", refused()),
        (44, "10.77.0.2:80/tcp", passes()),
        (44, "10.77.0.2:8080/tcp", redirected(15001)),
        (PROXY, "10.77.0.2:80/tcp", passes()),
        (PROXY, "10.77.0.1:8080/tcp", redirected(15006)),
        (PROXY, "[fd77::1]:22/tcp", passes()),
        (APP, "10.77.0.2:53/udp", redirected(15053)),
        (APP, "[fd77::2]:53/udp", redirected(15053)),
        (APP, "241.0.0.7:53/udp", redirected(15053)),
        (APP, "241.0.0.7:9/udp", refused()),
        (APP, "[fd75:7273:6100::7]:9/udp", refused()),
        (APP, "10.77.0.2:9053/udp", passes()),
        (APP, "10.77.0.1:9053/udp", passes()),
        (33, "10.77.0.2:53/udp", passes()),
        (33, "241.0.0.7:53/udp", refused()),
        (44, "10.77.0.2:53/udp", redirected(15053)),
        (PROXY, "10.77.0.2:53/udp", passes()),
        (PROXY, "[fd77::2]:53/udp", passes()),
    ];
    for (uid, question, expected) in cases {
        let what = format!("{backend}: uid {uid} to {question}");
        let explained = explain(&web, &["--from", "uid", &uid.to_string(), "--to", question]);
        let port = explained["port"].as_u64().map(|port| format!(" {port}")).unwrap_or_default();
        assert_eq!(format!("{}{port}", explained["verdict"].as_str().unwrap()), *expected, "{what}");
        let (to, protocol) = question.split_once('/').unwrap();
        let v4 = !to.starts_with('[');
        let before = counters(&web, backend, v4);
        let landed = if protocol == "tcp" { web.tcp(*uid, to) } else { web.udp(*uid, 0, to) };
        match expected.as_str() {
            // Who sends a datagram that is refused hears it from the call itself.
            "refused" => {
                use std::io::ErrorKind::{ConnectionRefused, PermissionDenied};
                assert!(matches!(landed, Err(ConnectionRefused | PermissionDenied)), "{what}: {landed:?}");
            }
            "passes" => assert_eq!(landed, Ok(to.rsplit(':').next().unwrap().parse().unwrap()), "{what}"),
            other => assert_eq!(landed, Ok(other.rsplit(' ').next().unwrap().parse().unwrap()), "{what}"),
        }
        counted(&before, &counters(&web, backend, v4), &explained, &what, "output");
    }
    let arriving = [
        ("10.77.0.1:8080/tcp", 15006),
        ("[fd77::1]:9/tcp", 15006),
        ("10.77.0.1:22/tcp", 22),
        ("10.77.0.1:9053/udp", 9053),
        ("[fd77::1]:9053/udp", 9053),
    ];
    for (question, expected) in arriving {
        let what = format!("{backend}: {question}");
        let (to, protocol) = question.split_once('/').unwrap();
        let v4 = !to.starts_with('[');
        let explained =
            explain(&web, &["--from", if v4 { "10.77.0.2" } else { "fd77::2" }, "--to", question]);
        let before = counters(&web, backend, v4);
        let landed = if protocol == "tcp" { stranger.tcp(APP, to) } else { stranger.udp(APP, 0, to) };
        assert_eq!(landed, Ok(expected), "{what}");
        let sent = to.rsplit(':').next().unwrap().parse().unwrap();
        assert_eq!(explained["port"].as_u64().unwrap_or(sent), u64::from(expected), "{what}");
        counted(&before, &counters(&web, backend, v4), &explained, &what, "prerouting");
    }
}

/// Every explained rule has counted, and of the chain that translates addresses, which sees only the first packet, no
/// other one has.
fn counted(before: &Counters, after: &Counters, explained: &Value, what: &str, nat: &str) {
    let counted: BTreeSet<_> =
        after.iter().filter(|(rule, n)| before.get(rule) != Some(n)).map(|(rule, _)| rule.clone()).collect();
    let explained_rules = rules_of(explained);
    let missed: Vec<_> = explained_rules.difference(&counted).collect();
    assert!(missed.is_empty(), "{what}: {missed:?} didn't count; {explained:#}");
    let names = [nat.to_owned(), format!("nat URSA_{}", nat.to_uppercase())];
    let of_nat = |rules: &BTreeSet<(String, u64)>| -> Vec<_> {
        rules.iter().filter(|(chain, _)| names.contains(chain)).cloned().collect()
    };
    assert_eq!(of_nat(&counted), of_nat(&explained_rules), "{what}");
}

#[test]
fn rules_of_iptables_are_explained_in_their_words() {
    let ns = Namespace::new();
    ns.ip("link set lo up");
    let args = ["apply", "--proxy-uid", "5678", "--exclude-outbound-ports", "5432"];
    ok(init_in(&ns, &args).args(["--backend", "iptables-legacy"]));
    let question = ["explain", "--from", "uid", "1000", "--to", "127.0.0.1:53/udp"];
    let text = ok(&mut init_in(&ns, &question));
    for words in [
        "(iptables-legacy)",
        "=> nat URSA_OUTPUT",
        "-j REDIRECT --to-ports 15053",
        "NOTHING LISTENS THERE",
        "dns (--dns, --dns-port)",
    ] {
        assert!(text.contains(words), "{words}: {text}");
    }
    // What isn't Ursa's is named, and not guessed at.
    let rule =
        ["-t", "nat", "-I", "URSA_OUTPUT", "1", "-p", "tcp", "-m", "length", "--length", "9", "-j", "RETURN"];
    assert_eq!(inside(&ns, "iptables-legacy", &rule, "").code, 0);
    let done = run(&mut init_in(&ns, &question));
    assert!(done.code == 1 && done.err.contains("--length 9"), "{}", done.err);
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
