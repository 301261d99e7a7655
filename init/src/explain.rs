//! Which rule decides about a packet, where that leads it, and what would change it.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};

use serde::Serialize;

use crate::plan::simulate::{Decision, Packet, Verdict, decide};
use crate::plan::{HookPoint, Plan, Protocol};

/// A rule that a packet meets.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Step {
    /// The chain.
    pub chain: String,
    /// The rule's position in it, from 1.
    pub position: usize,
    /// The rule in nftables' words.
    pub rule: String,
    /// Why it exists.
    pub reason: String,
    /// Whether it is the one that decides.
    pub decides: bool,
}

/// Where a packet lands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase", tag = "verdict", content = "port")]
pub enum Landing {
    /// Where it was sent.
    Passes,
    /// On this local port.
    Redirected(u16),
    /// At the transparent socket on this local port, its addresses unchanged.
    Handed(u16),
    /// Refused.
    Refused,
    /// Discarded.
    Dropped,
}

impl From<Verdict> for Landing {
    fn from(verdict: Verdict) -> Self {
        match verdict {
            Verdict::Passes => Self::Passes,
            Verdict::Redirected(port) => Self::Redirected(port),
            Verdict::Handed(port) => Self::Handed(port),
            Verdict::Refused => Self::Refused,
            Verdict::Dropped => Self::Dropped,
        }
    }
}

impl std::fmt::Display for Landing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Passes => f.write_str("passes: it goes where it was sent"),
            Self::Redirected(port) => write!(f, "is redirected to local port {port}"),
            Self::Handed(port) => write!(f, "is handed over to the transparent socket on port {port}"),
            Self::Refused => f.write_str("is refused"),
            Self::Dropped => f.write_str("is discarded"),
        }
    }
}

/// Everything about one packet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Explanation {
    /// Where it lands.
    #[serde(flatten)]
    pub landing: Landing,
    /// The rules that it meets, in order.
    pub rules: Vec<Step>,
    /// Where it would land without the rule that decides; absent when none does.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub otherwise: Option<Landing>,
    /// The settings that the deciding rule comes from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub setting: Option<&'static str>,
}

/// Explains what the plan does with a packet.
pub fn explain(plan: &Plan, packet: &Packet) -> Explanation {
    let decision = decide(plan, packet);
    let deciding = deciding(plan, &decision);
    let step = |(i, (chain, position)): (usize, &(crate::plan::ChainName, usize))| {
        let rule = rule_at(plan, chain, *position)?;
        Some(Step {
            chain: chain.to_string(),
            position: position + 1,
            rule: rule.to_string(),
            reason: rule.reason.to_string(),
            decides: deciding == Some(i),
        })
    };
    let rules: Vec<_> = decision.rules.iter().enumerate().filter_map(step).collect();
    let decided = deciding.and_then(|i| decision.rules.get(i));
    let otherwise = decided.map(|(chain, position)| {
        let mut without = plan.clone();
        if let Some(chain) = without.chains.iter_mut().find(|c| c.name == *chain) {
            chain.rules.remove(*position);
        }
        decide(&without, packet).verdict.into()
    });
    let setting = deciding.and_then(|i| rules.get(i)).and_then(|step| setting(step, packet.point));
    Explanation { landing: decision.verdict.into(), rules, otherwise, setting }
}

fn rule_at<'a>(plan: &'a Plan, chain: &str, position: usize) -> Option<&'a crate::plan::Rule> {
    plan.chains.iter().find(|c| c.name == *chain)?.rules.get(position)
}

/// The rule that made the verdict: the last that redirects, hands over, refuses or discards; of a packet that passes
/// the last that ends the chain that could have redirected it.
fn deciding(plan: &Plan, decision: &Decision) -> Option<usize> {
    use crate::plan::Action;
    let action = |i: usize| {
        let (chain, position) = decision.rules.get(i)?;
        rule_at(plan, chain, *position).map(|rule| &rule.action)
    };
    let last =
        |is: &dyn Fn(&Action) -> bool| (0..decision.rules.len()).rev().find(|i| action(*i).is_some_and(is));
    match decision.verdict {
        Verdict::Refused => last(&|a| *a == Action::Reject),
        Verdict::Dropped => last(&|a| *a == Action::Drop),
        Verdict::Redirected(port) => last(&|a| *a == Action::Redirect(port)),
        Verdict::Handed(port) => last(&|a| *a == Action::Tproxy(port)),
        Verdict::Passes => {
            // Guards and zones let pass what they don't concern; what counts is where it could have been redirected.
            let redirects = |i: usize| {
                let chain = decision.rules.get(i).map(|(chain, _)| chain.as_ref()).unwrap_or_default();
                !chain.starts_with("guard_") && !chain.starts_with("dns_zones") && !chain.starts_with("trace")
            };
            let ends = |i: &usize| redirects(*i) && action(*i) == Some(&Action::Return);
            (0..decision.rules.len()).rev().find(ends).or_else(|| last(&|a| *a == Action::Return))
        }
    }
}

/// Which setting a rule comes from, by the reason that is stored beside it.
fn setting(step: &Step, point: HookPoint) -> Option<&'static str> {
    let hairpin = step.chain.starts_with("inbound") || step.chain.starts_with("hand_over");
    let inbound = point == HookPoint::Prerouting || hairpin;
    Some(match (step.reason.as_str(), inbound) {
        ("excluded port", true) => "inbound.excludePorts (--exclude-inbound-ports)",
        ("excluded port", false) => "outbound.excludePorts (--exclude-outbound-ports)",
        ("included port", true) => "inbound.includePorts (--include-inbound-ports)",
        ("included port", false) => "outbound.includePorts (--include-outbound-ports)",
        ("excluded source", _) => "inbound.excludeCidrs (--exclude-inbound-cidrs)",
        ("excluded destination", _) => "outbound.excludeCidrs (--exclude-outbound-cidrs)",
        ("excluded destination, lookups too", _) => "outbound.excludeCidrs with dns.honourExcludeCidrs",
        ("included destination", _) => "outbound.includeCidrs (--include-outbound-cidrs)",
        ("excluded user", _) => "outbound.excludeUids (--exclude-outbound-uids)",
        ("excluded user and port" | "excluded user and protocol", _) => {
            "outbound.excludeOwners (--exclude-outbound-owners)"
        }
        ("excluded group", _) => "outbound.excludeGids (--exclude-outbound-gids)",
        ("none of the included groups", _) => "outbound.includeGids (--include-outbound-gids)",
        ("excluded interface", _) => "interfaces.exclude (--exclude-interfaces)",
        ("included interface", _) => "interfaces.include (--include-interfaces)",
        ("family switched off", _) => "ipv4 and ipv6 (--ipv4, --ipv6)",
        (
            "the proxy's own traffic" | "the proxy speaks to loopback directly" | "the proxy's own lookups",
            _,
        ) => "proxyUids, proxyGids, proxyMark (--proxy-uid, …)",
        ("probes of the kubelet", _) => "inbound.probes (--probe-sources, --probe-ports)",
        ("opened connections", _) => "outbound.enabled, outbound.port (--outbound, --outbound-port)",
        ("arriving connections" | "a client's port used again would pass unredirected", _) => {
            "inbound.enabled, inbound.port (--inbound, --inbound-port)"
        }
        ("lookups go to the shim", _) => "dns (--dns, --dns-port)",
        ("mesh addresses" | "closed by guard_out", _) => "vipRanges (--vip-ranges)",
        (reason, _) if reason.starts_with("a mesh address ") => "vipRanges (--vip-ranges)",
        _ => return None,
    })
}

/// What the calling thread's namespace knows about a way there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Way {
    /// The own address that would be used.
    pub source: IpAddr,
    /// The interface.
    pub interface: String,
    /// Whether the destination is an address of this namespace.
    pub local: bool,
}

/// Asks the kernel for the way to an address, without sending anything. `None` where there is none.
pub fn way(to: IpAddr) -> Option<Way> {
    let any: IpAddr = match to {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let local = UdpSocket::bind(SocketAddr::new(to, 0)).is_ok();
    let socket = UdpSocket::bind(SocketAddr::new(any, 0)).ok()?;
    socket.connect(SocketAddr::new(to, 9)).ok()?;
    let source = socket.local_addr().ok()?.ip();
    let interface = if local { "lo".to_owned() } else { interface_of(source)? };
    Some(Way { source, interface, local })
}

/// The interface that holds an address.
fn interface_of(address: IpAddr) -> Option<String> {
    own_addresses().find(|(_, own)| *own == address).map(|(name, _)| name)
}

/// Interfaces and their addresses.
pub fn own_addresses() -> impl Iterator<Item = (String, IpAddr)> {
    nix::ifaddrs::getifaddrs().into_iter().flatten().filter_map(|interface| {
        let address = interface.address?;
        let v4 = address.as_sockaddr_in().map(|a| IpAddr::from(a.ip()));
        let ip = v4.or_else(|| address.as_sockaddr_in6().map(|a| IpAddr::from(a.ip())))?;
        Some((interface.interface_name, ip))
    })
}

/// Who listens on ports of the calling thread's namespace, for TCP or for UDP: port and user.
pub fn listeners(protocol: Protocol) -> BTreeSet<(u16, u32)> {
    // What a datagram from anybody reaches is a socket that isn't connected.
    let (name, state) = if protocol == Protocol::Udp { ("udp", "07") } else { ("tcp", "0A") };
    let tables = [name.to_owned(), format!("{name}6")];
    let read = |table: &String| std::fs::read_to_string(format!("/proc/thread-self/net/{table}")).ok();
    let listener = |line: &str| {
        let fields: Vec<_> = line.split_whitespace().collect();
        let port = fields.get(1)?.rsplit(':').next()?;
        (*fields.get(3)? == state)
            .then(|| Some((u16::from_str_radix(port, 16).ok()?, fields.get(7)?.parse().ok()?)))?
    };
    let texts = tables.iter().filter_map(read);
    texts.flat_map(|text| text.lines().skip(1).filter_map(listener).collect::<Vec<_>>()).collect()
}
