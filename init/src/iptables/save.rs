//! What `iptables-save` prints, read so that it can be compared: releases and variants print the same rule in
//! different ways.

use std::collections::BTreeMap;

use super::compile::{Jump, PREFIX, Place, Rules, Table, Tables};
use super::rule::with_prefix;

/// The rules of one family as the kernel holds them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Saved {
    tables: BTreeMap<Table, Vec<(String, Vec<String>)>>,
}

impl Saved {
    /// Reads the text; what isn't understood isn't ours.
    pub(super) fn parse(text: &str) -> Self {
        let mut saved = Self::default();
        let mut current: Option<&mut Vec<(String, Vec<String>)>> = None;
        for line in text.lines() {
            // With counters asked for, they stand before the rule.
            let counted = line.strip_prefix('[').and_then(|rest| rest.split_once("] "));
            let line = counted.map_or(line, |(_, rule)| rule);
            if let Some(name) = line.strip_prefix('*') {
                let table = Table::ALL.into_iter().find(|t| t.name() == name.trim());
                current = table.map(|t| saved.tables.entry(t).or_default());
            } else if let (Some(chains), Some(rest)) = (current.as_mut(), line.strip_prefix(':')) {
                if let Some(chain) = rest.split(' ').next() {
                    chains.push((chain.to_owned(), Vec::new()));
                }
            } else if let (Some(chains), Some(rest)) = (current.as_mut(), line.strip_prefix("-A ")) {
                let (name, rule) = rest.split_once(' ').unwrap_or((rest, ""));
                if let Some((_, rules)) = chains.iter_mut().find(|(n, _)| n == name) {
                    rules.push(rule.to_owned());
                }
            }
        }
        saved
    }

    /// What is ours in a table, with the text as it was printed.
    pub(super) fn ours(&self, table: Table) -> Rules {
        let mut out = Rules::default();
        for (name, rules) in self.tables.get(&table).into_iter().flatten() {
            if name.starts_with(PREFIX) {
                out.chains.push((name.clone(), rules.clone()));
                continue;
            }
            for (i, rule) in rules.iter().enumerate().filter(|(_, rule)| leads_to_us(rule)) {
                out.jumps.push(Jump { base: name.clone(), rule: rule.clone(), place: Place::After(i) });
            }
        }
        out.chains.sort();
        out
    }

    /// How many rules of others a chain of theirs holds.
    pub(super) fn foreign(&self, table: Table, chain: &str) -> usize {
        self.chain(table, chain).iter().filter(|rule| !leads_to_us(rule)).count()
    }

    /// Whether others have rules or chains here.
    pub(super) fn has_foreign(&self) -> bool {
        let foreign = |(name, rules): &(String, Vec<String>)| {
            !name.starts_with(PREFIX) && rules.iter().any(|rule| !leads_to_us(rule))
        };
        self.tables.values().flatten().any(foreign)
    }

    /// Whether anything is ours.
    pub(super) fn has_ours(&self) -> bool {
        Table::ALL.into_iter().any(|table| !self.ours(table).is_empty())
    }

    fn chain(&self, table: Table, chain: &str) -> &[String] {
        let chains = self.tables.get(&table).map(Vec::as_slice).unwrap_or_default();
        chains.iter().find(|(name, _)| name == chain).map(|(_, rules)| rules.as_slice()).unwrap_or_default()
    }

    /// Whether what is ours in the table means the same as `wanted`. `placed` asks that our jumps also stand where
    /// they belong among the rules of others.
    pub(super) fn holds(&self, table: Table, wanted: &Rules, placed: bool) -> bool {
        let found = self.ours(table);
        // A kernel without comments has them nowhere.
        let commented = Table::ALL.into_iter().any(|table| commented(&self.ours(table)));
        let keep = if commented { Comments::Compare } else { Comments::Ignore };
        let meaning = |rules: &Rules| {
            let chains: BTreeMap<_, Vec<_>> = rules
                .chains
                .iter()
                .map(|(name, rules)| (name.clone(), rules.iter().map(|r| canonical(r, keep)).collect()))
                .collect();
            let mut jumps: Vec<_> =
                rules.jumps.iter().map(|j| (j.base.clone(), canonical(&j.rule, keep))).collect();
            jumps.sort();
            (chains, jumps)
        };
        // Without comments nobody can tell whether a cgroup is still the same one.
        if keep == Comments::Ignore
            && wanted.chains.iter().flat_map(|(_, r)| r).any(|r| r.contains(" (cgroup "))
        {
            return false;
        }
        let right_place = |jump: &Jump| {
            let Some(wanted) = wanted.jumps.iter().find(|j| j.base == jump.base) else { return true };
            match (wanted.place, jump.place) {
                (Place::First, Place::After(i)) => i == 0,
                (Place::Last, Place::After(i)) => i == self.foreign(table, &jump.base),
                _ => true,
            }
        };
        meaning(&found) == meaning(wanted) && (!placed || found.jumps.iter().all(right_place))
    }
}

fn commented(rules: &Rules) -> bool {
    rules.chains.iter().flat_map(|(_, rules)| rules).any(|rule| rule.contains("--comment "))
}

fn leads_to_us(rule: &str) -> bool {
    let words = words(rule);
    words.windows(2).any(|pair| matches!(pair[0].as_str(), "-j" | "-g") && pair[1].starts_with(PREFIX))
}

/// Whether comments count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Comments {
    Compare,
    /// The kernel or the programs have no comments.
    Ignore,
}

/// A rule's options, each with its values, in one order and one spelling. What is a default isn't there.
pub(super) fn canonical(rule: &str, comments: Comments) -> Vec<String> {
    let mut words = words(rule).into_iter().peekable();
    let mut out = Vec::new();
    let mut negated = "";
    while let Some(word) = words.next() {
        if word == "!" {
            negated = "! ";
            continue;
        }
        let not = std::mem::take(&mut negated);
        let mut values = Vec::new();
        while let Some(value) =
            words.next_if(|w| (values.is_empty() && word == "--comment") || !(w.starts_with('-') || w == "!"))
        {
            values.push(value);
        }
        let value = values.join(" ");
        let value = match word.as_str() {
            // The module is known by its options, if it has any of its own.
            "-m" if !matches!(value.as_str(), "socket" | "connmark") => continue,
            "--comment" if comments == Comments::Ignore => continue,
            "-p" => protocol(&value).to_owned(),
            "-s" | "-d" => with_prefix(&value),
            "--mark" | "--tproxy-mark" => value.trim_end_matches("/0xffffffff").to_owned(),
            _ => value,
        };
        let default = match word.as_str() {
            "--on-ip" => value == "0.0.0.0" || value == "::",
            "--nfmask" | "--ctmask" => value == "0xffffffff",
            "--tproxy-mark" => value == "0x0/0x0",
            "--reject-with" => value == "icmp-port-unreachable" || value == "icmp6-port-unreachable",
            _ => false,
        };
        if !default {
            out.push(format!("{not}{word} {value}"));
        }
    }
    out.sort();
    out
}

pub(super) fn protocol(name: &str) -> &str {
    match name {
        "6" => "tcp",
        "17" => "udp",
        "1" => "icmp",
        "58" | "icmpv6" => "ipv6-icmp",
        name => name,
    }
}

/// Splits as iptables-restore does: by blanks, with quotes and backslashes.
pub(super) fn words(line: &str) -> Vec<String> {
    let mut out = Vec::new();
    let mut word: Option<String> = None;
    let mut quoted = false;
    let mut chars = line.chars();
    while let Some(c) = chars.next() {
        match c {
            '\\' if quoted => word.get_or_insert_default().extend(chars.next()),
            '"' => {
                quoted = !quoted;
                word.get_or_insert_default();
            }
            ' ' | '\t' if !quoted => out.extend(word.take()),
            c => word.get_or_insert_default().push(c),
        }
    }
    out.extend(word);
    out
}

impl Rules {
    /// The rules that match none of these cgroups, told by their paths.
    pub(super) fn without_cgroups(mut self, gone: impl Fn(&str) -> bool) -> Self {
        for (_, rules) in &mut self.chains {
            rules.retain(|rule| {
                let words = words(rule);
                !words.windows(2).any(|pair| pair[0] == "--path" && gone(&pair[1]))
            });
        }
        self
    }
}

/// The new rules, and behind them what the old ones have more: whoever is refused by one of both is refused.
pub(super) fn union(new: &Rules, old: &Rules) -> Rules {
    let meaning = |rule: &String| canonical(rule, Comments::Ignore);
    let mut both = new.clone();
    for (name, rules) in &old.chains {
        match both.chains.iter_mut().find(|(n, _)| n == name) {
            Some((_, have)) => {
                let known: Vec<_> = have.iter().map(meaning).collect();
                have.extend(rules.iter().filter(|rule| !known.contains(&meaning(rule))).cloned());
            }
            None => both.chains.push((name.clone(), rules.clone())),
        }
    }
    for jump in &old.jumps {
        if !both.jumps.iter().any(|j| j.base == jump.base && j.rule == jump.rule) {
            both.jumps.push(jump.clone());
        }
    }
    both
}

/// One line per chain and rule of ours.
pub(super) fn lines(family: &str, tables: &Tables) -> Vec<String> {
    let mut lines = Vec::new();
    for (table, rules) in tables {
        for jump in &rules.jumps {
            lines.push(format!("{family} -t {table} -A {} {}", jump.base, jump.rule));
        }
        for (chain, rules) in &rules.chains {
            lines.push(format!("{family} -t {table} -N {chain}"));
            lines.extend(rules.iter().map(|rule| format!("{family} -t {table} -A {chain} {rule}")));
        }
    }
    lines
}
