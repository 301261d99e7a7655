//! Any intent, any packet: the simulator says what the kernel does, by every backend.

mod strategies;
mod wire;

use std::net::{IpAddr, SocketAddr};

use proptest::prelude::*;
use proptest::test_runner::{Config, TestCaseError, TestRunner};
use ursa_init::InPlace;
use ursa_init::backend::Backend;
use ursa_init::intent::RedirectIntent;
use ursa_init::plan::simulate::{Owner, Packet, Verdict, decide};
use ursa_init::plan::{Family, HookPoint, PASSTHROUGH_V4, PASSTHROUGH_V6, Plan, Protocol};

use crate::lab::Namespace;
use strategies::{Aim, Way, aim, valid};
use wire::{Fate, Sent, Shot, Tracking, fire};

/// How many intents each backend is tried with; more by `URSA_INTENTS`.
const INTENTS: u32 = 16;
const PACKETS: usize = 60;
/// Nothing concerns this port.
const QUIET: u16 = 9;

/// A workload's namespace, a stranger across eth0, somebody on wlan0, and a guest behind br0.
struct Lab {
    web: Namespace,
    stranger: Namespace,
    guest: Namespace,
    _other: Namespace,
    tracking: Tracking,
    ports: std::ops::Range<u16>,
}

impl Lab {
    fn new() -> Self {
        let (web, stranger) = Namespace::pair();
        let (guest, other) = (Namespace::alone(), Namespace::alone());
        for (ns, link, net) in [(&guest, "br0", "16"), (&other, "wlan0", "99")] {
            web.link(ns, link);
            let v4 = if net == "16" { "172.16.0" } else { "10.99.0" };
            web.ip(&format!("addr add {v4}.1/24 dev {link}"));
            web.ip(&format!("addr add fd{net}::1/64 dev {link} nodad"));
            web.ip(&format!("link set {link} up"));
            ns.ip(&format!("addr add {v4}.2/24 dev eth0"));
            ns.ip(&format!("addr add fd{net}::2/64 dev eth0 nodad"));
            ns.ip("link set eth0 up");
            ns.ip(&format!("route add default via {v4}.1"));
            ns.ip(&format!("-6 route add default via fd{net}::1"));
        }
        for net in ["241.0.0.0/8", "243.0.0.0/8", "172.16.0.0/24", "10.99.0.0/24"] {
            stranger.ip(&format!("route add {net} via 10.77.0.1"));
        }
        stranger.ip("-6 route add default via fd77::1");
        stranger.ip("route add default via 10.77.0.1");
        // Connection tracking runs only where a rule wants it, and forwarding decides about the guest's packets.
        web.sh(
            "sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1 net.ipv6.conf.all.accept_dad=0",
        );
        web.sh("nft 'table inet lab { chain out { type filter hook output priority 300; ct state new counter; }; }'");
        let tracking = Tracking::of(&web);
        let mut lab = Self { web, stranger, guest, _other: other, tracking, ports: 20000..60000 };
        // Neighbours know each other from now on.
        for way in [Way::Out, Way::Eth0, Way::Br0] {
            for to in ["10.77.0.2", "fd77::2", "10.99.0.2", "fd99::2", "172.16.0.2", "fd16::2"] {
                let shot = Shot {
                    protocol: Protocol::Udp,
                    source: None,
                    to: SocketAddr::new(to.parse().unwrap(), QUIET),
                    uid: 0,
                    gid: 0,
                    mark: 0,
                };
                lab.fire(way, &[shot]);
            }
        }
        lab
    }

    fn fire(&mut self, way: Way, shots: &[Shot]) -> Vec<Option<Sent>> {
        let (from, last) = match way {
            Way::Out => (&self.web, "127.0.0.1"),
            Way::Eth0 => (&self.stranger, "10.77.0.1"),
            Way::Br0 => (&self.guest, "172.16.0.1"),
        };
        fire(from, &self.tracking, &mut self.ports, shots, SocketAddr::new(last.parse().unwrap(), QUIET))
    }
}

impl Namespace {
    /// Joins this namespace's `name` with another's eth0.
    fn link(&self, other: &Self, name: &str) {
        let path = other.path().to_owned();
        let tid = path.iter().nth(4).unwrap().to_str().unwrap().to_owned();
        self.ip(&format!("link add {name} type veth peer name eth0 netns {tid}"));
    }
}

/// Whether the workload's namespace has the address, and by which interface packets to it leave.
fn route(plan: &Plan, aim: &Aim) -> (bool, &'static str) {
    let own = ["10.77.0.1", "172.16.0.1", "10.99.0.1", "fd77::1", "fd16::1", "fd99::1"];
    let own = own.iter().any(|address| address.parse::<IpAddr>().unwrap() == aim.to);
    let local = own || aim.to.is_loopback() || plan.local_routes.iter().any(|net| net.contains(&aim.to));
    let to_lo = plan
        .policy_route
        .is_some_and(|p| p.mark == aim.mark && (if aim.to.is_ipv4() { p.ipv4 } else { p.ipv6 }));
    let text = aim.to.to_string();
    let interface = if local || to_lo {
        "lo"
    } else if text.starts_with("172.16.") || text.starts_with("fd16:") {
        "br0"
    } else if text.starts_with("10.99.") || text.starts_with("fd99:") {
        "wlan0"
    } else {
        "eth0"
    };
    (local, interface)
}

fn shot(aim: &Aim) -> Shot {
    let passthrough = if aim.to.is_ipv4() { PASSTHROUGH_V4 } else { PASSTHROUGH_V6 };
    let out = aim.way == Way::Out;
    Shot {
        protocol: aim.protocol,
        source: (aim.passthrough && out).then_some(passthrough),
        to: SocketAddr::new(aim.to, aim.port),
        uid: aim.uid,
        gid: aim.gid,
        mark: if out { aim.mark } else { 0 },
    }
}

/// The packet as the simulator takes it.
fn packet(plan: &Plan, aim: &Aim, sent: &Sent) -> Packet {
    let (local, leaves) = route(plan, aim);
    let out = aim.way == Way::Out;
    Packet {
        point: if out { HookPoint::Output } else { HookPoint::Prerouting },
        protocol: Some(aim.protocol),
        source: sent.source.ip(),
        destination: aim.to,
        source_port: sent.source.port(),
        destination_port: aim.port,
        interface: match aim.way {
            Way::Out => leaves,
            Way::Eth0 => "eth0",
            Way::Br0 => "br0",
        }
        .to_owned(),
        owner: out.then_some(Owner { uid: aim.uid, gid: aim.gid }),
        cgroup: None,
        mark: if out { aim.mark } else { 0 },
        connection_mark: 0,
        invalid: false,
        reused: false,
        destination_is_local: local,
    }
}

/// What the simulator expects, in terms of what is seen.
fn expected(plan: &Plan, packet: &Packet, backend: Backend) -> (Fate, u16, String) {
    let decision = decide(plan, packet);
    let (iptables, out) = (backend != Backend::Nftables, packet.point == HookPoint::Output);
    let fate = match decision.verdict {
        Verdict::Passes => Fate::Passed,
        Verdict::Redirected(port) => Fate::Landed(port),
        // No transparent socket listens: nftables refuses, and iptables can't before the table filter.
        Verdict::Refused | Verdict::Handed(_) if iptables && !out => Fate::Dropped,
        Verdict::Refused | Verdict::Handed(_) => Fate::Refused,
        Verdict::Dropped => Fate::Dropped,
    };
    let tracked = matches!(fate, Fate::Passed | Fate::Landed(_));
    (fate, if tracked { decision.zone.unwrap_or(0) } else { 0 }, format!("{:?}", decision.rules))
}

fn agree(aim: &Aim, sent: &Sent, (fate, zone, _): &(Fate, u16, String)) -> bool {
    // The kernel answers datagrams with so many errors per second, and after them with silence.
    let silent = aim.protocol == Protocol::Udp && (sent.fate, *fate) == (Fate::Dropped, Fate::Refused);
    (silent || sent.fate == *fate) && sent.zone == *zone
}

fn check(
    lab: &mut Lab,
    backend: Backend,
    intent: &RedirectIntent,
    aims: &[Aim],
) -> Result<usize, TestCaseError> {
    let plan = Plan::compile(intent).map_err(|e| TestCaseError::reject(e.to_string()))?;
    lab.web
        .apply(&plan, backend)
        .map_err(|e| TestCaseError::fail(format!("{backend}: {}", e.with_causes())))?;
    let held = lab.web.run(InPlace::read).map_err(|e| TestCaseError::fail(e.with_causes()))?;
    let held = held.ok_or_else(|| TestCaseError::fail("nothing is in place"))?;
    let mut checked = 0;
    for way in [Way::Out, Way::Eth0, Way::Br0] {
        // What arrives has a foreign source, and addresses of the sender's own never arrive.
        let aims: Vec<_> =
            aims.iter().filter(|a| a.way == way && (way == Way::Out || !a.to.is_loopback())).collect();
        let shots: Vec<_> = aims.iter().map(|aim| shot(aim)).collect();
        for (aim, sent) in aims.iter().zip(lab.fire(way, &shots)) {
            let Some(sent) = sent else { continue };
            // A stranger talks to itself.
            if way != Way::Out && sent.source.ip() == aim.to {
                continue;
            }
            checked += 1;
            let mut packet = packet(&plan, aim, &sent);
            if way != Way::Out && aim.protocol == Protocol::Tcp {
                // What is redirected can't come again as if it were an older connection's.
                let again = decide(&plan, &Packet { reused: true, ..packet.clone() }).verdict;
                let wanted = match decide(&plan, &packet).verdict {
                    Verdict::Redirected(_) => Verdict::Refused,
                    other => other,
                };
                prop_assert_eq!(again, wanted, "{:?}", aim);
            }
            let (mut sent, mut wanted) = (sent, expected(&plan, &packet, backend));
            // The rules in place, read back as a plan, say the same.
            let family = if aim.to.is_ipv4() { Family::V4 } else { Family::V6 };
            let read = expected(held.plan(family), &packet, backend);
            prop_assert_eq!(
                (read.0, read.1),
                (wanted.0, wanted.1),
                "{}: {:?} read back: {}",
                backend,
                aim,
                read.2
            );
            if !agree(aim, &sent, &wanted) {
                // Once more and alone: a machine under load may answer late, but not twice.
                sent = lab.fire(way, &[shot(aim)])[0].unwrap_or(sent);
                packet.source_port = sent.source.port();
                wanted = expected(&plan, &packet, backend);
            }
            prop_assert!(
                agree(aim, &sent, &wanted),
                "{backend}: the kernel {:?} in zone {}, the simulator {:?} in zone {}: {aim:?} from {}, which met {}",
                sent.fate,
                sent.zone,
                wanted.0,
                wanted.1,
                sent.source,
                wanted.2
            );
        }
    }
    Ok(checked)
}

fn the_simulator_is_right_about(backend: Backend) {
    wire::one_processor();
    let cases = std::env::var("URSA_INTENTS").ok().and_then(|n| n.parse().ok()).unwrap_or(INTENTS);
    let config = Config { cases, failure_persistence: None, max_shrink_iters: 200, ..Config::default() };
    let lab = std::cell::RefCell::new(Lab::new());
    let checked = std::cell::Cell::new(0);
    let result =
        TestRunner::new(config).run(&(valid(), prop::collection::vec(aim(), PACKETS)), |(intent, aims)| {
            let mut lab = lab.borrow_mut();
            if lab.ports.len() < 2 * PACKETS {
                *lab = Lab::new();
            }
            checked.set(checked.get() + check(&mut lab, backend, &intent, &aims)?);
            Ok(())
        });
    if let Err(error) = result {
        panic!("{error}");
    }
    // Some packets have no way, but most do.
    assert!(checked.get() > cases as usize * PACKETS / 2, "only {} packets", checked.get());
    println!("{backend}: {} packets through {cases} plans", checked.get());
}

#[test]
fn the_simulator_is_right_about_nftables() {
    the_simulator_is_right_about(Backend::Nftables);
}

#[test]
fn the_simulator_is_right_about_iptables_nft() {
    the_simulator_is_right_about(Backend::IptablesNft);
}

#[test]
fn the_simulator_is_right_about_iptables_legacy() {
    the_simulator_is_right_about(Backend::IptablesLegacy);
}
