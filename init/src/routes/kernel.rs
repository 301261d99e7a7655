//! The kernel's local routes and the addresses of `lo`, by rtnetlink.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use netlink_sys::{Socket, SocketAddr};
use rtnetlink::packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_EXCL, NLM_F_REQUEST, NetlinkMessage,
    NetlinkPayload,
};
use rtnetlink::packet_route::address::{
    AddressAttribute, AddressHeaderFlags, AddressMessage, AddressProtocol, AddressScope, CacheInfo,
};
use rtnetlink::packet_route::link::{AfSpecInet6, AfSpecUnspec, LinkAttribute, LinkFlags};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use rtnetlink::packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage as Message};
use rtnetlink::{AddressMessageBuilder, LinkUnspec, RouteMessageBuilder};

use super::{Found, Item, PROTOCOL, everything};
use crate::error::{Error, libc_errno};
use crate::plan::Family;

/// `lo` has index 1 in every namespace.
const LO: u32 = 1;
/// Where the kernel keeps what is its own, `ip route show table local`.
const TABLE_LOCAL: u8 = 255;
/// How often a dump is begun again because what it reads changed meanwhile.
const ATTEMPTS: usize = 16;

/// `NETLINK_ROUTE`.
const ROUTE: isize = 0;
/// More than the kernel puts into one datagram.
const BUFFER: usize = 1 << 16;

/// A route socket in the namespace of the calling thread. `rtnetlink`'s own connection wants an event loop, which
/// costs more than everything that is asked here: the kernel answers while a request is sent, so nothing waits.
pub(super) struct Kernel {
    socket: Socket,
    buffer: Vec<u8>,
    sequence: u32,
}

impl Kernel {
    pub(super) fn open() -> Result<Self, Error> {
        let failed = |e| Error::kernel("open a route socket", e);
        let mut socket = Socket::new(ROUTE).map_err(failed)?;
        socket.bind_auto().map_err(failed)?;
        socket.connect(&SocketAddr::new(0, 0)).map_err(failed)?;
        // Lets the kernel filter dumps by what the request says; old kernels dump everything, and we filter anyway.
        let _ = socket.set_netlink_get_strict_chk(true);
        Ok(Self { socket, buffer: vec![0; BUFFER], sequence: 0 })
    }

    /// Reads what is ours.
    pub(super) fn read(&mut self) -> Result<Found, Error> {
        let mut found = Found::default();
        // Without a family the kernel answers for all in one go.
        let rules = self.dump("read the routing rules", &Message::GetRule(RuleMessage::default()))?;
        found.ours.extend(rules.iter().filter_map(|answer| match answer {
            Message::NewRule(answer) => policy_rule(answer),
            _ => None,
        }));
        // Asked for by their maker: so they are found in any table, also in one whose rule somebody removed.
        for family in [Family::V4, Family::V6] {
            let mut wanted = RouteMessage::default();
            wanted.header.address_family = address_family(family);
            wanted.header.protocol = RouteProtocol::from(PROTOCOL);
            for answer in self.dump("read the routes that are ours", &Message::GetRoute(wanted))? {
                let Message::NewRoute(answer) = answer else { continue };
                if answer.header.protocol == RouteProtocol::from(PROTOCOL) {
                    found.ours.extend(local_route(&answer).or_else(|| everything_route(&answer, family)));
                }
            }
        }
        let mut wanted = AddressMessage::default();
        wanted.header.family = AddressFamily::Inet6;
        wanted.header.index = LO;
        for answer in self.dump("read lo's addresses", &Message::GetAddress(wanted))? {
            let Message::NewAddress(answer) = answer else { continue };
            let Some((item, protocol)) = address(&answer) else { continue };
            // Kernels before 5.18 forget who made an address.
            let ours = match protocol {
                Some(protocol) => protocol == AddressProtocol::Other(PROTOCOL),
                None => item == Item::Address(crate::plan::PASSTHROUGH_V6),
            };
            if ours { &mut found.ours } else { &mut found.others }.insert(item);
        }
        Ok(found)
    }

    /// Reads what is ours, and local routes that somebody else made. Who only adds needs no word of these: what is there
    /// already can't be added.
    pub(super) fn read_all(&mut self) -> Result<Found, Error> {
        let mut found = self.read()?;
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut wanted = RouteMessage::default();
            wanted.header.address_family = family;
            wanted.header.table = TABLE_LOCAL;
            for answer in self.dump("read the local routes", &Message::GetRoute(wanted))? {
                let Message::NewRoute(answer) = answer else { continue };
                if answer.header.protocol != RouteProtocol::from(PROTOCOL) {
                    found.others.extend(local_route(&answer));
                }
            }
        }
        Ok(found)
    }

    /// `false` if it exists already.
    pub(super) fn add(&mut self, item: &Item) -> Result<bool, Error> {
        let message = match item {
            Item::Route(net) => Message::NewRoute(route_message(*net)),
            Item::Address(address) => Message::NewAddress(address_message(*address)),
            Item::Everything(family, table) => Message::NewRoute(everything_message(*family, *table)),
            Item::Rule(family, mark, table) => Message::NewRule(rule_message(*family, *mark, *table)),
        };
        let flags = NLM_F_CREATE | NLM_F_EXCL;
        self.change(&format!("add the {item}"), message, flags, libc_errno::EEXIST)
    }

    /// `false` if it is gone already.
    pub(super) fn delete(&mut self, item: &Item) -> Result<bool, Error> {
        let (message, gone) = match item {
            Item::Route(net) => (Message::DelRoute(route_message(*net)), libc_errno::ESRCH),
            Item::Address(address) => {
                (Message::DelAddress(address_message(*address)), libc_errno::EADDRNOTAVAIL)
            }
            Item::Everything(family, table) => {
                (Message::DelRoute(everything_message(*family, *table)), libc_errno::ESRCH)
            }
            Item::Rule(family, mark, table) => {
                (Message::DelRule(rule_message(*family, *mark, *table)), libc_errno::ENOENT)
            }
        };
        self.change(&format!("remove the {item}"), message, 0, gone)
    }

    /// Reads the state of `lo`.
    pub(super) fn loopback(&mut self) -> Result<Loopback, Error> {
        let get = Message::GetLink(LinkUnspec::new_with_index(LO).build());
        let answer = self.ask(get, 0).map_err(|e| Error::kernel("read lo's state", e))?;
        let mut lo = Loopback::default();
        for message in answer.messages {
            let Message::NewLink(link) = message else { continue };
            lo.up |= link.header.flags.contains(LinkFlags::Up);
            lo.ipv6 |= link.attributes.iter().any(speaks_ipv6);
        }
        Ok(lo)
    }

    /// Sets `lo` up: nothing can be routed to it while it is down.
    pub(super) fn raise_lo(&mut self) -> Result<(), Error> {
        let set = Message::SetLink(LinkUnspec::new_with_index(LO).up().build());
        self.ask(set, 0).map(drop).map_err(|e| Error::kernel("set lo up", e))
    }

    fn change(&mut self, what: &str, message: Message, flags: u16, already: i32) -> Result<bool, Error> {
        match self.ask(message, flags) {
            Ok(_) => Ok(true),
            Err(error) if error.raw_os_error() == Some(already) => Ok(false),
            Err(error) => Err(Error::kernel(what, error)),
        }
    }

    fn dump(&mut self, what: &str, message: &Message) -> Result<Vec<Message>, Error> {
        for _ in 0..ATTEMPTS {
            match self.ask(message.clone(), NLM_F_DUMP) {
                Ok(answer) if answer.interrupted => {}
                Ok(answer) => return Ok(answer.messages),
                Err(error) => match error.raw_os_error() {
                    Some(libc_errno::EINTR) => {}
                    // No local table yet, or no IPv6 in this kernel: nothing to read.
                    Some(libc_errno::ENOENT | libc_errno::EOPNOTSUPP | libc_errno::EAFNOSUPPORT) => {
                        return Ok(Vec::new());
                    }
                    _ => return Err(Error::kernel(what, error)),
                },
            }
        }
        Err(Error::Contended { attempts: ATTEMPTS })
    }

    /// Sends one request and takes every answer, up to the acknowledgement or the end of the dump.
    fn ask(&mut self, message: Message, flags: u16) -> io::Result<Answer> {
        self.sequence += 1;
        let mut request = NetlinkMessage::from(message);
        let acknowledge = if flags & NLM_F_DUMP == NLM_F_DUMP { 0 } else { NLM_F_ACK };
        request.header.flags = NLM_F_REQUEST | acknowledge | flags;
        request.header.sequence_number = self.sequence;
        request.finalize();
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        self.socket.send(&bytes, 0)?;
        let mut answer = Answer::default();
        loop {
            let received = match self.socket.recv(&mut &mut self.buffer[..], nix::libc::MSG_DONTWAIT) {
                Ok(received) => received,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    return Err(io::Error::other("the kernel doesn't say that its answer is complete"));
                }
                Err(e) => return Err(e),
            };
            let datagram = self.buffer.get(..received);
            let datagram = datagram.ok_or_else(|| io::Error::other("an answer is longer than the buffer"))?;
            if answer.take(datagram, self.sequence)? {
                return Ok(answer);
            }
        }
    }
}

/// The state of `lo`.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Loopback {
    /// Whether it is up.
    pub(super) up: bool,
    /// Whether the kernel says that it speaks IPv6. Opening the file in `/proc/sys` that says the same takes a fifth
    /// of all that routes take in a fresh namespace.
    pub(super) ipv6: bool,
}

/// Whether an attribute of an interface says that its IPv6 is on.
fn speaks_ipv6(attribute: &LinkAttribute) -> bool {
    let LinkAttribute::AfSpecUnspec(families) = attribute else { return false };
    families.iter().any(|family| match family {
        AfSpecUnspec::Inet6(found) => {
            found.iter().any(|part| matches!(part, AfSpecInet6::DevConf(conf) if conf.disable_ipv6 == 0))
        }
        _ => false,
    })
}

/// What the kernel answered to one request.
#[derive(Default)]
struct Answer {
    messages: Vec<Message>,
    /// Whether what was dumped changed meanwhile.
    interrupted: bool,
}

impl Answer {
    /// Takes the messages of one datagram that belong to the request with this number; `true` when it was the last.
    fn take(&mut self, mut rest: &[u8], sequence: u32) -> io::Result<bool> {
        while !rest.is_empty() {
            let part = NetlinkMessage::<Message>::deserialize(rest)
                .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e.to_string()))?;
            // Netlink pads messages to four bytes.
            let length = (part.header.length as usize).next_multiple_of(4);
            rest = rest.get(length..).unwrap_or_default();
            // What a request left over that ended with an error.
            if part.header.sequence_number != sequence {
                continue;
            }
            self.interrupted |= part.header.flags & NLM_F_DUMP_INTR != 0;
            match part.payload {
                NetlinkPayload::InnerMessage(message) => self.messages.push(message),
                NetlinkPayload::Error(error) if error.code.is_some() => return Err(error.to_io()),
                NetlinkPayload::Done(done) if done.code < 0 => {
                    return Err(io::Error::from_raw_os_error(-done.code));
                }
                NetlinkPayload::Error(_) | NetlinkPayload::Done(_) => return Ok(true),
                _ => {}
            }
        }
        Ok(false)
    }
}

fn route_message(net: IpNet) -> RouteMessage {
    // Without a source the kernel takes the mesh address itself, and the answers of the proxy would be addressed
    // to the mesh.
    let mut message = match net {
        IpNet::V4(net) => RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(net.addr(), net.prefix_len())
            .pref_source(Ipv4Addr::LOCALHOST)
            .build(),
        IpNet::V6(net) => RouteMessageBuilder::<Ipv6Addr>::new()
            .destination_prefix(net.addr(), net.prefix_len())
            .pref_source(Ipv6Addr::LOCALHOST)
            .build(),
    };
    message.header.table = TABLE_LOCAL;
    message.header.protocol = RouteProtocol::from(PROTOCOL);
    message.header.scope = RouteScope::Host;
    message.header.kind = RouteType::Local;
    message.attributes.push(RouteAttribute::Oif(LO));
    message
}

/// A table in which every address is local.
fn everything_message(family: Family, table: u32) -> RouteMessage {
    let mut message = match everything(family) {
        IpNet::V4(_) => RouteMessageBuilder::<Ipv4Addr>::new().build(),
        IpNet::V6(_) => RouteMessageBuilder::<Ipv6Addr>::new().build(),
    };
    message.header.table = short(table);
    message.attributes.push(RouteAttribute::Table(table));
    message.header.protocol = RouteProtocol::from(PROTOCOL);
    message.header.scope = RouteScope::Host;
    message.header.kind = RouteType::Local;
    message.attributes.push(RouteAttribute::Oif(LO));
    message
}

fn rule_message(family: Family, mark: u32, table: u32) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header.family = address_family(family);
    message.header.action = RuleAction::ToTable;
    message.header.table = short(table);
    message.attributes = vec![
        RuleAttribute::Table(table),
        RuleAttribute::FwMark(mark),
        RuleAttribute::FwMask(u32::MAX),
        RuleAttribute::Protocol(RouteProtocol::from(PROTOCOL)),
    ];
    message
}

/// Tables above 255 are told by an attribute alone; the field then holds 0, 'unspecified'.
fn short(table: u32) -> u8 {
    u8::try_from(table).unwrap_or_default()
}

const fn address_family(family: Family) -> AddressFamily {
    match family {
        Family::V4 => AddressFamily::Inet,
        Family::V6 => AddressFamily::Inet6,
    }
}

/// A rule of ours by mark.
fn policy_rule(message: &RuleMessage) -> Option<Item> {
    let family = match message.header.family {
        AddressFamily::Inet => Family::V4,
        AddressFamily::Inet6 => Family::V6,
        _ => return None,
    };
    let attributes = &message.attributes;
    let ours = attributes.contains(&RuleAttribute::Protocol(RouteProtocol::from(PROTOCOL)));
    let mark = attributes.iter().find_map(|a| match a {
        RuleAttribute::FwMark(mark) => Some(*mark),
        _ => None,
    });
    let table = attributes.iter().find_map(|a| match a {
        RuleAttribute::Table(table) => Some(*table),
        _ => None,
    });
    let table = table.unwrap_or_else(|| message.header.table.into());
    ours.then_some(Item::Rule(family, mark?, table))
}

/// A table in which every address is local, and which we made.
fn everything_route(message: &RouteMessage, family: Family) -> Option<Item> {
    let named = message.attributes.iter().find_map(|a| match a {
        RouteAttribute::Table(table) => Some(*table),
        _ => None,
    });
    let ours = message.header.protocol == RouteProtocol::from(PROTOCOL)
        && message.header.kind == RouteType::Local
        && message.header.destination_prefix_length == 0
        && message.attributes.contains(&RouteAttribute::Oif(LO));
    ours.then(|| Item::Everything(family, named.unwrap_or_else(|| message.header.table.into())))
}

fn address_message(address: IpAddr) -> AddressMessage {
    let prefix = IpNet::from(address).prefix_len();
    let mut message = match address {
        IpAddr::V4(address) => AddressMessageBuilder::<Ipv4Addr>::new().address(address, prefix).build(),
        IpAddr::V6(address) => AddressMessageBuilder::<Ipv6Addr>::new().address(address, prefix).build(),
    };
    message.header.index = LO;
    message.header.flags = AddressHeaderFlags::Nodad;
    message.header.scope = AddressScope::Host;
    // Deprecated from the start: never chosen as the source of a connection by itself.
    let mut life = CacheInfo::default();
    life.ifa_valid = u32::MAX;
    message.attributes.push(AddressAttribute::CacheInfo(life));
    message.attributes.push(AddressAttribute::Protocol(AddressProtocol::Other(PROTOCOL)));
    message
}

/// A local route via `lo`.
fn local_route(message: &RouteMessage) -> Option<Item> {
    let header = &message.header;
    let via_lo = message.attributes.contains(&RouteAttribute::Oif(LO));
    if header.table != TABLE_LOCAL || header.kind != RouteType::Local || !via_lo {
        return None;
    }
    let prefix = header.destination_prefix_length;
    message.attributes.iter().find_map(|attribute| {
        let net = match attribute {
            RouteAttribute::Destination(RouteAddress::Inet(ip)) => Ipv4Net::new(*ip, prefix).map(IpNet::V4),
            RouteAttribute::Destination(RouteAddress::Inet6(ip)) => Ipv6Net::new(*ip, prefix).map(IpNet::V6),
            _ => return None,
        };
        net.ok().map(Item::Route)
    })
}

/// An address of `lo`, and who made it where the kernel remembers.
fn address(message: &AddressMessage) -> Option<(Item, Option<AddressProtocol>)> {
    if message.header.index != LO {
        return None;
    }
    let mut found = None;
    let mut protocol = None;
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Address(address) => found = Some(Item::Address(*address)),
            AddressAttribute::Protocol(by) => protocol = Some(*by),
            _ => {}
        }
    }
    Some((found?, protocol))
}
