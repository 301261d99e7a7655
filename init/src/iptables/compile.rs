//! From the plan to chains and rules in iptables' words, without touching anything.
//!
//! A plan has one table with hooks of any priority; iptables has four tables, each hooked in once. So a hooked
//! chain lands in the table whose priority is its own, and what is hooked in at one place is called one after the
//! other, in the plan's order, by one dispatcher. One jump per built-in chain is all that stands among foreign rules.

use std::collections::BTreeSet;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::rule::{self, Matching};
use crate::cgroup::Cgroups;
use crate::error::Error;
use crate::plan::{Action, Chain, Family, HookKind, HookPoint, Plan};

/// What every chain of ours begins with.
pub(crate) const PREFIX: &str = "URSA_";

/// iptables' tables, in the order in which they are written: what guards before what redirects.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Table {
    /// Before connection tracking.
    Raw,
    /// Marks and transparent proxying.
    Mangle,
    /// What may pass.
    Filter,
    /// Where destinations are rewritten.
    Nat,
}

impl Table {
    /// All of them, in the order in which they are written.
    pub const ALL: [Self; 4] = [Self::Raw, Self::Mangle, Self::Filter, Self::Nat];

    /// Its name in iptables.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Mangle => "mangle",
            Self::Filter => "filter",
            Self::Nat => "nat",
        }
    }

    fn of(chain: &Chain) -> Option<Self> {
        let hook = chain.hook?;
        Some(match (hook.kind, hook.point, hook.priority) {
            (HookKind::Nat, ..) => Self::Nat,
            (HookKind::Filter, _, ..=-300) => Self::Raw,
            (HookKind::Filter | HookKind::Route, _, -299..=-101) => Self::Mangle,
            (HookKind::Filter, HookPoint::Output, -100..) => Self::Filter,
            _ => return None,
        })
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Where a jump stands in a built-in chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Place {
    /// Before everybody else's rules.
    First,
    /// After everybody else's rules.
    Last,
    /// After so many rules, to put back what was there.
    After(usize),
}

/// A rule in a chain that isn't ours, which leads to one that is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Jump {
    /// The chain that it stands in.
    pub(super) base: String,
    /// What follows after the chain's name.
    pub(super) rule: String,
    pub(super) place: Place,
}

/// Our chains in one table of one family.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Rules {
    /// The chains and their rules, each without `-A CHAIN`.
    pub(super) chains: Vec<(String, Vec<String>)>,
    pub(super) jumps: Vec<Jump>,
}

impl Rules {
    pub(super) const fn is_empty(&self) -> bool {
        self.chains.is_empty() && self.jumps.is_empty()
    }
}

/// The rules of one family, by table, empty tables left out.
pub(super) type Tables = Vec<(Table, Rules)>;

/// Compiles the plan for one family.
pub(super) fn tables(plan: &Plan, family: Family, cgroups: &Cgroups) -> Result<Tables, Error> {
    let mut tables = Vec::new();
    for table in Table::ALL {
        let rules = table_rules(plan, table, family, cgroups)?;
        if !rules.is_empty() {
            tables.push((table, rules));
        }
    }
    Ok(tables)
}

fn table_rules(plan: &Plan, table: Table, family: Family, cgroups: &Cgroups) -> Result<Rules, Error> {
    let mut hooked: Vec<_> = plan.chains.iter().filter_map(|c| Some((c.hook?, c))).collect();
    hooked.sort_by_key(|(hook, _)| hook.priority);
    let mut out = Rules::default();
    let mut wanted = Vec::new();
    for (point, base, dispatcher) in
        [(HookPoint::Prerouting, "PREROUTING", "IN"), (HookPoint::Output, "OUTPUT", "OUT")]
    {
        let mut calls = Vec::new();
        let mut last = false;
        for (hook, chain) in hooked.iter().filter(|(hook, _)| hook.point == point) {
            match Table::of(chain) {
                Some(of) if of == table => {}
                Some(_) => continue,
                None => {
                    return Err(Error::Inexpressible(format!("chain {} at {}", chain.name, hook.priority)));
                }
            }
            // After the priority of translation (-100) means after everybody else who translates.
            last = hook.kind == HookKind::Nat && hook.priority > -100;
            calls.push(format!("-j {}", name(&chain.name)));
            wanted.push(*chain);
        }
        if !calls.is_empty() {
            let dispatcher = format!("{PREFIX}{dispatcher}");
            let place = if last { Place::Last } else { Place::First };
            out.jumps.push(Jump { base: base.to_owned(), rule: format!("-j {dispatcher}"), place });
            out.chains.push((dispatcher, calls));
        }
    }
    let mut done = BTreeSet::new();
    while let Some(chain) = wanted.pop() {
        if !done.insert(chain.name.clone()) {
            continue;
        }
        let mut rules = Vec::new();
        for rule in &chain.rules {
            let Some(matching) = Matching::of(&rule.matches, family)? else { continue };
            if let Action::Goto(to) = &rule.action {
                wanted.extend(plan.chains.iter().find(|c| c.name == *to));
            }
            rules.extend(rule::lines(rule, &matching, table, family, cgroups)?);
            if matching.is_always() && !rule.action.goes_on() {
                break;
            }
        }
        out.chains.push((name(&chain.name), rules));
    }
    out.chains.sort();
    Ok(out)
}

/// `dns_zones` is `URSA_DNS_ZONES`. iptables takes 28 characters, and the plan's names stay below 23.
pub(super) fn name(chain: &str) -> String {
    format!("{PREFIX}{}", chain.to_ascii_uppercase())
}
