//! The rule plan: what the kernel is to do, in no backend's words.
//!
//! A plan is pure data. A backend turns it into rules, the simulator answers what it decides for a packet, and
//! read-back compares against it. One rule holds one value per match, so that every backend can express it.

mod compile;
pub mod simulate;

use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;

use crate::intent::Ports;

/// The address from which the proxy delivers to the application, so that the delivery isn't captured again.
pub const PASSTHROUGH_V4: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(127, 0, 0, 6));
/// The IPv6 counterpart of [`PASSTHROUGH_V4`]; it exists only because the plan adds it to `lo`.
pub const PASSTHROUGH_V6: IpAddr = IpAddr::V6(std::net::Ipv6Addr::new(0, 0, 0, 0, 0, 0, 0, 6));

/// Everything that one namespace needs: rules, local routes, addresses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// The chains, in the order in which they are created.
    pub chains: Vec<Chain>,
    /// Ranges that are routed to `lo`.
    pub local_routes: Vec<IpNet>,
    /// Addresses that `lo` needs.
    pub loopback_addresses: Vec<IpAddr>,
}

/// A list of rules, either hooked into the packet's way or jumped to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chain {
    /// Its name inside our table.
    pub name: &'static str,
    /// Where it is hooked in; `None` for a chain that is jumped to.
    pub hook: Option<Hook>,
    /// Its rules, first match with a verdict wins.
    pub rules: Vec<Rule>,
}

/// Where a base chain sits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hook {
    /// What the chain may do.
    pub kind: HookKind,
    /// The point on the packet's way.
    pub point: HookPoint,
    /// The order among all chains at that point; lower is earlier.
    pub priority: i32,
}

/// What a base chain may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HookKind {
    /// Let pass or refuse; sees every packet.
    Filter,
    /// Rewrite the destination; sees the first packet of a connection.
    Nat,
}

/// A point on the packet's way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HookPoint {
    /// Packets that arrive, before routing.
    Prerouting,
    /// Packets that a local process sends.
    Output,
}

/// Matches that must all hold, and what happens then.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// All must hold; none means always.
    pub matches: Vec<Match>,
    /// What happens.
    pub action: Action,
    /// Why the rule exists, shown to the operator and stored beside the rule.
    pub reason: &'static str,
}

/// An IP family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// The family of an address range.
    pub const fn of(net: &IpNet) -> Self {
        match net {
            IpNet::V4(_) => Self::V4,
            IpNet::V6(_) => Self::V6,
        }
    }
}

/// A transport protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// ICMP, the IPv4 one.
    Icmp,
    /// ICMPv6.
    Icmpv6,
}

/// One condition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Match {
    /// The packet's IP family.
    Family(Family),
    /// The transport protocol.
    Protocol(Protocol),
    /// Any transport protocol but this one.
    NotProtocol(Protocol),
    /// The destination port; the rule must match the protocol too.
    DestinationPort(Ports),
    /// The source port; the rule must match the protocol too.
    SourcePort(Ports),
    /// The source address (implies its family).
    Source(IpNet),
    /// The destination address (implies its family).
    Destination(IpNet),
    /// The destination is an address of this namespace.
    DestinationIsLocal,
    /// The packet arrived by this interface.
    InInterface(&'static str),
    /// The packet arrived by another interface than this one.
    NotInInterface(&'static str),
    /// The packet leaves by this interface.
    OutInterface(&'static str),
    /// The sending socket's user id.
    Uid(u32),
    /// The sending socket's group id.
    Gid(u32),
    /// The packet's mark.
    Mark(u32),
}

/// What a rule does with a packet that matches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Leave this chain; in a hooked chain the packet passes unchanged.
    Return,
    /// Refuse: a reset for TCP, an ICMP error for everything else.
    Reject,
    /// Discard without an answer.
    Drop,
    /// Send to this local port.
    Redirect(u16),
    /// Continue in another chain and never come back.
    Goto(&'static str),
    /// Track the connection in this conntrack zone, then go on.
    Zone(u16),
}

impl fmt::Display for Match {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Family(Family::V4) => f.write_str("meta nfproto ipv4"),
            Self::Family(Family::V6) => f.write_str("meta nfproto ipv6"),
            Self::Protocol(p) => write!(f, "meta l4proto {p}"),
            Self::NotProtocol(p) => write!(f, "meta l4proto != {p}"),
            Self::DestinationPort(p) => write!(f, "th dport {p}"),
            Self::SourcePort(p) => write!(f, "th sport {p}"),
            Self::Source(net) => write!(f, "{} saddr {net}", ip(net)),
            Self::Destination(net) => write!(f, "{} daddr {net}", ip(net)),
            Self::DestinationIsLocal => f.write_str("fib daddr type local"),
            Self::InInterface(name) => write!(f, "iifname \"{name}\""),
            Self::NotInInterface(name) => write!(f, "iifname != \"{name}\""),
            Self::OutInterface(name) => write!(f, "oifname \"{name}\""),
            Self::Uid(id) => write!(f, "meta skuid {id}"),
            Self::Gid(id) => write!(f, "meta skgid {id}"),
            Self::Mark(mark) => write!(f, "meta mark {mark:#x}"),
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Icmp => "icmp",
            Self::Icmpv6 => "ipv6-icmp",
        })
    }
}

fn ip(net: &IpNet) -> &'static str {
    match net {
        IpNet::V4(_) => "ip",
        IpNet::V6(_) => "ip6",
    }
}
