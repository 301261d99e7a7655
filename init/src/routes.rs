//! Mesh addresses routed to `lo`: without rules a connection to them is refused instead of leaving. And the policy
//! route that brings the application's answers to a transparent proxy.
//!
//! Routes and addresses carry a protocol number of ours, so that exactly they are removed.

mod kernel;

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;

use ipnet::IpNet;

use self::kernel::{Kernel, Loopback};
use crate::error::{Error, Hint, libc_errno};
use crate::nft::text_difference;
use crate::plan::{Family, Plan, PolicyRoute};

/// Who made a route or address: shown by `ip route` as `proto 117`.
pub const PROTOCOL: u8 = 117;

/// Something of ours on `lo`. In this order they are added, and in the reverse order removed: a rule never leads to
/// a table that is empty.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Item {
    /// A range that is local.
    Route(IpNet),
    /// An address of `lo`.
    Address(IpAddr),
    /// A table in which everything is local.
    Everything(Family, u32),
    /// What carries a mark is looked up in a table.
    Rule(Family, u32, u32),
}

impl std::fmt::Display for Item {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Route(net) => write!(f, "route local {net} dev lo"),
            Self::Address(address) => write!(f, "address {} dev lo", IpNet::from(*address)),
            Self::Everything(family, table) => {
                write!(f, "route local {} dev lo table {table}", everything(*family))
            }
            Self::Rule(Family::V4, mark, table) => write!(f, "rule fwmark {mark:#x} lookup {table}"),
            Self::Rule(Family::V6, mark, table) => write!(f, "rule -6 fwmark {mark:#x} lookup {table}"),
        }
    }
}

impl Item {
    const fn is_ipv6(&self) -> bool {
        matches!(
            self,
            Self::Route(IpNet::V6(_))
                | Self::Address(IpAddr::V6(_))
                | Self::Everything(Family::V6, _)
                | Self::Rule(Family::V6, ..)
        )
    }
}

/// Every address of a family.
fn everything(family: Family) -> IpNet {
    match family {
        Family::V4 => IpNet::V4(ipnet::Ipv4Net::default()),
        Family::V6 => IpNet::V6(ipnet::Ipv6Net::default()),
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

    /// A plan without rules that would make these routes and addresses.
    pub fn plan(&self) -> Plan {
        let mut plan = Plan {
            chains: Vec::new(),
            local_routes: Vec::new(),
            loopback_addresses: Vec::new(),
            policy_route: None,
        };
        for item in &self.ours {
            match item {
                Item::Route(net) => plan.local_routes.push(*net),
                Item::Address(address) => plan.loopback_addresses.push(*address),
                // Says nothing that its rule doesn't.
                Item::Everything(..) => {}
                Item::Rule(family, mark, table) => {
                    let new = PolicyRoute { mark: *mark, table: *table, ipv4: false, ipv6: false };
                    let route = plan.policy_route.get_or_insert(new);
                    match family {
                        Family::V4 => route.ipv4 = true,
                        Family::V6 => route.ipv6 = true,
                    }
                }
            }
        }
        plan
    }
}

/// What [`ensure`] added, to be undone if the rules don't come, and what [`finish`](Changes::finish) removes when they
/// have: the rules before needed it until then.
#[derive(Debug, Default)]
#[must_use]
pub struct Changes {
    added: Vec<Item>,
    stale: Vec<Item>,
    raised_lo: bool,
}

impl Changes {
    /// Removes ours that the plan doesn't have; returns how many routes and addresses changed in all.
    pub fn finish(self) -> Result<usize, Error> {
        let mut changed = self.added.len() + usize::from(self.raised_lo);
        if !self.stale.is_empty() {
            let mut kernel = Kernel::open()?;
            for stale in self.stale.iter().rev() {
                changed += usize::from(kernel.delete(stale)?);
            }
        }
        Ok(changed)
    }

    /// Takes back what was added.
    pub fn undo(self) -> Result<(), Error> {
        let mut kernel = Kernel::open()?;
        self.added.iter().rev().try_for_each(|item| kernel.delete(item).map(drop))
    }
}

/// Adds what is missing, before the rules that need it. `lo` is set up if it is down.
pub fn ensure(plan: &Plan) -> Result<Changes, Error> {
    let mut kernel = Kernel::open()?;
    let mut changes = Changes::default();
    match add_missing(&mut kernel, plan, &mut changes) {
        Ok(()) => Ok(changes),
        Err(error) => {
            if let Err(undo) = changes.undo() {
                tracing::warn!(%undo, "routes could not be put back");
            }
            Err(error)
        }
    }
}

fn add_missing(kernel: &mut Kernel, plan: &Plan, changes: &mut Changes) -> Result<(), Error> {
    let lo = kernel.loopback()?;
    let wanted = wanted(plan, lo)?;
    if !wanted.is_empty() && !lo.up {
        kernel.raise_lo()?;
        changes.raised_lo = true;
    }
    let found = kernel.read()?;
    for item in &wanted {
        if !found.ours.contains(item) && !found.others.contains(item) && kernel.add(item)? {
            changes.added.push(item.clone());
        }
    }
    changes.stale = found.ours.difference(&wanted).cloned().collect();
    Ok(())
}

/// Removes ours; returns how many.
pub fn remove() -> Result<usize, Error> {
    let mut kernel = Kernel::open()?;
    let mut removed = 0;
    for item in kernel.read()?.ours.into_iter().rev() {
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
    let mut kernel = Kernel::open()?;
    let wanted = wanted(plan, kernel.loopback()?)?;
    let found = kernel.read_all()?;
    let in_place: Vec<_> =
        found.ours.union(&found.others).filter(|i| found.ours.contains(i) || wanted.contains(i)).collect();
    let lines = |items: &mut dyn Iterator<Item = &Item>| items.map(ToString::to_string).collect::<Vec<_>>();
    Ok(text_difference(&lines(&mut in_place.into_iter()), &lines(&mut wanted.iter())))
}

/// What the plan wants in this namespace: without IPv6 there is nothing to close for it.
fn wanted(plan: &Plan, lo: Loopback) -> Result<BTreeSet<Item>, Error> {
    let routes = plan.local_routes.iter().map(|net| Item::Route(*net));
    let all = routes.chain(plan.loopback_addresses.iter().map(|a| Item::Address(*a)));
    let mut wanted: BTreeSet<_> = all.collect();
    if let Some(route) = plan.policy_route {
        for (_, family) in
            [(route.ipv4, Family::V4), (route.ipv6, Family::V6)].into_iter().filter(|(on, _)| *on)
        {
            wanted.insert(Item::Everything(family, route.table));
            wanted.insert(Item::Rule(family, route.mark, route.table));
        }
    }
    if wanted.iter().any(Item::is_ipv6) && !lo.ipv6 && !ipv6_on_lo()? {
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
