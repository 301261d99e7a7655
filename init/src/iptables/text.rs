//! What `iptables-restore --noflush` is given: one table from what is there to what is wanted, committed whole.

use std::fmt::Write as _;

use super::compile::{Jump, Place, Rules, Table};
use super::save::Saved;

/// The lines for one table. Chains that are there already are emptied by their declaration and filled again, all in
/// the same commit.
pub(super) fn table(table: Table, found: &Saved, wanted: &Rules) -> String {
    let ours = found.ours(table);
    let mut out = format!("*{table}\n");
    let mut put = |line: std::fmt::Arguments<'_>| {
        // Writing into a String can't fail.
        let _ = writeln!(out, "{line}");
    };
    let stale = || ours.chains.iter().filter(|(name, _)| !wanted.chains.iter().any(|(n, _)| n == name));
    for (name, _) in wanted.chains.iter().chain(stale()) {
        put(format_args!(":{name} - [0:0]"));
    }
    for Jump { base, rule, .. } in &ours.jumps {
        put(format_args!("-D {base} {rule}"));
    }
    for (name, rules) in &wanted.chains {
        for rule in rules {
            put(format_args!("-A {name} {rule}"));
        }
    }
    for Jump { base, rule, place } in &wanted.jumps {
        match place {
            Place::First => put(format_args!("-I {base} 1 {rule}")),
            Place::Last => put(format_args!("-A {base} {rule}")),
            Place::After(rules) => {
                let before = wanted.jumps.iter().filter(|j| j.base == *base).take_while(|j| j.rule != *rule);
                // Others may have taken away rules since.
                let most = found.foreign(table, base) + before.count();
                put(format_args!("-I {base} {} {rule}", rules.min(&most) + 1));
            }
        }
    }
    for (name, _) in stale() {
        put(format_args!("-X {name}"));
    }
    out.push_str("COMMIT\n");
    out
}

/// The rules without their comments, for kernels that have none.
pub(super) fn without_comments(rules: &Rules) -> Rules {
    let mut out = rules.clone();
    for rule in out.chains.iter_mut().flat_map(|(_, rules)| rules) {
        if let Some((before, rest)) = rule.split_once("-m comment --comment \"") {
            // A quote inside is escaped.
            let bytes = rest.as_bytes();
            let mut end = 0;
            while bytes.get(end).is_some_and(|b| *b != b'"') {
                end += if bytes[end] == b'\\' { 2 } else { 1 };
            }
            *rule = format!("{before}{}", rest.get(end + 1..).unwrap_or_default().trim_start());
        }
    }
    out
}
