//! From the plan's rules to nftables' instructions.

use std::borrow::Cow;

use ipnet::IpNet;

use super::expr::{
    Base, CT_CONFIRMED, CT_CONFIRMED_DNAT, CT_STATE_INVALID, Cmp, CtKey, Expr, MetaKey, SYN, SYN_ACK,
    TCP_FLAGS, Verdict,
};
use super::ruleset::{ChainDef, RuleDef, Ruleset, TableFamily};
use crate::cgroup::{self, Cgroups};
use crate::intent::{Ids, Interface, Ports};
use crate::plan::{Action, Family, Match, Plan, Protocol, Rule};

const NFPROTO_IPV4: u8 = 2;
const NFPROTO_IPV6: u8 = 10;
const RTN_LOCAL: u32 = 2;
const IFNAMSIZ: usize = 16;

/// Which tables hold the rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Layout {
    /// One table for both families.
    Inet,
    /// A table for each family, for kernels before 5.2, which can't translate addresses in the common one.
    Split,
}

impl Layout {
    const fn tables(self) -> &'static [TableFamily] {
        match self {
            Self::Inet => &[TableFamily::Inet],
            Self::Split => &[TableFamily::Ip, TableFamily::Ip6],
        }
    }

    /// The layout that was read.
    pub(super) fn of(found: &Ruleset) -> Self {
        if found.tables.is_empty() || found.tables.contains(&TableFamily::Inet) {
            Self::Inet
        } else {
            Self::Split
        }
    }
}

/// The rules that the kernel should hold for a plan. Cgroups are compared by their number; the rule of one that doesn't
/// exist matches nothing, and says so.
pub(super) fn ruleset(plan: &Plan, cgroups: &Cgroups, layout: Layout) -> Ruleset {
    let mut set = Ruleset { tables: layout.tables().iter().copied().collect(), ..Ruleset::default() };
    for family in layout.tables() {
        for chain in &plan.chains {
            let def =
                ChainDef { family: *family, name: chain.name.to_string(), hook: chain.hook.map(Into::into) };
            for rule in chain.rules.iter().filter(|rule| concerns(rule, *family)) {
                let reason = match cgroups.missing(rule.cgroups()) {
                    Some(cgroup) => Cow::Owned(cgroup::waiting(&rule.reason, cgroup)),
                    None => Cow::Borrowed(rule.reason.as_ref()),
                };
                for exprs in instructions(rule, cgroups, *family) {
                    set.rules.push(RuleDef::new(&def, exprs, &reason));
                }
            }
            set.chains.push(def);
        }
    }
    set
}

/// Whether packets of such a table can match the rule at all.
fn concerns(rule: &Rule, table: TableFamily) -> bool {
    let other = match table {
        TableFamily::Inet => return true,
        TableFamily::Ip => Family::V6,
        TableFamily::Ip6 => Family::V4,
    };
    !rule.matches.iter().any(|m| match m {
        Match::Family(family) => *family == other,
        Match::Source(net) | Match::Destination(net) => Family::of(net) == other,
        _ => false,
    })
}

/// One rule of the plan is one rule of the kernel, except that a refusal needs one for TCP and one for the rest.
fn instructions(rule: &Rule, cgroups: &Cgroups, table: TableFamily) -> Vec<Vec<Expr>> {
    let base = matches(&rule.matches, cgroups);
    let ended = |mut exprs: Vec<Expr>, end: &[Expr]| {
        exprs.push(Expr::Counter);
        exprs.extend_from_slice(end);
        exprs
    };
    let verdict = |verdict| vec![ended(base.clone(), &[Expr::Verdict(verdict)])];
    match &rule.action {
        Action::Return => verdict(Verdict::Return),
        Action::Drop => verdict(Verdict::Drop),
        Action::Goto(chain) => verdict(Verdict::Goto(chain.to_string())),
        Action::Redirect(port) => {
            vec![ended(base, &[Expr::Load(port.to_be_bytes().to_vec()), Expr::Redirect])]
        }
        Action::Zone(zone) => vec![ended(base, &[Expr::Load(zone.to_ne_bytes().to_vec()), Expr::SetZone])],
        // A connection that was handed over needs no further look.
        Action::Tproxy(port) => {
            let to = [
                Expr::Load(port.to_be_bytes().to_vec()),
                Expr::Tproxy(of_one(table)),
                Expr::Verdict(Verdict::Accept),
            ];
            vec![ended(base, &to)]
        }
        Action::SaveMark => vec![ended(base, &[Expr::Meta(MetaKey::Mark), Expr::SetConnectionMark])],
        Action::RestoreMark => vec![ended(base, &[Expr::Ct(CtKey::Mark), Expr::SetMark])],
        Action::Trace => vec![ended(base, &[Expr::Load(vec![1]), Expr::SetTrace])],
        Action::Reject => {
            let protocol = rule.matches.iter().find_map(|m| match m {
                Match::Protocol(p) => Some(*p),
                _ => None,
            });
            let refuse = Expr::RejectIcmp(of_one(table));
            let tcp_only =
                [base.clone(), equal(MetaKey::L4proto, vec![number(Protocol::Tcp)]).into()].concat();
            match protocol {
                Some(Protocol::Tcp) => vec![ended(base, &[Expr::RejectTcp])],
                Some(_) => vec![ended(base, &[refuse])],
                None => vec![ended(tcp_only, &[Expr::RejectTcp]), ended(base, &[refuse])],
            }
        }
    }
}

/// The one family of a table, where it has only one.
const fn of_one(table: TableFamily) -> Option<Family> {
    match table {
        TableFamily::Inet => None,
        TableFamily::Ip => Some(Family::V4),
        TableFamily::Ip6 => Some(Family::V6),
    }
}

fn matches(matches: &[Match], cgroups: &Cgroups) -> Vec<Expr> {
    let mut out = Vec::new();
    let mut family = None;
    for m in matches {
        match m {
            Match::Family(f) => {
                family = Some(*f);
                out.extend(equal(MetaKey::Nfproto, vec![nfproto(*f)]));
            }
            Match::Protocol(p) => out.extend(equal(MetaKey::L4proto, vec![number(*p)])),
            Match::NotProtocol(p) => {
                out.extend([Expr::Meta(MetaKey::L4proto), Expr::Cmp(Cmp::Neq, vec![number(*p)])]);
            }
            Match::DestinationPort(p) => port(&mut out, 2, *p),
            Match::SourcePort(p) => port(&mut out, 0, *p),
            Match::Source(net) | Match::Destination(net) => {
                let of = Family::of(net);
                // Without this the same offset of the other family's header would be compared.
                if family.replace(of) != Some(of) {
                    out.extend(equal(MetaKey::Nfproto, vec![nfproto(of)]));
                }
                address(&mut out, matches!(m, Match::Source(_)), net);
            }
            Match::DestinationIsLocal => {
                out.extend([Expr::DestinationType, Expr::Cmp(Cmp::Eq, RTN_LOCAL.to_ne_bytes().to_vec())]);
            }
            Match::InInterface(name) => out.extend(equal(MetaKey::Iifname, ifname(name))),
            Match::OutInterface(name) => out.extend(equal(MetaKey::Oifname, ifname(name))),
            Match::Uid(ids) => owner(&mut out, MetaKey::Skuid, *ids, true),
            Match::Gid(ids) => owner(&mut out, MetaKey::Skgid, *ids, true),
            Match::NotGid(ids) => owner(&mut out, MetaKey::Skgid, *ids, false),
            Match::Cgroup(cgroup) => {
                let id = cgroups.id(cgroup).to_ne_bytes().to_vec();
                out.extend([Expr::SocketCgroup { level: cgroup.level() }, Expr::Cmp(Cmp::Eq, id)]);
            }
            Match::Mark(mark) => out.extend(equal(MetaKey::Mark, mark.to_ne_bytes().to_vec())),
            Match::ConnectionMark(mark) => {
                out.extend([Expr::Ct(CtKey::Mark), Expr::Cmp(Cmp::Eq, mark.to_ne_bytes().to_vec())]);
            }
            Match::InvalidConnection => out.extend([
                Expr::Ct(CtKey::State),
                Expr::Mask(CT_STATE_INVALID.to_ne_bytes().to_vec()),
                Expr::Cmp(Cmp::Neq, vec![0; 4]),
            ]),
            Match::Untranslated => out.extend([
                Expr::Ct(CtKey::Status),
                Expr::Mask(CT_CONFIRMED_DNAT.to_ne_bytes().to_vec()),
                Expr::Cmp(Cmp::Eq, CT_CONFIRMED.to_ne_bytes().to_vec()),
            ]),
            Match::Syn => flags(&mut out, Cmp::Eq),
            Match::NotSyn => flags(&mut out, Cmp::Neq),
        }
    }
    out
}

fn equal(key: MetaKey, value: Vec<u8>) -> [Expr; 2] {
    [Expr::Meta(key), Expr::Cmp(Cmp::Eq, value)]
}

/// SYN without ACK, or anything else.
fn flags(out: &mut Vec<Expr>, op: Cmp) {
    out.push(Expr::Payload { base: Base::Transport, offset: TCP_FLAGS, len: 1 });
    out.extend([Expr::Mask(vec![SYN_ACK]), Expr::Cmp(op, vec![SYN])]);
}

/// Ids are numbers in the host's order; a range compares bytes, so they are turned round first.
fn owner(out: &mut Vec<Expr>, key: MetaKey, ids: Ids, inside: bool) {
    out.push(Expr::Meta(key));
    if ids.first == ids.last {
        out.push(Expr::Cmp(if inside { Cmp::Eq } else { Cmp::Neq }, ids.first.to_ne_bytes().to_vec()));
    } else {
        out.push(Expr::ToNetworkOrder);
        out.push(Expr::Range { inside, first: ids.first.to_be_bytes(), last: ids.last.to_be_bytes() });
    }
}

fn port(out: &mut Vec<Expr>, offset: u32, ports: Ports) {
    out.push(Expr::Payload { base: Base::Transport, offset, len: 2 });
    if ports.first == ports.last {
        out.push(Expr::Cmp(Cmp::Eq, ports.first.to_be_bytes().to_vec()));
    } else {
        out.push(Expr::Cmp(Cmp::Gte, ports.first.to_be_bytes().to_vec()));
        out.push(Expr::Cmp(Cmp::Lte, ports.last.to_be_bytes().to_vec()));
    }
}

fn address(out: &mut Vec<Expr>, source: bool, net: &IpNet) {
    let (offset, octets, mask) = match net.trunc() {
        IpNet::V4(net) => {
            (if source { 12 } else { 16 }, net.addr().octets().to_vec(), net.netmask().octets().to_vec())
        }
        IpNet::V6(net) => {
            (if source { 8 } else { 24 }, net.addr().octets().to_vec(), net.netmask().octets().to_vec())
        }
    };
    let prefix = usize::from(net.prefix_len());
    if prefix == 0 {
        return;
    }
    // Whole bytes need no mask. With one, nft shows an address only where all of it is compared.
    let used = if prefix.is_multiple_of(8) { prefix / 8 } else { octets.len() };
    let len = u32::try_from(used).unwrap_or(u32::MAX);
    out.push(Expr::Payload { base: Base::Network, offset, len });
    if !prefix.is_multiple_of(8) {
        out.push(Expr::Mask(mask[..used].to_vec()));
    }
    out.push(Expr::Cmp(Cmp::Eq, octets[..used].to_vec()));
}

/// A whole name ends with its zeros; a beginning is compared as far as it goes.
fn ifname(interface: &Interface) -> Vec<u8> {
    let mut bytes = interface.name().as_bytes().to_vec();
    if !interface.is_prefix() {
        bytes.resize(IFNAMSIZ, 0);
    }
    bytes
}

const fn nfproto(family: Family) -> u8 {
    match family {
        Family::V4 => NFPROTO_IPV4,
        Family::V6 => NFPROTO_IPV6,
    }
}

const fn number(protocol: Protocol) -> u8 {
    match protocol {
        Protocol::Tcp => 6,
        Protocol::Udp => 17,
        Protocol::Icmp => 1,
        Protocol::Icmpv6 => 58,
    }
}
