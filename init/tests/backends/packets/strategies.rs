//! Random intents with every option, and random packets that such options decide about.

use std::net::IpAddr;

use ipnet::IpNet;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;
use ursa_init::Plan;
use ursa_init::intent::{
    Bridge, Dns, DnsCapture, Ids, Inbound, InboundMode, Interface, Interfaces, Outbound, OwnerExclusion,
    Ports, Position, Probes, RedirectIntent, Transport, Workload, default_vip_ranges,
};
use ursa_init::plan::Protocol;

/// A packet, before it is known where it goes.
#[derive(Debug, Clone)]
pub(super) struct Aim {
    pub(super) way: Way,
    pub(super) protocol: Protocol,
    pub(super) to: IpAddr,
    pub(super) port: u16,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) mark: u32,
    pub(super) passthrough: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    /// Sent by a process of the workload's namespace.
    Out,
    /// Arriving from the stranger on eth0.
    Eth0,
    /// Arriving from the guest on br0.
    Br0,
}

pub(super) const UIDS: [u32; 9] = [0, 33, 1000, 1001, 1500, 2000, 5678, 5679, 9999];
const GIDS: [u32; 4] = [0, 77, 500, 1000];
const MARKS: [u32; 4] = [0, 0, 99, 1337];
const PORTS: [u16; 12] = [22, 53, 80, 443, 5432, 8080, 8085, 9999, 15001, 15006, 15053, 16006];
const NETS: [&str; 14] = [
    "10.77.0.0/24",
    "10.77.0.2/32",
    "10.99.0.0/16",
    "10.77.0.0/30",
    "198.51.100.0/24",
    "0.0.0.0/0",
    "172.16.0.0/12",
    "127.0.0.53/32",
    "fd77::/64",
    "fd77::2/128",
    "fd99::/61",
    "2001:db8::/32",
    "::/0",
    "241.0.0.0/13",
];
const TO: [&str; 22] = [
    "127.0.0.1",
    "127.0.0.53",
    "10.77.0.1",
    "10.77.0.2",
    "10.77.0.2",
    "10.99.0.2",
    "172.16.0.1",
    "172.16.0.2",
    "198.51.100.1",
    "198.51.100.1",
    "241.0.0.7",
    "243.9.9.9",
    "241.255.0.1",
    "::1",
    "fd77::1",
    "fd77::2",
    "fd77::2",
    "fd99::2",
    "fd16::2",
    "2001:db8::1",
    "fd75:7273:6100::f100:7",
    "fd75:7273:6100::f100:7",
];

fn ports() -> impl Strategy<Value = Ports> {
    prop_oneof![
        3 => select(PORTS.as_slice()).prop_map(Ports::one),
        1 => (select(PORTS.as_slice()), 0u16..600).prop_map(|(first, n)| Ports { first, last: first + n }),
    ]
}

fn ids(of: &'static [u32]) -> impl Strategy<Value = Ids> {
    prop_oneof![
        3 => select(of).prop_map(Ids::one),
        1 => (select(of), 1u32..600).prop_map(|(first, n)| Ids { first, last: first + n }),
    ]
}

/// Mostly none, so that one option doesn't hide all others.
fn few<T: std::fmt::Debug>(of: impl Strategy<Value = T>) -> impl Strategy<Value = Vec<T>> {
    vec(of, 0..4).prop_map(|all| if all.len() == 3 { Vec::new() } else { all })
}

fn net() -> impl Strategy<Value = IpNet> {
    select(NETS.as_slice()).prop_map(|net| net.parse().unwrap())
}

fn address() -> impl Strategy<Value = IpAddr> {
    select(TO.as_slice()).prop_map(|address| address.parse().unwrap())
}

fn interface() -> impl Strategy<Value = Interface> {
    select(["eth0", "wlan0", "br0", "wl+", "eth+", "e+"].as_slice()).prop_map(|name| name.parse().unwrap())
}

fn on() -> impl Strategy<Value = bool> {
    prop::bool::weighted(0.8)
}

prop_compose! {
    fn inbound(base: u16)(
        enabled in on(), tproxy in prop::bool::weighted(0.3), include_ports in few(ports()), exclude_ports in few(ports()),
        include_cidrs in few(net()), exclude_cidrs in few(net()),
        sources in few(select(["10.77.0.2", "fd77::2", "172.16.0.2"].as_slice())), probed in few(ports()),
    ) -> Inbound {
        let sources: Vec<_> = sources.into_iter().map(|s| s.parse().unwrap()).collect();
        let ports = if sources.is_empty() { Vec::new() } else { probed };
        Inbound {
            enabled, port: base + 6, mode: if tproxy { InboundMode::Tproxy } else { InboundMode::Redirect },
            include_ports, exclude_ports, include_cidrs, exclude_cidrs, probes: Probes { sources, ports },
        }
    }
}

prop_compose! {
    fn outbound(base: u16)(
        enabled in on(), include_ports in few(ports()), exclude_ports in few(ports()), include_cidrs in few(net()),
        exclude_cidrs in few(net()), exclude_uids in few(ids(&UIDS[..6])),
        owners in few((ids(&UIDS[..6]), prop::option::of(select([Transport::Tcp, Transport::Udp].as_slice())), few(ports()))),
        include_gids in few(ids(&GIDS)), exclude_gids in few(ids(&GIDS)),
    ) -> Outbound {
        let exclude = |(uids, protocol, ports)| OwnerExclusion { uids: vec![uids], protocol, ports };
        Outbound {
            enabled, port: base + 1, include_ports, exclude_ports, include_cidrs, exclude_cidrs, exclude_uids,
            exclude_owners: owners.into_iter().map(exclude).collect(), include_gids, exclude_gids,
        }
    }
}

prop_compose! {
    fn dns(base: u16)(
        enabled in on(), all in any::<bool>(), resolvers in vec(address(), 1..3), conntrack_zones in on(),
        honour_exclude_cidrs in any::<bool>(),
    ) -> Dns {
        let (capture, resolvers) =
            if all { (DnsCapture::All, Vec::new()) } else { (DnsCapture::Resolvers, resolvers) };
        Dns { enabled, port: base + 53, capture, resolvers, conntrack_zones, honour_exclude_cidrs }
    }
}

prop_compose! {
    fn workload(name: &'static str, proxy: u32, base: u16, uids: Ids, own: Ports)(
        inbound in inbound(base), outbound in outbound(base), dns in dns(base), known in any::<bool>(),
    ) -> Workload {
        let inbound = Inbound { include_ports: vec![own], ..inbound };
        let proxy_uids = if known { vec![proxy] } else { Vec::new() };
        Workload { name: name.to_owned(), uids: vec![uids], proxy_uids, inbound, outbound, dns, ..Workload::default() }
    }
}

fn bridge() -> impl Strategy<Value = Bridge> {
    let interface = select(["br0", "br+", "b+"].as_slice());
    (interface, few(select(["172.16.0.0/24", "fd16::/64", "10.99.0.0/24"].as_slice()))).prop_map(
        |(name, nets)| Bridge {
            interface: name.parse().unwrap(),
            local_cidrs: nets.into_iter().map(|net| net.parse().unwrap()).collect(),
        },
    )
}

prop_compose! {
    /// Any intent that is valid.
    pub(super) fn intent()(
        proxies in select(vec![vec![5678], vec![5678, 5679], vec![]]),
        proxy_gids in select(vec![vec![], vec![77]]), proxy_mark in select([None, Some(99)].as_slice()),
        inbound in inbound(15000), outbound in outbound(15000), dns in dns(15000),
        several in prop::bool::weighted(0.3),
        workloads in (workload("web", 5678, 15000, Ids { first: 1000, last: 1499 }, Ports { first: 80, last: 90 }),
                      workload("db", 5679, 16000, Ids { first: 1500, last: 2000 }, Ports::one(5432))),
        include in few(interface()), exclude in few(interface()), bridges in few(bridge()),
        families in 0..8u8, vips in on(), (drop_invalid, last, trace) in (any::<bool>(), any::<bool>(), prop::bool::weighted(0.05)),
    ) -> RedirectIntent {
        let mut intent = RedirectIntent {
            proxy_uids: if proxies.is_empty() && proxy_gids.is_empty() && proxy_mark.is_none() { vec![5678] } else { proxies },
            proxy_gids, proxy_mark, interfaces: Interfaces { include, exclude },
            ipv4: families != 0, ipv6: families != 1,
            vip_ranges: if vips { default_vip_ranges() } else { vec!["243.0.0.0/8".parse().unwrap()] },
            drop_invalid, trace, position: if last { Position::Last } else { Position::First },
            ..RedirectIntent::default()
        };
        if several {
            intent.workloads = vec![workloads.0, workloads.1];
            // A user is the proxy of one workload, or of all.
            let own: Vec<_> = intent.workloads.iter().flat_map(|w| w.proxy_uids.clone()).collect();
            intent.proxy_uids.retain(|uid| !own.contains(uid));
        } else {
            (intent.inbound, intent.outbound, intent.dns, intent.bridges) = (inbound, outbound, dns, bridges);
        }
        intent
    }
}

/// Any intent and its plan.
pub(super) fn valid() -> impl Strategy<Value = RedirectIntent> {
    intent().prop_filter("must be valid", |intent| Plan::compile(intent).is_ok())
}

prop_compose! {
    pub(super) fn aim()(
        way in select([Way::Out, Way::Out, Way::Eth0, Way::Br0].as_slice()),
        tcp in prop::bool::weighted(0.7), to in address(), port in prop_oneof![3 => select(PORTS.as_slice()), 1 => 1u16..20000],
        uid in select(UIDS.as_slice()), gid in select(GIDS.as_slice()), mark in select(MARKS.as_slice()),
        passthrough in prop::bool::weighted(0.1),
    ) -> Aim {
        let protocol = if tcp { Protocol::Tcp } else { Protocol::Udp };
        Aim { way, protocol, to, port, uid, gid, mark, passthrough }
    }
}
