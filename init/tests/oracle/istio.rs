//! What Istio's sidecar redirect does for its options, as it is documented and as it behaves.

use std::net::IpAddr;

use ipnet::IpNet;
use ursa_init::RedirectIntent;
use ursa_init::intent::{Bridge, Dns, DnsCapture, Ids, Inbound, InboundMode, Interfaces, Outbound, Ports};
use ursa_init::plan::Family;

use crate::restore::Tables;

/// Istio's numbers: proxy's outbound port, inbound port, tunnel port, shim's DNS port, marks.
const TUNNEL: u16 = 15008;
pub(crate) const MARK: u32 = 1337;
pub(crate) const ROUTE_TABLE: u32 = 133;
const HAIRPIN_MARK: u32 = 1338;

/// Lookups that are captured.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) enum Lookups {
    #[default]
    None,
    All,
    To(Vec<IpAddr>),
}

/// The options, by the names that they have in its annotations as far as there is one.
#[derive(Debug, Clone)]
pub(crate) struct Istio {
    pub(crate) proxy_uids: Vec<u32>,
    pub(crate) proxy_gids: Vec<u32>,
    /// `includeInboundPorts`; `None` is `*`.
    pub(crate) include_inbound: Option<Vec<u16>>,
    pub(crate) exclude_inbound: Vec<u16>,
    pub(crate) include_outbound_ports: Vec<u16>,
    pub(crate) exclude_outbound_ports: Vec<u16>,
    /// `includeOutboundIPRanges`; `None` is `*`.
    pub(crate) include_ranges: Option<Vec<IpNet>>,
    pub(crate) exclude_ranges: Vec<IpNet>,
    pub(crate) exclude_interfaces: Vec<&'static str>,
    /// `reroute-virtual-interfaces`.
    pub(crate) virtual_interfaces: Vec<&'static str>,
    pub(crate) include_groups: Vec<u32>,
    pub(crate) exclude_groups: Vec<u32>,
    pub(crate) lookups: Lookups,
    pub(crate) drop_invalid: bool,
    pub(crate) tproxy: bool,
}

impl Default for Istio {
    fn default() -> Self {
        Self {
            proxy_uids: vec![1337],
            proxy_gids: vec![1337],
            include_inbound: None,
            exclude_inbound: Vec::new(),
            include_outbound_ports: Vec::new(),
            exclude_outbound_ports: Vec::new(),
            include_ranges: None,
            exclude_ranges: Vec::new(),
            exclude_interfaces: Vec::new(),
            virtual_interfaces: Vec::new(),
            include_groups: Vec::new(),
            exclude_groups: Vec::new(),
            lookups: Lookups::None,
            drop_invalid: false,
            tproxy: false,
        }
    }
}

impl Istio {
    /// Its rules of one family.
    pub(crate) fn rules(&self, family: Family) -> String {
        let mut tables = Tables::default();
        let loopback = if family == Family::V4 { "127.0.0.1/32" } else { "::1/128" };
        self.arriving(&mut tables, family, loopback);
        self.opened(&mut tables, family, loopback);
        if self.lookups != Lookups::None {
            self.zones(&mut tables, family);
        }
        if self.tproxy {
            self.marks(&mut tables, loopback);
        }
        tables.to_string()
    }

    fn owners(&self) -> impl Iterator<Item = String> {
        let uids = self.proxy_uids.iter().map(|uid| format!("--uid-owner {uid}"));
        uids.chain(self.proxy_gids.iter().map(|gid| format!("--gid-owner {gid}")))
    }

    fn arriving(&self, tables: &mut Tables, family: Family, loopback: &str) {
        let table = if self.tproxy { "mangle" } else { "nat" };
        for interface in &self.exclude_interfaces {
            for table in if self.tproxy { &["nat", "mangle"][..] } else { &["nat"] } {
                tables.append(table, "PREROUTING", format!("-i {interface} -j RETURN"));
                tables.append(table, "OUTPUT", format!("-o {interface} -j RETURN"));
            }
        }
        for interface in &self.virtual_interfaces {
            tables.insert("nat", "PREROUTING", format!("-i {interface} -j RETURN"));
            for to in self.ranges(family) {
                tables.insert("nat", "PREROUTING", format!("-i {interface} {to}-j ISTIO_REDIRECT"));
            }
        }
        if self.drop_invalid {
            tables.append("mangle", "PREROUTING", "-m conntrack --ctstate INVALID -j ISTIO_DROP");
            tables.append("mangle", "ISTIO_DROP", "-j DROP");
        }
        tables.append("nat", "ISTIO_INBOUND", format!("-p tcp --dport {TUNNEL} -j RETURN"));
        tables.append("nat", "ISTIO_REDIRECT", "-p tcp -j REDIRECT --to-ports 15001");
        tables.append("nat", "ISTIO_IN_REDIRECT", "-p tcp -j REDIRECT --to-ports 15006");
        if self.include_inbound.as_ref().is_some_and(Vec::is_empty) {
            return;
        }
        let to_proxy = if self.tproxy { "ISTIO_TPROXY" } else { "ISTIO_IN_REDIRECT" };
        if self.tproxy {
            tables.append("mangle", "ISTIO_DIVERT", format!("-j MARK --set-mark {MARK}"));
            tables.append("mangle", "ISTIO_DIVERT", "-j ACCEPT");
            let target = format!("-j TPROXY --on-port 15006 --tproxy-mark {MARK}/0xffffffff");
            tables.append("mangle", "ISTIO_TPROXY", format!("! -d {loopback} -p tcp {target}"));
        }
        tables.append(table, "PREROUTING", "-p tcp -j ISTIO_INBOUND");
        let mut redirect = |to: String| {
            if self.tproxy {
                let known = "-m conntrack --ctstate RELATED,ESTABLISHED";
                tables.append(table, "ISTIO_INBOUND", format!("-p tcp {to}{known} -j ISTIO_DIVERT"));
            }
            tables.append(table, "ISTIO_INBOUND", format!("-p tcp {to}-j {to_proxy}"));
        };
        if let Some(ports) = &self.include_inbound {
            for port in ports {
                redirect(format!("--dport {port} "));
            }
            return;
        }
        redirect(String::new());
        for port in self.exclude_inbound.iter().rev() {
            tables.insert(table, "ISTIO_INBOUND", format!("-p tcp --dport {port} -j RETURN"));
        }
    }

    /// The destinations that are redirected, as matches.
    fn ranges(&self, family: Family) -> Vec<String> {
        match &self.include_ranges {
            None => vec![String::new()],
            Some(ranges) => {
                let mine = ranges.iter().filter(|range| Family::of(range) == family);
                mine.map(|range| format!("-d {range} ")).collect()
            }
        }
    }

    fn opened(&self, tables: &mut Tables, family: Family, loopback: &str) {
        let mut add = |rule: String| tables.append("nat", "ISTIO_OUTPUT", rule);
        for port in &self.exclude_outbound_ports {
            for protocol in ["tcp", "udp"] {
                add(format!("-p {protocol} --dport {port} -j RETURN"));
            }
        }
        let passthrough = if family == Family::V4 { "127.0.0.6/32" } else { "::6/128" };
        add(format!("-o lo -s {passthrough} -j RETURN"));
        let dns = self.lookups != Lookups::None;
        for owner in self.owners() {
            let except = if dns && owner.starts_with("--uid") {
                format!("-m multiport ! --dports 53,{TUNNEL}")
            } else {
                format!("! --dport {TUNNEL}")
            };
            add(format!("-o lo ! -d {loopback} -p tcp {except} -m owner {owner} -j ISTIO_IN_REDIRECT"));
            let lookups = if dns { "-p tcp ! --dport 53 " } else { "" };
            add(format!("-o lo {lookups}-m owner ! {owner} -j RETURN"));
            add(format!("-m owner {owner} -j RETURN"));
        }
        if !self.include_groups.is_empty() {
            let none: Vec<_> =
                self.include_groups.iter().map(|g| format!("-m owner ! --gid-owner {g} ")).collect();
            add(format!("{}-j RETURN", none.concat()));
        }
        for group in &self.exclude_groups {
            add(format!("-m owner --gid-owner {group} -j RETURN"));
        }
        if dns {
            add("-j ISTIO_OUTPUT_DNS".to_owned());
        }
        add(format!("-d {loopback} -j RETURN"));
        for range in self.exclude_ranges.iter().filter(|range| Family::of(range) == family) {
            add(format!("-d {range} -j RETURN"));
        }
        for port in &self.include_outbound_ports {
            add(format!("-p tcp --dport {port} -j ISTIO_REDIRECT"));
        }
        for to in self.ranges(family) {
            add(format!("{to}-j ISTIO_REDIRECT"));
        }
        for protocol in ["tcp", "udp"] {
            for to in self.resolvers(family, "-d") {
                let redirect = format!("-p {protocol} --dport 53 {to}-j REDIRECT --to-ports 15053");
                tables.append("nat", "ISTIO_OUTPUT_DNS", redirect);
            }
        }
        tables.append("nat", "OUTPUT", "-j ISTIO_OUTPUT");
    }

    /// The resolvers whose lookups are captured, as matches.
    fn resolvers(&self, family: Family, option: &str) -> Vec<String> {
        match &self.lookups {
            Lookups::None => Vec::new(),
            Lookups::All => vec![String::new()],
            Lookups::To(resolvers) => {
                let mine = resolvers.iter().filter(|resolver| resolver.is_ipv4() == (family == Family::V4));
                mine.map(|resolver| format!("{option} {} ", IpNet::from(*resolver))).collect()
            }
        }
    }

    fn zones(&self, tables: &mut Tables, family: Family) {
        tables.append("raw", "OUTPUT", "-j ISTIO_OUTPUT_DNS");
        tables.append("raw", "PREROUTING", "-j ISTIO_INBOUND");
        for owner in self.owners() {
            for (port, zone) in [("--dport 53", 1), ("--sport 15053", 2)] {
                let rule = format!("-p udp {port} -m owner {owner} -j CT --zone {zone}");
                tables.append("raw", "ISTIO_OUTPUT_DNS", rule);
            }
        }
        for to in self.resolvers(family, "-d") {
            tables.append("raw", "ISTIO_OUTPUT_DNS", format!("-p udp --dport 53 {to}-j CT --zone 2"));
        }
        for from in self.resolvers(family, "-s") {
            tables.append("raw", "ISTIO_INBOUND", format!("-p udp --sport 53 {from}-j CT --zone 1"));
        }
    }

    fn marks(&self, tables: &mut Tables, loopback: &str) {
        let marked = format!("-m mark --mark {MARK}");
        tables.append("mangle", "PREROUTING", format!("-p tcp {marked} -j CONNMARK --save-mark"));
        tables.append("mangle", "OUTPUT", format!("-p tcp -o lo {marked} -j RETURN"));
        for owner in self.owners() {
            let mark = format!("-m owner {owner} -j MARK --set-mark {HAIRPIN_MARK}");
            tables.append("mangle", "OUTPUT", format!("! -d {loopback} -p tcp -o lo {mark}"));
        }
        let restore = format!("-p tcp -m connmark --mark {MARK} -j CONNMARK --restore-mark");
        tables.append("mangle", "OUTPUT", restore);
        let passthrough = if loopback.contains(':') { "::6/128" } else { "127.0.0.6/32" };
        for rule in [
            format!("-p tcp -i lo -m mark ! --mark {HAIRPIN_MARK} -j RETURN"),
            format!("-p tcp -s {passthrough} -i lo -j RETURN"),
            format!("-p tcp {marked} -j RETURN"),
        ] {
            tables.insert("mangle", "ISTIO_INBOUND", rule);
        }
    }

    /// The intent that is to do the same.
    pub(crate) fn intent(&self) -> RedirectIntent {
        let ports = |ports: &[u16]| ports.iter().copied().map(Ports::one).collect::<Vec<_>>();
        let ids = |ids: &[u32]| ids.iter().copied().map(Ids::one).collect::<Vec<_>>();
        let include = self.include_inbound.clone().unwrap_or_default();
        // Istio leaves its tunnel's port alone unless it is told otherwise.
        let tunnel = self.include_inbound.is_none().then_some(TUNNEL);
        let exclude: Vec<u16> = self.exclude_inbound.iter().copied().chain(tunnel).collect();
        let ranges = self.include_ranges.clone().unwrap_or_default();
        // With all destinations included, included ports add nothing.
        let some = self.include_ranges.is_some();
        let interface = |name: &&str| name.parse().expect("an interface");
        RedirectIntent {
            proxy_uids: self.proxy_uids.clone(),
            proxy_gids: self.proxy_gids.clone(),
            inbound: Inbound {
                enabled: self.include_inbound.as_ref().is_none_or(|ports| !ports.is_empty()),
                mode: if self.tproxy { InboundMode::Tproxy } else { InboundMode::Redirect },
                include_ports: ports(&include),
                exclude_ports: ports(&exclude),
                ..Inbound::default()
            },
            outbound: Outbound {
                enabled: !some || !ranges.is_empty() || !self.include_outbound_ports.is_empty(),
                include_ports: if some { ports(&self.include_outbound_ports) } else { Vec::new() },
                exclude_ports: ports(&self.exclude_outbound_ports),
                include_cidrs: ranges,
                exclude_cidrs: self.exclude_ranges.clone(),
                include_gids: ids(&self.include_groups),
                exclude_gids: ids(&self.exclude_groups),
                ..Outbound::default()
            },
            dns: Dns {
                enabled: self.lookups != Lookups::None,
                capture: if matches!(self.lookups, Lookups::To(_)) {
                    DnsCapture::Resolvers
                } else {
                    DnsCapture::All
                },
                resolvers: if let Lookups::To(all) = &self.lookups { all.clone() } else { Vec::new() },
                ..Dns::default()
            },
            interfaces: Interfaces {
                exclude: self.exclude_interfaces.iter().map(interface).collect(),
                ..Interfaces::default()
            },
            bridges: self
                .virtual_interfaces
                .iter()
                .map(|name| Bridge { interface: interface(name), local_cidrs: Vec::new() })
                .collect(),
            drop_invalid: self.drop_invalid,
            ..RedirectIntent::default()
        }
    }
}
