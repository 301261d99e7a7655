//! One rule of the plan in iptables' words.

use std::fmt::Write as _;
use std::net::IpAddr;

use ipnet::IpNet;

use super::compile::{Table, name};
use crate::cgroup::{self, Cgroups};
use crate::error::Error;
use crate::intent::{Cgroup, Ids, Interface, Ports};
use crate::plan::{Action, Family, Match, Protocol, Rule};

/// The kernel's limit of a comment, without the zero at its end.
const COMMENT: usize = 255;
/// The kernel's limit of an interface's name, without the zero at its end.
const INTERFACE: usize = 15;

/// What a rule asks of a packet, each thing once: iptables takes most options only once.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Matching {
    protocol: Option<Protocol>,
    not_protocol: Option<Protocol>,
    source: Option<IpNet>,
    destination: Option<IpNet>,
    in_interface: Option<Interface>,
    out_interface: Option<Interface>,
    source_port: Option<Ports>,
    destination_port: Option<Ports>,
    local: bool,
    invalid: bool,
    untranslated: bool,
    /// Whether the packet asks for a connection; `None` where that doesn't matter.
    syn: Option<bool>,
    /// `(option, negated, value)` of the owner match; may stand several times.
    owners: Vec<String>,
    cgroups: Vec<Cgroup>,
    mark: Option<u32>,
    connection_mark: Option<u32>,
}

/// Both must hold: the narrower one, or `None` where nothing fulfils both.
fn narrow<T: Clone>(have: &mut Option<T>, more: &T, both: impl Fn(&T, &T) -> Option<T>) -> Option<()> {
    *have = Some(match have {
        None => more.clone(),
        Some(have) => both(have, more)?,
    });
    Some(())
}

fn same<T: Clone + PartialEq>(a: &T, b: &T) -> Option<T> {
    (a == b).then(|| a.clone())
}

fn nets(a: &IpNet, b: &IpNet) -> Option<IpNet> {
    if a.contains(b) { Some(*b) } else { b.contains(a).then_some(*a) }
}

fn interfaces(a: &Interface, b: &Interface) -> Option<Interface> {
    if a.is_prefix() && b.name().starts_with(a.name()) {
        Some(b.clone())
    } else {
        (a == b || (b.is_prefix() && a.name().starts_with(b.name()))).then(|| a.clone())
    }
}

fn ports(a: Ports, b: Ports) -> Option<Ports> {
    a.overlaps(b).then(|| Ports { first: a.first.max(b.first), last: a.last.min(b.last) })
}

impl Matching {
    /// What the matches mean together for packets of the family; `None` when they can't all hold.
    pub(super) fn of(matches: &[Match], family: Family) -> Result<Option<Self>, Error> {
        let mut out = Self::default();
        for m in matches {
            if out.add(m, family)?.is_none() {
                return Ok(None);
            }
        }
        match (out.protocol, out.not_protocol) {
            (Some(is), Some(not)) if is == not => return Ok(None),
            (Some(_), Some(_)) => out.not_protocol = None,
            _ => {}
        }
        let ports = out.source_port.is_some() || out.destination_port.is_some();
        if ports && !matches!(out.protocol, Some(Protocol::Tcp | Protocol::Udp)) {
            return Err(inexpressible(matches, "a port without its protocol"));
        }
        if out.syn.is_some() && out.protocol != Some(Protocol::Tcp) {
            return Err(inexpressible(matches, "TCP's flags without TCP"));
        }
        Ok(Some(out))
    }

    /// `Ok(None)` when nothing can match any more.
    fn add(&mut self, m: &Match, family: Family) -> Result<Option<()>, Error> {
        Ok(match m {
            Match::Family(f) => (*f == family).then_some(()),
            Match::Protocol(p) => narrow(&mut self.protocol, p, same),
            Match::NotProtocol(p) => match self.not_protocol {
                Some(other) if other != *p => {
                    return Err(inexpressible(std::slice::from_ref(m), "neither of two protocols"));
                }
                _ => {
                    self.not_protocol = Some(*p);
                    Some(())
                }
            },
            Match::Source(net) | Match::Destination(net) if Family::of(net) != family => None,
            Match::Source(net) => narrow(&mut self.source, &net.trunc(), nets),
            Match::Destination(net) => narrow(&mut self.destination, &net.trunc(), nets),
            Match::SourcePort(p) => narrow(&mut self.source_port, p, |a, b| ports(*a, *b)),
            Match::DestinationPort(p) => narrow(&mut self.destination_port, p, |a, b| ports(*a, *b)),
            Match::InInterface(name) => narrow(&mut self.in_interface, name, interfaces),
            Match::OutInterface(name) => narrow(&mut self.out_interface, name, interfaces),
            Match::DestinationIsLocal => {
                self.local = true;
                Some(())
            }
            Match::InvalidConnection => {
                self.invalid = true;
                Some(())
            }
            Match::Untranslated => {
                self.untranslated = true;
                Some(())
            }
            Match::Syn => narrow(&mut self.syn, &true, same),
            Match::NotSyn => narrow(&mut self.syn, &false, same),
            Match::Uid(ids) => self.owner("--uid-owner", *ids),
            Match::Gid(ids) => self.owner("--gid-owner", *ids),
            Match::NotGid(ids) => {
                // Without the first, a packet that has no socket would match as well.
                self.owners.push("--socket-exists".to_owned());
                if let Some(ids) = possible(*ids) {
                    self.owners.push(format!("! --gid-owner {ids}"));
                }
                Some(())
            }
            Match::Cgroup(cgroup) => {
                self.cgroups.push(cgroup.clone());
                Some(())
            }
            Match::Mark(mark) => narrow(&mut self.mark, mark, same),
            Match::ConnectionMark(mark) => narrow(&mut self.connection_mark, mark, same),
        })
    }

    fn owner(&mut self, option: &str, ids: Ids) -> Option<()> {
        let ids = possible(ids)?;
        self.owners.push(format!("{option} {ids}"));
        Some(())
    }

    /// Whether every packet matches.
    pub(super) fn is_always(&self) -> bool {
        *self == Self::default()
    }

    /// The options, for packets of `protocol` where the rule itself says none.
    fn text(&self, protocol: Option<Protocol>) -> String {
        let mut out = String::new();
        let mut put = |option: &str, value: &dyn std::fmt::Display| {
            // Writing into a String can't fail.
            let _ = write!(out, "{option} {value} ");
        };
        for (option, net) in [("-s", self.source), ("-d", self.destination)] {
            if let Some(net) = net.filter(|net| net.prefix_len() > 0) {
                put(option, &net);
            }
        }
        for (option, interface) in [("-i", &self.in_interface), ("-o", &self.out_interface)] {
            if let Some(interface) = interface {
                // A beginning as long as a name can be is the name.
                let plus = if interface.is_prefix() && interface.name().len() < INTERFACE { "+" } else { "" };
                put(option, &format_args!("{}{plus}", interface.name()));
            }
        }
        match (self.protocol.or(protocol), self.not_protocol) {
            (Some(is), _) => put("-p", &number(is)),
            (None, Some(not)) => put("! -p", &number(not)),
            (None, None) => {}
        }
        let transport = if self.protocol == Some(Protocol::Udp) { "udp" } else { "tcp" };
        if self.source_port.is_some() || self.destination_port.is_some() || self.syn.is_some() {
            put("-m", &transport);
        }
        for (option, span) in [("--sport", self.source_port), ("--dport", self.destination_port)] {
            if let Some(span) = span {
                if span.first == span.last {
                    put(option, &span.first);
                } else {
                    put(option, &format_args!("{}:{}", span.first, span.last));
                }
            }
        }
        if let Some(syn) = self.syn {
            put(if syn { "--tcp-flags" } else { "! --tcp-flags" }, &"SYN,ACK SYN");
        }
        for (wanted, option) in [
            (self.local, "addrtype --dst-type LOCAL"),
            (self.invalid, "conntrack --ctstate INVALID"),
            (self.untranslated, "conntrack ! --ctstate DNAT --ctstatus CONFIRMED"),
        ] {
            if wanted {
                put("-m", &option);
            }
        }
        for owner in &self.owners {
            put("-m owner", owner);
        }
        for cgroup in &self.cgroups {
            put("-m cgroup --path", cgroup);
        }
        for (option, mark) in [("mark", self.mark), ("connmark", self.connection_mark)] {
            if let Some(mark) = mark {
                put("-m", &format_args!("{option} --mark {mark:#x}"));
            }
        }
        out
    }
}

/// The last number is no id, and iptables refuses it.
fn possible(ids: Ids) -> Option<Ids> {
    let last = ids.last.min(u32::MAX - 1);
    (ids.first <= last).then_some(Ids { first: ids.first, last })
}

/// Names would be looked up.
const fn number(protocol: Protocol) -> &'static str {
    match protocol {
        // These two also name the match for ports.
        Protocol::Tcp => "tcp",
        Protocol::Udp => "udp",
        Protocol::Icmp => "1",
        Protocol::Icmpv6 => "58",
    }
}

fn inexpressible(matches: &[Match], what: &str) -> Error {
    let rule: Vec<_> = matches.iter().map(ToString::to_string).collect();
    Error::Inexpressible(format!("{what} in '{}'", rule.join(" ")))
}

/// The rule without its chain: one line, except that a refusal needs one for TCP and one for the rest.
pub(super) fn lines(
    rule: &Rule,
    matching: &Matching,
    table: Table,
    family: Family,
    cgroups: &Cgroups,
) -> Result<Vec<String>, Error> {
    if let Some(cgroup) = cgroups.missing(matching.cgroups.iter()) {
        // iptables takes no path that doesn't exist. A rule without a target matches everything and does nothing.
        return Ok(vec![comment(&cgroup::waiting(&rule.reason, cgroup)).trim_start().to_owned()]);
    }
    let comment = comment(&numbered(rule, matching, cgroups));
    let line = |protocol, target: &str| format!("{}{comment} {target}", matching.text(protocol));
    let one = |target: &str| Ok(vec![line(None, target)]);
    let transport = matches!(matching.protocol, Some(Protocol::Tcp | Protocol::Udp));
    match &rule.action {
        Action::Return => one("-j RETURN"),
        Action::Drop if table == Table::Nat => Err(inexpressible(&rule.matches, "to discard in table nat")),
        Action::Drop => one("-j DROP"),
        Action::Goto(chain) => one(&format!("-g {}", name(chain))),
        Action::Redirect(_) | Action::Tproxy(_) if !transport => {
            Err(inexpressible(&rule.matches, "a port to send to without a protocol"))
        }
        Action::Tproxy(_) if matching.protocol != Some(Protocol::Tcp) => {
            Err(inexpressible(&rule.matches, "to hand over what isn't TCP"))
        }
        Action::Redirect(port) => one(&format!("-j REDIRECT --to-ports {port}")),
        // iptables drops what no transparent socket takes, but connections that are older than the rules stay with
        // the application. What has a socket finds it without being handed over, unless it asks for a connection: then
        // the socket is the application's that listens. The packet's mark stays as it is.
        Action::Tproxy(port) => {
            let goes_on = Matching { syn: Some(false), ..matching.clone() }.text(None);
            Ok(vec![
                format!("{goes_on}{comment} -m socket -j RETURN"),
                line(None, &format!("-j TPROXY --on-port {port} --tproxy-mark 0x0/0x0")),
            ])
        }
        Action::Zone(zone) => one(&format!("-j CT --zone {zone}")),
        Action::SaveMark => one("-j CONNMARK --save-mark"),
        Action::RestoreMark => one("-j CONNMARK --restore-mark"),
        Action::Trace => one("-j TRACE"),
        Action::Reject => match table {
            Table::Filter => {
                let reset = line(Some(Protocol::Tcp), "-j REJECT --reject-with tcp-reset");
                let unreachable = match family {
                    Family::V4 => "icmp-port-unreachable",
                    Family::V6 => "icmp6-port-unreachable",
                };
                let other = line(None, &format!("-j REJECT --reject-with {unreachable}"));
                Ok(match matching.protocol {
                    Some(Protocol::Tcp) => vec![reset],
                    Some(_) => vec![other],
                    None if matching.not_protocol == Some(Protocol::Tcp) => vec![other],
                    None => vec![reset, other],
                })
            }
            // Only the table filter can answer; before it, iptables can only keep silent.
            Table::Raw | Table::Mangle => one("-j DROP"),
            Table::Nat => Err(inexpressible(&rule.matches, "to refuse in table nat")),
        },
    }
}

/// Why the rule exists. A cgroup's number stands there too: the kernel gives back only the path, and a cgroup that
/// was made again under the same path is another one.
fn numbered(rule: &Rule, matching: &Matching, cgroups: &Cgroups) -> String {
    let mut text = rule.reason.to_string();
    for cgroup in &matching.cgroups {
        let id = cgroups.id(cgroup);
        if id != 0 {
            let _ = write!(text, " (cgroup {id})");
        }
    }
    text
}

/// A comment, as iptables takes it.
fn comment(text: &str) -> String {
    // A workload's name may hold anything; a line break would begin a command of its own.
    let mut clean: String =
        text.chars().map(|c| if c == ' ' || c.is_ascii_graphic() { c } else { '?' }).collect();
    let cut = clean.len().saturating_sub(COMMENT);
    // The cgroup's number at the end matters more than the beginning.
    clean.drain(..cut);
    let escaped = clean.replace('\\', "\\\\").replace('"', "\\\"");
    format!("-m comment --comment \"{escaped}\"")
}

/// The host as iptables prints it.
pub(super) fn with_prefix(address: &str) -> String {
    match address.parse::<IpAddr>() {
        Ok(ip) => IpNet::from(ip).to_string(),
        Err(_) => address.to_owned(),
    }
}
