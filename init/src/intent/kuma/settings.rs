//! The settings of `kumactl install transparent-proxy`, however they were given.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::Path;

use serde_json::Value;

use super::Findings;
use super::words::{bridges, cidrs, items, owner_exclusions, ports};
use crate::intent::{DnsCapture, Inbound, Outbound, Ports, Position, RedirectIntent};

/// Where kumactl looks for resolvers.
const RESOLV_CONF: &str = "/etc/resolv.conf";

/// Every setting that kumactl knows; what ends with a dot is a group of anything.
const KNOWN: &[&str] = &[
    "kumaDPUser",
    "ipFamilyMode",
    "dropInvalidPackets",
    "redirect.vnet.networks",
    "redirect.inbound.enabled",
    "redirect.inbound.port",
    "redirect.inbound.includePorts",
    "redirect.inbound.excludePorts",
    "redirect.inbound.excludePortsForIPs",
    "redirect.inbound.excludePortsForUIDs",
    "redirect.inbound.insertRedirectInsteadOfAppend",
    "redirect.outbound.enabled",
    "redirect.outbound.port",
    "redirect.outbound.includePorts",
    "redirect.outbound.excludePorts",
    "redirect.outbound.excludePortsForIPs",
    "redirect.outbound.excludePortsForUIDs",
    "redirect.outbound.insertRedirectInsteadOfAppend",
    "redirect.dns.enabled",
    "redirect.dns.port",
    "redirect.dns.captureAll",
    "redirect.dns.skipConntrackZoneSplit",
    "redirect.dns.resolvConfigPath",
    "redirect.dns.upstreamTargetChain",
    "log.enabled",
    "log.level",
    "ebpf.",
    "retry.",
    "iptablesExecutables.",
    "iptablesExecutables",
    "comments.",
    "wait",
    "waitInterval",
    "storeFirewalld",
    "cniMode",
    "dryRun",
    "verbose",
];

/// Reads the resolvers that a `resolv.conf` names.
pub type ReadResolvers<'a> = &'a dyn Fn(&Path) -> Result<Vec<IpAddr>, String>;

/// What only somebody with a system at hand can answer.
#[derive(Clone, Copy)]
pub struct Lookups<'a> {
    /// The number of a user's name.
    pub user: &'a dyn Fn(&str) -> Result<u32, String>,
    /// How to read resolvers; `None` where there is none to read: every lookup is captured then.
    pub resolvers: Option<ReadResolvers<'a>>,
}

/// Settings by their path; what is given later replaces what was given earlier.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Settings(BTreeMap<String, Vec<String>>);

impl Settings {
    /// Gives one setting.
    pub fn set(&mut self, path: &str, values: Vec<String>) {
        self.0.insert(path.to_owned(), values);
    }

    /// Gives what another one holds.
    pub fn extend(&mut self, later: &Self) {
        self.0.extend(later.0.iter().map(|(path, values)| (path.clone(), values.clone())));
    }

    /// The value of a setting that isn't a list.
    pub fn get(&self, path: &str) -> Option<&str> {
        self.0.get(path).and_then(|values| values.last()).map(String::as_str)
    }

    /// Gives everything that a YAML or JSON document holds, and reports what kumactl wouldn't know.
    pub fn read(&mut self, document: &str, found: &mut Findings, at: &str) {
        match crate::yaml::from_str::<Value>(document) {
            Ok(Value::Null) => {}
            Ok(Value::Object(object)) => self.flatten("", &Value::Object(object), found),
            Ok(_) => found.wrong(at, "must be a mapping, such as `redirect: {inbound: {enabled: true}}`"),
            Err(error) => found.wrong(at, format!("is no YAML: {error}")),
        }
    }

    fn flatten(&mut self, path: &str, value: &Value, found: &mut Findings) {
        match value {
            Value::Object(_) if !path.is_empty() && !is_group(path) => {
                found.wrong(path, "is no group of settings of kumactl's transparent proxy");
            }
            Value::Object(object) => {
                for (key, value) in object {
                    let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                    self.flatten(&path, value, found);
                }
            }
            Value::Null => {}
            _ if !is_known(path) => found.wrong(path, "is no setting of kumactl's transparent proxy"),
            Value::Array(list) => {
                let texts: Option<Vec<_>> = list.iter().map(scalar).collect();
                match texts {
                    Some(texts) => self.set(path, texts),
                    None => found.wrong(path, "must be a list of texts or numbers"),
                }
            }
            value => self.set(path, scalar(value).into_iter().collect()),
        }
    }

    /// Lays the settings over an intent.
    pub fn apply(&self, intent: &mut RedirectIntent, lookups: Lookups<'_>) -> Findings {
        let mut found = Findings::default();
        self.who(intent, lookups, &mut found);
        self.inbound(&mut intent.inbound, &mut found);
        self.outbound(&mut intent.outbound, &mut found);
        self.dns(intent, lookups, &mut found);
        self.value(&mut found, "dropInvalidPackets", |text| flag(text).map(|on| intent.drop_invalid = on));
        self.value(&mut found, "log.enabled", |text| flag(text).map(|on| intent.trace = on));
        if intent.trace && self.0.contains_key("log.enabled") {
            found.warn("log.enabled", "rules are traced instead of logged: see `nft monitor trace`");
        }
        self.list(&mut found, "redirect.vnet.networks", bridges, &mut intent.bridges);
        for direction in ["inbound", "outbound"] {
            let path = format!("redirect.{direction}.insertRedirectInsteadOfAppend");
            self.value(&mut found, &path, |text| {
                if flag(text)? {
                    intent.position = Position::First;
                }
                Ok(())
            });
        }
        self.impossible(&mut found);
        found
    }

    fn who(&self, intent: &mut RedirectIntent, lookups: Lookups<'_>, found: &mut Findings) {
        self.value(found, "kumaDPUser", |text| {
            let uid = text.parse().or_else(|_| (lookups.user)(text))?;
            intent.proxy_uids = vec![uid];
            Ok(())
        });
        self.value(found, "ipFamilyMode", |text| {
            let (v4, v6) = match text.to_ascii_lowercase().as_str() {
                "dualstack" => (true, true),
                "ipv4" => (true, false),
                "ipv6" => (false, true),
                _ => return Err(format!("`{text}` is none of dualstack, ipv4, ipv6")),
            };
            (intent.ipv4, intent.ipv6) = (v4, v6);
            Ok(())
        });
    }

    fn inbound(&self, inbound: &mut Inbound, found: &mut Findings) {
        self.value(found, "redirect.inbound.enabled", |text| flag(text).map(|on| inbound.enabled = on));
        self.value(found, "redirect.inbound.port", |text| port(text).map(|port| inbound.port = port));
        self.list(found, "redirect.inbound.includePorts", ports, &mut inbound.include_ports);
        self.list(found, "redirect.inbound.excludePorts", ports, &mut inbound.exclude_ports);
        self.list(found, "redirect.inbound.excludePortsForIPs", cidrs, &mut inbound.exclude_cidrs);
        if self.given("redirect.inbound.excludePortsForUIDs") {
            let message =
                "has no meaning: what arrives has no local user; use excludePorts or excludePortsForIPs";
            found.wrong("redirect.inbound.excludePortsForUIDs", message);
        }
    }

    fn outbound(&self, outbound: &mut Outbound, found: &mut Findings) {
        self.value(found, "redirect.outbound.enabled", |text| flag(text).map(|on| outbound.enabled = on));
        self.value(found, "redirect.outbound.port", |text| port(text).map(|port| outbound.port = port));
        self.list(found, "redirect.outbound.includePorts", ports, &mut outbound.include_ports);
        self.list(found, "redirect.outbound.excludePorts", ports, &mut outbound.exclude_ports);
        self.list(found, "redirect.outbound.excludePortsForIPs", cidrs, &mut outbound.exclude_cidrs);
        let parse = |texts: &[String]| {
            owner_exclusions(texts)
                .map_err(|why| format!("parsing excluded outbound ports for uids failed: {why}"))
        };
        self.list(found, "redirect.outbound.excludePortsForUIDs", parse, &mut outbound.exclude_owners);
    }

    fn dns(&self, intent: &mut RedirectIntent, lookups: Lookups<'_>, found: &mut Findings) {
        let dns = &mut intent.dns;
        self.value(found, "redirect.dns.enabled", |text| flag(text).map(|on| dns.enabled = on));
        self.value(found, "redirect.dns.port", |text| port(text).map(|port| dns.port = port));
        self.value(found, "redirect.dns.skipConntrackZoneSplit", |text| {
            flag(text).map(|skip| dns.conntrack_zones = !skip)
        });
        if self.given("redirect.outbound.excludePortsForIPs") {
            // Kuma's rules for addresses come before those for lookups.
            dns.honour_exclude_cidrs = true;
        }
        let mut all = None;
        self.value(found, "redirect.dns.captureAll", |text| flag(text).map(|on| all = Some(on)));
        let path = self.get("redirect.dns.resolvConfigPath");
        if all == Some(true) {
            dns.capture = DnsCapture::All;
        } else if dns.enabled && (self.given("redirect.dns.enabled") || all.is_some() || path.is_some()) {
            let Some(read) = lookups.resolvers else { return dns.capture = DnsCapture::All };
            match read(Path::new(path.unwrap_or(RESOLV_CONF))) {
                Ok(resolvers) => (dns.capture, dns.resolvers) = (DnsCapture::Resolvers, resolvers),
                Err(why) => found.wrong("redirect.dns.resolvConfigPath", why),
            }
        }
    }

    /// What Ursa can't do, or doesn't need.
    fn impossible(&self, found: &mut Findings) {
        if self.get("ebpf.enabled").is_some_and(|text| flag(text) != Ok(false)) {
            let message =
                "eBPF isn't supported (Kuma 3 removed it too); nftables or iptables do the same work";
            found.wrong("ebpf.enabled", message);
        }
        if self.get("redirect.dns.upstreamTargetChain").is_some_and(|chain| !matches!(chain, "" | "RETURN")) {
            let message =
                "foreign chains can't be jumped to from Ursa's table; the proxy's lookups simply pass";
            found.wrong("redirect.dns.upstreamTargetChain", message);
        }
        if self.get("storeFirewalld").is_some_and(|text| flag(text) != Ok(false)) {
            let message = "nothing is stored in firewalld: run `ursa-init watch`, which puts the rules back after its \
                           reload within a second";
            found.warn("storeFirewalld", message);
        }
        let tuning = ["retry.", "iptablesExecutables", "wait", "comments.", "log.level"];
        for path in self.0.keys().filter(|path| tuning.iter().any(|t| path.starts_with(t))) {
            let message =
                "has no effect: rules go to the kernel in one step, without retries, locks or programs";
            found.warn(path, message);
        }
    }

    fn given(&self, path: &str) -> bool {
        self.0.get(path).is_some_and(|values| items(values).next().is_some())
    }

    fn value(&self, found: &mut Findings, path: &str, take: impl FnOnce(&str) -> Result<(), String>) {
        if let Some(Err(why)) = self.get(path).map(|text| take(text.trim())) {
            found.wrong(path, why);
        }
    }

    /// A list that is given replaces what was there, also by nothing.
    fn list<T>(
        &self,
        found: &mut Findings,
        path: &str,
        parse: impl FnOnce(&[String]) -> Result<Vec<T>, String>,
        target: &mut Vec<T>,
    ) {
        match self.0.get(path).map(|texts| parse(texts)) {
            None => {}
            Some(Ok(list)) => *target = list,
            Some(Err(why)) => found.wrong(path, why),
        }
    }
}

fn is_known(path: &str) -> bool {
    KNOWN.iter().any(|known| path == *known || known.ends_with('.') && path.starts_with(known))
}

fn is_group(path: &str) -> bool {
    let below = |known: &&str| known.strip_prefix(path).is_some_and(|rest| rest.starts_with('.'));
    is_known(path) || KNOWN.iter().copied().any(|known| below(&known))
}

fn scalar(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        Value::Bool(on) => Some(on.to_string()),
        Value::Null => Some(String::new()),
        Value::Array(_) | Value::Object(_) => None,
    }
}

/// Kuma's booleans.
pub(super) fn flag(text: &str) -> Result<bool, String> {
    match text {
        "true" | "yes" | "enabled" | "1" => Ok(true),
        "false" | "no" | "disabled" | "0" => Ok(false),
        _ => Err(format!("`{text}` is neither true nor false")),
    }
}

pub(super) fn port(text: &str) -> Result<u16, String> {
    match text.parse::<Ports>() {
        Ok(ports) if ports.first == ports.last => Ok(ports.first),
        _ => Err(format!("`{text}` is no port (1 to 65535)")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn apply(documents: &[&str]) -> (RedirectIntent, Findings) {
        let mut intent = RedirectIntent::default();
        intent.dns.enabled = false;
        let (mut settings, mut found) = (Settings::default(), Findings::default());
        for document in documents {
            settings.read(document, &mut found, "document");
        }
        let lookups = Lookups {
            user: &|name| if name == "kuma-dp" { Ok(5678) } else { Err(format!("no {name}")) },
            resolvers: Some(&|path| {
                Ok(vec![if path == Path::new(RESOLV_CONF) { [127, 0, 0, 53] } else { [1; 4] }.into()])
            }),
        };
        let more = settings.apply(&mut intent, lookups);
        found.violations.extend(more.violations);
        found.warnings.extend(more.warnings);
        (intent, found)
    }

    #[test]
    fn later_documents_win_per_setting() {
        let (intent, found) = apply(&[
            "redirect: {dns: {enabled: false, port: 7777}}",
            "redirect: {dns: {enabled: true, port: 8888}, inbound: {excludePorts: [10000, 20000]}}",
            "redirect:\n  dns: {captureAll: true}\n  inbound: {excludePorts: [4444]}\n  outbound:\n    \
             excludePortsForUIDs: [1, '2-3:4-5']\n    excludePortsForIPs: ['10.0.0.1,fe80::1', 'fd00::/8']",
        ]);
        assert_eq!(found, Findings::default());
        assert_eq!((intent.dns.enabled, intent.dns.port, intent.dns.capture), (true, 8888, DnsCapture::All));
        assert_eq!(intent.inbound.exclude_ports, ["4444".parse().unwrap()]);
        assert_eq!(intent.outbound.exclude_owners.len(), 2);
        assert_eq!(intent.outbound.exclude_cidrs.len(), 3);
        assert!(intent.dns.honour_exclude_cidrs);
    }

    #[test]
    fn users_and_resolvers_are_looked_up() {
        let (intent, found) = apply(&["kumaDPUser: kuma-dp\nredirect: {dns: {enabled: true}}"]);
        assert_eq!(found, Findings::default());
        assert_eq!(intent.proxy_uids, [5678]);
        assert_eq!(
            (intent.dns.capture, &intent.dns.resolvers[..]),
            (DnsCapture::Resolvers, &[[127, 0, 0, 53].into()][..])
        );
        let (intent, _) = apply(&["redirect: {dns: {enabled: true, resolvConfigPath: /x}}"]);
        assert_eq!(intent.dns.resolvers, [IpAddr::from([1; 4])]);
        assert_eq!(apply(&["kumaDPUser: bob"]).1.violations[0].message, "no bob");
    }

    #[test]
    fn every_mistake_is_named() {
        let (_, found) = apply(&[
            "ipFamilyMode: v5\nebpf: {enabled: true}\nredirct: {}\nredirect: {inbound: {port: 0, prot: 1, \
             excludePortsForUIDs: [5]}, outbound: {excludePorts: ['x'], excludePortsForUIDs: ['tcp:1:*']}, vnet: \
             {networks: [docker0]}}\ndropInvalidPackets: maybe",
            "redirect: [",
        ]);
        let mut fields: Vec<_> = found.violations.iter().map(|v| v.field.as_str()).collect();
        fields.sort_unstable();
        assert_eq!(
            fields,
            [
                "document",
                "dropInvalidPackets",
                "ebpf.enabled",
                "ipFamilyMode",
                "redirct",
                "redirect.inbound.excludePortsForUIDs",
                "redirect.inbound.port",
                "redirect.inbound.prot",
                "redirect.outbound.excludePorts",
                "redirect.outbound.excludePortsForUIDs",
            ]
        );
    }

    #[test]
    fn what_tunes_iptables_only_warns() {
        let (_, found) =
            apply(&["wait: 5\nretry: {maxRetries: 4}\niptablesExecutables: {iptables: /x}\nlog: {level: 7}"]);
        assert_eq!((found.violations.len(), found.warnings.len()), (0, 4));
    }
}
