//! From the intent to the plan: the one place that knows in which order the rules stand, and why.

use std::net::IpAddr;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::{
    Action, Chain, Family, Hook, HookKind, HookPoint, Match, PASSTHROUGH_V4, PASSTHROUGH_V6, Plan, Protocol,
    Rule,
};
use crate::intent::{DnsCapture, InvalidIntent, Ports, RedirectIntent};

/// Before connection tracking, where zones must be set and where nothing has been rewritten yet.
const RAW: i32 = -300;
/// Where destinations are rewritten.
const DSTNAT: i32 = -100;
/// After the rewriting: what is still addressed to the mesh here was not redirected.
const FILTER: i32 = 0;
/// The conntrack zone of lookups that are redirected.
const DNS_ZONE: u16 = 15053;

const LO: &str = "lo";

impl Plan {
    /// Compiles a valid intent. The same intent always gives the same plan.
    pub fn compile(intent: &RedirectIntent) -> Result<Self, InvalidIntent> {
        intent.validate()?;
        let mut chains = vec![guard_in(intent)];
        if intent.dns.enabled && intent.dns.conntrack_zones {
            chains.push(zones(intent));
        }
        if intent.inbound.enabled {
            chains.push(inbound_ports(intent));
            chains.push(prerouting(intent));
        }
        if intent.outbound.enabled || intent.dns.enabled {
            chains.push(proxy(intent));
            chains.push(output(intent));
        }
        if !intent.vip_ranges.is_empty() {
            chains.push(guard_out(intent));
        }
        chains.retain(|chain| !chain.rules.is_empty());
        Ok(Self {
            chains,
            local_routes: intent.vip_ranges.iter().map(IpNet::trunc).collect(),
            loopback_addresses: if intent.inbound.enabled && intent.ipv6 {
                vec![PASSTHROUGH_V6]
            } else {
                Vec::new()
            },
        })
    }
}

/// Collects the rules of one chain.
#[derive(Default)]
struct Rules(Vec<Rule>);

impl Rules {
    fn add(&mut self, matches: impl IntoIterator<Item = Match>, action: Action, reason: &'static str) {
        self.0.push(Rule { matches: matches.into_iter().collect(), action, reason });
    }

    /// Families that the operator switched off are left alone.
    fn skip_disabled_families(&mut self, intent: &RedirectIntent) {
        for (on, family) in [(intent.ipv4, Family::V4), (intent.ipv6, Family::V6)] {
            if !on {
                self.add([Match::Family(family)], Action::Return, "family switched off");
            }
        }
    }

    /// One decision about who the proxy is, wherever it is asked: the union of its user ids, group ids and mark.
    fn if_proxy(&mut self, intent: &RedirectIntent, action: Action, reason: &'static str) {
        let uids = intent.proxy_uids.iter().map(|id| Match::Uid(*id));
        let gids = intent.proxy_gids.iter().map(|id| Match::Gid(*id));
        let mark = intent.proxy_mark.map(Match::Mark);
        for owner in uids.chain(gids).chain(mark) {
            self.add([owner], action, reason);
        }
    }

    fn hooked(self, name: &'static str, kind: HookKind, point: HookPoint, priority: i32) -> Chain {
        Chain { name, hook: Some(Hook { kind, point, priority }), rules: self.0 }
    }
}

/// Nothing outside this namespace may use a mesh address or speak to the proxy's own ports: with the mesh ranges
/// routed to `lo`, the kernel would otherwise accept them from the wire.
fn guard_in(intent: &RedirectIntent) -> Chain {
    let mut rules = Rules::default();
    rules.add([Match::InInterface(LO)], Action::Return, "loopback is this namespace itself");
    for range in &intent.vip_ranges {
        rules.add(
            [Match::Destination(range.trunc())],
            Action::Drop,
            "a mesh address is never valid on the wire",
        );
    }
    let own = [
        (intent.inbound.enabled, Protocol::Tcp, intent.inbound.port),
        (intent.outbound.enabled, Protocol::Tcp, intent.outbound.port),
        (intent.dns.enabled, Protocol::Tcp, intent.dns.port),
        (intent.dns.enabled, Protocol::Udp, intent.dns.port),
    ];
    for (_, protocol, port) in own.into_iter().filter(|(on, ..)| *on) {
        rules.add(
            [Match::DestinationIsLocal, Match::Protocol(protocol), Match::DestinationPort(Ports::one(port))],
            Action::Reject,
            "the proxy's own ports are closed to the outside",
        );
    }
    rules.hooked("guard_in", HookKind::Filter, HookPoint::Prerouting, RAW)
}

/// Lookups that are redirected get a conntrack zone of their own. The kernel decides about address translation
/// once per tuple: without the zone, an application that reuses a port of the shim towards the same resolver
/// would inherit the shim's exemption.
fn zones(intent: &RedirectIntent) -> Chain {
    let mut rules = Rules::default();
    for family in families(intent) {
        let icmp = match family {
            Family::V4 => Protocol::Icmp,
            Family::V6 => Protocol::Icmpv6,
        };
        rules.add(
            [Match::Source(host(loopback(family))), Match::Protocol(icmp)],
            Action::Zone(DNS_ZONE),
            "a dead shim's refusals find their lookups",
        );
    }
    rules.add([Match::NotProtocol(Protocol::Udp)], Action::Return, "only UDP reuses tuples");
    rules.skip_disabled_families(intent);
    for family in families(intent) {
        rules.add(
            [
                Match::Source(host(loopback(family))),
                Match::Protocol(Protocol::Udp),
                Match::SourcePort(Ports::one(intent.dns.port)),
            ],
            Action::Zone(DNS_ZONE),
            "answers of the shim",
        );
    }
    exclude_owners(&mut rules, intent);
    rules.if_proxy(intent, Action::Return, "the proxy's own lookups");
    exclude_lookups_by_destination(&mut rules, intent);
    for matches in lookups(intent, Protocol::Udp) {
        rules.add(matches, Action::Zone(DNS_ZONE), "lookups that are redirected");
    }
    rules.hooked("dns_zones", HookKind::Filter, HookPoint::Output, RAW)
}

/// Which arriving ports go to the proxy; shared by arriving connections and the hairpin.
fn inbound_ports(intent: &RedirectIntent) -> Chain {
    let inbound = &intent.inbound;
    let mut rules = Rules::default();
    let to_proxy = Action::Redirect(inbound.port);
    if inbound.include_ports.is_empty() {
        for ports in &inbound.exclude_ports {
            rules.add(tcp_to(*ports), Action::Return, "excluded port");
        }
        rules.add([Match::Protocol(Protocol::Tcp)], to_proxy, "arriving connections");
    } else {
        for ports in &inbound.include_ports {
            rules.add(tcp_to(*ports), to_proxy, "included port");
        }
    }
    Chain { name: "inbound", hook: None, rules: rules.0 }
}

fn prerouting(intent: &RedirectIntent) -> Chain {
    let mut rules = Rules::default();
    rules.skip_disabled_families(intent);
    rules.add([Match::NotProtocol(Protocol::Tcp)], Action::Return, "only TCP is redirected");
    for cidr in &intent.inbound.exclude_cidrs {
        rules.add([Match::Source(cidr.trunc())], Action::Return, "excluded source");
    }
    // What is only forwarded (containers of this host, for example) isn't the workload's.
    rules.add([Match::DestinationIsLocal], Action::Goto("inbound"), "addressed to this namespace");
    rules.hooked("prerouting", HookKind::Nat, HookPoint::Prerouting, DSTNAT)
}

/// What the proxy itself sends.
fn proxy(intent: &RedirectIntent) -> Chain {
    let mut rules = Rules::default();
    if intent.inbound.enabled {
        if intent.dns.enabled {
            rules.add(tcp_to(Ports::one(53)), Action::Return, "the shim's own lookups over TCP");
        }
        for net in loopback_nets() {
            rules.add([Match::Destination(net)], Action::Return, "the proxy speaks to loopback directly");
        }
        for range in &intent.vip_ranges {
            rules.add([Match::Destination(range.trunc())], Action::Return, "closed by guard_out");
        }
        // The workload called its own service and the proxy chose this very workload: mutual TLS and policy must
        // still see the connection.
        rules.add(
            [Match::OutInterface(LO)],
            Action::Goto("inbound"),
            "hairpin: the proxy calls its own workload",
        );
    } else {
        rules.add([], Action::Return, "the proxy's own traffic");
    }
    Chain { name: "proxy", hook: None, rules: rules.0 }
}

fn output(intent: &RedirectIntent) -> Chain {
    let outbound = &intent.outbound;
    let to_proxy = Action::Redirect(outbound.port);
    let mut rules = Rules::default();
    rules.skip_disabled_families(intent);
    exclude_owners(&mut rules, intent);
    for source in [PASSTHROUGH_V4, PASSTHROUGH_V6] {
        rules.add(
            [Match::Source(host(source)), Match::OutInterface(LO)],
            Action::Return,
            "the proxy delivers to the application",
        );
    }
    rules.if_proxy(intent, Action::Goto("proxy"), "the proxy's own traffic");
    if intent.dns.enabled {
        exclude_lookups_by_destination(&mut rules, intent);
        for protocol in [Protocol::Udp, Protocol::Tcp] {
            for matches in lookups(intent, protocol) {
                rules.add(matches, Action::Redirect(intent.dns.port), "lookups go to the shim");
            }
        }
    }
    if outbound.enabled {
        rules.add([Match::NotProtocol(Protocol::Tcp)], Action::Return, "only TCP is redirected");
        // Before everything that exempts: mesh addresses are routed to lo and exist nowhere else.
        for range in &intent.vip_ranges {
            rules.add(
                [Match::Destination(range.trunc()), Match::Protocol(Protocol::Tcp)],
                to_proxy,
                "mesh addresses",
            );
        }
        rules.add([Match::OutInterface(LO)], Action::Return, "inside this namespace");
        for net in loopback_nets() {
            rules.add([Match::Destination(net)], Action::Return, "inside this namespace");
        }
        for cidr in &outbound.exclude_cidrs {
            rules.add([Match::Destination(cidr.trunc())], Action::Return, "excluded destination");
        }
        for ports in &outbound.exclude_ports {
            rules.add(tcp_to(*ports), Action::Return, "excluded port");
        }
        for ports in &outbound.include_ports {
            rules.add(tcp_to(*ports), to_proxy, "included port");
        }
        for cidr in &outbound.include_cidrs {
            rules.add(
                [Match::Destination(cidr.trunc()), Match::Protocol(Protocol::Tcp)],
                to_proxy,
                "included destination",
            );
        }
        if outbound.include_ports.is_empty() && outbound.include_cidrs.is_empty() {
            rules.add([Match::Protocol(Protocol::Tcp)], to_proxy, "opened connections");
        }
    }
    rules.hooked("output", HookKind::Nat, HookPoint::Output, DSTNAT)
}

/// A packet that still carries a mesh address here was not redirected: refuse it, whoever sent it.
fn guard_out(intent: &RedirectIntent) -> Chain {
    let mut rules = Rules::default();
    for range in &intent.vip_ranges {
        let to_mesh = Match::Destination(range.trunc());
        rules.add([to_mesh], Action::Reject, "a mesh address never leaves unredirected");
    }
    rules.hooked("guard_out", HookKind::Filter, HookPoint::Output, FILTER)
}

fn exclude_owners(rules: &mut Rules, intent: &RedirectIntent) {
    for uid in &intent.outbound.exclude_uids {
        rules.add([Match::Uid(*uid)], Action::Return, "excluded user");
    }
}

fn exclude_lookups_by_destination(rules: &mut Rules, intent: &RedirectIntent) {
    if intent.dns.honour_exclude_cidrs {
        for cidr in &intent.outbound.exclude_cidrs {
            rules.add(
                [Match::Destination(cidr.trunc())],
                Action::Return,
                "excluded destination, lookups too",
            );
        }
    }
}

fn lookups(intent: &RedirectIntent, protocol: Protocol) -> Vec<Vec<Match>> {
    let port = [Match::Protocol(protocol), Match::DestinationPort(Ports::one(53))];
    match intent.dns.capture {
        DnsCapture::All => vec![port.to_vec()],
        DnsCapture::Resolvers => intent
            .dns
            .resolvers
            .iter()
            .map(|resolver| [Match::Destination(host(*resolver))].into_iter().chain(port.clone()).collect())
            .collect(),
    }
}

fn tcp_to(ports: Ports) -> [Match; 2] {
    [Match::Protocol(Protocol::Tcp), Match::DestinationPort(ports)]
}

fn families(intent: &RedirectIntent) -> impl Iterator<Item = Family> {
    let v4 = intent.ipv4.then_some(Family::V4);
    let v6 = intent.ipv6.then_some(Family::V6);
    v4.into_iter().chain(v6)
}

fn loopback(family: Family) -> IpAddr {
    match family {
        Family::V4 => std::net::Ipv4Addr::LOCALHOST.into(),
        Family::V6 => std::net::Ipv6Addr::LOCALHOST.into(),
    }
}

fn loopback_nets() -> [IpNet; 2] {
    let v4 = Ipv4Net::new_assert(std::net::Ipv4Addr::new(127, 0, 0, 0), 8);
    let v6 = Ipv6Net::new_assert(std::net::Ipv6Addr::LOCALHOST, 128);
    [IpNet::V4(v4), IpNet::V6(v6)]
}

fn host(address: IpAddr) -> IpNet {
    IpNet::from(address)
}
