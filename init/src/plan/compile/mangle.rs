//! Transparent proxying, invalid packets, tracing.

use super::{
    Action, Chain, Hook, HookKind, HookPoint, Interface, MANGLE, Match, Protocol, RedirectIntent, Rules,
    Scope, TRACE, hook_interfaces, inbound, shared_proxy,
};

pub(super) fn chains(intent: &RedirectIntent, scopes: &[Scope<'_>]) -> Vec<Chain> {
    let mut chains = Vec::new();
    if intent.trace {
        for (name, point) in [("trace_in", HookPoint::Prerouting), ("trace_out", HookPoint::Output)] {
            let mut rules = Rules::default();
            for protocol in [Protocol::Tcp, Protocol::Udp] {
                rules.add([Match::Protocol(protocol)], Action::Trace, "asked for by `trace`");
            }
            chains.push(rules.hooked(name, HookKind::Filter, point, TRACE));
        }
    }
    if intent.drop_invalid {
        let mut rules = Rules::default();
        rules.skip_disabled_families(intent);
        let reason = "packets of no connection would make the application reset one";
        rules.add([Match::InvalidConnection], Action::Drop, reason);
        chains.push(rules.hooked("invalid", HookKind::Filter, HookPoint::Prerouting, MANGLE - 1));
    }
    let transparent: Vec<_> = scopes.iter().filter(|s| s.is_tproxy()).collect();
    if !transparent.is_empty() {
        chains.extend(arriving(intent, &transparent));
        chains.push(delivered(intent, &transparent));
    }
    chains
}

/// Arriving connections are handed to the proxy's transparent socket as they are.
fn arriving(intent: &RedirectIntent, scopes: &[&Scope<'_>]) -> Vec<Chain> {
    let mut chains = Vec::new();
    for scope in scopes {
        chains.push(inbound::ports(scope, "hand_over", &Action::Tproxy(scope.inbound.port)));
    }
    let mut before = Rules::default();
    before.skip_disabled_families(intent);
    // The hairpin is redirected where it is sent; everything else on lo is the proxy's delivery and its answers.
    before.add([Match::InInterface(Interface::lo())], Action::Return, "loopback is this namespace itself");
    before.add([Match::NotProtocol(Protocol::Tcp)], Action::Return, "only TCP is handed over");
    let (mut rules, more) = inbound::arrivals(scopes, "hand_over", "hand_over_arrive");
    chains.extend(more);
    if let ([scope], false) = (scopes, intent.bridges.is_empty()) {
        // What guests open is redirected later, and only what arrives is handed over.
        let arrive = Action::Goto("hand_over_arrive".into());
        let mut guests = Rules::default();
        inbound::bridges(&mut guests, intent, scope, &[Protocol::Tcp], &arrive, |_| Action::Return);
        guests.add([], arrive, "connections that arrive");
        chains.push(std::mem::replace(&mut rules, guests).named("hand_over_arrive".into()));
    }
    let hook = Hook { kind: HookKind::Filter, point: HookPoint::Prerouting, priority: MANGLE };
    chains.extend(hook_interfaces(intent, before, rules, ("tproxy_in", "tproxy_in_included"), hook));
    chains
}

/// The proxy delivers to the application with the client's address, so the application's answers would leave by the
/// wire. They carry their connection's mark, and routing brings what carries it to the proxy.
fn delivered(intent: &RedirectIntent, scopes: &[&Scope<'_>]) -> Chain {
    let mark = intent.tproxy.mark;
    let mut rules = Rules::default();
    rules.skip_disabled_families(intent);
    rules.add([Match::NotProtocol(Protocol::Tcp)], Action::Return, "only TCP is handed over");
    let owners = scopes.iter().flat_map(|s| s.proxy.clone()).chain(shared_proxy(intent));
    for owner in owners {
        let delivery = [owner, Match::Mark(mark)];
        rules.add(delivery, Action::SaveMark, "the proxy delivers with the client's address");
    }
    rules.add([Match::ConnectionMark(mark)], Action::RestoreMark, "the application's answers");
    rules.hooked("tproxy_out", HookKind::Route, HookPoint::Output, MANGLE)
}
