//! What arrives.

use super::{
    Action, Chain, Family, Hook, HookKind, HookPoint, Match, Ports, Protocol, RedirectIntent, Rules, Scope,
    hook_interfaces, host, nat_priority, tcp_to,
};

/// The chains that redirect what arrives. Transparent workloads have theirs in `mangle`, and here only the hairpin's.
pub(super) fn chains(intent: &RedirectIntent, scopes: &[Scope<'_>]) -> Vec<Chain> {
    let mut chains = Vec::new();
    for scope in scopes.iter().filter(|s| s.inbound.enabled) {
        chains.push(ports(scope, "inbound", &Action::Redirect(scope.inbound.port)));
    }
    let redirected: Vec<_> = scopes.iter().filter(|s| s.inbound.enabled && !s.is_tproxy()).collect();
    if redirected.is_empty() && intent.bridges.is_empty() {
        return chains;
    }
    let mut before = Rules::default();
    before.skip_disabled_families(intent);
    let mut rules = Rules::default();
    let arrive = !intent.bridges.is_empty() && !redirected.is_empty();
    let arrived = if arrive { Action::Goto("arrive".into()) } else { Action::Return };
    bridges(&mut rules, intent, &scopes[0], &[Protocol::Udp, Protocol::Tcp], &arrived, Action::Redirect);
    rules.add([Match::NotProtocol(Protocol::Tcp)], Action::Return, "only TCP is redirected");
    let (arrivals, more) = arrivals(&redirected, "inbound", "arrive");
    chains.extend(more);
    if arrive {
        chains.push(arrivals.named("arrive".into()));
        rules.add([], Action::Goto("arrive".into()), "connections that arrive");
    } else {
        rules.0.extend(arrivals.0);
    }
    let hook = Hook { kind: HookKind::Nat, point: HookPoint::Prerouting, priority: nat_priority(intent) };
    chains.extend(hook_interfaces(intent, before, rules, ("prerouting", "prerouting_included"), hook));
    chains
}

/// The rules that lead an arriving connection to its workload's `ports` chain, and the chains that they need.
pub(super) fn arrivals(scopes: &[&Scope<'_>], ports: &'static str, own: &'static str) -> (Rules, Vec<Chain>) {
    let mut rules = Rules::default();
    let mut chains = Vec::new();
    for scope in scopes {
        if scope.number.is_none() {
            arrival(&mut rules, scope, ports);
            continue;
        }
        let name = scope.chain(own);
        for included in &scope.inbound.include_ports {
            let to = [Match::DestinationIsLocal].into_iter().chain(tcp_to(*included));
            rules.add(to, Action::Goto(name.clone()), scope.reason("a port of workload"));
        }
        let mut arriving = Rules::default();
        arrival(&mut arriving, scope, ports);
        chains.push(arriving.named(name));
    }
    (rules, chains)
}

/// What decides by source before ports are looked at.
fn arrival(rules: &mut Rules, scope: &Scope<'_>, ports: &'static str) {
    exempt_sources(rules, scope);
    // What is only forwarded (containers of this host, for example) isn't the workload's.
    for from in sources(scope) {
        let matches = from.into_iter().chain([Match::DestinationIsLocal]);
        rules.add(matches, Action::Goto(scope.chain(ports)), "addressed to this namespace");
    }
}

/// Who may call the application past the proxy.
pub(super) fn exempt_sources(rules: &mut Rules, scope: &Scope<'_>) {
    let inbound = scope.inbound;
    for source in &inbound.probes.sources {
        let from = Match::Source(host(*source));
        if inbound.probes.ports.is_empty() {
            rules.add([from], Action::Return, "probes of the kubelet");
        } else {
            for ports in &inbound.probes.ports {
                let matches = [from.clone()].into_iter().chain(tcp_to(*ports));
                rules.add(matches, Action::Return, "probes of the kubelet");
            }
        }
    }
    for cidr in &inbound.exclude_cidrs {
        rules.add([Match::Source(cidr.trunc())], Action::Return, "excluded source");
    }
}

/// Whose connections are redirected, one way to know them each; `None` means everybody's.
pub(super) fn sources(scope: &Scope<'_>) -> Vec<Option<Match>> {
    let cidrs = &scope.inbound.include_cidrs;
    if cidrs.is_empty() {
        return vec![None];
    }
    cidrs.iter().map(|cidr| Some(Match::Source(cidr.trunc()))).collect()
}

/// Which arriving ports go to the proxy; shared by arriving connections and the hairpin.
pub(super) fn ports(scope: &Scope<'_>, name: &'static str, to_proxy: &Action) -> Chain {
    let mut rules = Rules::default();
    let mut included = Vec::new();
    if scope.inbound.include_ports.is_empty() {
        for ports in &scope.inbound.exclude_ports {
            rules.add(tcp_to(*ports), Action::Return, "excluded port");
        }
        included.push((vec![Match::Protocol(Protocol::Tcp)], "arriving connections"));
    } else {
        included.extend(scope.inbound.include_ports.iter().map(|p| (tcp_to(*p).to_vec(), "included port")));
    }
    for (matches, reason) in included {
        rules.add(matches.clone(), to_proxy.clone(), reason);
        if let Action::Tproxy(_) = to_proxy {
            // Connections that are older than the rules stay with the application. What begins one is told by its flags
            // and not by connection tracking, which takes a port that a client uses again for the old connection.
            let syn = matches.into_iter().chain([Match::Syn]);
            rules.add(syn, Action::Reject, "no transparent proxy listens");
        }
    }
    rules.named(scope.chain(name))
}

/// Guests behind a bridge arrive here, but what they send is opened by them. `opened` is what happens then, by the
/// port that it goes to, and `arrived` what happens between guests.
pub(super) fn bridges(
    rules: &mut Rules,
    intent: &RedirectIntent,
    scope: &Scope<'_>,
    lookups: &[Protocol],
    arrived: &Action,
    opened: fn(u16) -> Action,
) {
    for bridge in &intent.bridges {
        let by = || Match::InInterface(bridge.interface.clone());
        let listed = |family| bridge.local_cidrs.iter().any(|net| Family::of(net) == family);
        // One rule without a family where both are concerned.
        let families: &[Option<Family>] = match (listed(Family::V4), listed(Family::V6)) {
            (true, false) => &[Some(Family::V4)],
            (false, true) => &[Some(Family::V6)],
            _ => &[None],
        };
        let guests = |matches: &[Match]| -> Vec<Vec<Match>> {
            let one = |family: &Option<Family>| {
                let family = family.map(Match::Family);
                family.into_iter().chain([by()]).chain(matches.iter().cloned()).collect()
            };
            families.iter().map(one).collect()
        };
        if scope.dns.enabled {
            for protocol in lookups {
                let lookup = [Match::Protocol(*protocol), Match::DestinationPort(Ports::one(53))];
                let reason = "a guest's lookups go to the shim";
                for guest in guests(&lookup) {
                    rules.add(guest, opened(scope.dns.port), reason);
                }
            }
        }
        if !scope.outbound.enabled {
            continue;
        }
        let tcp = Match::Protocol(Protocol::Tcp);
        for net in &bridge.local_cidrs {
            let to = Match::Destination(net.trunc());
            rules.add([by(), tcp.clone(), to], arrived.clone(), "between guests");
        }
        let reason = "a guest's connections go to the proxy";
        let to_proxy = opened(scope.outbound.port);
        if scope.outbound.include_cidrs.is_empty() {
            for guest in guests(&[tcp]) {
                rules.add(guest, to_proxy.clone(), reason);
            }
            continue;
        }
        for net in intent.vip_ranges.iter().chain(&scope.outbound.include_cidrs) {
            rules.add([by(), tcp.clone(), Match::Destination(net.trunc())], to_proxy.clone(), reason);
        }
        for guest in guests(&[tcp]) {
            rules.add(guest, Action::Return, "a guest's connections to elsewhere");
        }
    }
}
