//! Ursa's redirect beside Istio's and Linkerd's: the same packets, on the real kernel, land on the same ports, except
//! where this says by name why not. Kuma's rules are judged so by the conformance runner.

#![allow(clippy::unwrap_used, reason = "a test that can't go on has failed")]

mod fire;
mod istio;
mod linkerd;
mod restore;

use std::collections::BTreeSet;
use std::thread;

use fire::differences::{Named, Sorted, between};
use fire::lab::{self, Lab, Restore};
use fire::matrix::{Edges, matrix};
use fire::probe::{Landed, Layer4, Origin, Place, Probe};
use istio::{Istio, Lookups};
use linkerd::Linkerd;
use ursa_init::backend::Backend;
use ursa_init::plan::Family;
use ursa_init::{Plan, RedirectIntent};

/// A peer's options, its rules for them, and what Ursa is asked for instead.
struct Case {
    name: &'static str,
    v4: String,
    v6: String,
    /// The mark and table of the peer's policy route.
    route: Option<(u32, u32)>,
    intent: RedirectIntent,
}

impl Case {
    /// Everything that differs.
    fn judge(&self, allowed: &[Named], backend: Backend) -> Sorted {
        let mut probes = matrix(&Edges::of(&[&self.v4, &self.v6]), &self.intent);
        if backend != Backend::Nftables {
            let ports = [self.intent.inbound.port, self.intent.outbound.port, self.intent.dns.port];
            for probe in probes.iter_mut().filter(|probe| !matches!(probe.origin, Origin::Web { .. })) {
                // iptables is silent where nftables refuses.
                probe.may_be_lost |= ports.contains(&probe.to.port());
            }
        }
        let (theirs, ours) = thread::scope(|scope| {
            let theirs = scope.spawn(|| {
                let lab = Lab::new(&probes, &self.intent);
                lab.load(Restore::Nft, &self.v4, &self.v6);
                if let Some((mark, table)) = self.route {
                    lab.route_mark(mark, table);
                }
                lab.fire(&probes)
            });
            let ours = scope.spawn(|| {
                let lab = Lab::new(&probes, &self.intent);
                lab.apply(&Plan::compile(&self.intent).unwrap(), backend).unwrap();
                lab.fire(&probes)
            });
            (theirs.join().unwrap(), ours.join().unwrap())
        });
        println!("{}: {} packets", self.name, probes.len());
        Sorted::new(between(&probes, &theirs, &ours), allowed, &self.intent)
    }
}

/// Every difference has an allowed name, and every allowed name a difference.
fn equal_but_for(allowed: &[Named], cases: &[Case], backend: Backend) {
    let mut met = BTreeSet::new();
    let mut wrong = String::new();
    for case in cases {
        let sorted = case.judge(allowed, backend);
        met.extend(sorted.named.keys().copied());
        if !sorted.unnamed.is_empty() {
            wrong.extend([format!("{}: {} differences without a name\n", case.name, sorted.unnamed.len())]);
        }
        for difference in sorted.unnamed.iter().take(25) {
            wrong.extend([format!("  {difference}\n")]);
        }
    }
    for named in allowed.iter().filter(|named| !met.contains(named)) {
        wrong.extend([format!("{named:?} explains nothing any more: remove it\n")]);
    }
    assert!(wrong.is_empty(), "{wrong}");
}

/// Each user and each group of the proxy calls its own workload through the inbound listener, and each
/// one's own rule is what does it.
#[test]
fn every_user_and_group_of_the_proxy_hairpins() {
    let intent = RedirectIntent {
        proxy_uids: vec![1337, 1400, 1401],
        proxy_gids: vec![1500, 1501],
        ..RedirectIntent::default()
    };
    let uids = intent.proxy_uids.iter().map(|uid| (*uid, 1000));
    let owners: Vec<(u32, u32)> = uids.chain(intent.proxy_gids.iter().map(|gid| (1000, *gid))).collect();
    let calls = |owner: &(u32, u32)| {
        [lab::OWN4, lab::OWN6].map(|own| Probe {
            origin: Origin::Web { uid: owner.0, gid: owner.1 },
            layer4: Layer4::Tcp,
            source: None,
            to: (own, 80).into(),
            may_be_lost: false,
        })
    };
    let lab = Lab::new(&owners.iter().flat_map(calls).collect::<Vec<_>>(), &intent);
    lab.apply(&Plan::compile(&intent).unwrap(), Backend::Nftables).unwrap();
    let counters = || -> Vec<u64> {
        let rules = lab.run(ursa_init::nft::read_back).unwrap().unwrap();
        let own =
            |(chain, why, _): &(&str, &str, u64)| *chain == "output" && *why == "the proxy's own traffic";
        rules.counters().filter(own).map(|(.., packets)| packets).collect()
    };
    assert_eq!(counters(), [0; 5]);
    for (i, owner) in owners.iter().enumerate() {
        assert_eq!(lab.fire(&calls(owner)), [Landed::At(Place::Web, intent.inbound.port); 2], "{owner:?}");
        let expected: Vec<u64> = (0..owners.len()).map(|other| if other <= i { 2 } else { 0 }).collect();
        assert_eq!(counters(), expected, "{owner:?}");
    }
}

fn ports<T: std::str::FromStr>(list: &str) -> Vec<T> {
    list.split(',').map(|one| one.parse().ok().unwrap()).collect()
}

fn of_istio(name: &'static str, istio: &Istio) -> Case {
    Case {
        name,
        v4: istio.rules(Family::V4),
        v6: istio.rules(Family::V6),
        route: istio.tproxy.then_some((istio::MARK, istio::ROUTE_TABLE)),
        intent: istio.intent(),
    }
}

#[test]
fn istio_beside_both_kinds_of_iptables() {
    let cases = || {
        [
            of_istio(
                "excluded and included",
                &Istio {
                    exclude_inbound: vec![22],
                    exclude_outbound_ports: vec![22, 5432],
                    exclude_ranges: ports("169.254.169.254/32,fd00:1::/32"),
                    exclude_groups: vec![2000],
                    virtual_interfaces: vec!["docker0"],
                    lookups: Lookups::All,
                    ..Istio::default()
                },
            ),
            of_istio("transparent", &Istio { tproxy: true, drop_invalid: true, ..Istio::default() }),
        ]
    };
    let allowed = [
        Named::MeshAddressesAreClosed,
        Named::OwnPortsAreClosed,
        Named::ForwardedIsLeftAlone,
        Named::LoopbackIsAllOfIt,
        Named::HairpinHonoursInboundPorts,
        Named::HairpinIgnoresOutboundExclusions,
        Named::EveryProxyHairpins,
        Named::LookupsOfGuests,
        Named::ShimAsksDirectly,
        Named::TunnelIsLeftAlone,
    ];
    for backend in [Backend::IptablesNft, Backend::IptablesLegacy] {
        equal_but_for(&allowed, &cases(), backend);
    }
}

#[test]
fn istio() {
    let case = |name, istio: Istio| of_istio(name, &istio);
    let base = Istio::default;
    let cases = [
        case("default", base()),
        case(
            "excluded ports",
            Istio {
                exclude_inbound: vec![22, 15020, 15021, 15090],
                exclude_outbound_ports: vec![22, 5432],
                ..base()
            },
        ),
        case(
            "included ports",
            Istio {
                include_inbound: Some(vec![80, 8080]),
                include_outbound_ports: vec![443, 6379],
                include_ranges: Some(Vec::new()),
                ..base()
            },
        ),
        case("nothing inbound", Istio { include_inbound: Some(Vec::new()), ..base() }),
        case("nothing outbound", Istio { include_ranges: Some(Vec::new()), ..base() }),
        case(
            "included ranges",
            Istio {
                include_ranges: Some(ports("10.96.0.0/12,2001:db8:1::/48")),
                exclude_ranges: ports("10.96.0.10/32,2001:db8:1:1::/64"),
                include_outbound_ports: vec![8443],
                lookups: Lookups::All,
                ..base()
            },
        ),
        case(
            "excluded ranges",
            Istio { exclude_ranges: ports("169.254.169.254/32,192.168.0.0/16,fd00:1::/32"), ..base() },
        ),
        case(
            "excluded interfaces",
            Istio { exclude_interfaces: vec!["docker0", "br-x"], lookups: Lookups::All, ..base() },
        ),
        case(
            "virtual interfaces",
            Istio { virtual_interfaces: vec!["docker0", "br-x"], lookups: Lookups::All, ..base() },
        ),
        case(
            "virtual interfaces and ranges",
            Istio {
                virtual_interfaces: vec!["docker0"],
                include_ranges: Some(ports("10.96.0.0/12,2001:db8:1::/48")),
                ..base()
            },
        ),
        case("transparent", Istio { tproxy: true, ..base() }),
        case(
            "transparent, everything else too",
            Istio {
                tproxy: true,
                exclude_inbound: vec![22, 15020, 15021, 15090],
                exclude_interfaces: vec!["br-x"],
                lookups: Lookups::All,
                drop_invalid: true,
                ..base()
            },
        ),
        case(
            "transparent, included ports",
            Istio { tproxy: true, include_inbound: Some(vec![80, 8080]), ..base() },
        ),
        case(
            "several users and groups",
            Istio { proxy_uids: vec![1337, 1400], proxy_gids: vec![1337, 1500], ..base() },
        ),
        case(
            "several users, lookups",
            Istio { proxy_uids: vec![1337, 1400], proxy_gids: vec![1500], lookups: Lookups::All, ..base() },
        ),
        case("included groups", Istio { include_groups: vec![2000, 2001], lookups: Lookups::All, ..base() }),
        case("excluded groups", Istio { exclude_groups: vec![2000, 2001], lookups: Lookups::All, ..base() }),
        case("lookups", Istio { lookups: Lookups::All, ..base() }),
        case(
            "lookups of resolv.conf",
            Istio { lookups: Lookups::To(ports("10.96.0.10,127.0.0.53,2001:db8:1::53")), ..base() },
        ),
        case("invalid packets", Istio { drop_invalid: true, ..base() }),
    ];
    let allowed = [
        Named::MeshAddressesAreClosed,
        Named::OwnPortsAreClosed,
        Named::ForwardedIsLeftAlone,
        Named::LoopbackIsAllOfIt,
        Named::HairpinHonoursInboundPorts,
        Named::HairpinIgnoresOutboundExclusions,
        Named::EveryProxyHairpins,
        Named::LookupsOfGuests,
        Named::ShimAsksDirectly,
        Named::TunnelIsLeftAlone,
        Named::OtherLocalResolversAreLocal,
    ];
    equal_but_for(&allowed, &cases, Backend::Nftables);
}

#[test]
fn linkerd() {
    let case = |name, linkerd: Linkerd| Case {
        name,
        v4: linkerd.rules(Family::V4),
        v6: linkerd.rules(Family::V6),
        route: None,
        intent: linkerd.intent(),
    };
    let base = Linkerd::default;
    let cases = [
        case("default", base()),
        case("a group", Linkerd { proxy_gid: Some(2103), ..base() }),
        case(
            "skipped ports",
            Linkerd {
                skip_inbound: ports("22,4190,4191,4567,4568,8000-8010"),
                skip_outbound: ports(
                    "25,443,587,3306,4444,4567,4568,5432,6379,9300,9301,9302,9303,9304,9305,11211,20000-20010",
                ),
                ..base()
            },
        ),
        case(
            "skipped subnets",
            Linkerd { skip_subnets: ports("192.168.0.0/24,10.1.2.3/32,fd00:5::/48"), ..base() },
        ),
        case("listed ports", Linkerd { listed: vec![80, 8080], ..base() }),
    ];
    let allowed = [
        Named::MeshAddressesAreClosed,
        Named::OwnPortsAreClosed,
        Named::ForwardedIsLeftAlone,
        Named::HairpinAtAll,
    ];
    equal_but_for(&allowed, &cases, Backend::Nftables);
}
