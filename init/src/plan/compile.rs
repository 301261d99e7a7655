//! From the intent to the plan: the one place that knows in which order the rules stand, and why.
//!
//! * `guards`: what closes mesh addresses and the proxy's own ports, whatever else is configured.
//! * `zones`: connection tracking of redirected lookups.
//! * `inbound`: what arrives.
//! * `reused`: what arrives and would pass those rules, since connection tracking knows it from before.
//! * `outbound`: what local processes open.
//! * `mangle`: transparent proxying, invalid packets, tracing.
//!
//! One workload has its rules in the hooked chains themselves. Several have chains of their own, numbered, and the
//! hooked chains only tell them apart.

mod guards;
mod inbound;
mod mangle;
mod outbound;
mod reused;
mod zones;

use std::borrow::Cow;
use std::net::IpAddr;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::{
    Action, Chain, ChainName, Family, Hook, HookKind, HookPoint, Match, PASSTHROUGH_V4, PASSTHROUGH_V6, Plan,
    PolicyRoute, Protocol, Rule,
};
use crate::intent::{
    Dns, Ids, Inbound, InboundMode, Interface, InvalidIntent, Outbound, Ports, Position, RedirectIntent,
};

/// Before everything else, so that nothing is missed.
const TRACE: i32 = -310;
/// Before connection tracking, where zones must be set and where nothing has been rewritten yet.
const RAW: i32 = -300;
/// After connection tracking, before destinations are rewritten.
const MANGLE: i32 = -150;
/// Where destinations are rewritten.
const DSTNAT: i32 = -100;
/// After the rewriting: what is still addressed to the mesh here was not redirected.
const FILTER: i32 = 0;

impl Plan {
    /// Compiles a valid intent. The same intent always gives the same plan.
    pub fn compile(intent: &RedirectIntent) -> Result<Self, InvalidIntent> {
        intent.validate()?;
        let scopes = Scope::all(intent);
        let mut chains = vec![guards::guard_in(intent, &scopes)];
        chains.extend(mangle::chains(intent, &scopes));
        chains.extend(zones::chains(intent, &scopes));
        chains.extend(inbound::chains(intent, &scopes));
        chains.extend(reused::chains(intent, &scopes));
        chains.extend(outbound::chains(intent, &scopes));
        chains.push(guards::guard_out(intent));
        // What is jumped to stays: a workload of which nothing is redirected has an empty chain.
        chains.retain(|chain| chain.hook.is_none() || !chain.rules.is_empty());
        let inbound = scopes.iter().any(|s| s.inbound.enabled);
        let tproxy = scopes.iter().any(Scope::is_tproxy);
        Ok(Self {
            chains,
            local_routes: intent.vip_ranges.iter().map(IpNet::trunc).collect(),
            loopback_addresses: if inbound && intent.ipv6 { vec![PASSTHROUGH_V6] } else { Vec::new() },
            policy_route: tproxy.then_some(PolicyRoute {
                mark: intent.tproxy.mark,
                table: intent.tproxy.route_table,
                ipv4: intent.ipv4,
                ipv6: intent.ipv6,
            }),
        })
    }
}

/// The part of an intent that concerns one workload.
struct Scope<'a> {
    /// `None` when the namespace belongs to one workload alone.
    number: Option<usize>,
    name: &'a str,
    /// How its packets are known, one way each; empty when everybody is the workload.
    selectors: Vec<Match>,
    /// How its own proxy's packets are known.
    proxy: Vec<Match>,
    inbound: &'a Inbound,
    outbound: &'a Outbound,
    dns: &'a Dns,
}

impl<'a> Scope<'a> {
    fn all(intent: &'a RedirectIntent) -> Vec<Self> {
        if intent.workloads.is_empty() {
            return vec![Self {
                number: None,
                name: "",
                selectors: Vec::new(),
                proxy: Vec::new(),
                inbound: &intent.inbound,
                outbound: &intent.outbound,
                dns: &intent.dns,
            }];
        }
        let one = |(number, workload): (usize, &'a crate::intent::Workload)| Self {
            number: Some(number),
            name: &workload.name,
            selectors: {
                let uids = workload.uids.iter().map(|uids| Match::Uid(*uids));
                uids.chain(workload.slices.iter().map(|slice| Match::Cgroup(slice.clone()))).collect()
            },
            proxy: workload.proxy_uids.iter().map(|uid| Match::Uid(Ids::one(*uid))).collect(),
            inbound: &workload.inbound,
            outbound: &workload.outbound,
            dns: &workload.dns,
        };
        intent.workloads.iter().enumerate().map(one).collect()
    }

    /// The name of a chain of this workload.
    fn chain(&self, name: &'static str) -> ChainName {
        match self.number {
            None => name.into(),
            Some(number) => format!("{name}_{number}").into(),
        }
    }

    /// Why a packet is sent to this workload's chains.
    fn reason(&self, what: &str) -> Cow<'static, str> {
        format!("{what} {}", self.name).into()
    }

    const fn is_tproxy(&self) -> bool {
        self.inbound.enabled && matches!(self.inbound.mode, InboundMode::Tproxy)
    }

    const fn redirects_lookups(&self) -> bool {
        self.dns.enabled
    }
}

/// How the packets of proxies that every workload may have are known: the union of user ids, group ids and mark.
fn shared_proxy(intent: &RedirectIntent) -> impl Iterator<Item = Match> {
    let uids = intent.proxy_uids.iter().map(|id| Match::Uid(Ids::one(*id)));
    let gids = intent.proxy_gids.iter().map(|id| Match::Gid(Ids::one(*id)));
    uids.chain(gids).chain(intent.proxy_mark.map(Match::Mark))
}

/// Collects the rules of one chain.
#[derive(Default)]
struct Rules(Vec<Rule>);

impl Rules {
    fn add(
        &mut self,
        matches: impl IntoIterator<Item = Match>,
        action: Action,
        reason: impl Into<Cow<'static, str>>,
    ) {
        self.0.push(Rule { matches: matches.into_iter().collect(), action, reason: reason.into() });
    }

    /// Families that the operator switched off are left alone.
    fn skip_disabled_families(&mut self, intent: &RedirectIntent) {
        for (on, family) in [(intent.ipv4, Family::V4), (intent.ipv6, Family::V6)] {
            if !on {
                self.add([Match::Family(family)], Action::Return, "family switched off");
            }
        }
    }

    /// Interfaces that the operator excluded are left alone. With a list of included ones, `rest` is where these go on.
    fn skip_interfaces(&mut self, intent: &RedirectIntent, by: fn(Interface) -> Match) {
        for interface in &intent.interfaces.exclude {
            self.add([by(interface.clone())], Action::Return, "excluded interface");
        }
    }

    fn hooked(self, name: &'static str, kind: HookKind, point: HookPoint, priority: i32) -> Chain {
        Chain { name: name.into(), hook: Some(Hook { kind, point, priority }), rules: self.0 }
    }

    fn named(self, name: ChainName) -> Chain {
        Chain { name, hook: None, rules: self.0 }
    }
}

/// The hooked chains of one place. With included interfaces only what passes by these enters the chain of the same
/// name with `_included`; otherwise the rules are hooked themselves.
fn hook_interfaces(
    intent: &RedirectIntent,
    before: Rules,
    rules: Rules,
    (name, included): (&'static str, &'static str),
    hook: Hook,
) -> Vec<Chain> {
    let (rules, mut chains) = by_interface(intent, before, rules, included, hook.point);
    chains.push(rules.hooked(name, hook.kind, hook.point, hook.priority));
    chains
}

/// `before`, what interfaces decide, and `rules` or the chain `included` that has them.
fn by_interface(
    intent: &RedirectIntent,
    mut before: Rules,
    rules: Rules,
    included: &'static str,
    point: HookPoint,
) -> (Rules, Vec<Chain>) {
    let by: fn(Interface) -> Match = match point {
        HookPoint::Prerouting => Match::InInterface,
        HookPoint::Output => Match::OutInterface,
    };
    before.skip_interfaces(intent, by);
    if intent.interfaces.include.is_empty() {
        before.0.extend(rules.0);
        return (before, Vec::new());
    }
    let always = (point == HookPoint::Output).then(Interface::lo);
    for interface in always.iter().chain(&intent.interfaces.include) {
        before.add([by(interface.clone())], Action::Goto(included.into()), "included interface");
    }
    (before, vec![rules.named(included.into())])
}

fn nat_priority(intent: &RedirectIntent) -> i32 {
    match intent.position {
        Position::First => DSTNAT - 1,
        Position::Last => DSTNAT + 1,
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

const fn loopback(family: Family) -> IpAddr {
    match family {
        Family::V4 => IpAddr::V4(std::net::Ipv4Addr::LOCALHOST),
        Family::V6 => IpAddr::V6(std::net::Ipv6Addr::LOCALHOST),
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
