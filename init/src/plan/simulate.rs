//! What the plan decides for a packet, without a kernel.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::{Action, Chain, ChainName, Family, HookKind, HookPoint, Match, Plan, Protocol};

/// A packet that asks for a connection, or a datagram.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packet {
    /// Where it enters: sent by a local process, or arriving.
    pub point: HookPoint,
    /// TCP, UDP, or anything else.
    pub protocol: Option<Protocol>,
    /// Source address.
    pub source: IpAddr,
    /// Destination address.
    pub destination: IpAddr,
    /// Source port, for TCP and UDP.
    pub source_port: u16,
    /// Destination port, for TCP and UDP.
    pub destination_port: u16,
    /// The interface that it arrives by or leaves by.
    pub interface: String,
    /// The sender, when it is local and has a socket.
    pub owner: Option<Owner>,
    /// The cgroup of the sender below the root, when it is local and has a socket.
    pub cgroup: Option<String>,
    /// The packet's mark.
    pub mark: u32,
    /// The mark of its connection.
    pub connection_mark: u32,
    /// Whether it belongs to no connection and can't begin one.
    pub invalid: bool,
    /// Whether connection tracking takes it for a packet of an older connection, whose destination was never rewritten.
    pub reused: bool,
    /// Whether the destination is an address of this namespace.
    pub destination_is_local: bool,
}

/// Who sent a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owner {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
}

/// What happens to a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It goes where it was sent.
    Passes,
    /// It goes to this local port.
    Redirected(u16),
    /// It is handed to the transparent socket on this local port.
    Handed(u16),
    /// It is refused.
    Refused,
    /// It is discarded.
    Dropped,
}

/// A verdict and where it comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    /// What happens.
    pub verdict: Verdict,
    /// The conntrack zone, when one is set.
    pub zone: Option<u16>,
    /// The rules that it met, in order: chain and position. The last one that doesn't go on decided.
    pub rules: Vec<(ChainName, usize)>,
}

/// Walks the packet through every hook of its point, in the kernel's order.
pub fn decide(plan: &Plan, packet: &Packet) -> Decision {
    let mut decision = Decision { verdict: Verdict::Passes, zone: None, rules: Vec::new() };
    let mut packet = packet.clone();
    let mut hooked: Vec<_> = plan.chains.iter().filter_map(|c| Some((c.hook?, c))).collect();
    hooked.retain(|(hook, _)| hook.point == packet.point);
    hooked.sort_by_key(|(hook, _)| hook.priority);
    // Destinations are rewritten by what was decided about a connection's first packet.
    hooked.retain(|(hook, _)| !packet.reused || hook.kind != HookKind::Nat);
    for (_, chain) in hooked {
        match walk(plan, chain, &mut packet, &mut decision) {
            Some(Action::Reject) => {
                decision.verdict = Verdict::Refused;
                return decision;
            }
            Some(Action::Drop) => {
                decision.verdict = Verdict::Dropped;
                return decision;
            }
            Some(Action::Tproxy(port)) => decision.verdict = Verdict::Handed(port),
            Some(Action::Redirect(port)) => {
                decision.verdict = Verdict::Redirected(port);
                packet.destination_port = port;
                packet.destination_is_local = true;
                if packet.point == HookPoint::Output {
                    packet.destination = match packet.destination {
                        IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
                        IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
                    };
                }
            }
            _ => {}
        }
    }
    decision
}

/// The verdict of one hooked chain, if it has one.
fn walk(plan: &Plan, chain: &Chain, packet: &mut Packet, decision: &mut Decision) -> Option<Action> {
    let mut chain = chain;
    'chain: loop {
        for (position, rule) in chain.rules.iter().enumerate() {
            if !rule.matches.iter().all(|m| holds(m, packet)) {
                continue;
            }
            decision.rules.push((chain.name.clone(), position));
            match &rule.action {
                Action::Zone(zone) => decision.zone = Some(*zone),
                Action::SaveMark => packet.connection_mark = packet.mark,
                Action::RestoreMark => packet.mark = packet.connection_mark,
                Action::Trace => {}
                Action::Goto(name) => {
                    chain = plan.chains.iter().find(|c| c.name == *name)?;
                    continue 'chain;
                }
                action => return Some(action.clone()),
            }
        }
        return None;
    }
}

fn holds(m: &Match, packet: &Packet) -> bool {
    let ports = matches!(packet.protocol, Some(Protocol::Tcp | Protocol::Udp));
    match m {
        Match::Family(Family::V4) => packet.destination.is_ipv4(),
        Match::Family(Family::V6) => packet.destination.is_ipv6(),
        Match::Protocol(p) => packet.protocol == Some(*p),
        Match::NotProtocol(p) => packet.protocol != Some(*p),
        Match::DestinationPort(range) => ports && range.contains(packet.destination_port),
        Match::SourcePort(range) => ports && range.contains(packet.source_port),
        Match::Source(net) => net.contains(&packet.source),
        Match::Destination(net) => net.contains(&packet.destination),
        Match::DestinationIsLocal => packet.destination_is_local,
        Match::InInterface(name) => packet.point == HookPoint::Prerouting && name.matches(&packet.interface),
        Match::OutInterface(name) => packet.point == HookPoint::Output && name.matches(&packet.interface),
        Match::Uid(uids) => packet.owner.is_some_and(|o| uids.contains(o.uid)),
        Match::Gid(gids) => packet.owner.is_some_and(|o| gids.contains(o.gid)),
        Match::NotGid(gids) => packet.owner.is_some_and(|o| !gids.contains(o.gid)),
        Match::Cgroup(cgroup) => packet.cgroup.as_deref().is_some_and(|path| {
            path.strip_prefix(cgroup.path()).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        }),
        Match::Mark(mark) => packet.mark == *mark,
        Match::ConnectionMark(mark) => packet.connection_mark == *mark,
        Match::InvalidConnection => packet.invalid,
        Match::Untranslated => packet.reused,
        // What isn't invalid asks for a connection.
        Match::Syn => packet.protocol == Some(Protocol::Tcp) && !packet.invalid,
        Match::NotSyn => packet.protocol == Some(Protocol::Tcp) && packet.invalid,
    }
}
