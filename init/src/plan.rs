//! The rule plan: what the kernel is to do, in no backend's words.
//!
//! A plan is pure data. A backend turns it into rules, the simulator answers what it decides for a packet, and
//! read-back compares against it. One rule holds one value per match, so that every backend can express it.

mod compile;
pub mod simulate;

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::intent::{Cgroup, Ids, Interface, Ports};

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
    /// Where the application's answers to a transparent proxy are routed.
    pub policy_route: Option<PolicyRoute>,
}

impl Plan {
    /// The plan of a namespace in which nobody is redirected.
    pub const fn none() -> Self {
        Self {
            chains: Vec::new(),
            local_routes: Vec::new(),
            loopback_addresses: Vec::new(),
            policy_route: None,
        }
    }

    /// Whether it asks for nothing at all.
    pub fn is_none(&self) -> bool {
        *self == Self::none()
    }

    /// The slices by which workloads are told apart. One that is made again is another one, and the kernel changes no
    /// rule for it.
    pub fn slices(&self) -> BTreeSet<&Cgroup> {
        let rules = self.chains.iter().flat_map(|chain| &chain.rules);
        rules.flat_map(Rule::cgroups).collect()
    }
}

impl Rule {
    /// The cgroups that it matches.
    pub(crate) fn cgroups(&self) -> impl Iterator<Item = &Cgroup> {
        self.matches.iter().filter_map(|m| match m {
            Match::Cgroup(cgroup) => Some(cgroup),
            _ => None,
        })
    }
}

/// Packets with a mark are looked up in a table of their own, in which everything is local.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolicyRoute {
    /// The mark.
    pub mark: u32,
    /// The table.
    pub table: u32,
    /// Whether IPv4 needs it.
    pub ipv4: bool,
    /// Whether IPv6 needs it.
    pub ipv6: bool,
}

/// A chain's name inside our table.
pub type ChainName = Cow<'static, str>;

/// A list of rules, either hooked into the packet's way or jumped to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chain {
    /// Its name inside our table.
    pub name: ChainName,
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
    /// Change what routing looks at (a mark); the packet is routed again.
    Route,
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
    pub reason: Cow<'static, str>,
}

/// An IP family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
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
    InInterface(Interface),
    /// The packet leaves by this interface.
    OutInterface(Interface),
    /// The sending socket's user id.
    Uid(Ids),
    /// The sending socket's group id.
    Gid(Ids),
    /// The sending socket has another group id; a packet without a socket doesn't match.
    NotGid(Ids),
    /// The sending socket was made in this cgroup or below it.
    Cgroup(Cgroup),
    /// The packet's mark.
    Mark(u32),
    /// The connection's mark.
    ConnectionMark(u32),
    /// The packet belongs to no connection and can't begin one.
    InvalidConnection,
    /// The packet asks for a connection: SYN without ACK, whatever connection tracking takes it for. The rule must match
    /// TCP too.
    Syn,
    /// Any other packet of TCP than [`Syn`](Self::Syn); the rule must match TCP too.
    NotSyn,
    /// Connection tracking has known the packet's connection since an earlier packet, and its destination was never
    /// rewritten. No chain that rewrites destinations sees it.
    Untranslated,
}

/// What a rule does with a packet that matches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Leave this chain; in a hooked chain the packet passes unchanged.
    Return,
    /// Refuse: a reset for TCP, an ICMP error for everything else.
    Reject,
    /// Discard without an answer.
    Drop,
    /// Send to this local port.
    Redirect(u16),
    /// Hand the connection to the transparent socket on this port, addresses unchanged. Without such a socket nftables
    /// goes on to the next rule, and iptables drops the packet.
    Tproxy(u16),
    /// Continue in another chain and never come back.
    Goto(ChainName),
    /// Track the connection in this conntrack zone, then go on.
    Zone(u16),
    /// Remember the packet's mark with its connection, then go on.
    SaveMark,
    /// Give the packet its connection's mark, then go on.
    RestoreMark,
    /// Let the kernel report every rule that the packet meets, then go on.
    Trace,
}

impl Action {
    /// Whether the packet goes on to the next rule.
    pub const fn goes_on(&self) -> bool {
        matches!(self, Self::Zone(_) | Self::SaveMark | Self::RestoreMark | Self::Trace)
    }
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
            Self::InInterface(name) => write!(f, "iifname \"{}\"", wildcard(name)),
            Self::OutInterface(name) => write!(f, "oifname \"{}\"", wildcard(name)),
            Self::Uid(id) => write!(f, "meta skuid {id}"),
            Self::Gid(id) => write!(f, "meta skgid {id}"),
            Self::NotGid(id) => write!(f, "meta skgid != {id}"),
            Self::Cgroup(cgroup) => write!(f, "socket cgroupv2 level {} \"{cgroup}\"", cgroup.level()),
            Self::Mark(mark) => write!(f, "meta mark {mark:#x}"),
            Self::ConnectionMark(mark) => write!(f, "ct mark {mark:#x}"),
            Self::InvalidConnection => f.write_str("ct state invalid"),
            Self::Syn => f.write_str("tcp flags & (syn | ack) == syn"),
            Self::NotSyn => f.write_str("tcp flags & (syn | ack) != syn"),
            Self::Untranslated => f.write_str("ct status & (confirmed | dnat) == confirmed"),
        }
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Return => f.write_str("return"),
            Self::Reject => f.write_str("reject"),
            Self::Drop => f.write_str("drop"),
            Self::Redirect(port) => write!(f, "redirect to :{port}"),
            Self::Tproxy(port) => write!(f, "tproxy to :{port}"),
            Self::Goto(chain) => write!(f, "goto {chain}"),
            Self::Zone(zone) => write!(f, "ct zone set {zone}"),
            Self::SaveMark => f.write_str("ct mark set meta mark"),
            Self::RestoreMark => f.write_str("meta mark set ct mark"),
            Self::Trace => f.write_str("meta nftrace set 1"),
        }
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for m in &self.matches {
            write!(f, "{m} ")?;
        }
        self.action.fmt(f)
    }
}

/// nft writes a beginning as `br*`.
fn wildcard(interface: &Interface) -> String {
    let star = if interface.is_prefix() { "*" } else { "" };
    format!("{}{star}", interface.name())
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
