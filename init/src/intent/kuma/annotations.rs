//! The annotations of a pod that concern its redirect.

use std::collections::BTreeMap;

use super::Findings;
use super::settings::{Lookups, Settings, flag, port};
use crate::intent::{InboundMode, Ports, RedirectIntent, Violation};

/// A whole document of kumactl's settings; the other annotations win over it.
const CONFIG: &str = "traffic.kuma.io/transparent-proxy-config";
const CONFIG_MAP: &str = "traffic.kuma.io/transparent-proxy-configmap-name";
const REDIRECTED: &str = "kuma.io/transparent-proxying";
const GATEWAY: &str = "kuma.io/gateway";
const REMOVED: [&str; 2] = [
    "traffic.kuma.io/exclude-outbound-tcp-ports-for-uids",
    "traffic.kuma.io/exclude-outbound-udp-ports-for-uids",
];
/// Ours: Kuma has no TPROXY.
const MODE: &str = "ursa.io/inbound-mode";
const PROBE_PORTS: [&str; 2] = ["kuma.io/virtual-probes-port", "kuma.io/application-probe-proxy-port"];

/// Annotations that are one of kumactl's settings each, the older spelling first: the later one wins.
const SETTINGS: &[(&str, &str)] = &[
    ("kuma.io/sidecar-uid", "kumaDPUser"),
    ("kuma.io/transparent-proxying-inbound-port", "redirect.inbound.port"),
    ("kuma.io/transparent-proxying-outbound-port", "redirect.outbound.port"),
    ("kuma.io/transparent-proxying-ip-family-mode", "ipFamilyMode"),
    ("traffic.kuma.io/transparent-proxying-ip-family-mode", "ipFamilyMode"),
    ("kuma.io/builtindns", "redirect.dns.enabled"),
    ("kuma.io/builtin-dns", "redirect.dns.enabled"),
    ("kuma.io/builtindnsport", "redirect.dns.port"),
    ("kuma.io/builtin-dns-port", "redirect.dns.port"),
    ("kuma.io/transparent-proxying-ebpf", "ebpf.enabled"),
    ("traffic.kuma.io/exclude-inbound-ports", "redirect.inbound.excludePorts"),
    ("traffic.kuma.io/exclude-inbound-ips", "redirect.inbound.excludePortsForIPs"),
    ("traffic.kuma.io/exclude-outbound-ports", "redirect.outbound.excludePorts"),
    ("traffic.kuma.io/exclude-outbound-ips", "redirect.outbound.excludePortsForIPs"),
    ("traffic.kuma.io/exclude-outbound-ports-for-uids", "redirect.outbound.excludePortsForUIDs"),
    ("traffic.kuma.io/drop-invalid-packets", "dropInvalidPackets"),
    ("traffic.kuma.io/iptables-logs", "log.enabled"),
];

/// Whether an annotation concerns the redirect.
pub fn is_known(annotation: &str) -> bool {
    let others =
        [CONFIG, CONFIG_MAP, REDIRECTED, GATEWAY, MODE].into_iter().chain(REMOVED).chain(PROBE_PORTS);
    SETTINGS.iter().map(|(name, _)| *name).chain(others).any(|name| name == annotation)
}

/// Lays a pod's annotations over a redirect. Lists that an annotation gives replace those of `base`.
///
/// Numbers only: a user's name can't be looked up in the pod's image. Lookups of a pod are captured as a whole
/// where its annotations don't say more, since its resolvers aren't known here.
pub fn from_annotations(
    base: &RedirectIntent,
    annotations: &BTreeMap<String, String>,
) -> Result<RedirectIntent, Vec<Violation>> {
    let mut intent = base.clone();
    let (mut settings, mut found) = (Settings::default(), Findings::default());
    if let Some(document) = annotations.get(CONFIG) {
        let mut inside = Findings::default();
        settings.read(document, &mut inside, "");
        for violation in inside.violations {
            found.wrong(&name(CONFIG), format!("{} {}", violation.field, violation.message).trim_start());
        }
    } else if let Some(config_map) = annotations.get(CONFIG_MAP).filter(|name| !name.is_empty()) {
        let message = format!(
            "the ConfigMap {config_map} isn't read: a node asks no API server for a redirect. Put its content into \
             the annotation {CONFIG}"
        );
        found.wrong(&name(CONFIG_MAP), message);
    }
    for (annotation, setting) in SETTINGS {
        if let Some(text) = annotations.get(*annotation) {
            settings.set(setting, vec![text.clone()]);
        }
    }
    for removed in REMOVED.into_iter().filter(|removed| annotations.contains_key(*removed)) {
        let message =
            "was removed from Kuma; use traffic.kuma.io/exclude-outbound-ports-for-uids: tcp:22:1000";
        found.wrong(&name(removed), message);
    }
    let no_name = |user: &str| {
        Err(format!(
            "`{user}` is no numeric user id; a name can't be looked up in the pod's image, so write the number"
        ))
    };
    let applied = settings.apply(&mut intent, Lookups { user: &no_name, resolvers: None });
    for violation in applied.violations {
        found.violations.push(Violation { field: origin(&violation.field, annotations), ..violation });
    }
    switches(&mut intent, annotations, &mut found);
    if found.violations.is_empty() { Ok(intent) } else { Err(found.violations) }
}

/// The redirect of a pod: that of its network, with the pod's annotations laid over it. Where the network names no
/// proxy, the group `proxy_gid` is exempt; the pod never names it, because another's proxy on the node could be its
/// own then.
pub fn for_pod(
    network: RedirectIntent,
    proxy_gid: u32,
    annotations: &BTreeMap<String, String>,
) -> Result<RedirectIntent, Vec<Violation>> {
    let mut base = network;
    if base.proxy_uids.is_empty() && base.proxy_gids.is_empty() && base.proxy_mark.is_none() {
        base.proxy_gids.push(proxy_gid);
    }
    let intent = from_annotations(&base, annotations)?;
    let RedirectIntent { proxy_uids, proxy_gids, proxy_mark, .. } = base;
    Ok(RedirectIntent { proxy_uids, proxy_gids, proxy_mark, ..intent })
}

/// What isn't one of kumactl's settings.
fn switches(intent: &mut RedirectIntent, annotations: &BTreeMap<String, String>, found: &mut Findings) {
    match annotations.get(REDIRECTED).map(|text| flag(text)) {
        None | Some(Ok(true)) => {}
        Some(Ok(false)) => {
            (intent.inbound.enabled, intent.outbound.enabled, intent.dns.enabled) = (false, false, false);
        }
        Some(Err(why)) => found.wrong(&name(REDIRECTED), why),
    }
    match annotations.get(GATEWAY).map(String::as_str) {
        None => {}
        // What arrives at a gateway comes from outside of the mesh.
        Some("builtin") => {
            found.wrong(&name(GATEWAY), "builtin gateways were removed from Kuma; use `enabled`");
        }
        Some(text) => match flag(text) {
            Ok(on) => intent.inbound.enabled &= !on,
            Err(why) => found.wrong(&name(GATEWAY), why),
        },
    }
    match annotations.get(MODE).map(String::as_str) {
        None => {}
        Some("redirect") => intent.inbound.mode = InboundMode::Redirect,
        Some("tproxy") => intent.inbound.mode = InboundMode::Tproxy,
        Some(text) => {
            found.wrong(
                &name(MODE),
                format!("`{text}` is no mode; write `redirect`, or `tproxy` to keep clients' addresses"),
            );
        }
    }
    for annotation in PROBE_PORTS {
        match annotations.get(annotation).map(String::as_str) {
            None | Some("0") => {}
            Some(text) => match port(text).map(Ports::one) {
                Ok(port) if intent.inbound.exclude_ports.contains(&port) => {}
                Ok(port) => intent.inbound.exclude_ports.push(port),
                Err(why) => found.wrong(&name(annotation), why),
            },
        }
    }
}

/// Which annotation gave a setting: the last one that is present.
fn origin(setting: &str, annotations: &BTreeMap<String, String>) -> String {
    let of = |(annotation, s): &&(&str, &str)| *s == setting && annotations.contains_key(*annotation);
    match SETTINGS.iter().rev().find(of) {
        Some((annotation, _)) => name(annotation),
        None => format!("{}.{setting}", name(CONFIG)),
    }
}

fn name(annotation: &str) -> String {
    format!("annotations[\"{annotation}\"]")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::intent::DnsCapture;

    fn read(base: &RedirectIntent, given: &[(&str, &str)]) -> Result<RedirectIntent, Vec<Violation>> {
        let annotations = given.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
        from_annotations(base, &annotations)
    }

    fn base() -> RedirectIntent {
        let mut base = RedirectIntent { proxy_gids: vec![5678], ..RedirectIntent::default() };
        base.outbound.exclude_ports = vec![Ports::one(1)];
        base.inbound.exclude_ports = vec![Ports::one(2)];
        base
    }

    #[test]
    fn nothing_said_changes_nothing() {
        assert_eq!(read(&base(), &[("kuma.io/mesh", "default"), ("x", "y")]), Ok(base()));
    }

    #[test]
    fn each_annotation_replaces_its_setting() {
        let intent = read(
            &base(),
            &[
                (CONFIG, "redirect: {dns: {enabled: true, port: 1053}, inbound: {port: 16006}}\nipFamilyMode: ipv4"),
                ("kuma.io/transparent-proxying-inbound-port", "17006"),
                ("traffic.kuma.io/exclude-outbound-ports", "22, 80-90"),
                ("traffic.kuma.io/exclude-inbound-ips", "10.0.0.1,fe80::/10"),
                ("traffic.kuma.io/exclude-outbound-ports-for-uids", "tcp:22:1000;2000"),
                ("traffic.kuma.io/drop-invalid-packets", "true"),
                ("traffic.kuma.io/iptables-logs", "enabled"),
                ("kuma.io/application-probe-proxy-port", "9001"),
            ],
        )
        .unwrap();
        assert_eq!((intent.inbound.port, intent.dns.port, intent.ipv6), (17006, 1053, false));
        assert_eq!(intent.outbound.exclude_ports, ["22".parse().unwrap(), "80-90".parse().unwrap()]);
        assert_eq!(intent.inbound.exclude_ports, [Ports::one(2), Ports::one(9001)]);
        assert_eq!((intent.inbound.exclude_cidrs.len(), intent.outbound.exclude_owners.len()), (2, 2));
        assert!(intent.drop_invalid && intent.trace);
        assert_eq!((intent.dns.capture, intent.proxy_gids), (DnsCapture::All, vec![5678]));
    }

    #[test]
    fn pods_that_switch_parts_off() {
        let off = read(&base(), &[(REDIRECTED, "disabled")]).unwrap();
        assert!(!off.inbound.enabled && !off.outbound.enabled && !off.dns.enabled);
        let gateway = read(&base(), &[(GATEWAY, "enabled")]).unwrap();
        assert!(!gateway.inbound.enabled && gateway.outbound.enabled);
        assert!(!read(&base(), &[("kuma.io/builtindns", "disabled")]).unwrap().dns.enabled);
    }

    #[test]
    fn a_pod_may_keep_its_clients_addresses() {
        let mode = |text: &str| read(&base(), &[(MODE, text)]).map(|intent| intent.inbound.mode);
        assert_eq!(mode("tproxy"), Ok(InboundMode::Tproxy));
        assert_eq!(mode("redirect"), Ok(InboundMode::Redirect));
        let wrong = mode("TPROXY").unwrap_err();
        assert!(wrong[0].field.contains(MODE) && wrong[0].message.contains("`tproxy`"), "{wrong:?}");
        assert!(is_known(MODE));
    }

    #[test]
    fn every_violation_names_its_annotation() {
        let found = read(
            &base(),
            &[
                (CONFIG, "redirect: {outbound: {port: x}, inbuond: {port: 1}}"),
                ("traffic.kuma.io/exclude-outbound-ports", "http"),
                ("traffic.kuma.io/exclude-outbound-ips", "example.org"),
                ("kuma.io/sidecar-uid", "kuma-dp"),
                ("kuma.io/builtindnsport", "70000"),
                ("kuma.io/transparent-proxying-ebpf", "enabled"),
                ("kuma.io/gateway", "builtin"),
                ("kuma.io/virtual-probes-port", "x"),
            ],
        );
        let mut fields: Vec<_> = found.unwrap_err().into_iter().map(|v| v.field).collect();
        fields.sort();
        let expected = [
            "annotations[\"kuma.io/builtindnsport\"]",
            "annotations[\"kuma.io/gateway\"]",
            "annotations[\"kuma.io/sidecar-uid\"]",
            "annotations[\"kuma.io/transparent-proxying-ebpf\"]",
            "annotations[\"kuma.io/virtual-probes-port\"]",
            "annotations[\"traffic.kuma.io/exclude-outbound-ips\"]",
            "annotations[\"traffic.kuma.io/exclude-outbound-ports\"]",
            "annotations[\"traffic.kuma.io/transparent-proxy-config\"]",
            "annotations[\"traffic.kuma.io/transparent-proxy-config\"].redirect.outbound.port",
        ];
        assert_eq!(fields, expected);
    }

    #[test]
    fn a_config_map_is_never_silently_ignored() {
        let found = read(&base(), &[(CONFIG_MAP, "my-config")]).unwrap_err();
        assert!(found[0].message.contains("my-config isn't read"));
        // An injector has read it already.
        assert!(read(&base(), &[(CONFIG_MAP, "my-config"), (CONFIG, "{}")]).is_ok());
    }

    proptest::proptest! {
        #[test]
        fn whatever_an_annotation_holds_it_is_taken_or_named(
            which in 0..SETTINGS.len() + 4,
            text in "[ -~]{0,12}|[0-9,:;*a-z/.-]{0,16}|(tcp|udp|true|enabled|[0-9]{1,5})([:,;-]([0-9]{1,5}|\\*|tcp))*",
        ) {
            let others = [CONFIG, REDIRECTED, GATEWAY, PROBE_PORTS[0]];
            let name = SETTINGS.get(which).map_or_else(|| others[which - SETTINGS.len()], |(name, _)| name);
            match read(&base(), &[(name, &text)]) {
                // What is taken can be written and read again.
                Ok(intent) => {
                    let written = serde_json::to_string(&intent).unwrap();
                    proptest::prop_assert_eq!(serde_json::from_str::<RedirectIntent>(&written).unwrap(), intent);
                }
                Err(found) => proptest::prop_assert!(found.iter().all(|v| v.field.contains(name)), "{:?}", found),
            }
        }
    }
}
