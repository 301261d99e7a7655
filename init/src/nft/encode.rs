//! From the plan's rules to nftables' instructions.

use ipnet::IpNet;

use super::expr::{Base, Cmp, Expr, MetaKey, Verdict};
use super::ruleset::{ChainDef, RuleDef, Ruleset};
use crate::intent::Ports;
use crate::plan::{Action, Family, Match, Plan, Protocol, Rule};

const NFPROTO_IPV4: u8 = 2;
const NFPROTO_IPV6: u8 = 10;
const RTN_LOCAL: u32 = 2;
const IFNAMSIZ: usize = 16;

/// The rules that the kernel should hold for a plan.
pub(super) fn ruleset(plan: &Plan) -> Ruleset {
    let mut rules = Vec::new();
    for chain in &plan.chains {
        for rule in &chain.rules {
            for exprs in instructions(rule) {
                rules.push(RuleDef::new(chain.name, exprs, rule.reason));
            }
        }
    }
    let chains =
        plan.chains.iter().map(|c| ChainDef { name: c.name.to_owned(), hook: c.hook.map(Into::into) });
    Ruleset { chains: chains.collect(), rules }
}

/// One rule of the plan is one rule of the kernel, except that a refusal needs one for TCP and one for the rest.
fn instructions(rule: &Rule) -> Vec<Vec<Expr>> {
    let base = matches(&rule.matches);
    let ended = |mut exprs: Vec<Expr>, end: &[Expr]| {
        exprs.push(Expr::Counter);
        exprs.extend_from_slice(end);
        exprs
    };
    let verdict = |verdict| vec![ended(base.clone(), &[Expr::Verdict(verdict)])];
    match rule.action {
        Action::Return => verdict(Verdict::Return),
        Action::Drop => verdict(Verdict::Drop),
        Action::Goto(chain) => verdict(Verdict::Goto(chain.to_owned())),
        Action::Redirect(port) => {
            vec![ended(base, &[Expr::Load(port.to_be_bytes().to_vec()), Expr::Redirect])]
        }
        Action::Zone(zone) => vec![ended(base, &[Expr::Load(zone.to_ne_bytes().to_vec()), Expr::SetZone])],
        Action::Reject => {
            let protocol = rule.matches.iter().find_map(|m| match m {
                Match::Protocol(p) => Some(*p),
                _ => None,
            });
            let tcp_only =
                [base.clone(), equal(MetaKey::L4proto, vec![number(Protocol::Tcp)]).into()].concat();
            match protocol {
                Some(Protocol::Tcp) => vec![ended(base, &[Expr::RejectTcp])],
                Some(_) => vec![ended(base, &[Expr::RejectIcmp])],
                None => vec![ended(tcp_only, &[Expr::RejectTcp]), ended(base, &[Expr::RejectIcmp])],
            }
        }
    }
}

fn matches(matches: &[Match]) -> Vec<Expr> {
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
            Match::NotInInterface(name) => {
                out.extend([Expr::Meta(MetaKey::Iifname), Expr::Cmp(Cmp::Neq, ifname(name))]);
            }
            Match::OutInterface(name) => out.extend(equal(MetaKey::Oifname, ifname(name))),
            Match::Uid(id) => out.extend(equal(MetaKey::Skuid, id.to_ne_bytes().to_vec())),
            Match::Gid(id) => out.extend(equal(MetaKey::Skgid, id.to_ne_bytes().to_vec())),
            Match::Mark(mark) => out.extend(equal(MetaKey::Mark, mark.to_ne_bytes().to_vec())),
        }
    }
    out
}

fn equal(key: MetaKey, value: Vec<u8>) -> [Expr; 2] {
    [Expr::Meta(key), Expr::Cmp(Cmp::Eq, value)]
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
    // Whole bytes need no mask.
    let used = prefix.div_ceil(8);
    let len = u32::try_from(used).unwrap_or(u32::MAX);
    out.push(Expr::Payload { base: Base::Network, offset, len });
    if !prefix.is_multiple_of(8) {
        out.push(Expr::Mask(mask[..used].to_vec()));
    }
    out.push(Expr::Cmp(Cmp::Eq, octets[..used].to_vec()));
}

fn ifname(name: &str) -> Vec<u8> {
    let mut bytes = name.as_bytes().to_vec();
    bytes.resize(IFNAMSIZ, 0);
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
