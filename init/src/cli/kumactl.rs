//! `ursa-init transparent-proxy`: the arguments, variables and documents of `kumactl install transparent-proxy`.

use std::path::{Path, PathBuf};

use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches};

use super::{Usage, options};
use crate::intent::kuma::{Findings, Lookups, Settings};
use crate::intent::{RedirectIntent, Violation};
use crate::{InvalidIntent, users};

/// kumactl's user, and its number where there is none of that name.
const USER: (&str, u32) = ("kuma-dp", 5678);
const CONFIGS: [&str; 2] = ["config", "config-file"];

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// May stand without a value.
    Switch,
    Text,
    /// May be repeated.
    List,
    /// Can't be given as a flag.
    VariableOnly,
    /// Was removed from kumactl.
    Removed(&'static str),
}

use Kind::{List, Removed, Switch, Text, VariableOnly};

/// Flag, path of the setting, variable without `KUMA_TRANSPARENT_PROXY_`, and kind.
#[rustfmt::skip]
const SETTINGS: &[(&str, &str, &str, Kind, &str)] = &[
    ("kuma-dp-user", "kumaDPUser", "KUMA_DP_USER", Text, "The user of the proxy, name or number [default: kuma-dp, else 5678]"),
    ("ip-family-mode", "ipFamilyMode", "IP_FAMILY_MODE", Text, "dualstack, ipv4 or ipv6 [default: dualstack]"),
    ("redirect-inbound", "redirect.inbound.enabled", "REDIRECT_INBOUND_ENABLED", Switch, "Redirect arriving connections [default: true]"),
    ("redirect-inbound-port", "redirect.inbound.port", "REDIRECT_INBOUND_PORT", Text, "The proxy's inbound port [default: 15006]"),
    ("redirect-inbound-include-ports", "redirect.inbound.includePorts", "REDIRECT_INBOUND_INCLUDE_PORTS", VariableOnly, ""),
    ("exclude-inbound-ports", "redirect.inbound.excludePorts", "REDIRECT_INBOUND_EXCLUDE_PORTS", List, "Leave these arriving ports alone"),
    ("exclude-inbound-ips", "redirect.inbound.excludePortsForIPs", "REDIRECT_INBOUND_EXCLUDE_PORTS_FOR_IPS", List, "Leave connections from these addresses or networks alone"),
    ("redirect-inbound-exclude-uids", "redirect.inbound.excludePortsForUIDs", "REDIRECT_INBOUND_EXCLUDE_PORTS_FOR_UIDS", VariableOnly, ""),
    ("redirect-inbound-insert-instead-of-append", "redirect.inbound.insertRedirectInsteadOfAppend", "REDIRECT_INBOUND_INSERT_REDIRECT_INSTEAD_OF_APPEND", Switch, "Come before other programs' rules (Ursa's do anyway)"),
    ("redirect-outbound", "redirect.outbound.enabled", "REDIRECT_OUTBOUND_ENABLED", VariableOnly, ""),
    ("redirect-outbound-port", "redirect.outbound.port", "REDIRECT_OUTBOUND_PORT", Text, "The proxy's outbound port [default: 15001]"),
    ("redirect-outbound-include-ports", "redirect.outbound.includePorts", "REDIRECT_OUTBOUND_INCLUDE_PORTS", VariableOnly, ""),
    ("exclude-outbound-ports", "redirect.outbound.excludePorts", "REDIRECT_OUTBOUND_EXCLUDE_PORTS", List, "Leave these destination ports alone"),
    ("exclude-outbound-ips", "redirect.outbound.excludePortsForIPs", "REDIRECT_OUTBOUND_EXCLUDE_PORTS_FOR_IPS", List, "Leave these destinations alone, lookups too"),
    ("exclude-outbound-ports-for-uids", "redirect.outbound.excludePortsForUIDs", "REDIRECT_OUTBOUND_EXCLUDE_PORTS_FOR_UIDS", List, "[[protocol:]ports:]uids, such as tcp:22,80-88:1000-1002"),
    ("redirect-outbound-insert-instead-of-append", "redirect.outbound.insertRedirectInsteadOfAppend", "REDIRECT_OUTBOUND_INSERT_REDIRECT_INSTEAD_OF_APPEND", Switch, "Come before other programs' rules (Ursa's do anyway)"),
    ("redirect-dns", "redirect.dns.enabled", "REDIRECT_DNS_ENABLED", Switch, "Redirect lookups to the resolvers in /etc/resolv.conf"),
    ("redirect-all-dns-traffic", "redirect.dns.captureAll", "REDIRECT_DNS_CAPTURE_ALL", Switch, "Redirect every lookup"),
    ("redirect-dns-port", "redirect.dns.port", "REDIRECT_DNS_PORT", Text, "The shim's DNS port [default: 15053]"),
    ("redirect-dns-resolv-config-path", "redirect.dns.resolvConfigPath", "REDIRECT_DNS_RESOLV_CONFIG_PATH", VariableOnly, ""),
    ("redirect-dns-upstream-target-chain", "redirect.dns.upstreamTargetChain", "REDIRECT_DNS_UPSTREAM_TARGET_CHAIN", Text, "Only RETURN"),
    ("skip-dns-conntrack-zone-split", "redirect.dns.skipConntrackZoneSplit", "REDIRECT_DNS_SKIP_CONNTRACK_ZONE_SPLIT", Switch, "No conntrack zone for lookups"),
    ("vnet", "redirect.vnet.networks", "REDIRECT_VNET_NETWORKS", List, "Networks of guests, interface:CIDR, such as docker0:172.17.0.0/16"),
    ("drop-invalid-packets", "dropInvalidPackets", "DROP_INVALID_PACKETS", Switch, "Discard packets that belong to no connection"),
    ("iptables-logs", "log.enabled", "LOG_ENABLED", Switch, "Trace the rules (nft monitor trace)"),
    ("dry-run", "dryRun", "DRY_RUN", Switch, "Print the rules and change nothing"),
    ("verbose", "verbose", "VERBOSE", Switch, "No effect"),
    ("store-firewalld", "storeFirewalld", "STORE_FIREWALLD", Switch, "Use `ursa-init watch` instead"),
    ("wait", "wait", "WAIT", Text, "No effect"),
    ("wait-interval", "waitInterval", "WAIT_INTERVAL", Text, "No effect"),
    ("max-retries", "retry.maxRetries", "RETRY_MAX_RETRIES", Text, "No effect"),
    ("sleep-between-retries", "retry.sleepBetweenRetries", "RETRY_SLEEP_BETWEEN_RETRIES", Text, "No effect"),
    ("disable-comments", "comments.disabled", "COMMENTS_DISABLED", Switch, "No effect"),
    ("iptables-executables", "iptablesExecutables", "IPTABLES_EXECUTABLES", List, "No effect"),
    ("ebpf-enabled", "ebpf.enabled", "EBPF_ENABLED", Switch, "Not supported"),
    ("ebpf-instance-ip", "ebpf.instanceIP", "EBPF_INSTANCE_IP", Text, "Not supported"),
    ("ebpf-bpffs-path", "ebpf.bpffsPath", "EBPF_BPFFS_PATH", Text, "Not supported"),
    ("ebpf-cgroup-path", "ebpf.cgroupPath", "EBPF_CGROUP_PATH", Text, "Not supported"),
    ("ebpf-tc-attach-iface", "ebpf.tcAttachIface", "EBPF_TC_ATTACH_IFACE", Text, "Not supported"),
    ("ebpf-programs-source-path", "ebpf.programsSourcePath", "EBPF_PROGRAMS_SOURCE_PATH", Text, "Not supported"),
    ("kuma-dp-uid", "", "", Removed("use --kuma-dp-user, which takes a number too"), ""),
    ("redirect-inbound-port-v6", "", "", Removed("--redirect-inbound-port holds for both families; --ip-family-mode ipv4 switches IPv6 off"), ""),
    ("exclude-outbound-tcp-ports-for-uids", "", "", Removed("use --exclude-outbound-ports-for-uids tcp:PORTS:UIDS"), ""),
    ("exclude-outbound-udp-ports-for-uids", "", "", Removed("use --exclude-outbound-ports-for-uids udp:PORTS:UIDS"), ""),
    ("experimental-transparent-proxy-engine", "", "", Removed("there is only one engine; leave the flag out"), ""),
    ("skip-resolv-conf", "", "", Removed("resolv.conf is never changed; leave the flag out"), ""),
    ("kuma-cp-ip", "", "", Removed("the redirect needs no control plane; leave the flag out"), ""),
];

/// kumactl's arguments.
#[derive(Debug, Clone)]
pub(super) struct Arguments {
    configs: Vec<String>,
    variables: Settings,
    flags: Settings,
    removed: Vec<String>,
    /// `--redirect-dns` and `--redirect-all-dns-traffic`.
    dns: (bool, bool),
}

impl Args for Arguments {
    fn augment_args(command: Command) -> Command {
        let config = |name| {
            let help = "kumactl's settings, YAML or JSON: a file, `-` for standard input, or the text itself; repeatable";
            Arg::new(name).long(name).value_name("FILE").action(ArgAction::Append).help(help)
        };
        let command = CONFIGS.into_iter().fold(command, |command, name| command.arg(config(name)));
        SETTINGS.iter().fold(command, |command, (flag, _, variable, kind, help)| {
            let argument = Arg::new(*flag).long(*flag).help(*help);
            command.arg(match kind {
                Switch => argument
                    .value_name("BOOL")
                    .num_args(0..=1)
                    .require_equals(true)
                    .default_missing_value("true")
                    .env(name_of(variable)),
                Text => argument.value_name("VALUE").env(name_of(variable)),
                List => argument.value_name("VALUE").action(ArgAction::Append).env(name_of(variable)),
                VariableOnly => argument.hide(true).env(name_of(variable)),
                Removed(_) => argument.hide(true).num_args(0..=1).default_missing_value(""),
            })
        })
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

/// Variables are few and known when the program starts.
fn name_of(variable: &str) -> &'static str {
    Box::leak(format!("KUMA_TRANSPARENT_PROXY_{variable}").into_boxed_str())
}

impl FromArgMatches for Arguments {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut this = Self {
            configs: Vec::new(),
            variables: Settings::default(),
            flags: Settings::default(),
            removed: Vec::new(),
            dns: (false, false),
        };
        for name in CONFIGS {
            this.configs.extend(matches.get_many::<String>(name).into_iter().flatten().cloned());
        }
        for (flag, path, _, kind, _) in SETTINGS {
            let Some(values) = matches.get_many::<String>(flag) else { continue };
            let values: Vec<_> = values.cloned().collect();
            match (kind, matches.value_source(flag)) {
                (Removed(instead), _) => {
                    this.removed.push(format!("--{flag} was removed from kumactl: {instead}"));
                }
                (_, Some(ValueSource::EnvVariable)) => this.variables.set(path, values),
                (VariableOnly, _) => this
                    .removed
                    .push(format!("--{flag} is no flag of kumactl's; say `{path}` in a document (--config)")),
                (..) => {
                    match *flag {
                        "redirect-dns" => this.dns.0 = values == ["true"],
                        "redirect-all-dns-traffic" if values == ["true"] => {
                            this.dns.1 = true;
                            this.flags.set("redirect.dns.enabled", values.clone());
                        }
                        _ => {}
                    }
                    this.flags.set(path, values);
                }
            }
        }
        Ok(this)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

/// What kumactl's arguments say.
pub(super) struct Resolved {
    /// The redirect.
    pub(super) intent: RedirectIntent,
    /// Only print the rules.
    pub(super) dry_run: bool,
    /// What has no effect, and why.
    pub(super) warnings: Vec<Violation>,
}

impl Arguments {
    /// The redirect. kumactl's precedence: defaults, documents in their order, variables, flags.
    pub(super) fn resolve(&self) -> anyhow::Result<Resolved> {
        if let Some(first) = self.removed.first() {
            return Err(Usage(first.clone()).into());
        }
        if self.dns == (true, true) {
            let message = "only one of '--redirect-dns' or '--redirect-all-dns-traffic' should be specified";
            return Err(Usage(message.to_owned()).into());
        }
        let mut found = Findings::default();
        let mut settings = Settings::default();
        for config in &self.configs {
            let inline = config.contains([':', '\n']) && !Path::new(config).exists();
            let text = if inline { config.clone() } else { options::read(&PathBuf::from(config))? };
            settings.read(&text, &mut found, if inline { "--config" } else { config });
        }
        settings.extend(&self.variables);
        settings.extend(&self.flags);
        let mut intent = RedirectIntent::default();
        // As kumactl does; on Kubernetes Kuma's injector switches it on.
        intent.dns.enabled = false;
        let passwd = Path::new(users::PASSWD);
        let applied = settings.apply(
            &mut intent,
            Lookups {
                user: &|name| users::uid(passwd, name),
                resolvers: Some(&|path| options::resolvers_in(path).map_err(|why| format!("{why:#}"))),
            },
        );
        found.violations.extend(applied.violations);
        if !found.violations.is_empty() {
            return Err(InvalidIntent(found.violations).into());
        }
        if intent.proxy_uids.is_empty() {
            intent.proxy_uids = vec![users::uid(passwd, USER.0).unwrap_or(USER.1)];
        }
        let dry_run = settings.get("dryRun") == Some("true");
        Ok(Resolved { intent, dry_run, warnings: applied.warnings })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::intent::DnsCapture;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        arguments: Arguments,
    }

    fn resolve(args: &[&str]) -> anyhow::Result<Resolved> {
        Line::try_parse_from(["x"].iter().chain(args))?.arguments.resolve()
    }

    #[test]
    fn kumactls_flags() {
        let resolved = resolve(&[
            "--kuma-dp-user",
            "5679",
            "--redirect-all-dns-traffic",
            "--vnet",
            "docker0:172.17.0.0/16",
            "--vnet",
            "iface:::1/64",
            "--exclude-outbound-ports-for-uids",
            "53,3000-5000:106-108",
            "--exclude-outbound-ips",
            "10.0.0.1,fe80::1",
            "--exclude-outbound-ips",
            "fd00::/8",
            "--exclude-inbound-ports",
            "4444,55555",
            "--redirect-inbound=false",
            "--skip-dns-conntrack-zone-split",
            "--drop-invalid-packets",
            "--wait",
            "7",
            "--dry-run",
        ])
        .unwrap();
        let intent = resolved.intent;
        assert_eq!((intent.proxy_uids, intent.bridges.len()), (vec![5679], 2));
        assert_eq!((intent.dns.enabled, intent.dns.capture), (true, DnsCapture::All));
        assert!(
            !intent.dns.conntrack_zones && intent.drop_invalid && !intent.inbound.enabled && resolved.dry_run
        );
        assert_eq!((intent.outbound.exclude_cidrs.len(), intent.inbound.exclude_ports.len()), (3, 2));
        assert_eq!(resolved.warnings.len(), 1);
    }

    #[test]
    fn kumactls_defaults() {
        let intent = resolve(&[]).unwrap().intent;
        assert!(!intent.dns.enabled && intent.ipv6 && intent.inbound.enabled);
        assert!(!intent.proxy_uids.is_empty());
    }

    #[test]
    fn documents_lie_below_flags() {
        let inline = "redirect: {inbound: {port: 1}, outbound: {port: 2}}";
        let intent = resolve(&["--config", inline, "--redirect-inbound-port", "3"]).unwrap().intent;
        assert_eq!((intent.inbound.port, intent.outbound.port), (3, 2));
    }

    #[test]
    fn what_is_impossible_is_said() {
        for (args, words) in [
            (&["--redirect-dns", "--redirect-all-dns-traffic"][..], "only one of"),
            (&["--ebpf-enabled"], "eBPF isn't supported"),
            (&["--redirect-inbound-port-v6", "15010"], "was removed from kumactl"),
            (&["--kuma-dp-uid", "5"], "use --kuma-dp-user"),
            (&["--kuma-dp-user", "no-such-user"], "useradd"),
            (
                &["--exclude-outbound-ports-for-uids", "a3000-5000:1"],
                "parsing excluded outbound ports for uids failed: invalid port range: validation failed for value or \
              range 'a3000-5000': invalid uint16 value: 'a3000'",
            ),
            (&["--config", "redirct: {}"], "no group of settings of kumactl's"),
            (&["--redirect-dns-upstream-target-chain", "DOCKER_OUTPUT"], "foreign chains"),
        ] {
            let error = resolve(args).err().map(|e| format!("{e:#}")).unwrap_or_default();
            assert!(error.contains(words), "{args:?}: {error}");
        }
    }
}
