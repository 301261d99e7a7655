//! What closes mesh addresses and the proxy's own ports, whatever else is configured.

use super::{
    Action, Chain, FILTER, Family, HookKind, HookPoint, Interface, Match, Ports, Protocol, RAW,
    RedirectIntent, Rules, Scope, families,
};
use crate::intent::Bridge;

/// Nothing outside this namespace may use a mesh address or speak to the proxy's own ports: with the mesh ranges
/// routed to `lo`, the kernel would otherwise accept them from the wire.
pub(super) fn guard_in(intent: &RedirectIntent, scopes: &[Scope<'_>]) -> Chain {
    let mut rules = Rules::default();
    rules.add([Match::InInterface(Interface::lo())], Action::Return, "loopback is this namespace itself");
    for range in &intent.vip_ranges {
        let to_mesh = Match::Destination(range.trunc());
        for bridge in &intent.bridges {
            for what in guests_calls(intent, scopes, bridge, Family::of(range)) {
                let by = Match::InInterface(bridge.interface.clone());
                let call = [by, to_mesh.clone()].into_iter().chain(what);
                rules.add(call, Action::Return, "guests may call mesh addresses");
            }
        }
        rules.add([to_mesh], Action::Drop, "a mesh address is never valid on the wire");
    }
    for scope in scopes {
        let own = [
            (scope.inbound.enabled, Protocol::Tcp, scope.inbound.port),
            (scope.outbound.enabled, Protocol::Tcp, scope.outbound.port),
            (scope.dns.enabled, Protocol::Tcp, scope.dns.port),
            (scope.dns.enabled, Protocol::Udp, scope.dns.port),
        ];
        for (_, protocol, port) in own.into_iter().filter(|(on, ..)| *on) {
            let to_port = [Match::Protocol(protocol), Match::DestinationPort(Ports::one(port))];
            rules.add(
                [Match::DestinationIsLocal].into_iter().chain(to_port),
                Action::Reject,
                "the proxy's own ports are closed to the outside",
            );
        }
    }
    rules.hooked("guard_in", HookKind::Filter, HookPoint::Prerouting, RAW)
}

/// What a guest may send to a mesh address: only what is redirected later, since all else would be delivered here.
fn guests_calls(
    intent: &RedirectIntent,
    scopes: &[Scope<'_>],
    bridge: &Bridge,
    family: Family,
) -> Vec<Vec<Match>> {
    let listed =
        bridge.local_cidrs.is_empty() || bridge.local_cidrs.iter().any(|net| Family::of(net) == family);
    if !listed || !families(intent).any(|on| on == family) {
        return Vec::new();
    }
    let mut calls = Vec::new();
    if scopes.iter().any(|s| s.outbound.enabled) {
        calls.push(vec![Match::Protocol(Protocol::Tcp)]);
    }
    if scopes.iter().any(|s| s.dns.enabled) {
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            calls.push(vec![Match::Protocol(protocol), Match::DestinationPort(Ports::one(53))]);
        }
    }
    calls
}

/// A packet that still carries a mesh address here was not redirected: refuse it, whoever sent it.
pub(super) fn guard_out(intent: &RedirectIntent) -> Chain {
    let mut rules = Rules::default();
    for range in &intent.vip_ranges {
        let to_mesh = Match::Destination(range.trunc());
        rules.add([to_mesh], Action::Reject, "a mesh address never leaves unredirected");
    }
    rules.hooked("guard_out", HookKind::Filter, HookPoint::Output, FILTER)
}
