//! The tables about redirect, CNI and redirected connections.

use std::fmt::Write as _;
use std::time::Duration;

use super::super::cni::{Cni, STORM};
use super::super::connection::Passage;
use super::super::rules::{Rules, Way};
use super::super::space::Times;
use super::super::trace::Counts;
use super::{Row, bytes, time, to_float};

fn row(what: &str, ursa: String, beside: String, target: &str, met: Option<bool>) -> Row {
    Row { what: what.to_owned(), ursa, bare: beside, target: target.to_owned(), met }
}

fn both(times: &Times) -> String {
    format!("{} / {}", time(times.at(0.5)), time(times.at(0.99)))
}

fn ratio(of: Duration, to: Duration) -> f64 {
    of.as_secs_f64() / to.as_secs_f64().max(1e-9)
}

/// What the table of rules is about.
pub(super) fn rules_words(rules: &Rules) -> String {
    format!(
        "The default redirect (IPv4, IPv6, DNS; {} rules as one plan, {} lines for iptables of both families), put into \
         {} fresh network namespaces by each way in turn ({} by a process per rule). Times are p50 / p99. nft loads \
         exactly Ursa's rules (`ursa-init render`), iptables those of Ursa's fallback. Netlink bytes are sent / received.",
        rules.rules.0,
        rules.rules.1,
        rules.batch.times.count(),
        rules.each.times.count()
    )
}

/// The rows about rules.
pub(super) fn rules_rows(rules: &Rules) -> Vec<Row> {
    let ours = rules.batch.times.at(0.5);
    let other = |what: &str, way: &Way, target: &str, least: Option<f64>| {
        let times = ratio(way.times.at(0.5), ours);
        let met = least.map(|least| times >= least);
        row(what, String::new(), format!("{} ({times:.0}×)", both(&way.times)), target, met)
    };
    let mut rows = vec![
        row(
            "rules in one netlink batch, read back",
            both(&rules.batch.times),
            String::new(),
            "0.5 ms p50",
            Some(ours <= Duration::from_micros(500)),
        ),
        row("– with the routes of mesh addresses", both(&rules.whole.times), String::new(), "", None),
        row("– once more, nothing to change", both(&rules.again.times), String::new(), "", None),
        row("– `ursa-init apply`, the whole process", both(&rules.program.times), String::new(), "", None),
        other("`nft -f`", &rules.nft, "", None),
        other("`iptables-nft-restore` and `ip6tables-nft-restore`", &rules.restore, "50×", Some(50.0)),
        other("a process per rule (`iptables-nft`, `ip6tables-nft`)", &rules.each, "", None),
    ];
    let mut counted = |name: &str, way: &Way, is_ours: bool| {
        let Some(counts) = way.counts else { return };
        let text = match way.programs {
            1 => counts_text(&counts),
            programs => format!("{programs} programs, each for itself; {}", counts_text(&counts)),
        };
        let (ursa, beside) = if is_ours { (text, String::new()) } else { (String::new(), text) };
        let met = is_ours.then_some(counts.execs == 0);
        rows.push(row(
            &format!("asked of the kernel by {name}"),
            ursa,
            beside,
            if is_ours { "0 programs started" } else { "" },
            met,
        ));
    };
    counted("`ursa-init apply`", &rules.program, true);
    counted("`nft -f`", &rules.nft, false);
    counted("both `restore`", &rules.restore, false);
    counted("a process per rule", &rules.each, false);
    rows
}

fn counts_text(counts: &Counts) -> String {
    format!(
        "{} system calls, {} programs started, {} netlink messages, {} / {}",
        counts.syscalls,
        counts.execs,
        counts.messages,
        bytes(to_float(counts.sent)),
        bytes(to_float(counts.received))
    )
}

/// What the table about CNI is about.
pub(super) fn cni_words(cni: &Cni) -> String {
    format!(
        "{} pods by each way, {STORM} at once in the rows that say so; from the start of the plugin's process to its end, p50 / p99. \
         A responder stands in the agent's place and answers at once, so Envoy's start isn't in it. The chain is \
         Debian's `bridge` with `host-local`, in a namespace of its own.",
        cni.plain.count()
    )
}

/// The rows about CNI.
pub(super) fn cni_rows(cni: &Cni) -> Vec<Row> {
    let within = |times: &Times, millis| Some(times.at(0.99) <= Duration::from_millis(millis));
    let floor = format!("{} (`true`)", both(&cni.floor));
    let none = |counts: &Counts| Some(counts.execs == 0 && counts.internet == 0);
    let calls =
        |counts: &Counts| format!("{} programs started, {} internet sockets", counts.execs, counts.internet);
    let mut rows = vec![
        row("ADD, a pod that isn't meshed", both(&cni.plain), floor, "3 ms p99", within(&cni.plain, 3)),
        row("ADD, a meshed pod", both(&cni.meshed), String::new(), "10 ms p99", within(&cni.meshed, 10)),
        row(
            &format!("{STORM} at once, pods that aren't meshed"),
            both(&cni.plain_storm),
            String::new(),
            "",
            None,
        ),
        row(&format!("{STORM} at once, meshed pods"), both(&cni.meshed_storm), String::new(), "", None),
        row(
            "– the plugin's start alone (VERSION), its size",
            format!("{}, {:.1} MiB", both(&cni.version), to_float(cni.size) / 1024.0 / 1024.0),
            String::new(),
            "",
            None,
        ),
        row(
            "programs and API calls of an ADD, not meshed",
            calls(&cni.plain_counts),
            String::new(),
            "0, 0",
            none(&cni.plain_counts),
        ),
        row(
            "programs and API calls of an ADD, meshed",
            calls(&cni.meshed_counts),
            String::new(),
            "0, 0",
            none(&cni.meshed_counts),
        ),
        row("– asked of the kernel, not meshed", counts_text(&cni.plain_counts), String::new(), "", None),
        row("– asked of the kernel, meshed", counts_text(&cni.meshed_counts), String::new(), "", None),
    ];
    if let Some(chain) = &cni.chain {
        let mut beside = |what: &str, ours: &Times, theirs: &Times, target: Option<f64>| {
            let times = ratio(ours.at(0.5), theirs.at(0.5));
            let words = target.map_or_else(String::new, |target| format!("{target}×"));
            rows.push(row(
                what,
                format!("{} ({times:.2}×)", both(ours)),
                format!("{} without", both(theirs)),
                &words,
                target.map(|target| times <= target),
            ));
        };
        let what = "chain for a pod that isn't meshed: `bridge`, `ursa-cni`";
        beside(what, &chain.with_ursa, &chain.bridge, Some(1.25));
        let what = "– `bridge`, `portmap`, `ursa-cni`";
        beside(what, &chain.with_both, &chain.with_portmap, None);
    }
    rows
}

/// The table about connections.
pub(super) fn connections(passages: &[Passage]) -> String {
    let mut text = "\n## A redirected connection\n\n\
         Two namespaces on a bridge; the application and its client have the second processor, a proxy the first. The relay is a \
         small TCP proxy of the benchmark; Envoy is a TCP proxy with a static configuration and one worker. What a way \
         adds to the same proxy addressed directly is the kernel's part: its rules, connection tracking and, with TPROXY, \
         the policy route. TPROXY delivers with the client's address.\n\n\
         | way to the application | connect, 1 byte there and back: p50 / p99 | added p50 | 1 byte there and back on 16 kept connections | one stream |\n\
         | --- | --- | --- | --- | --- |\n"
        .to_owned();
    for passage in passages {
        // The first one with the same proxy.
        let first = passage.name.split([',', ' ']).next().unwrap_or_default();
        let floor = passages.iter().find(|other| other.name.starts_with(first)).unwrap_or(passage);
        let (mine, theirs) = (passage.connect.at(0.5), floor.connect.at(0.5));
        let added = match (mine.checked_sub(theirs), theirs.checked_sub(mine)) {
            _ if floor.name == passage.name => "–".to_owned(),
            (Some(more), _) => time(more),
            (None, less) => format!("−{}", time(less.unwrap_or_default())),
        };
        let _ = writeln!(
            text,
            "| {} | {} | {added} | {}/s | {:.2} GB/s |",
            passage.name,
            both(&passage.connect),
            passage.requests,
            to_float(passage.bytes) / 1e9
        );
    }
    text
}
