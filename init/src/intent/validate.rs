//! What makes an intent impossible, dangerous or contradictory.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use serde::Serialize;

use super::{Dns, DnsCapture, Inbound, InboundMode, Outbound, RedirectIntent, Workload};

/// One thing that is wrong with an intent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Violation {
    /// Path of the field, as written in the document.
    pub field: String,
    /// What is wrong and what would be right.
    pub message: String,
}

/// Everything that is wrong with an intent.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the redirect's configuration is invalid: {}", list(.0))]
pub struct InvalidIntent(pub Vec<Violation>);

fn list(violations: &[Violation]) -> String {
    violations.iter().map(|v| format!("{}: {}", v.field, v.message)).collect::<Vec<_>>().join("; ")
}

/// Collects violations.
#[derive(Default)]
struct Findings(Vec<Violation>);

impl Findings {
    fn say(&mut self, field: impl Into<String>, message: impl Into<String>) {
        self.0.push(Violation { field: field.into(), message: message.into() });
    }
}

impl RedirectIntent {
    /// Checks the whole document and returns every violation, not only the first.
    pub fn validate(&self) -> Result<(), InvalidIntent> {
        let mut found = Findings::default();
        self.proxy(&mut found);
        if self.workloads.is_empty() {
            traffic(&mut found, "", &self.inbound, &self.outbound, &self.dns);
            excluded_proxies(&mut found, "", &self.proxy_uids, &self.outbound);
        } else {
            self.several(&mut found);
        }
        if !self.ipv4 && !self.ipv6 {
            found.say("ipv4", "at least one of ipv4 and ipv6 must be true");
        }
        for (i, range) in self.vip_ranges.iter().enumerate() {
            let field = format!("vipRanges[{i}]");
            if range.prefix_len() == 0 {
                found.say(&field, format!("{range} would close the whole network"));
            }
            if range.trunc().contains(&loopback(range)) {
                found.say(&field, format!("{range} contains the loopback address"));
            }
        }
        self.tproxy(&mut found);
        if found.0.is_empty() { Ok(()) } else { Err(InvalidIntent(found.0)) }
    }

    fn proxy(&self, found: &mut Findings) {
        let named = !self.proxy_uids.is_empty() || !self.proxy_gids.is_empty() || self.proxy_mark.is_some();
        let each_names =
            !self.workloads.is_empty() && self.workloads.iter().all(|w| !w.proxy_uids.is_empty());
        if !named && !each_names {
            let hint = "name the proxy by at least one of proxyUids, proxyGids, proxyMark: without it the proxy's \
                        own connections would be sent back to it";
            found.say("proxyUids", hint);
        }
        proxy_ids(found, "proxyUids", "user", &self.proxy_uids);
        proxy_ids(found, "proxyGids", "group", &self.proxy_gids);
        if self.proxy_mark == Some(0) {
            found.say("proxyMark", "0 is the mark of every unmarked packet; choose another");
        }
    }

    fn tproxy(&self, found: &mut Findings) {
        let of_workloads = self.workloads.iter().map(|w| &w.inbound);
        let mut inbounds = std::iter::once(&self.inbound).chain(of_workloads);
        if !inbounds.any(|inbound| inbound.enabled && inbound.mode == InboundMode::Tproxy) {
            return;
        }
        if self.tproxy.mark == 0 {
            found.say("tproxy.mark", "0 is the mark of every unmarked packet; choose another");
        }
        if self.proxy_mark == Some(self.tproxy.mark) {
            found.say(
                "tproxy.mark",
                "is also proxyMark: it must mark only the proxy's way to the application",
            );
        }
        if matches!(self.tproxy.route_table, 0 | 253..=255) {
            let message = format!("{} is a table of the kernel; choose another", self.tproxy.route_table);
            found.say("tproxy.routeTable", message);
        }
    }

    /// Several workloads: nothing may be ambiguous between them.
    fn several(&self, found: &mut Findings) {
        for (field, changed) in [
            ("inbound", self.inbound != Inbound::default()),
            ("outbound", self.outbound != Outbound::default()),
            ("dns", self.dns != Dns::default()),
        ] {
            if changed {
                found.say(field, "is said per workload when there are `workloads`; move it there");
            }
        }
        if !self.bridges.is_empty() {
            found.say("bridges", "guests can't be told apart by workload; leave out `workloads`");
        }
        for (i, workload) in self.workloads.iter().enumerate() {
            let at = format!("workloads[{i}].");
            one_of_several(found, &at, workload);
            let all_proxies =
                || self.proxy_uids.iter().chain(self.workloads.iter().flat_map(|w| &w.proxy_uids));
            for uids in &workload.uids {
                if let Some(proxy) = all_proxies().find(|uid| uids.contains(**uid)) {
                    found.say(format!("{at}uids"), format!("{uids} contains {proxy}, the user of a proxy"));
                }
            }
            for (j, earlier) in self.workloads[..i].iter().enumerate() {
                ambiguous(found, &at, workload, &format!("workloads[{j}]"), earlier);
            }
        }
    }
}

fn proxy_ids(found: &mut Findings, field: &str, kind: &str, ids: &[u32]) {
    for (i, id) in ids.iter().enumerate() {
        let field = format!("{field}[{i}]");
        match *id {
            0 => found.say(field, "0 (root) can't be the proxy: everything root does would go past the mesh"),
            u32::MAX => found.say(field, format!("{id} is not a {kind} id")),
            _ => {}
        }
    }
}

fn excluded_proxies(found: &mut Findings, at: &str, proxies: &[u32], outbound: &Outbound) {
    let excluded = |uid: u32| {
        let owners = outbound.exclude_owners.iter().flat_map(|o| &o.uids);
        outbound.exclude_uids.iter().chain(owners).any(|uids| uids.contains(uid))
    };
    for (i, uid) in proxies.iter().enumerate().filter(|(_, uid)| excluded(**uid)) {
        let message = format!("{uid} is also excluded in outbound; list it once");
        found.say(format!("{at}proxyUids[{i}]"), message);
    }
}

/// The traffic of one workload.
fn traffic(found: &mut Findings, at: &str, inbound: &Inbound, outbound: &Outbound, dns: &Dns) {
    for (field, on, port) in [
        ("inbound.port", inbound.enabled, inbound.port),
        ("outbound.port", outbound.enabled, outbound.port),
        ("dns.port", dns.enabled, dns.port),
    ] {
        if on && port == 0 {
            found.say(format!("{at}{field}"), "must be between 1 and 65535");
        }
    }
    if inbound.enabled && outbound.enabled && inbound.port == outbound.port {
        found.say(format!("{at}outbound.port"), format!("{} is already the inbound port", outbound.port));
    }
    for (field, on, port) in
        [("inbound.port", inbound.enabled, inbound.port), ("outbound.port", outbound.enabled, outbound.port)]
    {
        if on && dns.enabled && port == dns.port {
            let message = format!("{port} is already {field}; the shim serves DNS over TCP too");
            found.say(format!("{at}dns.port"), message);
        }
    }
    if dns.enabled && dns.capture == DnsCapture::Resolvers && dns.resolvers.is_empty() {
        let message = "must list at least one address with capture: resolvers";
        found.say(format!("{at}dns.resolvers"), message);
    }
    for (i, owners) in outbound.exclude_owners.iter().enumerate() {
        if owners.uids.is_empty() {
            let message = "must name at least one user; excludePorts leaves ports of everybody alone";
            found.say(format!("{at}outbound.excludeOwners[{i}].uids"), message);
        }
    }
    if inbound.probes.sources.is_empty() && !inbound.probes.ports.is_empty() {
        let message = "must list the node's addresses; for everybody's connections use excludePorts";
        found.say(format!("{at}inbound.probes.sources"), message);
    }
}

fn one_of_several(found: &mut Findings, at: &str, workload: &Workload) {
    traffic(found, at, &workload.inbound, &workload.outbound, &workload.dns);
    excluded_proxies(found, at, &workload.proxy_uids, &workload.outbound);
    proxy_ids(found, &format!("{at}proxyUids"), "user", &workload.proxy_uids);
    if workload.name.is_empty() {
        found.say(format!("{at}name"), "must not be empty");
    }
    if workload.uids.is_empty() && workload.slices.is_empty() {
        found.say(format!("{at}uids"), "say who the workload is: at least one of uids and slices");
    }
    if workload.uids.iter().any(|uids| uids.contains(0)) {
        let message = "0 (root) is no workload's alone; run it in a slice and name that";
        found.say(format!("{at}uids"), message);
    }
    if workload.inbound.enabled && workload.inbound.include_ports.is_empty() {
        let message =
            "must list the workload's ports: its neighbours' connections arrive in the same namespace";
        found.say(format!("{at}inbound.includePorts"), message);
    }
}

/// What two workloads can't both have.
fn ambiguous(found: &mut Findings, at: &str, one: &Workload, other_at: &str, other: &Workload) {
    if one.name == other.name {
        found.say(format!("{at}name"), format!("`{}` is already {other_at}", one.name));
    }
    if let Some(ids) = first_overlap(&one.uids, &other.uids) {
        found.say(format!("{at}uids"), format!("{ids} overlaps with {other_at}.uids"));
    }
    let below = |a: &str, b: &str| a == b || a.strip_prefix(b).is_some_and(|rest| rest.starts_with('/'));
    for slice in &one.slices {
        let same = |s: &&super::Cgroup| below(s.path(), slice.path()) || below(slice.path(), s.path());
        if let Some(s) = other.slices.iter().find(same) {
            found.say(format!("{at}slices"), format!("{slice} overlaps with {s} of {other_at}"));
        }
    }
    if one.inbound.enabled && other.inbound.enabled {
        let overlap = first_overlap(&one.inbound.include_ports, &other.inbound.include_ports);
        if let Some(ports) = overlap {
            let message = format!("{ports} overlaps with {other_at}.inbound.includePorts");
            found.say(format!("{at}inbound.includePorts"), message);
        }
    }
    let ports = |w: &Workload| {
        [
            ("inbound.port", w.inbound.enabled, w.inbound.port),
            ("outbound.port", w.outbound.enabled, w.outbound.port),
            ("dns.port", w.dns.enabled, w.dns.port),
        ]
    };
    for (field, on, port) in ports(one) {
        let same = ports(other).into_iter().find(|(_, other_on, p)| on && *other_on && *p == port);
        if let Some((taken, ..)) = same {
            let message = format!("{port} is already {other_at}.{taken}; each proxy needs ports of its own");
            found.say(format!("{at}{field}"), message);
        }
    }
}

fn first_overlap<T: Copy + Ord>(one: &[super::Span<T>], other: &[super::Span<T>]) -> Option<super::Span<T>> {
    one.iter().find(|a| other.iter().any(|b| a.overlaps(*b))).copied()
}

fn loopback(range: &IpNet) -> IpAddr {
    match range {
        IpNet::V4(_) => Ipv4Addr::LOCALHOST.into(),
        IpNet::V6(_) => Ipv6Addr::LOCALHOST.into(),
    }
}
