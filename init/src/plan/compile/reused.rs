//! What arrives and would pass the rules that redirect, since connection tracking knows it from before.
//!
//! The kernel decides once per connection where it is redirected to. A connection that is older than the rules, and
//! whose end nobody saw, stays tracked for up to five days; when its client calls again from the same port, that call
//! is the old connection's for connection tracking, and no chain that rewrites destinations sees it. So what asks for a
//! connection (SYN without ACK) and would have been redirected is refused. Deleting what is tracked, when the
//! rules come, isn't a way: the next packet of a connection that is still open would then begin one, and be redirected.

use super::{
    Action, Chain, HookKind, HookPoint, Interface, MANGLE, Match, Protocol, RedirectIntent, Rules, Scope,
    by_interface, inbound, tcp_to,
};

const REASON: &str = "a client's port used again would pass unredirected";

/// The chains that refuse what `inbound` would have redirected. Transparent workloads refuse it where they hand over.
pub(super) fn chains(intent: &RedirectIntent, scopes: &[Scope<'_>]) -> Vec<Chain> {
    let redirected: Vec<_> = scopes.iter().filter(|s| s.inbound.enabled && !s.is_tproxy()).collect();
    if redirected.is_empty() && intent.bridges.is_empty() {
        return Vec::new();
    }
    let mut chains = Vec::new();
    let mut before = Rules::default();
    // What is sent here was tracked when it was sent.
    before.add([Match::InInterface(Interface::lo())], Action::Return, "loopback is this namespace itself");
    before.skip_disabled_families(intent);
    let mut rules = Rules::default();
    let mut arrivals = Rules::default();
    for scope in &redirected {
        if scope.number.is_none() {
            refuse(&mut arrivals, scope);
            continue;
        }
        let name = scope.chain("reused_arrive");
        for included in &scope.inbound.include_ports {
            let to = [Match::DestinationIsLocal].into_iter().chain(tcp_to(*included));
            arrivals.add(to, Action::Goto(name.clone()), scope.reason("a port of workload"));
        }
        let mut own = Rules::default();
        refuse(&mut own, scope);
        chains.push(own.named(name));
    }
    if intent.bridges.is_empty() {
        rules.0.extend(arrivals.0);
    } else {
        let arrive = !redirected.is_empty();
        let arrived = if arrive { Action::Goto("reused_arrive".into()) } else { Action::Return };
        let refused = |_| Action::Reject;
        inbound::bridges(&mut rules, intent, &scopes[0], &[Protocol::Tcp], &arrived, refused);
        if arrive {
            rules.add([], arrived, "connections that arrive");
            chains.push(arrivals.named("reused_arrive".into()));
        }
    }
    let (rules, more) = by_interface(intent, before, rules, "reused_included", HookPoint::Prerouting);
    chains.extend(more);
    chains.push(rules.named("reused".into()));
    // Almost nothing gets further than here. What comes the other way than the tracked connection's first packet
    // is invalid, and isn't redirected either.
    let mut calls = Rules::default();
    for tracked in [Match::Untranslated, Match::InvalidConnection] {
        let again = [Match::Protocol(Protocol::Tcp), Match::Syn, tracked];
        calls.add(again, Action::Goto("reused".into()), "tracked, and asks for a connection");
    }
    chains.push(calls.hooked("calls_again", HookKind::Filter, HookPoint::Prerouting, MANGLE + 1));
    chains
}

/// As `inbound` decides, but in one chain: all is TCP here, and nothing else leads to it.
fn refuse(rules: &mut Rules, scope: &Scope<'_>) {
    inbound::exempt_sources(rules, scope);
    let tcp = if scope.inbound.include_ports.is_empty() {
        for ports in &scope.inbound.exclude_ports {
            rules.add(tcp_to(*ports), Action::Return, "excluded port");
        }
        vec![vec![Match::Protocol(Protocol::Tcp)]]
    } else {
        scope.inbound.include_ports.iter().map(|ports| tcp_to(*ports).to_vec()).collect()
    };
    for from in inbound::sources(scope) {
        for to in &tcp {
            let matches = from.clone().into_iter().chain([Match::DestinationIsLocal]).chain(to.clone());
            rules.add(matches, Action::Reject, REASON);
        }
    }
}
