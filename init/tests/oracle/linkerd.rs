//! What Linkerd's redirect does for its options, as it is documented and as it behaves.

use ipnet::IpNet;
use ursa_init::RedirectIntent;
use ursa_init::intent::{Dns, Inbound, Outbound, Ports};
use ursa_init::plan::Family;

use crate::restore::Tables;

/// As many ports as one rule of the multiport match holds; a range counts twice.
const SLOTS: usize = 15;

/// The options, as in its annotations.
#[derive(Debug, Clone)]
pub(crate) struct Linkerd {
    pub(crate) proxy_uid: u32,
    pub(crate) proxy_gid: Option<u32>,
    /// `skip-inbound-ports`.
    pub(crate) skip_inbound: Vec<Ports>,
    /// `skip-outbound-ports`.
    pub(crate) skip_outbound: Vec<Ports>,
    /// `skip-subnets`: sources.
    pub(crate) skip_subnets: Vec<IpNet>,
    /// Only these ports of the application; empty means all.
    pub(crate) listed: Vec<u16>,
}

impl Default for Linkerd {
    fn default() -> Self {
        Self {
            proxy_uid: 2102,
            proxy_gid: None,
            skip_inbound: Vec::new(),
            skip_outbound: Vec::new(),
            skip_subnets: Vec::new(),
            listed: Vec::new(),
        }
    }
}

impl Linkerd {
    /// Its rules of one family.
    pub(crate) fn rules(&self, family: Family) -> String {
        let mut tables = Tables::default();
        let mut add = |chain: &'static str, rule: String| tables.append("nat", chain, rule);
        let (inbound, outbound) = ("PROXY_INIT_REDIRECT", "PROXY_INIT_OUTPUT");
        skip(&self.skip_inbound, |ports| {
            add(inbound, format!("-p tcp -m multiport --dports {ports} -j RETURN"));
        });
        // Linkerd gives the subnets of both families to both, which one of the two refuses.
        for subnet in self.skip_subnets.iter().filter(|subnet| Family::of(subnet) == family) {
            add(inbound, format!("-s {subnet} -j RETURN"));
        }
        for port in &self.listed {
            add(inbound, format!("-p tcp --dport {port} -j REDIRECT --to-ports 4143"));
        }
        if self.listed.is_empty() {
            add(inbound, "-p tcp -j REDIRECT --to-ports 4143".to_owned());
        }
        add("PREROUTING", format!("-j {inbound}"));
        add(outbound, format!("-m owner --uid-owner {} -j RETURN", self.proxy_uid));
        if let Some(gid) = self.proxy_gid {
            add(outbound, format!("-m owner --gid-owner {gid} -j RETURN"));
        }
        add(outbound, "-o lo -j RETURN".to_owned());
        skip(&self.skip_outbound, |ports| {
            add(outbound, format!("-p tcp -m multiport --dports {ports} -j RETURN"));
        });
        add(outbound, "-p tcp -j REDIRECT --to-ports 4140".to_owned());
        add("OUTPUT", format!("-j {outbound}"));
        tables.to_string()
    }

    /// The intent that is to do the same.
    pub(crate) fn intent(&self) -> RedirectIntent {
        RedirectIntent {
            proxy_uids: vec![self.proxy_uid],
            proxy_gids: self.proxy_gid.into_iter().collect(),
            inbound: Inbound {
                port: 4143,
                include_ports: self.listed.iter().copied().map(Ports::one).collect(),
                exclude_ports: self.skip_inbound.clone(),
                exclude_cidrs: self.skip_subnets.clone(),
                ..Inbound::default()
            },
            outbound: Outbound {
                port: 4140,
                exclude_ports: self.skip_outbound.clone(),
                ..Outbound::default()
            },
            dns: Dns { enabled: false, ..Dns::default() },
            ..RedirectIntent::default()
        }
    }
}

/// Calls `rule` with each list of ports that fits one rule.
fn skip(ports: &[Ports], mut rule: impl FnMut(String)) {
    let (mut list, mut used) = (Vec::new(), 0);
    for span in ports {
        let slots = if span.first == span.last { 1 } else { 2 };
        if used + slots > SLOTS {
            rule(std::mem::take(&mut list).join(","));
            used = 0;
        }
        list.push(span.to_string().replace('-', ":"));
        used += slots;
    }
    if !list.is_empty() {
        rule(list.join(","));
    }
}
