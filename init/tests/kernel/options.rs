//! The options that peers have, one by one, on real packets.

use std::io::ErrorKind::ConnectionRefused;
use std::net::SocketAddr;
use std::time::Instant;

use socket2::{Domain, Protocol, Socket, Type};
use ursa_init::intent::{Bridge, Ids, OwnerExclusion, Probes, RedirectIntent, Transport};
use ursa_init::{Plan, nft};

use crate::lab::{APP, Namespace, PATIENCE, PROXY};

fn meshed(change: impl FnOnce(&mut RedirectIntent)) -> (Namespace, Namespace) {
    let mut intent = RedirectIntent { proxy_uids: vec![PROXY], ..RedirectIntent::default() };
    change(&mut intent);
    let (web, stranger) = Namespace::pair();
    web.listen(&[15001, 15006, 8080, 9000]);
    web.serve_dns(&["127.0.0.1".parse().unwrap(), "::1".parse().unwrap()], 15053);
    stranger.listen(&[80, 3500, 8080]);
    stranger.serve_dns(&["10.77.0.2".parse().unwrap(), "fd77::2".parse().unwrap()], 53);
    let plan = Plan::compile(&intent).unwrap();
    web.run(|| ursa_init::apply(&plan)).unwrap();
    assert_eq!(web.run(|| ursa_init::diff(&plan)).unwrap(), Vec::<String>::new(), "reads back as written");
    (web, stranger)
}

#[test]
fn a_part_of_somebodys_traffic_can_be_excluded() {
    let (web, _stranger) = meshed(|intent| {
        intent.outbound.exclude_owners = vec![
            OwnerExclusion {
                uids: vec!["106-108".parse().unwrap()],
                protocol: Some(Transport::Tcp),
                ports: vec!["80".parse().unwrap(), "3000-5000".parse().unwrap()],
            },
            OwnerExclusion {
                uids: vec![Ids::one(200)],
                protocol: Some(Transport::Udp),
                ports: vec!["53".parse().unwrap()],
            },
            OwnerExclusion { uids: vec![Ids::one(300)], protocol: None, ports: vec![] },
        ];
    });
    for (far, resolver) in [("10.77.0.2", "10.77.0.2:53"), ("[fd77::2]", "[fd77::2]:53")] {
        for (uid, on_80, on_3500, on_8080, lookup) in [
            (105, 15001, 15001, 15001, 15053),
            (106, 80, 3500, 15001, 15053),
            (108, 80, 3500, 15001, 15053),
            (109, 15001, 15001, 15001, 15053),
            (200, 15001, 15001, 15001, 53),
            (300, 80, 3500, 8080, 53),
        ] {
            assert_eq!(web.tcp(uid, &format!("{far}:80")), Ok(on_80), "uid {uid}");
            assert_eq!(web.tcp(uid, &format!("{far}:3500")), Ok(on_3500), "uid {uid}");
            assert_eq!(web.tcp(uid, &format!("{far}:8080")), Ok(on_8080), "uid {uid}");
            assert_eq!(web.udp(uid, 0, resolver), Ok(lookup), "uid {uid}");
        }
    }
    assert_eq!(web.tcp(300, "241.0.0.7:80"), Err(ConnectionRefused), "mesh addresses are closed to them");
}

#[test]
fn only_chosen_groups_are_redirected() {
    let (web, _stranger) = meshed(|intent| {
        intent.outbound.include_gids = vec!["400-402".parse().unwrap(), Ids::one(410)];
        intent.outbound.exclude_gids = vec![Ids::one(401)];
    });
    for (gid, landed) in [(399, 80), (400, 15001), (401, 80), (402, 15001), (403, 80), (410, 15001)] {
        assert_eq!(web.tcp_as(APP, gid, "10.77.0.2:80"), Ok(landed), "gid {gid}");
        assert_eq!(web.tcp_as(APP, gid, "[fd77::2]:80"), Ok(landed), "gid {gid}");
    }
}

#[test]
fn interfaces_can_be_left_alone() {
    let (web, stranger) = meshed(|intent| intent.interfaces.exclude = vec!["eth+".parse().unwrap()]);
    assert_eq!(web.tcp(APP, "10.77.0.2:80"), Ok(80));
    assert_eq!(web.udp(APP, 0, "10.77.0.2:53"), Ok(53));
    assert_eq!(stranger.tcp(APP, "10.77.0.1:8080"), Ok(8080));
    assert_eq!(web.tcp(APP, "241.0.0.7:80"), Ok(15001), "mesh addresses are on lo");

    let (web, stranger) = meshed(|intent| intent.interfaces.include = vec!["net1".parse().unwrap()]);
    assert_eq!(web.tcp(APP, "10.77.0.2:80"), Ok(80));
    assert_eq!(stranger.tcp(APP, "10.77.0.1:8080"), Ok(8080));
    assert_eq!(web.tcp(APP, "241.0.0.7:80"), Ok(15001));

    let (web, stranger) = meshed(|intent| intent.interfaces.include = vec!["eth0".parse().unwrap()]);
    assert_eq!(web.tcp(APP, "10.77.0.2:80"), Ok(15001));
    assert_eq!(stranger.tcp(APP, "10.77.0.1:8080"), Ok(15006));
}

#[test]
fn sources_decide_about_what_arrives() {
    let (_web, stranger) = meshed(|intent| {
        intent.inbound.probes = Probes {
            sources: vec!["10.77.0.2".parse().unwrap(), "fd77::2".parse().unwrap()],
            ports: vec!["9000".parse().unwrap()],
        };
    });
    for own in ["10.77.0.1", "[fd77::1]"] {
        assert_eq!(stranger.tcp(APP, &format!("{own}:9000")), Ok(9000), "a probe");
        assert_eq!(stranger.tcp(APP, &format!("{own}:8080")), Ok(15006), "no probe's port");
    }
    let (_web, stranger) = meshed(|intent| {
        intent.inbound.include_cidrs = vec!["10.77.0.0/24".parse().unwrap()];
    });
    assert_eq!(stranger.tcp(APP, "10.77.0.1:8080"), Ok(15006));
    assert_eq!(stranger.tcp(APP, "[fd77::1]:8080"), Ok(8080), "no included source");
}

#[test]
fn guests_behind_a_bridge_are_served() {
    // The stranger is the guest: what it sends arrives by eth0.
    let (web, guest) = Namespace::pair();
    web.listen(&[15001, 15006]);
    let all = ["10.77.0.1".parse().unwrap(), "fd77::1".parse().unwrap()];
    web.serve_dns(&all, 15053);
    guest.ip("route add default via 10.77.0.1");
    guest.ip("-6 route add default via fd77::1");
    let mut intent = RedirectIntent { proxy_uids: vec![PROXY], ..RedirectIntent::default() };
    let local = |nets: &[&str]| nets.iter().map(|n| n.parse().unwrap()).collect();
    let bridge = |local_cidrs| vec![Bridge { interface: "eth+".parse().unwrap(), local_cidrs }];
    intent.bridges = bridge(local(&["10.77.0.0/24", "fd77::/64"]));
    web.run(|| ursa_init::apply(&Plan::compile(&intent).unwrap())).unwrap();
    for (own, far, resolver, mesh) in [
        ("10.77.0.1", "198.51.100.1:443", "203.0.113.53:53", "241.0.0.7:80"),
        ("[fd77::1]", "[2001:db8::1]:443", "[2001:db8::53]:53", "[fd75:7273:6100::7]:80"),
    ] {
        assert_eq!(guest.tcp(APP, far), Ok(15001), "{far}");
        assert_eq!(guest.tcp(APP, mesh), Ok(15001), "{mesh}");
        assert_eq!(guest.udp(APP, 0, resolver), Ok(15053), "{resolver}");
        assert_eq!(guest.tcp(APP, resolver), Ok(15053), "{resolver}");
        assert_eq!(guest.tcp(APP, &format!("{own}:8080")), Ok(15006), "between guests and host it arrives");
    }
    // KubeVirt: every connection of the guest is opened by it.
    intent.bridges = bridge(Vec::new());
    web.run(|| ursa_init::apply(&Plan::compile(&intent).unwrap())).unwrap();
    assert_eq!(guest.tcp(APP, "10.77.0.1:8080"), Ok(15001));
    assert_eq!(guest.tcp(APP, "[2001:db8::1]:443"), Ok(15001));
}

#[test]
fn packets_of_no_connection_are_dropped() {
    let (web, stranger) = meshed(|intent| intent.drop_invalid = true);
    let dropped = || {
        let rules = web.run(nft::read_back).unwrap().unwrap();
        rules.counters().filter(|(chain, ..)| *chain == "invalid").map(|(.., packets)| packets).sum::<u64>()
    };
    assert_eq!(dropped(), 0);
    for (own, domain) in [("10.77.0.1", Domain::IPV4), ("fd77::1", Domain::IPV6)] {
        let to = SocketAddr::new(own.parse().unwrap(), 0);
        let before = dropped();
        // A TCP header without a flag, a port or a checksum belongs to nothing.
        stranger.run(|| {
            let raw = Socket::new(domain, Type::RAW, Some(Protocol::TCP)).unwrap();
            raw.send_to(&[0; 20], &to.into()).unwrap();
        });
        let deadline = Instant::now() + PATIENCE;
        while dropped() == before {
            assert!(Instant::now() < deadline, "{own}: it came to the application");
            std::thread::yield_now();
        }
    }
    assert_eq!(stranger.tcp(APP, "10.77.0.1:8080"), Ok(15006), "connections are");
}

#[test]
fn diagnosis_and_protection_change_no_landing() {
    let (web, stranger) = meshed(|intent| {
        intent.drop_invalid = true;
        intent.trace = true;
        intent.position = ursa_init::intent::Position::Last;
    });
    assert_eq!(web.tcp(APP, "10.77.0.2:80"), Ok(15001));
    assert_eq!(web.udp(APP, 0, "10.77.0.2:53"), Ok(15053));
    assert_eq!(stranger.tcp(APP, "10.77.0.1:8080"), Ok(15006));
    let rules = web.run(nft::read_back).unwrap().unwrap();
    assert!(rules.counters().any(|(chain, _, packets)| chain == "trace_out" && packets > 0));
}
