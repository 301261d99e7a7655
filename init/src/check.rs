//! Real connections through the rules: does what should land at the proxy really land there?
//!
//! Where no proxy runs yet, its ports are held by listeners of our own on loopback, and a random token must come back
//! from them: a stranger who answers isn't taken for the proxy. Where the proxy holds its ports already, the packet
//! counters of the rules tell. What arrives from outside can't be tried from inside; for that the rules are read back
//! and asked, and the hairpin, which shares their last part, is tried for real.

mod probe;
mod responder;

use std::borrow::Cow;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use ipnet::IpNet;
use serde::Serialize;

use crate::InPlace;
use crate::error::Error;
use crate::explain::{own_addresses, way};
use crate::intent::{Dns, DnsCapture, Inbound, InboundMode, Outbound, RedirectIntent};
use crate::plan::simulate::{Owner, Packet, Verdict, decide};
use crate::plan::{Family, HookPoint, Plan, Protocol};
use crate::routes;
use crate::slices;
use probe::Answer;
use responder::{Kind, Responders};

/// What there is without any.
const NOTHING: &str = "no rules of Ursa's are in place";

/// What became of one question.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase", tag = "result", content = "detail")]
pub enum Found {
    /// As it should be; how that is known.
    Good(String),
    /// Not redirected as it should be; what was found instead.
    Missing(String),
    /// Not tried, and why.
    Skipped(String),
}

/// One question and its answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Finding {
    /// What was tried: `outbound TCP over IPv4`.
    pub what: String,
    /// What came out.
    #[serde(flatten)]
    pub found: Found,
}

/// One workload, as far as it matters here.
struct Subject<'a> {
    name: &'a str,
    /// Who it is; anybody without.
    uid: Option<u32>,
    proxy: Option<Owner>,
    inbound: &'a Inbound,
    outbound: &'a Outbound,
    dns: &'a Dns,
}

/// Who asks, where to, and where that should land.
struct Trial {
    kind: Kind,
    protocol: Protocol,
    to: SocketAddr,
    owner: Owner,
    packet: Packet,
    port: u16,
}

/// Tries everything that the intent wants redirected, in the calling thread's namespace. `patience` is for each try.
pub fn check(intent: &RedirectIntent, patience: Duration) -> Result<Vec<Finding>, Error> {
    let plan = Plan::compile(intent)?;
    // Without rights only the connections themselves tell.
    let in_place = InPlace::read();
    let routed = routes::read_back()?.plan().local_routes;
    let missing = slices::missing(&plan).into_iter();
    let mut findings: Vec<_> = missing
        .map(|slice| Finding {
            what: format!("slice {}", slice.slice),
            found: Found::Missing(slice.to_string()),
        })
        .collect();
    for subject in Subject::all(intent) {
        for family in
            [intent.ipv4.then_some(Family::V4), intent.ipv6.then_some(Family::V6)].into_iter().flatten()
        {
            let responders = Responders::open(&subject.ports(), family);
            let mut say = |what: &str, found| {
                let of =
                    if subject.name.is_empty() { String::new() } else { format!(" of {}", subject.name) };
                findings.push(Finding { what: format!("{what}{of} over {}", name(family)), found });
            };
            if !responder::has_loopback(family) {
                say("everything", Found::Skipped("the namespace has no such addresses".to_owned()));
                continue;
            }
            for (what, trial) in trials(intent, (&plan, &routed), &subject, family) {
                match trial {
                    Ok(trial) => {
                        let found = attempt(&trial, &responders, in_place.as_ref(), patience);
                        say(&what, found);
                    }
                    Err(why) => say(&what, Found::Skipped(why)),
                }
            }
            if subject.inbound.enabled {
                say("arriving TCP", arriving(&plan, &subject, family, in_place.as_ref()));
            }
        }
    }
    Ok(findings)
}

const fn name(family: Family) -> &'static str {
    match family {
        Family::V4 => "IPv4",
        Family::V6 => "IPv6",
    }
}

impl<'a> Subject<'a> {
    fn all(intent: &'a RedirectIntent) -> Vec<Self> {
        let uid = intent.proxy_uids.first().map(|uid| Owner { uid: *uid, gid: *uid });
        let shared =
            uid.or_else(|| intent.proxy_gids.first().map(|gid| Owner { uid: u32::MAX - 1, gid: *gid }));
        if intent.workloads.is_empty() {
            return vec![Self {
                name: "",
                uid: None,
                proxy: shared,
                inbound: &intent.inbound,
                outbound: &intent.outbound,
                dns: &intent.dns,
            }];
        }
        let one = |workload: &'a crate::intent::Workload| Self {
            name: &workload.name,
            uid: workload.uids.first().map(|ids| ids.first),
            proxy: workload.proxy_uids.first().map(|uid| Owner { uid: *uid, gid: *uid }).or(shared),
            inbound: &workload.inbound,
            outbound: &workload.outbound,
            dns: &workload.dns,
        };
        intent.workloads.iter().map(one).collect()
    }

    fn ports(&self) -> Vec<(Kind, u16)> {
        let all = [
            (self.outbound.enabled, Kind::Outbound, self.outbound.port),
            (self.inbound.enabled, Kind::Inbound, self.inbound.port),
            (self.dns.enabled, Kind::Dns, self.dns.port),
        ];
        all.into_iter().filter(|(on, ..)| *on).map(|(_, kind, port)| (kind, port)).collect()
    }

    /// Users to try as: ourselves first, since that needs no right.
    fn users(&self) -> Vec<Owner> {
        let own = Owner { uid: nix::unistd::geteuid().as_raw(), gid: nix::unistd::getegid().as_raw() };
        let groups = self.outbound.include_gids.first().map(|ids| ids.first);
        let user = |uid: u32| Owner { uid, gid: groups.unwrap_or(uid) };
        match self.uid {
            Some(uid) => vec![user(uid)],
            None => [own].into_iter().chain([1000, 65534, 4242, 90210].map(user)).collect(),
        }
    }
}

/// Everything that can be tried, and what can't with its reason.
fn trials(
    intent: &RedirectIntent,
    (plan, routed): (&Plan, &[IpNet]),
    subject: &Subject<'_>,
    family: Family,
) -> Vec<(String, Result<Trial, String>)> {
    let mut all = Vec::new();
    let mut add =
        |what: &str, kind, protocol, port, ports: Vec<u16>, addresses: Vec<IpAddr>, users: Vec<Owner>| {
            let trial = choose((plan, routed), kind, protocol, port, &ports, &addresses, &users);
            all.push((what.to_owned(), trial));
        };
    let outside = outside(intent, subject.outbound, family);
    if subject.outbound.enabled {
        let included = subject.outbound.include_ports.iter().map(|ports| ports.first);
        let ports = included.chain([80, 443, 8080, 20_000]).collect();
        let port = subject.outbound.port;
        add("outbound TCP", Kind::Outbound, Protocol::Tcp, port, ports, outside.clone(), subject.users());
    }
    if subject.dns.enabled {
        let resolvers = match subject.dns.capture {
            DnsCapture::All => outside,
            DnsCapture::Resolvers => subject.dns.resolvers.clone(),
        };
        let resolvers: Vec<_> = resolvers.into_iter().filter(|ip| of(*ip) == family).collect();
        if !resolvers.is_empty() {
            for (what, protocol) in [("DNS by UDP", Protocol::Udp), ("DNS by TCP", Protocol::Tcp)] {
                add(
                    what,
                    Kind::Dns,
                    protocol,
                    subject.dns.port,
                    vec![53],
                    resolvers.clone(),
                    subject.users(),
                );
            }
        }
    }
    if subject.inbound.enabled
        && let Some(proxy) = subject.proxy
    {
        let included = subject.inbound.include_ports.iter().map(|ports| ports.first);
        let ports = included.chain([80, 443, 8080, 20_000]).collect();
        let own = own_addresses().map(|(_, ip)| ip).filter(|ip| of(*ip) == family && !ip.is_loopback());
        // ::6 is on lo for the proxy's deliveries, and a link-local address needs more than an address.
        let own = own.filter(|ip| *ip != crate::plan::PASSTHROUGH_V6 && !is_link_local(*ip)).collect();
        let port = subject.inbound.port;
        add("inbound TCP (hairpin)", Kind::Inbound, Protocol::Tcp, port, ports, own, vec![proxy]);
    }
    all
}

fn of(ip: IpAddr) -> Family {
    if ip.is_ipv4() { Family::V4 } else { Family::V6 }
}

fn is_link_local(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    }
}

/// Destinations that are nobody's: those for documentation, where there is a route, and mesh addresses, to which our
/// own routes lead.
fn outside(intent: &RedirectIntent, outbound: &Outbound, family: Family) -> Vec<IpAddr> {
    let second = |net: &IpNet| net.hosts().nth(1).unwrap_or(net.addr());
    let documentation: [IpAddr; 2] = [[192, 0, 2, 2].into(), [0x2001, 0xdb8, 0, 0, 0, 0, 0, 2].into()];
    let included = outbound.include_cidrs.iter().map(second);
    let all = included.chain(documentation).chain(intent.vip_ranges.iter().map(second));
    all.filter(|ip| of(*ip) == family).collect()
}

/// The first try that the plan redirects to the port.
fn choose(
    (plan, routed): (&Plan, &[IpNet]),
    kind: Kind,
    protocol: Protocol,
    port: u16,
    ports: &[u16],
    addresses: &[IpAddr],
    users: &[Owner],
) -> Result<Trial, String> {
    let mut why = Cow::Borrowed("there is no address of this namespace to try it with");
    for address in addresses {
        let Some(mut way) = way(*address) else {
            why = format!("there is no route to {address} or to any other destination to try it with").into();
            continue;
        };
        if plan.local_routes.iter().any(|net| net.contains(address)) {
            if !routed.iter().any(|net| net.contains(address)) {
                // It would really leave.
                why = "mesh addresses aren't routed to lo, and there is no other route".into();
                continue;
            }
            (way.interface, way.local) = ("lo".to_owned(), true);
        }
        for owner in users {
            for destination_port in ports {
                let packet = Packet {
                    point: HookPoint::Output,
                    protocol: Some(protocol),
                    source: way.source,
                    destination: *address,
                    source_port: 50000,
                    destination_port: *destination_port,
                    interface: way.interface.clone(),
                    owner: Some(*owner),
                    cgroup: None,
                    mark: 0,
                    connection_mark: 0,
                    invalid: false,
                    reused: false,
                    destination_is_local: way.local,
                };
                if decide(plan, &packet).verdict == Verdict::Redirected(port) {
                    let to = SocketAddr::new(*address, *destination_port);
                    return Ok(Trial { kind, protocol, to, owner: *owner, packet, port });
                }
                why = "nothing that could be tried is redirected by this document".into();
            }
        }
    }
    Err(why.into_owned())
}

/// Rules in place, or why they can't be read.
type Rules<'a> = Result<&'a Option<InPlace>, &'a Error>;

fn attempt(trial: &Trial, responders: &Responders, in_place: Rules<'_>, patience: Duration) -> Found {
    let udp = trial.protocol == Protocol::Udp;
    if responders.is_taken(trial.kind, udp) {
        return by_counters(trial, in_place, patience);
    }
    let answer = match probe::ask(trial.to, udp, trial.owner, patience) {
        Ok(answer) => answer,
        Err(why) => return Found::Skipped(why),
    };
    if let Answer::Text(text) = &answer
        && let Some((kind, port)) = responders.whose(text)
    {
        return if kind == trial.kind {
            Found::Good(format!("{} landed on port {port}, the token came back", trial.to))
        } else {
            Found::Missing(format!("{} landed on port {port} ({kind}), not on {}", trial.to, trial.port))
        };
    }
    Found::Missing(format!("{} {answer}; {}", trial.to, diagnosis(trial, in_place)))
}

/// What the rules in place would do, for somebody who has to repair them.
fn diagnosis(trial: &Trial, in_place: Rules<'_>) -> String {
    match in_place {
        Err(error) => format!("the rules can't be read ({error})"),
        Ok(None) => NOTHING.to_owned(),
        Ok(Some(found)) => match decide(found.plan(of(trial.to.ip())), &trial.packet).verdict {
            Verdict::Redirected(port) if port == trial.port => {
                format!("the rules lead to port {port}, but something before them or on that port interferes")
            }
            Verdict::Redirected(port) => {
                format!("the rules in place lead to port {port}, not to {}", trial.port)
            }
            Verdict::Passes => "the rules in place let it pass".to_owned(),
            verdict => format!("the rules in place decide otherwise ({verdict:?})"),
        },
    }
}

/// The proxy holds its port and won't say a token: the rule that should decide must count the connection.
fn by_counters(trial: &Trial, in_place: Rules<'_>, patience: Duration) -> Found {
    let family = of(trial.to.ip());
    let plan = match in_place {
        Ok(Some(found)) => found.plan(family),
        Ok(None) => return Found::Missing(NOTHING.to_owned()),
        Err(error) => {
            let why = format!(
                "the proxy holds port {}, and the rules' counters can't be read: {error}",
                trial.port
            );
            return Found::Skipped(why);
        }
    };
    let decision = decide(plan, &trial.packet);
    if decision.verdict != Verdict::Redirected(trial.port) {
        return Found::Missing(diagnosis(trial, in_place));
    }
    let Some((chain, position)) = decision.rules.iter().rev().find(|(chain, position)| {
        let rules = plan.chains.iter().find(|c| c.name == *chain).map(|c| &c.rules);
        let rule = rules.and_then(|rules| rules.get(*position));
        rule.is_some_and(|rule| rule.action == crate::plan::Action::Redirect(trial.port))
    }) else {
        return Found::Missing(diagnosis(trial, in_place));
    };
    let read = || Ok::<_, Error>(InPlace::read()?.map_or(0, |found| found.packets(family, chain, *position)));
    let before = read();
    if let Err(why) = probe::ask(trial.to, trial.protocol == Protocol::Udp, trial.owner, patience) {
        return Found::Skipped(why);
    }
    match (before, read()) {
        (Ok(before), Ok(after)) if after > before => Found::Good(format!(
            "{} was counted by rule {} of chain {chain}, which leads to the proxy's port {}",
            trial.to,
            position + 1,
            trial.port
        )),
        (Ok(_), Ok(_)) => Found::Missing(format!(
            "{} wasn't counted by the rule that leads to port {}",
            trial.to, trial.port
        )),
        (Err(error), _) | (_, Err(error)) => Found::Skipped(error.with_causes()),
    }
}

/// What arrives, asked of the rules in place.
fn arriving(plan: &Plan, subject: &Subject<'_>, family: Family, in_place: Rules<'_>) -> Found {
    let in_place = match in_place {
        Ok(Some(found)) => found.plan(family),
        Ok(None) => return Found::Missing(NOTHING.to_owned()),
        Err(error) => return Found::Skipped(format!("the rules can't be read: {error}")),
    };
    let (source, destination): (IpAddr, IpAddr) = match family {
        Family::V4 => ([192, 0, 2, 3].into(), [192, 0, 2, 2].into()),
        Family::V6 => ([0x2001, 0xdb8, 0, 0, 0, 0, 0, 3].into(), [0x2001, 0xdb8, 0, 0, 0, 0, 0, 2].into()),
    };
    let own = own_addresses().find(|(_, ip)| of(*ip) == family && !ip.is_loopback());
    let (interface, destination) = own.unwrap_or_else(|| ("eth0".to_owned(), destination));
    let wanted = match subject.inbound.mode {
        InboundMode::Redirect => Verdict::Redirected(subject.inbound.port),
        InboundMode::Tproxy => Verdict::Handed(subject.inbound.port),
    };
    let included = subject.inbound.include_ports.iter().map(|ports| ports.first);
    for destination_port in included.chain([80, 443, 8080, 20_000]) {
        let packet = Packet {
            point: HookPoint::Prerouting,
            protocol: Some(Protocol::Tcp),
            source,
            destination,
            source_port: 50000,
            destination_port,
            interface: interface.clone(),
            owner: None,
            cgroup: None,
            mark: 0,
            connection_mark: 0,
            invalid: false,
            reused: false,
            destination_is_local: true,
        };
        if decide(plan, &packet).verdict != wanted {
            continue;
        }
        let found = decide(in_place, &packet).verdict;
        return if found == wanted {
            Found::Good(format!(
                "the rules in place lead port {destination_port} to {}",
                subject.inbound.port
            ))
        } else {
            Found::Missing(format!(
                "the rules in place decide {found:?} about port {destination_port}, not {wanted:?}"
            ))
        };
    }
    Found::Skipped("nothing that could arrive is redirected by this document".to_owned())
}
