//! From what `iptables-save` prints back to the plan's rules, to explain what is in place.

use std::collections::BTreeMap;

use super::compile::{PREFIX, Rules, Table};
use super::save::{Saved, protocol, words};
use super::{Kernel, Variant, text};
use crate::cgroup;
use crate::error::Error;
use crate::in_place::{Held, Line};
use crate::intent::{Ids, Interface, Ports};
use crate::plan::{Action, Chain, ChainName, Family, Hook, HookKind, HookPoint, Match, Protocol, Rule};

/// Reads our rules of a kind in the calling thread's network namespace, for IPv4 and for IPv6.
pub(crate) fn held(variant: Variant) -> Result<[Held; 2], Error> {
    let kernel = Kernel::open(variant)?;
    let mut both = [Held::default(), Held::default()];
    for family in kernel.tools.families() {
        let text = kernel.tools.save_counted(family)?;
        let held = decode(&Saved::parse(&text), &packets(&text)).map_err(Error::ForeignRule)?;
        both[usize::from(family == Family::V6)] = held;
    }
    Ok(both)
}

/// Packets by table, chain and position, of a text with counters.
type Packets = BTreeMap<(Table, String, usize), u64>;

fn packets(text: &str) -> Packets {
    let mut packets = Packets::new();
    let mut positions = BTreeMap::<(Table, String), usize>::new();
    let mut table = None;
    for line in text.lines() {
        if let Some(name) = line.strip_prefix('*') {
            table = Table::ALL.into_iter().find(|t| t.name() == name.trim());
        }
        let counted = line.strip_prefix('[').and_then(|rest| rest.split_once("] -A "));
        if let (Some(table), Some((counters, rule))) = (table, counted) {
            let chain = rule.split(' ').next().unwrap_or_default().to_owned();
            let position = positions.entry((table, chain.clone())).or_default();
            let number = counters.split(':').next().and_then(|n| n.parse().ok()).unwrap_or_default();
            packets.insert((table, chain, *position), number);
            *position += 1;
        }
    }
    packets
}

/// The error is the first rule that Ursa can't have written.
fn decode(saved: &Saved, packets: &Packets) -> Result<Held, String> {
    let mut held = Held::default();
    for table in Table::ALL {
        let ours = saved.ours(table);
        let Calls { hooks, dispatchers } = calls(table, &ours)?;
        // Those that are hooked in, in the order in which they are called; then those that are only jumped to.
        let order = |name: &str| hooks.iter().position(|(chain, _)| chain == name).unwrap_or(usize::MAX);
        let mut chains: Vec<_> = ours.chains.iter().filter(|(name, _)| !dispatchers.contains(name)).collect();
        chains.sort_by_key(|(name, _)| order(name));
        let bare = text::without_comments(&ours);
        for (name, rules) in chains {
            let plain = plan_name(name);
            if held.chains.iter().any(|chain| chain.name == plain) {
                // Jumped to in two tables, and the same in both.
                continue;
            }
            let mut decoded = Vec::new();
            for (position, text) in rules.iter().enumerate() {
                let foreign = || format!("-t {table} -A {name} {text}");
                decoded.push(rule(text).ok_or_else(foreign)?);
                let shown = bare.chains.iter().find(|(n, _)| n == name).and_then(|(_, r)| r.get(position));
                let line = Line {
                    chain: format!("{table} {name}"),
                    rule: shown.unwrap_or(text).clone(),
                    packets: packets.get(&(table, name.clone(), position)).copied().unwrap_or_default(),
                };
                held.lines.insert((plain.clone(), position), line);
            }
            let hook = hooks.iter().find(|(chain, _)| chain == name).map(|(_, hook)| *hook);
            held.chains.push(Chain { name: plain, hook, rules: decoded });
        }
    }
    Ok(held)
}

/// How a table's chains are called.
#[derive(Default)]
struct Calls {
    /// Those that are hooked in, in the order in which they are called.
    hooks: Vec<(String, Hook)>,
    /// Those that do nothing but call these.
    dispatchers: Vec<String>,
}

fn calls(table: Table, ours: &Rules) -> Result<Calls, String> {
    let mut found = Calls::default();
    for jump in &ours.jumps {
        let foreign = || format!("-t {table} -A {} {}", jump.base, jump.rule);
        let point = match jump.base.as_str() {
            "PREROUTING" => HookPoint::Prerouting,
            "OUTPUT" => HookPoint::Output,
            _ => return Err(foreign()),
        };
        let (kind, priority) = match (table, point) {
            (Table::Raw, _) => (HookKind::Filter, -300),
            (Table::Mangle, HookPoint::Output) => (HookKind::Route, -150),
            (Table::Mangle, HookPoint::Prerouting) => (HookKind::Filter, -150),
            (Table::Nat, _) => (HookKind::Nat, -100),
            (Table::Filter, _) => (HookKind::Filter, 0),
        };
        let dispatcher = jump.rule.strip_prefix("-j ").ok_or_else(foreign)?;
        let (_, calls) = ours.chains.iter().find(|(name, _)| name == dispatcher).ok_or_else(foreign)?;
        for call in calls {
            let chain = call.strip_prefix("-j ").filter(|chain| chain.starts_with(PREFIX));
            let chain = chain.ok_or_else(|| format!("-t {table} -A {dispatcher} {call}"))?;
            found.hooks.push((chain.to_owned(), Hook { kind, point, priority }));
        }
        found.dispatchers.push(dispatcher.to_owned());
    }
    Ok(found)
}

fn plan_name(chain: &str) -> ChainName {
    chain.strip_prefix(PREFIX).unwrap_or(chain).to_ascii_lowercase().into()
}

/// One rule as it was printed, without its chain; `None` where Ursa writes none like it.
fn rule(text: &str) -> Option<Rule> {
    let mut words = words(text).into_iter().peekable();
    let (mut matches, mut action, mut reason) = (Vec::new(), None, String::new());
    let (mut module, mut negated) = (String::new(), false);
    while let Some(word) = words.next() {
        if word == "!" {
            negated = true;
            continue;
        }
        let mut values = Vec::new();
        while let Some(value) =
            words.next_if(|w| (values.is_empty() && word == "--comment") || !(w.starts_with('-') || w == "!"))
        {
            values.push(value);
        }
        let value = values.join(" ");
        match (word.as_str(), std::mem::take(&mut negated)) {
            ("-m", false) => module = value,
            ("--comment", false) => reason = value,
            ("-j", false) => action = Some(target(&value)?),
            ("-g", false) => action = Some(Action::Goto(plan_name(&value))),
            ("--to-ports", false) => action = Some(Action::Redirect(value.parse().ok()?)),
            ("--on-port", false) => action = Some(Action::Tproxy(value.parse().ok()?)),
            ("--zone", false) => action = Some(Action::Zone(value.parse().ok()?)),
            ("--restore-mark", false) => action = Some(Action::RestoreMark),
            (
                "--save-mark" | "--on-ip" | "--tproxy-mark" | "--nfmask" | "--ctmask" | "--reject-with",
                false,
            ) => {}
            // The other half of what `--ctstatus` says.
            ("--ctstate", true) if value == "DNAT" => {}
            (option, not) => matches.push(one(option, not, &value, &module)?),
        }
    }
    if action.is_none() && matches.is_empty() && !reason.is_empty() {
        // Nothing but a comment: what waits for its slice. Nobody is in it.
        matches.push(Match::Cgroup(cgroup::gone(0)?));
        action = Some(Action::Return);
    }
    if let Some((before, _)) = reason.rsplit_once(" (cgroup ") {
        reason.truncate(before.len());
    }
    Some(Rule { matches, action: action?, reason: reason.into() })
}

/// What a target does; those with a value say it in an option behind them.
fn target(name: &str) -> Option<Action> {
    Some(match name {
        "RETURN" => Action::Return,
        "DROP" => Action::Drop,
        "REJECT" => Action::Reject,
        "TRACE" => Action::Trace,
        "REDIRECT" => Action::Redirect(0),
        "TPROXY" => Action::Tproxy(0),
        "CT" => Action::Zone(0),
        "CONNMARK" => Action::SaveMark,
        _ => return None,
    })
}

fn one(option: &str, not: bool, value: &str, module: &str) -> Option<Match> {
    Some(match (option, not) {
        ("-p", _) => {
            let protocol = match protocol(value) {
                "tcp" => Protocol::Tcp,
                "udp" => Protocol::Udp,
                "icmp" => Protocol::Icmp,
                "ipv6-icmp" => Protocol::Icmpv6,
                _ => return None,
            };
            if not { Match::NotProtocol(protocol) } else { Match::Protocol(protocol) }
        }
        ("-s", false) => Match::Source(super::rule::with_prefix(value).parse().ok()?),
        ("-d", false) => Match::Destination(super::rule::with_prefix(value).parse().ok()?),
        ("-i", false) => Match::InInterface(value.parse::<Interface>().ok()?),
        ("-o", false) => Match::OutInterface(value.parse::<Interface>().ok()?),
        ("--sport", false) => Match::SourcePort(ports(value)?),
        ("--dport", false) => Match::DestinationPort(ports(value)?),
        ("--dst-type", false) if value == "LOCAL" => Match::DestinationIsLocal,
        ("--ctstate", false) if value == "INVALID" => Match::InvalidConnection,
        ("--ctstatus", false) if value == "CONFIRMED" => Match::Untranslated,
        ("--tcp-flags", _) if value == "SYN,ACK SYN" => {
            if not {
                Match::NotSyn
            } else {
                Match::Syn
            }
        }
        ("--uid-owner", false) => Match::Uid(ids(value)?),
        ("--gid-owner", false) => Match::Gid(ids(value)?),
        ("--gid-owner", true) => Match::NotGid(ids(value)?),
        // The last number is nobody's id.
        ("--socket-exists", false) => Match::NotGid(Ids::one(u32::MAX)),
        ("--path", false) => Match::Cgroup(value.parse().ok()?),
        ("--mark", false) if module == "mark" => Match::Mark(mark(value)?),
        ("--mark", false) if module == "connmark" => Match::ConnectionMark(mark(value)?),
        _ => return None,
    })
}

fn span<T: std::str::FromStr + Copy>(text: &str, between: char) -> Option<(T, T)> {
    let (first, last) = text.split_once(between).unwrap_or((text, text));
    Some((first.parse().ok()?, last.parse().ok()?))
}

fn ports(text: &str) -> Option<Ports> {
    span(text, ':').map(|(first, last)| Ports { first, last })
}

fn ids(text: &str) -> Option<Ids> {
    span(text, '-').map(|(first, last)| Ids { first, last })
}

fn mark(text: &str) -> Option<u32> {
    let text = text.strip_suffix("/0xffffffff").unwrap_or(text);
    u32::from_str_radix(text.strip_prefix("0x")?, 16).ok()
}
