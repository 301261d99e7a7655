//! `ursa-init explain`.

use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::Context as _;
use clap::Args;
use serde_json::json;

use super::Usage;
use super::options::Options;
use super::place::Place;
use crate::InPlace;
use crate::explain::{Explanation, Landing, Way, explain, listeners, own_addresses, way};
use crate::plan::simulate::{Owner, Packet};
use crate::plan::{Family, HookPoint, PASSTHROUGH_V4, PASSTHROUGH_V6, Plan, Protocol};

#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "The packet")]
pub(super) struct Arguments {
    /// Who sends it: uid N, gid N, cgroup PATH, interface NAME, mark N, or an address, in any order
    #[arg(long, num_args = 1.., value_name = "WHO", required = true)]
    from: Vec<String>,
    /// Where it is sent: 10.0.0.1:5432/tcp, [fd00::1]:53/udp, :8080/tcp for this namespace
    #[arg(long, value_name = "ADDRESS:PORT[/PROTOCOL]")]
    to: String,
    /// It arrives; without this it does when --from names an address and nobody
    #[arg(long)]
    arriving: bool,
    /// As JSON
    #[arg(long)]
    json: bool,
}

/// Who sends a packet.
#[derive(Debug, Default)]
struct Sender {
    uid: Option<u32>,
    gid: Option<u32>,
    cgroup: Option<String>,
    interface: Option<String>,
    mark: u32,
    address: Option<IpAddr>,
}

impl Sender {
    fn parse(words: &[String]) -> Result<Self, Usage> {
        let mut sender = Self::default();
        let mut words = words.iter().flat_map(|word| word.split(['=', ','])).filter(|word| !word.is_empty());
        while let Some(word) = words.next() {
            if let Ok(address) = word.parse() {
                sender.address = Some(address);
                continue;
            }
            let mut value =
                || words.next().ok_or_else(|| Usage(format!("--from {word} wants a value behind it")));
            let number = |text: &str| {
                text.parse()
                    .map_err(|_| Usage(format!("--from {word}: `{text}` is no number; see `id -u {text}`")))
            };
            match word {
                "uid" => sender.uid = Some(number(value()?)?),
                "gid" => sender.gid = Some(number(value()?)?),
                "mark" => sender.mark = number(value()?)?,
                "cgroup" => sender.cgroup = Some(value()?.trim_matches('/').to_owned()),
                "interface" => sender.interface = Some(value()?.to_owned()),
                _ => {
                    let known = "uid N, gid N, cgroup PATH, interface NAME, mark N, or an address";
                    return Err(Usage(format!("--from {word}: say {known}")));
                }
            }
        }
        Ok(sender)
    }
}

/// `10.0.0.1:5432/tcp`; without an address this namespace's own.
fn destination(text: &str) -> Result<(Option<IpAddr>, u16, Protocol), Usage> {
    let wrong = || {
        Usage(format!("--to {text}: say ADDRESS:PORT/tcp or /udp, such as 10.0.0.1:5432/tcp or :8080/tcp"))
    };
    let (place, protocol) = match text.rsplit_once('/') {
        Some((place, "tcp")) => (place, Protocol::Tcp),
        Some((place, "udp")) => (place, Protocol::Udp),
        Some(_) => return Err(wrong()),
        None => (text, Protocol::Tcp),
    };
    let (address, port) = place.rsplit_once(':').ok_or_else(wrong)?;
    let port = port.parse().map_err(|_| wrong())?;
    let address = address.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(address);
    let address = if address.is_empty() { None } else { Some(address.parse().map_err(|_| wrong())?) };
    Ok((address, port, protocol))
}

pub(super) fn run(
    out: &mut impl Write,
    place: &Place,
    options: &Options,
    arguments: &Arguments,
) -> anyhow::Result<()> {
    let sender = Sender::parse(&arguments.from)?;
    let to = destination(&arguments.to)?;
    let netns = place.look()?;
    let (plans, in_place) = if options.is_empty() {
        let found =
            netns.run(InPlace::read)?.context("can't read the rules in place; name a document (--config)")?;
        let none = "no rules of Ursa's are in place: name a document (--config, --proxy-uid, …)";
        let found = found.ok_or_else(|| Usage(none.to_owned()))?;
        ([found.plan(Family::V4).clone(), found.plan(Family::V6).clone()], Some(found))
    } else {
        let mut intent = options.resolve()?.0;
        place.keep_ssh(&netns, &mut intent, None)?;
        let plan = Plan::compile(&intent)?;
        ([plan.clone(), plan], None)
    };
    let of = match &in_place {
        Some(found) => format!("the rules in place ({})", found.backend),
        None => "the document".to_owned(),
    };
    let local = sender.uid.is_some() || sender.gid.is_some() || sender.cgroup.is_some();
    let arriving = arguments.arriving || (sender.address.is_some() && !local);
    // Both families have the same routes.
    let packet = place.inside(&netns, || packet(&plans[0], &sender, to, arriving))??;
    let family = if packet.destination.is_ipv4() { Family::V4 } else { Family::V6 };
    let mut explanation = explain(&plans[usize::from(family == Family::V6)], &packet);
    if let Some(found) = &in_place {
        found.in_its_words(family, &mut explanation);
    }
    let protocol = packet.protocol.unwrap_or(Protocol::Tcp);
    let listening = place.inside(&netns, || listeners(protocol))?;
    let listener = match explanation.landing {
        Landing::Redirected(port) | Landing::Handed(port) => {
            match listening.iter().find(|(p, _)| *p == port) {
                Some((_, uid)) => format!("A process of uid {uid} listens there."),
                None => "NOTHING LISTENS THERE now: it is refused.".to_owned(),
            }
        }
        _ => String::new(),
    };
    if arguments.json {
        let mut document = serde_json::to_value(&explanation)?;
        document["packet"] = json!(describe(&packet));
        document["of"] = json!(of);
        writeln!(out, "{}", serde_json::to_string_pretty(&document)?)?;
        return Ok(());
    }
    write(out, &packet, &of, &explanation, &listener)
}

/// Fills in what the namespace knows: addresses and interfaces that weren't said.
fn packet(
    plan: &Plan,
    sender: &Sender,
    (to, destination_port, protocol): (Option<IpAddr>, u16, Protocol),
    arriving: bool,
) -> Result<Packet, Usage> {
    let own = |like: Option<IpAddr>| {
        let same = |ip: &IpAddr| like.is_none_or(|like| like.is_ipv4() == ip.is_ipv4());
        let mut all: Vec<_> = own_addresses().map(|(_, ip)| ip).filter(same).collect();
        // Nobody's but the proxy's, when it delivers.
        all.retain(|ip| ![PASSTHROUGH_V4, PASSTHROUGH_V6].contains(ip));
        all.sort_by_key(IpAddr::is_loopback);
        all.first().copied()
    };
    let no_address = || Usage("this namespace has no address of that family: say one in --to".to_owned());
    let destination = to.or_else(|| own(sender.address)).ok_or_else(no_address)?;
    // Mesh addresses are routed to lo by us, with a source; a document may not be in place yet.
    let mesh = plan.local_routes.iter().any(|net| net.contains(&destination));
    let known = if mesh {
        let source = match destination {
            IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
            IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
        };
        Some(Way { source, interface: "lo".to_owned(), local: true })
    } else {
        way(destination)
    };
    let interface = sender.interface.clone().or_else(|| {
        if arriving {
            way(sender.address?).map(|way| way.interface)
        } else {
            known.as_ref().map(|w| w.interface.clone())
        }
    });
    let source =
        sender.address.or_else(|| known.as_ref().map(|way| way.source)).or_else(|| own(Some(destination)));
    let uid = sender.uid.unwrap_or_default();
    Ok(Packet {
        point: if arriving { HookPoint::Prerouting } else { HookPoint::Output },
        protocol: Some(protocol),
        source: source.unwrap_or(destination),
        destination,
        // Any that is nobody's.
        source_port: 50000,
        destination_port,
        interface: interface.unwrap_or_else(|| "eth0".to_owned()),
        owner: (!arriving).then(|| Owner { uid, gid: sender.gid.unwrap_or(uid) }),
        cgroup: sender.cgroup.clone(),
        mark: sender.mark,
        connection_mark: 0,
        invalid: false,
        reused: false,
        destination_is_local: known.is_some_and(|way| way.local),
    })
}

fn describe(packet: &Packet) -> String {
    let protocol = packet.protocol.map(|p| p.to_string()).unwrap_or_default();
    let to = std::net::SocketAddr::new(packet.destination, packet.destination_port);
    let who = packet
        .owner
        .map(|owner| format!(", sent by uid {} gid {}", owner.uid, owner.gid))
        .unwrap_or_default();
    let by = if packet.owner.is_some() { "leaving" } else { "arriving" };
    format!("{protocol} from {} to {to}{who}, {by} by {}", packet.source, packet.interface)
}

fn write(
    out: &mut impl Write,
    packet: &Packet,
    of: &str,
    explanation: &Explanation,
    listener: &str,
) -> anyhow::Result<()> {
    writeln!(out, "{}", describe(packet))?;
    writeln!(out, "meets these rules of {of}:")?;
    for step in &explanation.rules {
        let mark = if step.decides { "=>" } else { "  " };
        writeln!(out, "{mark} {} {}: {}  # {}", step.chain, step.position, step.rule, step.reason)?;
    }
    if explanation.rules.is_empty() {
        writeln!(out, "   none")?;
    }
    writeln!(out, "It {}.", explanation.landing)?;
    if !listener.is_empty() {
        writeln!(out, "{listener}")?;
    }
    if let Some(otherwise) = &explanation.otherwise {
        let setting = explanation.setting.map(|s| format!(", which comes from {s},")).unwrap_or_default();
        writeln!(out, "Without the rule marked =>{setting} it {otherwise}.")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn questions() {
        assert_eq!(
            destination("10.0.0.1:5432/tcp").unwrap(),
            (Some([10, 0, 0, 1].into()), 5432, Protocol::Tcp)
        );
        assert_eq!(destination("[fd00::1]:53/udp").unwrap().2, Protocol::Udp);
        assert_eq!(destination(":8080").unwrap(), (None, 8080, Protocol::Tcp));
        for wrong in ["10.0.0.1", "10.0.0.1:x/tcp", "10.0.0.1:5/icmp", "host:5/tcp"] {
            assert!(destination(wrong).unwrap_err().0.contains("ADDRESS:PORT"), "{wrong}");
        }
        let words = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
        let sender = Sender::parse(&words("uid 1000 gid=5 interface eth1 10.0.0.9")).unwrap();
        assert_eq!(
            (sender.uid, sender.gid, sender.interface.as_deref()),
            (Some(1000), Some(5), Some("eth1"))
        );
        assert_eq!(sender.address, Some([10, 0, 0, 9].into()));
        for wrong in ["uid", "uid root", "user 5"] {
            assert!(Sender::parse(&words(wrong)).is_err(), "{wrong}");
        }
    }
}
