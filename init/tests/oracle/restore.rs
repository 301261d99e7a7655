//! Rules in the form that `iptables-restore` reads.

use std::collections::{BTreeMap, BTreeSet};

/// The tables of one family.
#[derive(Debug, Default)]
pub(crate) struct Tables(BTreeMap<&'static str, Vec<(&'static str, String)>>);

impl Tables {
    /// Appends a rule.
    pub(crate) fn append(&mut self, table: &'static str, chain: &'static str, rule: impl Into<String>) {
        self.0.entry(table).or_default().push((chain, rule.into()));
    }

    /// Puts a rule before those of its chain.
    pub(crate) fn insert(&mut self, table: &'static str, chain: &'static str, rule: impl Into<String>) {
        self.0.entry(table).or_default().insert(0, (chain, rule.into()));
    }
}

impl std::fmt::Display for Tables {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (table, rules) in &self.0 {
            writeln!(f, "*{table}")?;
            let own = |name: &&str| name.starts_with("ISTIO_") || name.starts_with("PROXY_INIT_");
            let targets = rules.iter().filter_map(|(_, rule)| rule.split("-j ").nth(1));
            let targets = targets.filter_map(|target| target.split(' ').next());
            let chains: BTreeSet<&str> =
                rules.iter().map(|(chain, _)| *chain).chain(targets).filter(own).collect();
            for chain in chains {
                writeln!(f, ":{chain} - [0:0]")?;
            }
            for (chain, rule) in rules {
                writeln!(f, "-A {chain} {rule}")?;
            }
            writeln!(f, "COMMIT")?;
        }
        Ok(())
    }
}
