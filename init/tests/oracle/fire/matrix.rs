//! The packets that rules ask for: whatever they name, just inside and just outside of it.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use ipnet::IpNet;
use ursa_init::RedirectIntent;
use ursa_init::intent::InboundMode;

use super::lab::{GUESTS, LINK_LOCAL, OWN4, OWN6, is_own};
use super::probe::{Layer4, Origin, Probe};

/// The user and group of an application.
const APP: (u32, u32) = (1000, 1000);
/// Ports that no rule need name.
const PORTS: [u16; 7] = [53, 80, 15001, 15006, 15008, 15053, 15090];

/// What rules in the form of `iptables-save` name, and its neighbours.
#[derive(Debug, Default)]
pub(crate) struct Edges {
    ports: BTreeSet<u16>,
    uids: BTreeSet<u32>,
    gids: BTreeSet<u32>,
    sources: BTreeSet<IpAddr>,
    destinations: BTreeSet<IpAddr>,
}

impl Edges {
    /// Reads the rules of both families.
    pub(crate) fn of(rules: &[&str]) -> Self {
        let mut edges = Self::default();
        for line in rules.iter().flat_map(|rules| rules.lines()) {
            let words: Vec<_> = line.split_whitespace().collect();
            for pair in words.windows(2) {
                edges.word(pair[0], pair[1]);
            }
        }
        edges
    }

    fn word(&mut self, option: &str, value: &str) {
        match option {
            "--dport" | "--dports" | "--to-ports" | "--to-port" | "--on-port" => {
                for span in value.split(',') {
                    self.ports.extend(around(span).into_iter().filter_map(|n| u16::try_from(n).ok()));
                }
            }
            "--uid-owner" => self.uids.extend(around(value)),
            "--gid-owner" => self.gids.extend(around(value)),
            "-s" => self.sources.extend(addresses(value)),
            "-d" => self.destinations.extend(addresses(value)),
            _ => {}
        }
    }
}

/// The ends of a number or range, and the numbers beside them; 0 is neither a port nor an application's.
fn around(span: &str) -> BTreeSet<u32> {
    let (first, last) = span.split_once([':', '-']).unwrap_or((span, span));
    let ends = [first, last].into_iter().filter_map(|n| n.parse::<u32>().ok());
    ends.flat_map(|n| [n.saturating_sub(1), n, n + 1]).filter(|n| *n > 0).collect()
}

/// The ends of a range of addresses and the ones beside them, as far as a packet can have them.
fn addresses(net: &str) -> Vec<IpAddr> {
    let net = net.parse::<IpNet>().or_else(|_| net.parse::<IpAddr>().map(IpNet::from));
    let ends = match net {
        Ok(IpNet::V4(net)) => {
            let (first, last) = (u32::from(net.network()), u32::from(net.broadcast()));
            let all = [first.wrapping_sub(1), first, last, last.wrapping_add(1)];
            all.map(|bits| IpAddr::from(Ipv4Addr::from(bits)))
        }
        Ok(IpNet::V6(net)) => {
            let (first, last) = (u128::from(net.network()), u128::from(net.broadcast()));
            let all = [first.wrapping_sub(1), first, last, last.wrapping_add(1)];
            all.map(|bits| IpAddr::from(Ipv6Addr::from(bits)))
        }
        Err(_) => return Vec::new(),
    };
    let usable = |address: &IpAddr| match address {
        // 127/8, 0/8 and 224/3 are nobody's across a link; neither are ::/64, fe80::/10 and ff00::/8.
        IpAddr::V4(v4) => (1..224).contains(&v4.octets()[0]) && !v4.is_loopback(),
        IpAddr::V6(v6) => v6.segments()[0] > 0 && v6.segments()[0] & 0xff80 != 0xfe80 && !v6.is_multicast(),
    };
    ends.into_iter().filter(usable).collect()
}

/// Collects probes, each once.
#[derive(Default)]
struct Matrix {
    probes: BTreeSet<Probe>,
}

impl Matrix {
    fn add(&mut self, origin: Origin, layer4: Layer4, source: Option<IpAddr>, to: IpAddr, port: u16) {
        let to = SocketAddr::new(to, port);
        self.probes.insert(Probe { origin, layer4, source, to, may_be_lost: false });
    }
}

/// The probes for a peer's rules and the intent that is to do the same.
pub(crate) fn matrix(edges: &Edges, intent: &RedirectIntent) -> Vec<Probe> {
    let mut matrix = Matrix::default();
    let ports: BTreeSet<u16> = edges.ports.iter().copied().chain(PORTS).collect();
    opened(&mut matrix, edges, intent, &ports);
    arriving(&mut matrix, edges, &ports);
    guests(&mut matrix, edges, &ports);
    let probes =
        matrix.probes.into_iter().map(|probe| Probe { may_be_lost: may_be_lost(&probe, intent), ..probe });
    probes.collect()
}

/// Whether one of the two rule sets swallows the packet, or its answer.
fn may_be_lost(probe: &Probe, intent: &RedirectIntent) -> bool {
    let to = probe.to.ip();
    let same_family = |net: &IpNet| net.addr().is_ipv4() == to.is_ipv4();
    let lookup = probe.layer4 == Layer4::Udp && probe.to.port() == 53;
    let guest = match probe.origin {
        Origin::Web { .. } => return false,
        Origin::Far => false,
        Origin::Guest(name) => intent.bridges.iter().any(|bridge| {
            let concerned = bridge.local_cidrs.is_empty() || bridge.local_cidrs.iter().any(same_family);
            concerned && bridge.interface.matches(name)
        }),
    };
    // Ursa swallows what is for a mesh address, unless it redirects it.
    let redirected = match probe.layer4 {
        Layer4::Tcp => intent.outbound.enabled,
        Layer4::Udp => intent.dns.enabled && lookup,
    };
    let mesh = intent.vip_ranges.iter().any(|range| range.contains(&to));
    // Istio loses what is only forwarded when it is transparent.
    let forwarded = intent.inbound.mode == InboundMode::Tproxy && !is_own(to);
    // Kuma's shim answers guests in another conntrack zone than they asked in.
    let zones = guest && lookup && intent.dns.enabled && intent.dns.conntrack_zones;
    forwarded || zones || (mesh && !(guest && redirected))
}

fn remote() -> [IpAddr; 2] {
    [Ipv4Addr::new(93, 184, 216, 34).into(), Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 1).into()]
}

/// Addresses of Ursa's default mesh ranges.
fn mesh() -> [IpAddr; 2] {
    let v6 = Ipv6Addr::new(0xfd75, 0x7273, 0x6100, 0, 0, 0, 0, 7);
    [Ipv4Addr::new(241, 0, 0, 7).into(), v6.into()]
}

fn opened(matrix: &mut Matrix, edges: &Edges, intent: &RedirectIntent, ports: &BTreeSet<u16>) {
    let mut owners = vec![APP, (0, 0)];
    owners.extend(edges.uids.iter().map(|uid| (*uid, APP.1)));
    owners.extend(edges.gids.iter().map(|gid| (APP.0, *gid)));
    let mut known = vec![APP];
    known.extend(intent.proxy_uids.iter().map(|uid| (*uid, APP.1)));
    known.extend(intent.proxy_gids.iter().map(|gid| (APP.0, *gid)));
    let loopback: [IpAddr; 3] =
        [Ipv4Addr::LOCALHOST.into(), Ipv4Addr::new(127, 0, 0, 2).into(), Ipv6Addr::LOCALHOST.into()];
    let inside: Vec<IpAddr> = loopback.into_iter().chain([OWN4, OWN6]).collect();
    let origin = |(uid, gid): (u32, u32)| Origin::Web { uid, gid };
    for owner in owners {
        for to in inside.iter().copied().chain(remote()).chain(mesh()) {
            for layer4 in [Layer4::Tcp, Layer4::Udp] {
                for port in [53, 80] {
                    matrix.add(origin(owner), layer4, None, to, port);
                }
            }
        }
        for to in remote() {
            for port in ports {
                matrix.add(origin(owner), Layer4::Tcp, None, to, *port);
                matrix.add(origin(owner), Layer4::Udp, None, to, *port);
            }
        }
    }
    for owner in known {
        let guests = GUESTS.iter().flat_map(|guests| guests.guest());
        for to in edges.destinations.iter().copied().chain(guests) {
            for port in [53, 80] {
                matrix.add(origin(owner), Layer4::Tcp, None, to, port);
                matrix.add(origin(owner), Layer4::Udp, None, to, port);
            }
        }
        for to in &inside {
            for port in ports {
                matrix.add(origin(owner), Layer4::Tcp, None, *to, *port);
            }
        }
        // The address that marks the proxy's deliveries, on lo and elsewhere.
        let passthrough: [IpAddr; 2] =
            [Ipv4Addr::new(127, 0, 0, 6).into(), Ipv6Addr::new(0, 0, 0, 0, 0, 0, 0, 6).into()];
        // Without deliveries nobody has the IPv6 address.
        for to in inside.iter().filter(|to| to.is_ipv4() || (intent.inbound.enabled && intent.ipv6)) {
            let source = passthrough[usize::from(to.is_ipv6())];
            for port in [53, 80] {
                matrix.add(origin(owner), Layer4::Tcp, Some(source), *to, port);
            }
            matrix.add(origin(owner), Layer4::Udp, Some(source), *to, 53);
        }
    }
}

fn arriving(matrix: &mut Matrix, edges: &Edges, ports: &BTreeSet<u16>) {
    for own in [OWN4, OWN6] {
        for port in ports {
            matrix.add(Origin::Far, Layer4::Tcp, None, own, *port);
            matrix.add(Origin::Far, Layer4::Udp, None, own, *port);
        }
        for source in edges.sources.iter().filter(|source| source.is_ipv4() == own.is_ipv4()) {
            for port in ports.iter().filter(|port| **port < 15000 || **port == 15006) {
                matrix.add(Origin::Far, Layer4::Tcp, Some(*source), own, *port);
            }
        }
    }
    for port in [53, 80] {
        matrix.add(Origin::Far, Layer4::Tcp, None, LINK_LOCAL, port);
        let forwarded = GUESTS.iter().flat_map(|guests| guests.guest());
        for to in forwarded.chain(mesh()) {
            matrix.add(Origin::Far, Layer4::Tcp, None, to, port);
        }
    }
}

fn guests(matrix: &mut Matrix, edges: &Edges, ports: &BTreeSet<u16>) {
    for guests in GUESTS {
        let from = Origin::Guest(guests.interface);
        for (family, own) in guests.own().into_iter().enumerate() {
            // A probe leaves with its interface's own address: its family must fit.
            let source = Some(guests.guest()[family]);
            let fits = |to: &IpAddr| to.is_ipv6() == own.is_ipv6();
            let others = [own, guests.behind()[family], [OWN4, OWN6][family], remote()[family]];
            for to in others.into_iter().chain(edges.destinations.iter().copied().filter(fits)) {
                for port in [53, 80, 15001, 15006] {
                    matrix.add(from, Layer4::Tcp, source, to, port);
                    matrix.add(from, Layer4::Udp, source, to, port);
                }
            }
            for port in ports {
                matrix.add(from, Layer4::Tcp, source, own, *port);
            }
            // Some are swallowed, which takes time: not from every interface.
            if ["docker0", "br-x"].contains(&guests.interface) {
                matrix.add(from, Layer4::Tcp, source, mesh()[family], 80);
                matrix.add(from, Layer4::Udp, source, mesh()[family], 53);
            }
        }
    }
}
