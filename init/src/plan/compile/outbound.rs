//! What local processes open.

use super::{
    Action, Chain, Hook, HookKind, HookPoint, Interface, Match, PASSTHROUGH_V4, PASSTHROUGH_V6, Ports,
    Protocol, RedirectIntent, Rules, Scope, hook_interfaces, host, loopback_nets, nat_priority, shared_proxy,
    tcp_to,
};
use crate::intent::{DnsCapture, Transport};

/// The chains that redirect what local processes open.
pub(super) fn chains(intent: &RedirectIntent, scopes: &[Scope<'_>]) -> Vec<Chain> {
    // The hairpin is what arrives, though a local process sends it.
    if !scopes.iter().any(|s| s.outbound.enabled || s.dns.enabled || s.inbound.enabled) {
        return Vec::new();
    }
    let mut chains = Vec::new();
    let mut before = Rules::default();
    before.skip_disabled_families(intent);
    let mut rules = Rules::default();
    if let [scope] = scopes
        && scope.number.is_none()
    {
        exclude_owners(&mut rules, scope);
    }
    for source in [PASSTHROUGH_V4, PASSTHROUGH_V6] {
        rules.add(
            [Match::Source(host(source)), lo()],
            Action::Return,
            "the proxy delivers to the application",
        );
    }
    for (i, scope) in scopes.iter().enumerate().filter(|(_, s)| !s.proxy.is_empty()) {
        let name = scope.chain("proxy");
        for owner in &scope.proxy {
            rules.add([owner.clone()], Action::Goto(name.clone()), scope.reason("the proxy of workload"));
        }
        chains.push(proxy(intent, scopes, Some(i)).named(name));
    }
    let mut shared = false;
    for owner in shared_proxy(intent) {
        shared = true;
        rules.add([owner], Action::Goto("proxy".into()), "the proxy's own traffic");
    }
    if shared {
        chains.push(proxy(intent, scopes, None).named("proxy".into()));
    }
    for (i, scope) in scopes.iter().enumerate() {
        if scope.number.is_none() {
            opened(&mut rules, intent, scopes, i);
            continue;
        }
        let name = scope.chain("output");
        for selector in &scope.selectors {
            rules.add([selector.clone()], Action::Goto(name.clone()), scope.reason("traffic of workload"));
        }
        let mut own = Rules::default();
        exclude_owners(&mut own, scope);
        opened(&mut own, intent, scopes, i);
        chains.push(own.named(name));
    }
    let hook = Hook { kind: HookKind::Nat, point: HookPoint::Output, priority: nat_priority(intent) };
    chains.extend(hook_interfaces(intent, before, rules, ("output", "output_included"), hook));
    chains
}

fn lo() -> Match {
    Match::OutInterface(Interface::lo())
}

/// What a proxy sends: that of one workload, or one that isn't told apart.
fn proxy(intent: &RedirectIntent, scopes: &[Scope<'_>], own: Option<usize>) -> Rules {
    let mut rules = Rules::default();
    let arriving: Vec<_> = scopes.iter().enumerate().filter(|(_, s)| s.inbound.enabled).collect();
    if arriving.is_empty() {
        rules.add([], Action::Return, "the proxy's own traffic");
        return rules;
    }
    if scopes.iter().any(Scope::is_tproxy) {
        let delivery = [Match::Mark(intent.tproxy.mark), lo()];
        rules.add(delivery, Action::Return, "the proxy delivers with the client's address");
    }
    if scopes.iter().any(|s| s.dns.enabled) {
        rules.add(tcp_to(Ports::one(53)), Action::Return, "the shim's own lookups over TCP");
    }
    // A neighbour in this namespace is reached through its own proxy, on loopback too.
    let neighbours = arriving.iter().filter(|(i, _)| own.is_some_and(|own| own != *i));
    for (_, scope) in neighbours {
        for ports in &scope.inbound.include_ports {
            let to = [lo()].into_iter().chain(tcp_to(*ports));
            let goto = Action::Goto(scope.chain("inbound"));
            rules.add(to, goto, scope.reason("the proxy calls its neighbour"));
        }
    }
    for net in loopback_nets() {
        rules.add([Match::Destination(net)], Action::Return, "the proxy speaks to loopback directly");
    }
    for range in &intent.vip_ranges {
        rules.add([Match::Destination(range.trunc())], Action::Return, "closed by guard_out");
    }
    // The workload called its own service and the proxy chose this very workload: mutual TLS and policy must
    // still see the connection.
    for (i, scope) in &arriving {
        let goto = Action::Goto(scope.chain("inbound"));
        if scope.number.is_none() {
            rules.add([lo()], goto, "hairpin: the proxy calls its own workload");
        } else if own.is_none_or(|own| own == *i) {
            for ports in &scope.inbound.include_ports {
                let to = [lo()].into_iter().chain(tcp_to(*ports));
                rules.add(to, goto.clone(), scope.reason("hairpin: the proxy calls workload"));
            }
        }
    }
    rules
}

/// What one workload opens.
fn opened(rules: &mut Rules, intent: &RedirectIntent, scopes: &[Scope<'_>], own: usize) {
    let scope = &scopes[own];
    let outbound = scope.outbound;
    let to_proxy = Action::Redirect(outbound.port);
    filter_groups(rules, scope);
    if scope.dns.enabled {
        exclude_lookups_by_destination(rules, scope);
        for protocol in [Protocol::Udp, Protocol::Tcp] {
            for matches in lookups(scope, protocol) {
                rules.add(matches, Action::Redirect(scope.dns.port), "lookups go to the shim");
            }
        }
    }
    if !outbound.enabled {
        return;
    }
    rules.add([Match::NotProtocol(Protocol::Tcp)], Action::Return, "only TCP is redirected");
    // Before everything that exempts: mesh addresses are routed to lo and exist nowhere else.
    for range in &intent.vip_ranges {
        let to_mesh = [Match::Destination(range.trunc()), Match::Protocol(Protocol::Tcp)];
        rules.add(to_mesh, to_proxy.clone(), "mesh addresses");
    }
    for (_, neighbour) in scopes.iter().enumerate().filter(|(i, s)| *i != own && s.inbound.enabled) {
        for ports in &neighbour.inbound.include_ports {
            let to = [lo()].into_iter().chain(tcp_to(*ports));
            rules.add(to, to_proxy.clone(), neighbour.reason("a call to the neighbour"));
        }
    }
    rules.add([lo()], Action::Return, "inside this namespace");
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
        rules.add(tcp_to(*ports), to_proxy.clone(), "included port");
    }
    for cidr in &outbound.include_cidrs {
        let to = [Match::Destination(cidr.trunc()), Match::Protocol(Protocol::Tcp)];
        rules.add(to, to_proxy.clone(), "included destination");
    }
    if outbound.include_ports.is_empty() && outbound.include_cidrs.is_empty() {
        rules.add([Match::Protocol(Protocol::Tcp)], to_proxy, "opened connections");
    }
}

/// Users whose traffic, or a part of it, is left alone.
pub(super) fn exclude_owners(rules: &mut Rules, scope: &Scope<'_>) {
    for uids in &scope.outbound.exclude_uids {
        rules.add([Match::Uid(*uids)], Action::Return, "excluded user");
    }
    for exclusion in &scope.outbound.exclude_owners {
        let protocols: &[Protocol] = match exclusion.protocol {
            Some(Transport::Tcp) => &[Protocol::Tcp],
            Some(Transport::Udp) => &[Protocol::Udp],
            None => &[Protocol::Tcp, Protocol::Udp],
        };
        for uids in &exclusion.uids {
            for protocol in protocols {
                let who = [Match::Uid(*uids), Match::Protocol(*protocol)];
                if exclusion.ports.is_empty() {
                    rules.add(who.clone(), Action::Return, "excluded user and protocol");
                }
                for ports in &exclusion.ports {
                    let what = who.clone().into_iter().chain([Match::DestinationPort(*ports)]);
                    rules.add(what, Action::Return, "excluded user and port");
                }
            }
        }
    }
}

/// Groups whose traffic is left alone.
pub(super) fn filter_groups(rules: &mut Rules, scope: &Scope<'_>) {
    let outbound = scope.outbound;
    if !outbound.include_gids.is_empty() {
        let none = outbound.include_gids.iter().map(|gids| Match::NotGid(*gids));
        rules.add(none, Action::Return, "none of the included groups");
    }
    for gids in &outbound.exclude_gids {
        rules.add([Match::Gid(*gids)], Action::Return, "excluded group");
    }
}

/// Exempts lookups to excluded destinations, where the operator wants that.
pub(super) fn exclude_lookups_by_destination(rules: &mut Rules, scope: &Scope<'_>) {
    if scope.dns.honour_exclude_cidrs {
        for cidr in &scope.outbound.exclude_cidrs {
            let to = [Match::Destination(cidr.trunc())];
            rules.add(to, Action::Return, "excluded destination, lookups too");
        }
    }
}

/// The lookups that are redirected.
pub(super) fn lookups(scope: &Scope<'_>, protocol: Protocol) -> Vec<Vec<Match>> {
    let port = [Match::Protocol(protocol), Match::DestinationPort(Ports::one(53))];
    match scope.dns.capture {
        DnsCapture::All => vec![port.to_vec()],
        DnsCapture::Resolvers => {
            let to = |resolver: &std::net::IpAddr| Match::Destination(host(*resolver));
            scope.dns.resolvers.iter().map(|r| [to(r)].into_iter().chain(port.clone()).collect()).collect()
        }
    }
}
