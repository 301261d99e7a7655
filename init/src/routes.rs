//! Mesh addresses routed to `lo`: without rules a connection to them is refused instead of leaving.
//!
//! Routes and addresses carry a protocol number of ours, so that exactly they are removed.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::error::{Error, Hint, libc_errno};
use crate::netlink::{NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, Socket, Writer, attribute};
use crate::nft::text_difference;
use crate::plan::Plan;

/// Who made a route or address: shown by `ip route` as `proto 117`.
pub const PROTOCOL: u8 = 117;

const NETLINK_ROUTE: isize = 0;
const RTM_NEWLINK: u16 = 16;
const RTM_GETLINK: u16 = 18;
const RTM_NEWADDR: u16 = 20;
const RTM_DELADDR: u16 = 21;
const RTM_GETADDR: u16 = 22;
const RTM_NEWROUTE: u16 = 24;
const RTM_DELROUTE: u16 = 25;
const RTM_GETROUTE: u16 = 26;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
const TABLE_LOCAL: u8 = 255;
const SCOPE_HOST: u8 = 254;
const TYPE_LOCAL: u8 = 2;
const IFA_F_NODAD: u8 = 2;
const IFF_UP: u32 = 1;
/// `lo` has index 1 in every namespace.
const LO: u32 = 1;

/// Something of ours on `lo`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Item {
    /// A range that is local.
    Route(IpNet),
    /// An address of `lo`.
    Address(IpAddr),
}

impl std::fmt::Display for Item {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Route(net) => write!(f, "route local {net} dev lo"),
            Self::Address(address) => write!(f, "address {} dev lo", IpNet::from(*address)),
        }
    }
}

impl Item {
    const fn is_ipv6(&self) -> bool {
        matches!(self, Self::Route(IpNet::V6(_)) | Self::Address(IpAddr::V6(_)))
    }
}

/// The routes and addresses that are in place.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Found {
    ours: BTreeSet<Item>,
    /// The same, but made by somebody else: good enough to close, not ours to remove.
    others: BTreeSet<Item>,
}

impl Found {
    /// One line per route and address of ours.
    pub fn lines(&self) -> Vec<String> {
        self.ours.iter().map(ToString::to_string).collect()
    }
}

/// What [`ensure`] changed, to be undone if a later step fails.
#[derive(Debug, Default)]
#[must_use]
pub struct Changes {
    added: Vec<Item>,
    removed: Vec<Item>,
    raised_lo: bool,
}

impl Changes {
    /// How many routes and addresses changed.
    pub fn count(&self) -> usize {
        self.added.len() + self.removed.len() + usize::from(self.raised_lo)
    }

    /// Puts everything back.
    pub fn undo(self) -> Result<(), Error> {
        let mut kernel = Kernel::open()?;
        self.removed.iter().try_for_each(|item| kernel.add(item).map(drop))?;
        self.added.iter().rev().try_for_each(|item| kernel.delete(item).map(drop))
    }
}

/// Adds what is missing and removes ours that the plan doesn't have. `lo` is set up if it is down.
pub fn ensure(plan: &Plan) -> Result<Changes, Error> {
    let mut kernel = Kernel::open()?;
    let mut changes = Changes::default();
    let done = ensure_all(&mut kernel, plan, &mut changes);
    match done {
        Ok(()) => Ok(changes),
        Err(error) => {
            if let Err(undo) = changes.undo() {
                tracing::warn!(%undo, "routes could not be put back");
            }
            Err(error)
        }
    }
}

fn ensure_all(kernel: &mut Kernel, plan: &Plan, changes: &mut Changes) -> Result<(), Error> {
    let wanted = wanted(plan)?;
    if !wanted.is_empty() {
        changes.raised_lo = kernel.raise_lo()?;
    }
    let found = kernel.read()?;
    for item in &wanted {
        if !found.ours.contains(item) && !found.others.contains(item) && kernel.add(item)? {
            changes.added.push(item.clone());
        }
    }
    for stale in found.ours.difference(&wanted) {
        if kernel.delete(stale)? {
            changes.removed.push(stale.clone());
        }
    }
    Ok(())
}

/// Removes ours; returns how many.
pub fn remove() -> Result<usize, Error> {
    let mut kernel = Kernel::open()?;
    let mut removed = 0;
    for item in kernel.read()?.ours {
        removed += usize::from(kernel.delete(&item)?);
    }
    Ok(removed)
}

/// Reads what is in place.
pub fn read_back() -> Result<Found, Error> {
    Kernel::open()?.read()
}

/// The differences between the kernel (`-`) and the plan (`+`).
pub fn diff(plan: &Plan) -> Result<Vec<String>, Error> {
    let wanted = wanted(plan)?;
    let found = read_back()?;
    let in_place: Vec<_> =
        found.ours.union(&found.others).filter(|i| found.ours.contains(i) || wanted.contains(i)).collect();
    let lines = |items: &mut dyn Iterator<Item = &Item>| items.map(ToString::to_string).collect::<Vec<_>>();
    Ok(text_difference(&lines(&mut in_place.into_iter()), &lines(&mut wanted.iter())))
}

/// What the plan wants in this namespace: without IPv6 there is nothing to close for it.
fn wanted(plan: &Plan) -> Result<BTreeSet<Item>, Error> {
    let routes = plan.local_routes.iter().map(|net| Item::Route(*net));
    let all = routes.chain(plan.loopback_addresses.iter().map(|a| Item::Address(*a)));
    let mut wanted: BTreeSet<_> = all.collect();
    if wanted.iter().any(Item::is_ipv6) && !ipv6_on_lo()? {
        wanted.retain(|item| !item.is_ipv6());
    }
    Ok(wanted)
}

/// Whether `lo` speaks IPv6. An interface that does while `lo` doesn't would let mesh addresses out.
fn ipv6_on_lo() -> Result<bool, Error> {
    const CONF: &str = "/proc/sys/net/ipv6/conf";
    let enabled = |name: &str| {
        std::fs::read_to_string(format!("{CONF}/{name}/disable_ipv6")).is_ok_and(|text| text.trim() == "0")
    };
    if enabled("lo") {
        return Ok(true);
    }
    let interfaces = match std::fs::read_dir(CONF) {
        Ok(interfaces) => interfaces,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(e) => return Err(Error::kernel(format!("read {CONF}"), e)),
    };
    for interface in interfaces.flatten() {
        let name = interface.file_name();
        let Some(name) = name.to_str().filter(|n| !matches!(*n, "all" | "default" | "lo")) else { continue };
        if enabled(name) {
            return Err(Error::Kernel {
                what: format!("close the mesh's IPv6 addresses: IPv6 is off on lo, but on for {name}"),
                hint: Hint(
                    "`sysctl net.ipv6.conf.lo.disable_ipv6=0`, or switch it off everywhere in the namespace",
                ),
                source: io::Error::from_raw_os_error(libc_errno::EACCES),
            });
        }
    }
    Ok(false)
}

struct Kernel {
    socket: Socket,
}

impl Kernel {
    fn open() -> Result<Self, Error> {
        let socket = Socket::open(NETLINK_ROUTE).map_err(|e| Error::kernel("open a route socket", e))?;
        socket.strict();
        Ok(Self { socket })
    }

    fn read(&mut self) -> Result<Found, Error> {
        let mut found = Found::default();
        for family in [AF_INET, AF_INET6] {
            let body = [family, 0, 0, 0, TABLE_LOCAL, 0, 0, 0, 0, 0, 0, 0];
            for payload in self.dump("read the local routes", RTM_GETROUTE, &body)? {
                let Some((item, protocol)) = route(&payload) else { continue };
                let set = if protocol == PROTOCOL { &mut found.ours } else { &mut found.others };
                set.insert(item);
            }
        }
        let mut body = [AF_INET6, 0, 0, 0, 0, 0, 0, 0];
        body[4..].copy_from_slice(&LO.to_ne_bytes());
        for payload in self.dump("read lo's addresses", RTM_GETADDR, &body)? {
            let Some((item, protocol)) = address(&payload) else { continue };
            // Kernels before 5.18 forget who made an address.
            let ours = match protocol {
                Some(protocol) => protocol == PROTOCOL,
                None => item == Item::Address(crate::plan::PASSTHROUGH_V6),
            };
            if ours { &mut found.ours } else { &mut found.others }.insert(item);
        }
        Ok(found)
    }

    fn dump(&mut self, what: &str, kind: u16, body: &[u8]) -> Result<Vec<Vec<u8>>, Error> {
        const ATTEMPTS: usize = 16;
        let mut writer = Writer::default();
        writer.message(kind, NLM_F_DUMP, body, |_| {});
        for _ in 0..ATTEMPTS {
            let answer = self.socket.ask(&writer).map_err(|e| Error::kernel(what, e))?;
            if let Some(refusal) = answer.refusals.into_iter().next() {
                match refusal.error.raw_os_error() {
                    Some(libc_errno::EINTR) => continue,
                    // No local table yet, or no IPv6 in this kernel: nothing to read.
                    Some(libc_errno::ENOENT | libc_errno::EOPNOTSUPP | libc_errno::EAFNOSUPPORT) => {
                        return Ok(Vec::new());
                    }
                    _ => return Err(Error::kernel(what, refusal.error)),
                }
            }
            if !answer.interrupted {
                return Ok(answer.messages.into_iter().map(|m| m.payload).collect());
            }
        }
        Err(Error::Contended { attempts: ATTEMPTS })
    }

    /// `false` if it exists already.
    fn add(&mut self, item: &Item) -> Result<bool, Error> {
        self.change(&format!("add the {item}"), item, true, libc_errno::EEXIST)
    }

    /// `false` if it is gone already.
    fn delete(&mut self, item: &Item) -> Result<bool, Error> {
        let gone = match item {
            Item::Route(_) => libc_errno::ESRCH,
            Item::Address(_) => libc_errno::EADDRNOTAVAIL,
        };
        self.change(&format!("remove the {item}"), item, false, gone)
    }

    fn change(&mut self, what: &str, item: &Item, add: bool, already: i32) -> Result<bool, Error> {
        let flags = if add { NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL } else { NLM_F_ACK };
        let mut writer = Writer::default();
        match item {
            Item::Route(net) => {
                let (family, octets, source) = match net {
                    IpNet::V4(net) => {
                        (AF_INET, net.addr().octets().to_vec(), Ipv4Addr::LOCALHOST.octets().to_vec())
                    }
                    IpNet::V6(net) => {
                        (AF_INET6, net.addr().octets().to_vec(), Ipv6Addr::LOCALHOST.octets().to_vec())
                    }
                };
                let kind = if add { RTM_NEWROUTE } else { RTM_DELROUTE };
                let body = [
                    family,
                    net.prefix_len(),
                    0,
                    0,
                    TABLE_LOCAL,
                    PROTOCOL,
                    SCOPE_HOST,
                    TYPE_LOCAL,
                    0,
                    0,
                    0,
                    0,
                ];
                writer.message(kind, flags, &body, |a| {
                    a.bytes(1, &octets);
                    a.bytes(4, &LO.to_ne_bytes());
                    // Otherwise the kernel takes the mesh address itself as the source, and the answers of the
                    // proxy would be addressed to the mesh.
                    a.bytes(7, &source);
                });
            }
            Item::Address(address) => {
                let (family, octets) = match address {
                    IpAddr::V4(a) => (AF_INET, a.octets().to_vec()),
                    IpAddr::V6(a) => (AF_INET6, a.octets().to_vec()),
                };
                let kind = if add { RTM_NEWADDR } else { RTM_DELADDR };
                let mut body =
                    [family, IpNet::from(*address).prefix_len(), IFA_F_NODAD, SCOPE_HOST, 0, 0, 0, 0];
                body[4..].copy_from_slice(&LO.to_ne_bytes());
                writer.message(kind, flags, &body, |a| {
                    a.bytes(1, &octets);
                    a.bytes(2, &octets);
                    // Deprecated from the start: never chosen as the source of a connection by itself.
                    a.bytes(6, &[[0; 4], [0xff; 4], [0; 4], [0; 4]].concat());
                    a.bytes(11, &[PROTOCOL]);
                });
            }
        }
        let answer = self.socket.ask(&writer).map_err(|e| Error::kernel(what, e))?;
        match answer.refusals.into_iter().next() {
            None => Ok(true),
            Some(refusal) if refusal.error.raw_os_error() == Some(already) => Ok(false),
            Some(refusal) => Err(Error::kernel(what, refusal.error)),
        }
    }

    /// Sets `lo` up: nothing can be routed to it while it is down. `false` if it was up.
    fn raise_lo(&mut self) -> Result<bool, Error> {
        let body = |flags: u32, change: u32| {
            let mut body = [0; 16];
            body[4..8].copy_from_slice(&LO.to_ne_bytes());
            body[8..12].copy_from_slice(&flags.to_ne_bytes());
            body[12..].copy_from_slice(&change.to_ne_bytes());
            body
        };
        let mut get = Writer::default();
        get.message(RTM_GETLINK, 0, &body(0, 0), |_| {});
        let what = "read lo's state";
        let answer = self.socket.ask(&get).map_err(|e| Error::kernel(what, e))?;
        if let Some(refusal) = answer.refusals.into_iter().next() {
            return Err(Error::kernel(what, refusal.error));
        }
        let flags = answer
            .messages
            .first()
            .and_then(|m| m.payload.get(8..12)?.try_into().ok())
            .map(u32::from_ne_bytes);
        if flags.is_some_and(|flags| flags & IFF_UP != 0) {
            return Ok(false);
        }
        let mut set = Writer::default();
        set.message(RTM_NEWLINK, NLM_F_ACK, &body(IFF_UP, IFF_UP), |_| {});
        let what = "set lo up";
        let answer = self.socket.ask(&set).map_err(|e| Error::kernel(what, e))?;
        match answer.refusals.into_iter().next() {
            None => Ok(true),
            Some(refusal) => Err(Error::kernel(what, refusal.error)),
        }
    }
}

/// A local route via `lo`, and who made it.
fn route(payload: &[u8]) -> Option<(Item, u8)> {
    let [family, prefix, _, _, table, protocol, _, kind, ..] = *payload.first_chunk::<12>()?;
    let attributes = payload.get(12..)?;
    let via_lo = attribute(attributes, 4) == Some(&LO.to_ne_bytes()[..]);
    if table != TABLE_LOCAL || kind != TYPE_LOCAL || !via_lo {
        return None;
    }
    let net = network(family, attribute(attributes, 1)?, prefix)?;
    Some((Item::Route(net), protocol))
}

/// An address of `lo`, and who made it where the kernel remembers.
fn address(payload: &[u8]) -> Option<(Item, Option<u8>)> {
    let [family, prefix, _, _, index @ ..] = *payload.first_chunk::<8>()?;
    let attributes = payload.get(8..)?;
    if u32::from_ne_bytes(index) != LO {
        return None;
    }
    let net = network(family, attribute(attributes, 1)?, prefix)?;
    let protocol = attribute(attributes, 11).and_then(|b| b.first().copied());
    Some((Item::Address(net.addr()), protocol))
}

fn network(family: u8, octets: &[u8], prefix: u8) -> Option<IpNet> {
    match family {
        AF_INET => Ipv4Net::new(Ipv4Addr::from(*octets.first_chunk::<4>()?), prefix).ok().map(IpNet::V4),
        AF_INET6 => Ipv6Net::new(Ipv6Addr::from(*octets.first_chunk::<16>()?), prefix).ok().map(IpNet::V6),
        _ => None,
    }
}
