//! The script that `render` writes is the table that `apply` makes.

use crate::lab::Namespace;
use crate::tool::{init, init_in, inside, ok, run_with};

/// As much as fits into one redirect, and several workloads.
const DOCUMENTS: &[&str] = &[
    "proxyUids: [5678]",
    "{proxyUids: [5678, 5679], proxyGids: [77], proxyMark: 9, dropInvalid: true, trace: true, position: last,
      inbound: {mode: tproxy, excludePorts: [22, 8000-8100], excludeCidrs: [10.0.0.0/8, fd00::/9],
                probes: {sources: [10.0.0.1, 'fd00::1'], ports: [8081]}},
      outbound: {excludePorts: [22], excludeCidrs: [10.0.0.0/13], includePorts: [80, 443], excludeUids: [33, 100-200],
                 excludeOwners: [{uids: [5], protocol: udp, ports: [53, 90-99]}, {uids: [6]}], excludeGids: [8-9]},
      dns: {capture: resolvers, resolvers: [127.0.0.53, 'fd00::53'], honourExcludeCidrs: true},
      interfaces: {include: [eth0, 'br+'], exclude: [docker0]}}",
    "{proxyGids: [77], bridges: [{interface: docker0, localCidrs: [172.17.0.0/16]}, {interface: 'br+'}], ipv6: false}",
    "{workloads: [{name: web, uids: [1000], proxyUids: [5678], inbound: {includePorts: [80]}},
                  {name: db, uids: [1001-1003], proxyUids: [5679], inbound: {includePorts: [5432], port: 16006},
                   outbound: {port: 16001}, dns: {port: 16053}}]}",
];

#[test]
fn the_script_is_what_apply_puts_in_place() {
    for document in DOCUMENTS {
        let script = run_with(init().args(["render", "--config", "-"]), document);
        assert_eq!(script.code, 0, "{}", script.err);
        let (scripted, applied) = (Namespace::new(), Namespace::new());
        let checked = inside(&scripted, "nft", &["-c", "-f", "-"], &script.out);
        assert_eq!(checked.code, 0, "{}\n{}", checked.err, script.out);
        // Twice: it replaces what it made.
        for _ in 0..2 {
            let loaded = inside(&scripted, "nft", &["-f", "-"], &script.out);
            assert_eq!(loaded.code, 0, "{}", loaded.err);
        }
        let put = run_with(&mut init_in(&applied, &["apply", "--config", "-"]), document);
        assert_eq!(put.code, 0, "{}", put.err);
        let table = |ns: &Namespace| {
            let listed = inside(ns, "nft", &["-s", "list", "table", "inet", "ursa"], "");
            assert_eq!(listed.code, 0, "{}", listed.err);
            listed.out
        };
        assert_eq!(table(&scripted), table(&applied), "{document}");
        // And it reads back as what was wanted, except where nft writes a range of ids in other instructions.
        let diff = run_with(&mut init_in(&scripted, &["diff", "--config", "-"]), document);
        let range = |line: &&str| line.contains("meta skuid") || line.contains("meta skgid");
        let rules: Vec<_> = diff.out.lines().filter(|line| line.contains("chain") && !range(line)).collect();
        assert!(rules.is_empty(), "{rules:#?}");
    }
}

#[test]
fn rendering_needs_no_rights() {
    use std::os::unix::process::CommandExt as _;
    let text = ok(init().args(["render", "--proxy-uid", "5678"]).uid(65534).gid(65534));
    assert!(text.contains("redirect to :15001") && text.starts_with("#!/usr/sbin/nft -f"), "{text}");
    let lines = ok(init().args(["render", "--proxy-uid", "5678", "--format", "lines"]).uid(65534));
    assert!(lines.contains("chain output: "), "{lines}");
}

#[test]
fn iptables_takes_its_script() {
    for document in DOCUMENTS.iter().filter(|document| !document.contains("tproxy")) {
        for (format, program) in [("iptables", "iptables-restore"), ("ip6tables", "ip6tables-restore")] {
            let script = run_with(init().args(["render", "--config", "-", "--format", format]), document);
            assert_eq!(script.code, 0, "{}", script.err);
            let ns = Namespace::new();
            let loaded = inside(&ns, program, &["--noflush"], &script.out);
            assert_eq!(loaded.code, 0, "{}\n{}", loaded.err, script.out);
        }
    }
}
