//! Differences on purpose, each by name, and whatever else differs.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};

use ipnet::IpNet;
use ursa_init::RedirectIntent;
use ursa_init::intent::InboundMode;

use super::lab::{GUESTS, is_own};
use super::probe::{Landed, Layer4, Origin, Place, Probe};

/// A probe that landed elsewhere.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Difference {
    pub(crate) probe: Probe,
    /// With the peer's rules.
    pub(crate) theirs: Landed,
    /// With Ursa's.
    pub(crate) ours: Landed,
}

/// Those that differ.
pub(crate) fn between(probes: &[Probe], theirs: &[Landed], ours: &[Landed]) -> Vec<Difference> {
    let all = probes.iter().zip(theirs).zip(ours);
    all.filter(|((_, theirs), ours)| theirs != ours)
        .map(|((probe, theirs), ours)| Difference { probe: *probe, theirs: *theirs, ours: *ours })
        .collect()
}

impl std::fmt::Display for Difference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: theirs {}, ours {}", self.probe, self.theirs, self.ours)
    }
}

/// A kind of difference that is on purpose.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Named {
    /// Mesh addresses are redirected or refused, whoever sends, and never taken from the wire.
    MeshAddressesAreClosed,
    /// The proxy's own ports don't answer the outside. With the peers they answer through the redirect, as ports of
    /// the application that it hasn't got.
    OwnPortsAreClosed,
    /// Connections that are only forwarded belong to somebody else.
    ForwardedIsLeftAlone,
    /// All of 127/8 is loopback for the proxy too, not only 127.0.0.1.
    LoopbackIsAllOfIt,
    /// Lookups over TCP go to the shim.
    LookupsOverTcp,
    /// What the shim itself asks a resolver of this namespace over TCP isn't sent to the inbound listener, whichever
    /// user or group of the proxy's it has.
    ShimAsksDirectly,
    /// With some resolvers captured, a lookup of another one inside the namespace is no call to the outside.
    OtherLocalResolversAreLocal,
    /// A guest's lookups go to the shim and are answered. Kuma's shim answers in another conntrack zone than the
    /// guest asked in, and the answer doesn't look like one.
    LookupsOfGuests,
    /// A proxy's call of its own workload goes to the inbound listener under the same rules as everybody's call: ports
    /// that are excluded there, or not included, are not the listener's.
    HairpinHonoursInboundPorts,
    /// What is excluded for connections that the application opens doesn't exempt the hairpin.
    HairpinIgnoresOutboundExclusions,
    /// Every user and group of the proxy hairpins, not only the first.
    EveryProxyHairpins,
    /// The peer has no hairpin.
    HairpinAtAll,
    /// The port of Istio's tunnels is left alone with TPROXY too.
    TunnelIsLeftAlone,
    /// The proxy's deliveries aren't lookups, whoever sends them.
    DeliveriesAreNoLookups,
}

impl Named {
    /// Whether a difference is of this kind, and exactly that.
    fn explains(self, d: &Difference, intent: &RedirectIntent) -> bool {
        let Difference { probe, theirs, ours } = *d;
        let (to, port) = (probe.to.ip(), probe.to.port());
        let tcp = probe.layer4 == Layer4::Tcp;
        let own_port = Landed::At(Place::Web, port);
        let to_inbound = Landed::At(Place::Web, intent.inbound.port);
        let to_shim = Landed::At(Place::Web, intent.dns.port);
        let mesh = intent.vip_ranges.iter().any(|range| range.contains(&to));
        let outside = !matches!(probe.origin, Origin::Web { .. });
        let proxy = match probe.origin {
            Origin::Web { uid, gid } => intent.proxy_uids.contains(&uid) || intent.proxy_gids.contains(&gid),
            _ => false,
        };
        let hairpins = proxy && tcp && is_own(to) && !to.is_loopback();
        match self {
            Self::MeshAddressesAreClosed => {
                let redirected = Landed::At(Place::Web, intent.outbound.port);
                let guest = matches!(probe.origin, Origin::Guest(_));
                let refused = ours == Landed::Refused && (!outside || guest);
                let swallowed = ours == Landed::Lost && probe.may_be_lost;
                mesh && (refused || swallowed || (ours == redirected && !proxy && tcp))
            }
            Self::OwnPortsAreClosed => {
                let dns = intent.dns.enabled && port == intent.dns.port;
                let own = [intent.inbound.port, intent.outbound.port].contains(&port) && tcp;
                // iptables can only discard that early.
                let closed = ours == Landed::Refused || (ours == Landed::Lost && probe.may_be_lost);
                outside && is_own(to) && (own || dns) && closed
            }
            Self::ForwardedIsLeftAlone => {
                // With TPROXY Istio takes the answers of forwarded connections for the proxy's, and they're lost.
                let taken = theirs == to_inbound || theirs == Landed::Lost;
                outside && !is_own(to) && !mesh && taken && ours == untouched(to, port)
            }
            Self::LoopbackIsAllOfIt => {
                let net = IpNet::from(IpAddr::V4(Ipv4Addr::LOCALHOST));
                proxy
                    && tcp
                    && to.is_loopback()
                    && !net.contains(&to)
                    && theirs == to_inbound
                    && ours == own_port
            }
            Self::LookupsOverTcp => intent.dns.enabled && tcp && port == 53 && !proxy && ours == to_shim,
            Self::ShimAsksDirectly => {
                intent.dns.enabled && port == 53 && hairpins && theirs == to_inbound && ours == own_port
            }
            Self::OtherLocalResolversAreLocal => {
                let redirected = Landed::At(Place::Web, intent.outbound.port);
                let other = intent.dns.enabled && !intent.dns.resolvers.contains(&to);
                let local = !outside && !proxy && is_own(to) && theirs == redirected && ours == own_port;
                tcp && port == 53 && other && local
            }
            Self::LookupsOfGuests => {
                matches!(probe.origin, Origin::Guest(_)) && port == 53 && ours == to_shim
            }
            Self::HairpinHonoursInboundPorts => {
                let inbound = &intent.inbound;
                let listed = inbound.include_ports.iter().any(|ports| ports.contains(port));
                let excluded = inbound.exclude_ports.iter().any(|ports| ports.contains(port));
                let left =
                    !inbound.enabled || if inbound.include_ports.is_empty() { excluded } else { !listed };
                hairpins && left && theirs == to_inbound && ours == own_port
            }
            Self::HairpinIgnoresOutboundExclusions => {
                let outbound = &intent.outbound;
                let excluded = outbound.exclude_ports.iter().any(|ports| ports.contains(port))
                    || outbound.exclude_cidrs.iter().any(|net| net.contains(&to));
                hairpins && excluded && theirs == own_port && ours == to_inbound
            }
            Self::EveryProxyHairpins => {
                let first = match (probe.origin, intent.proxy_uids.first(), intent.proxy_gids.first()) {
                    (Origin::Web { uid, .. }, Some(first), _) => uid == *first,
                    (Origin::Web { gid, .. }, None, Some(first)) => gid == *first,
                    _ => false,
                };
                hairpins && !first && theirs == own_port && ours == to_inbound
            }
            Self::HairpinAtAll => hairpins && theirs == own_port && ours == to_inbound,
            Self::TunnelIsLeftAlone => {
                let transparent = intent.inbound.mode == InboundMode::Tproxy;
                transparent && outside && port == 15008 && theirs == to_inbound && ours == own_port
            }
            Self::DeliveriesAreNoLookups => {
                let passthrough = probe.source.is_some() && !outside;
                passthrough && is_own(to) && port == 53 && theirs == to_shim && ours == own_port
            }
        }
    }
}

/// Where a packet lands that nothing touches.
fn untouched(to: IpAddr, port: u16) -> Landed {
    let place = match to {
        _ if is_own(to) => Place::Web,
        _ if GUESTS.iter().any(|guests| guests.guest().contains(&to)) => Place::Guest,
        _ => Place::Far,
    };
    Landed::At(place, port)
}

/// Differences, sorted by name.
#[derive(Debug, Default)]
pub(crate) struct Sorted {
    /// Those on purpose.
    pub(crate) named: BTreeMap<Named, Vec<Difference>>,
    /// The others.
    pub(crate) unnamed: Vec<Difference>,
}

impl Sorted {
    /// Gives each difference the first of the allowed names that explains it.
    pub(crate) fn new(differences: Vec<Difference>, allowed: &[Named], intent: &RedirectIntent) -> Self {
        let mut sorted = Self::default();
        for difference in differences {
            match allowed.iter().find(|named| named.explains(&difference, intent)) {
                Some(named) => sorted.named.entry(*named).or_default().push(difference),
                None => sorted.unnamed.push(difference),
            }
        }
        sorted
    }
}
