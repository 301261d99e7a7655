//! Our table as data: what we want in the kernel, or what we read from it.

use std::collections::{BTreeMap, BTreeSet};

use super::expr::{self, Expr};
use crate::netlink::text;
use crate::plan;

/// The families of tables that we use, in the kernel's numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub(super) enum TableFamily {
    /// Both IP families.
    Inet = 1,
    /// IPv4.
    Ip = 2,
    /// IPv6.
    Ip6 = 10,
}

impl TableFamily {
    const ALL: [Self; 3] = [Self::Inet, Self::Ip, Self::Ip6];

    /// `None` for families that are never ours (bridge, arp, netdev).
    pub(super) fn from_number(number: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|family| *family as u8 == number)
    }

    /// nft's word for it.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Inet => "inet",
            Self::Ip => "ip",
            Self::Ip6 => "ip6",
        }
    }

    /// A chain's name, with the family where it isn't the usual one.
    fn qualify(self, chain: &str) -> String {
        match self {
            Self::Inet => chain.to_owned(),
            Self::Ip | Self::Ip6 => format!("{} {chain}", self.name()),
        }
    }
}

/// The chains and rules of our table, or of our tables where the kernel can't have one for both families.
#[derive(Debug, Clone, Default)]
pub struct Ruleset {
    pub(super) tables: BTreeSet<TableFamily>,
    pub(super) chains: Vec<ChainDef>,
    pub(super) rules: Vec<RuleDef>,
}

/// A chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ChainDef {
    pub(super) family: TableFamily,
    pub(super) name: String,
    pub(super) hook: Option<HookDef>,
}

/// A hook in the kernel's numbers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct HookDef {
    pub(super) kind: String,
    pub(super) number: u32,
    pub(super) priority: i32,
    pub(super) policy: u32,
}

/// The longest comment that fits into a rule's user data of 256 bytes, with its type, length and end.
pub(super) const COMMENT: usize = 253;

/// `NF_ACCEPT`, the policy of all our chains.
const ACCEPT: u32 = 1;

impl From<plan::Hook> for HookDef {
    fn from(hook: plan::Hook) -> Self {
        let kind = match hook.kind {
            plan::HookKind::Filter => "filter",
            plan::HookKind::Nat => "nat",
            plan::HookKind::Route => "route",
        };
        let number = match hook.point {
            plan::HookPoint::Prerouting => 0,
            plan::HookPoint::Output => 3,
        };
        Self { kind: kind.to_owned(), number, priority: hook.priority, policy: ACCEPT }
    }
}

/// A rule.
#[derive(Debug, Clone)]
pub(super) struct RuleDef {
    pub(super) family: TableFamily,
    pub(super) chain: String,
    pub(super) exprs: Vec<Expr>,
    /// The reason, kept by the kernel as the rule's comment.
    pub(super) comment: String,
    pub(super) packets: u64,
    /// The instructions and user data as the kernel dumped them, to put a foreign edit back as it was.
    pub(super) raw: Option<(Vec<u8>, Vec<u8>)>,
}

impl RuleDef {
    pub(super) fn new(chain: &ChainDef, exprs: Vec<Expr>, comment: &str) -> Self {
        let mut end = comment.len().min(COMMENT);
        while !comment.is_char_boundary(end) {
            end -= 1;
        }
        let comment = comment[..end].to_owned();
        let (family, chain) = (chain.family, chain.name.clone());
        Self { family, chain, exprs, comment, packets: 0, raw: None }
    }

    /// A rule as the kernel dumps it.
    pub(super) fn dumped(family: TableFamily, chain: String, list: &[u8], user_data: &[u8]) -> Option<Self> {
        let (exprs, packets) = Expr::decode_list(list);
        let comment = match user_data {
            [0, len, rest @ ..] => text(rest.get(..usize::from(*len))?),
            _ => String::new(),
        };
        let raw = Some((list.to_vec(), user_data.to_vec()));
        Some(Self { family, chain, exprs, comment, packets, raw })
    }

    fn line(&self, counters: Counters) -> String {
        let mut line = expr::line(&self.exprs);
        match counters {
            Counters::Show => {
                line = line.replacen("counter", &format!("counter packets {}", self.packets), 1);
            }
            Counters::Hide => line = line.replacen("counter ", "", 1),
        }
        if self.comment.is_empty() { line } else { format!("{line}  # {}", self.comment) }
    }
}

/// Whether packet counters are part of the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Counters {
    /// Show them.
    Show,
    /// Leave them out, to compare.
    Hide,
}

impl Ruleset {
    /// One line per chain and rule, chains sorted by name.
    pub fn lines(&self, counters: Counters) -> Vec<String> {
        let mut rules: BTreeMap<_, Vec<&RuleDef>> = BTreeMap::new();
        for rule in &self.rules {
            rules.entry((rule.family, &rule.chain)).or_default().push(rule);
        }
        let mut chains: Vec<_> = self.chains.iter().collect();
        chains.sort_by_key(|c| (c.family, &c.name));
        let mut lines = Vec::new();
        for chain in chains {
            lines.push(chain.line());
            for rule in rules.get(&(chain.family, &chain.name)).into_iter().flatten() {
                lines.push(format!("chain {}: {}", chain.family.qualify(&chain.name), rule.line(counters)));
            }
        }
        lines
    }

    /// How many packets each rule counted: chain, rule, number.
    pub fn counters(&self) -> impl Iterator<Item = (&str, &str, u64)> {
        self.rules.iter().map(|r| (r.chain.as_str(), r.comment.as_str(), r.packets))
    }

    /// Whether both hold the same chains and the same rules in the same order; counters don't matter.
    pub fn same_as(&self, other: &Self) -> bool {
        fn sorted(set: &Ruleset) -> Vec<&ChainDef> {
            let mut chains: Vec<_> = set.chains.iter().collect();
            chains.sort_by_key(|chain| (chain.family, &chain.name));
            chains
        }
        // Stable, so that the order within a chain stays.
        fn by_chain(set: &Ruleset) -> impl Iterator<Item = (TableFamily, &str, &[Expr], &str)> {
            let mut rules: Vec<_> = set.rules.iter().collect();
            rules.sort_by_key(|rule| (rule.family, &rule.chain));
            rules
                .into_iter()
                .map(|rule| (rule.family, rule.chain.as_str(), rule.exprs.as_slice(), rule.comment.as_str()))
        }
        self.tables == other.tables && sorted(self) == sorted(other) && by_chain(self).eq(by_chain(other))
    }
}

impl ChainDef {
    fn line(&self) -> String {
        let name = self.family.qualify(&self.name);
        let Some(hook) = &self.hook else { return format!("chain {name}") };
        let point = match hook.number {
            0 => "prerouting",
            1 => "input",
            2 => "forward",
            3 => "output",
            4 => "postrouting",
            _ => "other",
        };
        let policy = if hook.policy == ACCEPT { "accept" } else { "drop" };
        format!("chain {name}: type {} hook {point} priority {}; policy {policy}", hook.kind, hook.priority)
    }
}

/// The difference of two texts, line by line: `-` only in `found`, `+` only in `wanted`, in order.
pub(crate) fn difference(found: &[String], wanted: &[String]) -> Vec<String> {
    // Longest common subsequence; the texts have some dozen lines.
    let (n, m) = (found.len(), wanted.len());
    let mut common = vec![vec![0usize; m + 1]; n + 1];
    for i in (0..n).rev() {
        for j in (0..m).rev() {
            common[i][j] = if found[i] == wanted[j] {
                common[i + 1][j + 1] + 1
            } else {
                common[i + 1][j].max(common[i][j + 1])
            };
        }
    }
    let (mut i, mut j, mut out) = (0, 0, Vec::new());
    while i < n || j < m {
        if i < n && j < m && found[i] == wanted[j] {
            (i, j) = (i + 1, j + 1);
        } else if j == m || (i < n && common[i + 1][j] >= common[i][j + 1]) {
            out.push(format!("- {}", found[i]));
            i += 1;
        } else {
            out.push(format!("+ {}", wanted[j]));
            j += 1;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::difference;

    #[test]
    fn difference_names_what_moved() {
        let text = |t: &str| t.split(' ').map(str::to_owned).collect::<Vec<_>>();
        assert!(difference(&text("a b c"), &text("a b c")).is_empty());
        assert_eq!(difference(&text("a b c"), &text("a c d")), ["- b", "+ d"]);
        assert_eq!(difference(&[], &text("a")), ["+ a"]);
    }
}
