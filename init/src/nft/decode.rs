//! From nftables' instructions back to the plan's rules, to explain what is in place.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

use super::expr::{
    self, Base, CT_CONFIRMED, CT_CONFIRMED_DNAT, CT_STATE_INVALID, Cmp, CtKey, Expr, MetaKey, SYN, SYN_ACK,
    TCP_FLAGS, Verdict,
};
use super::ruleset::{HookDef, Ruleset, TableFamily};
use crate::cgroup;
use crate::in_place::{Held, Line};
use crate::intent::{Ids, Interface, Ports};
use crate::plan::{Action, Chain, Family, Hook, HookKind, HookPoint, Match, Protocol, Rule};

impl Ruleset {
    /// What concerns packets of the family, rule by rule; the error is the first rule that Ursa can't have written.
    pub(crate) fn held(&self, family: Family) -> Result<Held, String> {
        let concerns = |table: TableFamily| match table {
            TableFamily::Inet => true,
            TableFamily::Ip => family == Family::V4,
            TableFamily::Ip6 => family == Family::V6,
        };
        let mut held = Held::default();
        for def in self.chains.iter().filter(|def| concerns(def.family)) {
            let hook = def.hook.as_ref().map(|h| hook(h).ok_or_else(|| format!("chain {}", def.name)));
            held.chains.push(Chain {
                name: def.name.clone().into(),
                hook: hook.transpose()?,
                rules: Vec::new(),
            });
        }
        for def in self.rules.iter().filter(|def| concerns(def.family)) {
            let foreign = || format!("chain {}: {}", def.chain, expr::line(&def.exprs));
            let (matches, action) = rule(&def.exprs).ok_or_else(foreign)?;
            let chain = held.chains.iter_mut().find(|chain| chain.name == def.chain).ok_or_else(foreign)?;
            let rule = Rule { matches, action, reason: def.comment.clone().into() };
            let place = (chain.name.clone(), chain.rules.len());
            let line = Line { chain: def.chain.clone(), rule: rule.to_string(), packets: def.packets };
            held.lines.insert(place, line);
            chain.rules.push(rule);
        }
        Ok(held)
    }
}

fn hook(def: &HookDef) -> Option<Hook> {
    let kind = match def.kind.as_str() {
        "filter" => HookKind::Filter,
        "nat" => HookKind::Nat,
        "route" => HookKind::Route,
        _ => return None,
    };
    let point = match def.number {
        0 => HookPoint::Prerouting,
        3 => HookPoint::Output,
        _ => return None,
    };
    Some(Hook { kind, point, priority: def.priority })
}

fn rule(exprs: &[Expr]) -> Option<(Vec<Match>, Action)> {
    let counter = exprs.iter().position(|expr| *expr == Expr::Counter)?;
    let (mut rest, mut matches) = (&exprs[..counter], Vec::new());
    while !rest.is_empty() {
        let (found, used) = one(rest)?;
        matches.push(found);
        rest = &rest[used..];
    }
    Some((matches, action(&exprs[counter + 1..])?))
}

fn action(exprs: &[Expr]) -> Option<Action> {
    Some(match exprs {
        [Expr::Verdict(Verdict::Return)] => Action::Return,
        [Expr::Verdict(Verdict::Drop)] => Action::Drop,
        [Expr::Verdict(Verdict::Goto(chain))] => Action::Goto(chain.clone().into()),
        [Expr::Load(port), Expr::Redirect] => Action::Redirect(be16(port)?),
        [Expr::Load(zone), Expr::SetZone] => Action::Zone(u16::from_ne_bytes(*zone.first_chunk()?)),
        [Expr::Load(port), Expr::Tproxy(_), Expr::Verdict(Verdict::Accept)] => Action::Tproxy(be16(port)?),
        [Expr::Meta(MetaKey::Mark), Expr::SetConnectionMark] => Action::SaveMark,
        [Expr::Ct(CtKey::Mark), Expr::SetMark] => Action::RestoreMark,
        [Expr::Load(_), Expr::SetTrace] => Action::Trace,
        [Expr::RejectTcp | Expr::RejectIcmp(_)] => Action::Reject,
        _ => return None,
    })
}

/// The first match, and how many instructions it takes.
fn one(exprs: &[Expr]) -> Option<(Match, usize)> {
    Some(match exprs {
        [Expr::Meta(MetaKey::Nfproto), Expr::Cmp(Cmp::Eq, number), ..] => {
            (Match::Family(if number[..] == [2] { Family::V4 } else { Family::V6 }), 2)
        }
        [Expr::Meta(MetaKey::L4proto), Expr::Cmp(op, number), ..] => {
            let protocol = match number[..] {
                [6] => Protocol::Tcp,
                [17] => Protocol::Udp,
                [1] => Protocol::Icmp,
                [58] => Protocol::Icmpv6,
                _ => return None,
            };
            match op {
                Cmp::Eq => (Match::Protocol(protocol), 2),
                Cmp::Neq => (Match::NotProtocol(protocol), 2),
                _ => return None,
            }
        }
        [
            Expr::Payload { base: Base::Transport, offset: TCP_FLAGS, len: 1 },
            Expr::Mask(mask),
            Expr::Cmp(op @ (Cmp::Eq | Cmp::Neq), flags),
            ..,
        ] if mask[..] == [SYN_ACK] && flags[..] == [SYN] => {
            (if *op == Cmp::Eq { Match::Syn } else { Match::NotSyn }, 3)
        }
        [Expr::Payload { base: Base::Transport, offset, len: 2 }, rest @ ..] => {
            let (ports, used) = match rest {
                [Expr::Cmp(Cmp::Eq, port), ..] => (Ports::one(be16(port)?), 2),
                [Expr::Cmp(Cmp::Gte, first), Expr::Cmp(Cmp::Lte, last), ..] => {
                    (Ports { first: be16(first)?, last: be16(last)? }, 3)
                }
                _ => return None,
            };
            match offset {
                0 => (Match::SourcePort(ports), used),
                2 => (Match::DestinationPort(ports), used),
                _ => return None,
            }
        }
        [
            Expr::Payload { base: Base::Network, offset, .. },
            Expr::Mask(mask),
            Expr::Cmp(Cmp::Eq, bytes),
            ..,
        ] => (address(*offset, bytes, mask.iter().map(|byte| byte.count_ones()).sum())?, 3),
        [Expr::Payload { base: Base::Network, offset, len }, Expr::Cmp(Cmp::Eq, bytes), ..] => {
            (address(*offset, bytes, len * 8)?, 2)
        }
        [Expr::DestinationType, Expr::Cmp(Cmp::Eq, kind), ..] if ne32(kind) == Some(2) => {
            (Match::DestinationIsLocal, 2)
        }
        [Expr::Meta(MetaKey::Iifname), Expr::Cmp(Cmp::Eq, name), ..] => {
            (Match::InInterface(interface(name)?), 2)
        }
        [Expr::Meta(MetaKey::Oifname), Expr::Cmp(Cmp::Eq, name), ..] => {
            (Match::OutInterface(interface(name)?), 2)
        }
        [Expr::Meta(key @ (MetaKey::Skuid | MetaKey::Skgid)), rest @ ..] => {
            let (ids, inside, used) = match rest {
                [Expr::Cmp(op @ (Cmp::Eq | Cmp::Neq), id), ..] => (Ids::one(ne32(id)?), *op == Cmp::Eq, 2),
                [Expr::ToNetworkOrder, Expr::Range { inside, first, last }, ..] => {
                    (Ids { first: u32::from_be_bytes(*first), last: u32::from_be_bytes(*last) }, *inside, 3)
                }
                _ => return None,
            };
            match (key, inside) {
                (MetaKey::Skuid, true) => (Match::Uid(ids), used),
                (MetaKey::Skgid, true) => (Match::Gid(ids), used),
                (MetaKey::Skgid, false) => (Match::NotGid(ids), used),
                _ => return None,
            }
        }
        [Expr::SocketCgroup { level }, Expr::Cmp(Cmp::Eq, id), ..] => {
            let id = u64::from_ne_bytes(*id.first_chunk()?);
            (Match::Cgroup(cgroup::by_number(id, *level)?), 2)
        }
        [Expr::Meta(MetaKey::Mark), Expr::Cmp(Cmp::Eq, mark), ..] => (Match::Mark(ne32(mark)?), 2),
        [Expr::Ct(CtKey::Mark), Expr::Cmp(Cmp::Eq, mark), ..] => (Match::ConnectionMark(ne32(mark)?), 2),
        [Expr::Ct(CtKey::State), Expr::Mask(states), Expr::Cmp(Cmp::Neq, _), ..]
            if ne32(states) == Some(CT_STATE_INVALID) =>
        {
            (Match::InvalidConnection, 3)
        }
        [Expr::Ct(CtKey::Status), Expr::Mask(mask), Expr::Cmp(Cmp::Eq, status), ..]
            if (ne32(mask), ne32(status)) == (Some(CT_CONFIRMED_DNAT), Some(CT_CONFIRMED)) =>
        {
            (Match::Untranslated, 3)
        }
        _ => return None,
    })
}

fn be16(bytes: &[u8]) -> Option<u16> {
    bytes.first_chunk().map(|bytes| u16::from_be_bytes(*bytes))
}

fn ne32(bytes: &[u8]) -> Option<u32> {
    bytes.first_chunk().map(|bytes| u32::from_ne_bytes(*bytes))
}

fn address(offset: u32, bytes: &[u8], prefix: u32) -> Option<Match> {
    let mut full = [0; 16];
    full.get_mut(..bytes.len())?.copy_from_slice(bytes);
    let address: IpAddr = match offset {
        12 | 16 => Ipv4Addr::new(full[0], full[1], full[2], full[3]).into(),
        8 | 24 => Ipv6Addr::from(full).into(),
        _ => return None,
    };
    let net = IpNet::new(address, u8::try_from(prefix).ok()?).ok()?;
    Some(if matches!(offset, 12 | 8) { Match::Source(net) } else { Match::Destination(net) })
}

/// A whole name ends with its zeros.
fn interface(bytes: &[u8]) -> Option<Interface> {
    let name = crate::netlink::text(bytes);
    if bytes.contains(&0) { name.parse().ok() } else { format!("{name}+").parse().ok() }
}
