//! What must hold for every plan and every packet, decided by the simulator.

#![allow(clippy::unwrap_used, reason = "a test that can't go on has failed")]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use proptest::prelude::*;
use ursa_init::intent::{Dns, Ids, Inbound, Outbound, Ports, RedirectIntent};
use ursa_init::plan::simulate::{Owner, Packet, Verdict, decide};
use ursa_init::plan::{HookPoint, PASSTHROUGH_V4, Plan, Protocol};

fn address() -> impl Strategy<Value = IpAddr> {
    prop_oneof![
        any::<u32>().prop_map(|bits| Ipv4Addr::from(bits).into()),
        any::<u128>().prop_map(|bits| Ipv6Addr::from(bits).into()),
        (0u32..1 << 24).prop_map(|host| Ipv4Addr::from(0xf100_0000 | host).into()),
        any::<u64>()
            .prop_map(|host| Ipv6Addr::from(0xfd75_7273_6100_0000_u128 << 64 | u128::from(host)).into()),
        (0u32..256).prop_map(|host| Ipv4Addr::from(0x0a4d_0000 | host).into()),
        Just(Ipv4Addr::LOCALHOST.into()),
        Just(Ipv6Addr::LOCALHOST.into()),
    ]
}

fn port() -> impl Strategy<Value = u16> {
    prop_oneof![Just(53), Just(80), Just(5432), Just(15001), Just(15006), Just(15053), 1u16..]
}

fn ports() -> impl Strategy<Value = Ports> {
    prop_oneof![
        port().prop_map(Ports::one),
        (1u16..60000, 0u16..100).prop_map(|(first, more)| Ports { first, last: first + more })
    ]
}

fn uid() -> impl Strategy<Value = u32> {
    prop_oneof![Just(0), Just(33), Just(1000), Just(5678), Just(5679)]
}

prop_compose! {
    fn intent()(
        inbound in any::<bool>(), outbound in any::<bool>(), dns in any::<bool>(),
        families in 0..3u8, two in any::<bool>(), exclude_user in any::<bool>(),
        include_in in prop::collection::vec(ports(), 0..3), exclude_in in prop::collection::vec(ports(), 0..3),
        include_out in prop::collection::vec(ports(), 0..3), exclude_out in prop::collection::vec(ports(), 0..3),
        cidr in prop::option::of(address().prop_map(|a| IpNet::new(a, 24).expect("24 fits both families"))),
    ) -> RedirectIntent {
        RedirectIntent {
            proxy_uids: if two { vec![5678, 5679] } else { vec![5678] },
            ipv4: families != 1,
            ipv6: families != 2,
            inbound: Inbound {
                enabled: inbound, include_ports: include_in, exclude_ports: exclude_in, ..Inbound::default()
            },
            outbound: Outbound {
                enabled: outbound, include_ports: include_out, exclude_ports: exclude_out,
                exclude_uids: if exclude_user { vec![Ids::one(33)] } else { vec![] },
                exclude_cidrs: cidr.into_iter().collect(), ..Outbound::default()
            },
            dns: Dns { enabled: dns, ..Dns::default() },
            ..RedirectIntent::default()
        }
    }
}

prop_compose! {
    fn packet()(
        output in any::<bool>(), protocol in 0..3u8, source in address(), destination in address(),
        source_port in port(), destination_port in port(), uid in uid(), on_lo in any::<bool>(), local in any::<bool>(),
    ) -> Packet {
        // One family per packet.
        let source = match (destination, source) {
            (IpAddr::V4(_), IpAddr::V6(_)) => Ipv4Addr::new(10, 77, 0, 1).into(),
            (IpAddr::V6(_), IpAddr::V4(_)) => Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 1).into(),
            (_, source) => source,
        };
        Packet {
            point: if output { HookPoint::Output } else { HookPoint::Prerouting },
            protocol: [Some(Protocol::Tcp), Some(Protocol::Udp), None][usize::from(protocol)],
            source, destination, source_port, destination_port,
            interface: if on_lo { "lo".to_owned() } else { "eth0".to_owned() },
            owner: output.then_some(Owner { uid, gid: uid }),
            mark: 0, connection_mark: 0, invalid: false, reused: false, cgroup: None,
            destination_is_local: local,
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn every_packet_is_decided_sanely(intent in intent(), packet in packet()) {
        let plan = Plan::compile(&intent).unwrap();
        let verdict = decide(&plan, &packet).verdict;
        let output = packet.point == HookPoint::Output;
        let mesh = intent.vip_ranges.iter().any(|range| range.contains(&packet.destination));
        let family_on = if packet.destination.is_ipv4() { intent.ipv4 } else { intent.ipv6 };
        let owner = packet.owner.map(|o| o.uid);
        let proxy = owner.is_some_and(|uid| intent.proxy_uids.contains(&uid));

        // A mesh address never leaves as it is, whoever sends it and whatever is excluded.
        if output && mesh {
            prop_assert!(verdict != Verdict::Passes, "{verdict:?}");
        }
        // Nothing from the wire reaches a mesh address.
        if !output && packet.interface != "lo" && mesh {
            prop_assert_eq!(verdict, Verdict::Dropped);
        }
        // The proxy's own traffic is never sent to the proxy's outbound or DNS port: it would loop.
        if proxy {
            prop_assert!(verdict != Verdict::Redirected(intent.outbound.port), "{verdict:?}");
            prop_assert!(verdict != Verdict::Redirected(intent.dns.port), "{verdict:?}");
        }
        // Only TCP and lookups are ever redirected, and only in families that are on.
        if let Verdict::Redirected(port) = verdict {
            prop_assert!(family_on);
            let lookup = packet.protocol == Some(Protocol::Udp) && packet.destination_port == 53;
            prop_assert!(packet.protocol == Some(Protocol::Tcp) || (lookup && port == intent.dns.port));
            prop_assert!(owner != Some(33) || intent.outbound.exclude_uids.is_empty());
        }
        // An application's lookup always goes to the shim.
        let excluded = owner.is_some_and(|uid| intent.outbound.exclude_uids.contains(&Ids::one(uid)));
        let passthrough = packet.source == PASSTHROUGH_V4 && packet.interface == "lo";
        if output && intent.dns.enabled && family_on && !proxy && !excluded && !passthrough
            && packet.protocol.is_some() && packet.destination_port == 53
        {
            prop_assert_eq!(verdict, Verdict::Redirected(intent.dns.port));
        }
        // What stays in the namespace stays direct for applications, unless it is a mesh address.
        if output && packet.interface == "lo" && !proxy && !mesh && packet.destination_port != 53 {
            prop_assert_eq!(verdict, Verdict::Passes);
        }
    }

    #[test]
    fn a_port_used_again_passes_no_rule_that_redirects(intent in intent(), packet in packet()) {
        let plan = Plan::compile(&intent).unwrap();
        let interface = "eth0".to_owned();
        let packet = Packet { point: HookPoint::Prerouting, interface, owner: None, ..packet };
        let first = decide(&plan, &packet).verdict;
        let again = decide(&plan, &Packet { reused: true, ..packet }).verdict;
        match first {
            Verdict::Redirected(_) => prop_assert_eq!(again, Verdict::Refused),
            other => prop_assert_eq!(again, other),
        }
    }

    #[test]
    fn compiling_is_deterministic(intent in intent()) {
        prop_assert_eq!(Plan::compile(&intent).unwrap(), Plan::compile(&intent.clone()).unwrap());
    }
}
