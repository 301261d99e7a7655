//! Connection tracking of redirected lookups.

use super::{
    Action, Chain, Family, Hook, HookKind, HookPoint, Match, Ports, Protocol, RAW, RedirectIntent, Rules,
    Scope, families, hook_interfaces, host, loopback, outbound, shared_proxy,
};

/// The conntrack zone of lookups that are redirected.
const DNS_ZONE: u16 = 15053;

/// Lookups that are redirected get a conntrack zone of their own. The kernel decides about address translation
/// once per tuple: without the zone, an application that reuses a port of the shim towards the same resolver
/// would inherit the shim's exemption.
pub(super) fn chains(intent: &RedirectIntent, scopes: &[Scope<'_>]) -> Vec<Chain> {
    let zoned = |scope: &&Scope<'_>| scope.redirects_lookups() && scope.dns.conntrack_zones;
    let scopes: Vec<_> = scopes.iter().filter(zoned).collect();
    if scopes.is_empty() {
        return Vec::new();
    }
    let mut before = Rules::default();
    for family in families(intent) {
        let icmp = match family {
            Family::V4 => Protocol::Icmp,
            Family::V6 => Protocol::Icmpv6,
        };
        before.add(
            [Match::Source(host(loopback(family))), Match::Protocol(icmp)],
            Action::Zone(DNS_ZONE),
            "a dead shim's refusals find their lookups",
        );
    }
    before.add([Match::NotProtocol(Protocol::Udp)], Action::Return, "only UDP reuses tuples");
    before.skip_disabled_families(intent);
    for scope in &scopes {
        for family in families(intent) {
            before.add(
                [
                    Match::Source(host(loopback(family))),
                    Match::Protocol(Protocol::Udp),
                    Match::SourcePort(Ports::one(scope.dns.port)),
                ],
                Action::Zone(DNS_ZONE),
                "answers of the shim",
            );
        }
    }
    let mut rules = Rules::default();
    let mut chains = Vec::new();
    for scope in &scopes {
        for owner in &scope.proxy {
            rules.add([owner.clone()], Action::Return, "the proxy's own lookups");
        }
    }
    for scope in &scopes {
        let mut own = Rules::default();
        outbound::exclude_owners(&mut own, scope);
        if scope.number.is_none() {
            for owner in shared_proxy(intent) {
                own.add([owner], Action::Return, "the proxy's own lookups");
            }
        }
        outbound::filter_groups(&mut own, scope);
        outbound::exclude_lookups_by_destination(&mut own, scope);
        for matches in outbound::lookups(scope, Protocol::Udp) {
            own.add(matches, Action::Zone(DNS_ZONE), "lookups that are redirected");
        }
        if scope.number.is_none() {
            rules.0.extend(own.0);
        } else {
            let name = scope.chain("dns_zones");
            for selector in &scope.selectors {
                let goto = Action::Goto(name.clone());
                rules.add([selector.clone()], goto, scope.reason("lookups of workload"));
            }
            chains.push(own.named(name));
        }
    }
    let hook = Hook { kind: HookKind::Filter, point: HookPoint::Output, priority: RAW };
    chains.extend(hook_interfaces(intent, before, rules, ("dns_zones", "dns_zones_included"), hook));
    chains
}
