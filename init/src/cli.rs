//! The command line of `ursa-init`.

use std::io::Write as _;
use std::net::IpAddr;
use std::path::PathBuf;

use anyhow::Context as _;
use caps::{CapSet, Capability, CapsHashSet};
use clap::{Args, CommandFactory as _, Parser, Subcommand, ValueEnum};
use ipnet::IpNet;

use crate::intent::{DnsCapture, Ids, Ports, RedirectIntent};
use crate::netns::Netns;
use crate::plan::Plan;

/// Exit code for a document or flag that is wrong; the same as for wrong usage.
const EXIT_INVALID: u8 = 2;
/// Exit code of `diff` when there are differences.
const EXIT_DIFFERENT: u8 = 3;

const EXAMPLES: &str = "\
Examples:
  # redirect the workload in namespace `web`; the proxy runs as uid 5678
  ursa-init apply --netns /run/netns/web --proxy-uid 5678

  # the same from a file, with one exclusion more
  ursa-init apply --netns /run/netns/web --config redirect.yaml --exclude-outbound-ports 5432

  # what is in place, with packet counters; what differs from the file
  ursa-init show --netns /run/netns/web
  ursa-init diff --netns /run/netns/web --config redirect.yaml

  # the rules as text: needs no rights and touches nothing
  ursa-init render --proxy-uid 5678

  # take back exactly what `apply` made
  ursa-init remove --netns /run/netns/web

A file looks like this; every field has a default:
  proxyUids: [5678]
  inbound: {port: 15006, excludePorts: [22]}
  outbound: {port: 15001, excludePorts: [5432, \"8000-8100\"], excludeCidrs: [10.9.0.0/16], excludeUids: [33]}
  dns: {port: 15053, capture: all}

Exit codes: 0 done, 1 the kernel or the system refused, 2 wrong usage or document, 3 `diff` found differences.";

/// Redirect a workload's traffic through its proxy: nftables in one netlink batch, read back, all or nothing.
#[derive(Debug, Parser)]
#[command(name = "ursa-init", version, after_help = EXAMPLES, max_term_width = 110)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Put the redirect in place; does nothing when it is in place already
    Apply {
        #[command(flatten)]
        place: Place,
        #[command(flatten)]
        options: Options,
    },
    /// Remove exactly what `apply` put in place
    Remove {
        #[command(flatten)]
        place: Place,
    },
    /// Show what is in place, with packet counters
    Show {
        #[command(flatten)]
        place: Place,
    },
    /// Show how what is in place differs from the document (exit code 3 if it does)
    Diff {
        #[command(flatten)]
        place: Place,
        #[command(flatten)]
        options: Options,
    },
    /// Print the rules of the document as text; needs no rights
    Render {
        #[command(flatten)]
        options: Options,
    },
    /// Print a shell's completion script
    Completion {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Print the manual page, or write the pages of all commands into a folder
    #[command(hide = true)]
    Man {
        /// The folder
        dir: Option<PathBuf>,
    },
}

/// Where to work.
#[derive(Debug, Args)]
struct Place {
    /// The workload's network namespace [default: the one this program runs in]
    #[arg(long, env = "URSA_NETNS", value_name = "PATH")]
    netns: Option<PathBuf>,
    /// Allow the machine's own network namespace; inbound port 22 is left alone then
    #[arg(long, env = "URSA_HOST")]
    host: bool,
}

/// The intent: a file, and flags and variables that win over it.
#[derive(Debug, Args)]
struct Options {
    /// The redirect's document (YAML or JSON; `-` for standard input)
    #[arg(long, short, env = "URSA_REDIRECT", value_name = "FILE")]
    config: Option<PathBuf>,
    /// User ids of the proxy
    #[arg(long = "proxy-uid", env = "URSA_PROXY_UIDS", value_delimiter = ',', value_name = "UID")]
    proxy_uids: Vec<u32>,
    /// Group ids of the proxy
    #[arg(long = "proxy-gid", env = "URSA_PROXY_GIDS", value_delimiter = ',', value_name = "GID")]
    proxy_gids: Vec<u32>,
    /// Redirect arriving connections
    #[arg(long, env = "URSA_INBOUND", value_name = "BOOL")]
    inbound: Option<bool>,
    /// The proxy's inbound port
    #[arg(long, env = "URSA_INBOUND_PORT", value_name = "PORT")]
    inbound_port: Option<u16>,
    /// Redirect only these arriving ports
    #[arg(long, env = "URSA_INCLUDE_INBOUND_PORTS", value_delimiter = ',', value_name = "PORTS")]
    include_inbound_ports: Vec<Ports>,
    /// Leave these arriving ports alone
    #[arg(long, env = "URSA_EXCLUDE_INBOUND_PORTS", value_delimiter = ',', value_name = "PORTS")]
    exclude_inbound_ports: Vec<Ports>,
    /// Redirect opened connections
    #[arg(long, env = "URSA_OUTBOUND", value_name = "BOOL")]
    outbound: Option<bool>,
    /// The proxy's outbound port
    #[arg(long, env = "URSA_OUTBOUND_PORT", value_name = "PORT")]
    outbound_port: Option<u16>,
    /// Redirect only these destination ports
    #[arg(long, env = "URSA_INCLUDE_OUTBOUND_PORTS", value_delimiter = ',', value_name = "PORTS")]
    include_outbound_ports: Vec<Ports>,
    /// Leave these destination ports alone
    #[arg(long, env = "URSA_EXCLUDE_OUTBOUND_PORTS", value_delimiter = ',', value_name = "PORTS")]
    exclude_outbound_ports: Vec<Ports>,
    /// Leave these destinations alone
    #[arg(long, env = "URSA_EXCLUDE_OUTBOUND_CIDRS", value_delimiter = ',', value_name = "CIDR")]
    exclude_outbound_cidrs: Vec<IpNet>,
    /// Leave these users alone
    #[arg(long, env = "URSA_EXCLUDE_OUTBOUND_UIDS", value_delimiter = ',', value_name = "UID")]
    exclude_outbound_uids: Vec<Ids>,
    /// Which lookups to redirect
    #[arg(long, env = "URSA_DNS", value_name = "WHICH")]
    dns: Option<DnsChoice>,
    /// The shim's DNS port
    #[arg(long, env = "URSA_DNS_PORT", value_name = "PORT")]
    dns_port: Option<u16>,
    /// Redirect IPv4
    #[arg(long, env = "URSA_IPV4", value_name = "BOOL")]
    ipv4: Option<bool>,
    /// Redirect IPv6
    #[arg(long, env = "URSA_IPV6", value_name = "BOOL")]
    ipv6: Option<bool>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum DnsChoice {
    /// Every lookup
    All,
    /// Only lookups to the resolvers in /etc/resolv.conf
    Resolvers,
    /// None
    Off,
}

impl Options {
    /// Defaults, then the file, then variables and flags.
    fn intent(&self) -> anyhow::Result<RedirectIntent> {
        let mut intent = match &self.config {
            None => RedirectIntent::default(),
            Some(path) => {
                let text = if path.as_os_str() == "-" {
                    std::io::read_to_string(std::io::stdin()).context("can't read standard input")?
                } else {
                    std::fs::read_to_string(path).with_context(|| format!("can't read {}", path.display()))?
                };
                crate::yaml::from_str(&text)
                    .with_context(|| format!("{} is no redirect document (see --help)", path.display()))?
            }
        };
        list(&mut intent.proxy_uids, &self.proxy_uids);
        list(&mut intent.proxy_gids, &self.proxy_gids);
        value(&mut intent.inbound.enabled, self.inbound);
        value(&mut intent.inbound.port, self.inbound_port);
        list(&mut intent.inbound.include_ports, &self.include_inbound_ports);
        list(&mut intent.inbound.exclude_ports, &self.exclude_inbound_ports);
        value(&mut intent.outbound.enabled, self.outbound);
        value(&mut intent.outbound.port, self.outbound_port);
        list(&mut intent.outbound.include_ports, &self.include_outbound_ports);
        list(&mut intent.outbound.exclude_ports, &self.exclude_outbound_ports);
        list(&mut intent.outbound.exclude_cidrs, &self.exclude_outbound_cidrs);
        list(&mut intent.outbound.exclude_uids, &self.exclude_outbound_uids);
        value(&mut intent.dns.port, self.dns_port);
        value(&mut intent.ipv4, self.ipv4);
        value(&mut intent.ipv6, self.ipv6);
        match self.dns {
            None => {}
            Some(DnsChoice::Off) => intent.dns.enabled = false,
            Some(DnsChoice::All) => (intent.dns.enabled, intent.dns.capture) = (true, DnsCapture::All),
            Some(DnsChoice::Resolvers) => {
                (intent.dns.enabled, intent.dns.capture) = (true, DnsCapture::Resolvers);
            }
        }
        if intent.dns.enabled
            && intent.dns.capture == DnsCapture::Resolvers
            && intent.dns.resolvers.is_empty()
        {
            let path = "/etc/resolv.conf";
            let text = std::fs::read_to_string(path)
                .with_context(|| format!("can't read the resolvers in {path}"))?;
            intent.dns.resolvers = resolvers(&text);
        }
        Ok(intent)
    }
}

/// A list that is given replaces the file's.
fn list<T: Clone>(target: &mut Vec<T>, given: &[T]) {
    if !given.is_empty() {
        target.clear();
        target.extend_from_slice(given);
    }
}

fn value<T: Copy>(target: &mut T, given: Option<T>) {
    if let Some(given) = given {
        *target = given;
    }
}

/// The resolvers that a resolv.conf names.
fn resolvers(text: &str) -> Vec<IpAddr> {
    let names = text.lines().filter_map(|line| line.trim().strip_prefix("nameserver"));
    // A zone (fe80::1%eth0) can't be matched by address alone.
    names.filter_map(|rest| rest.trim().parse().ok()).collect()
}

/// Runs the command; the result is the exit code.
pub fn run(cli: Cli) -> anyhow::Result<u8> {
    let mut out = std::io::stdout().lock();
    match cli.command {
        Command::Apply { place, options } => {
            let mut intent = options.intent()?;
            let netns = place.open(&mut intent)?;
            let plan = Plan::compile(&intent)?;
            drop_capabilities()?;
            let applied = netns.run(|| crate::apply(&plan))??;
            let text = if applied.changed() {
                "the redirect is in place"
            } else {
                "the redirect was in place already"
            };
            writeln!(out, "{text}")?;
        }
        Command::Remove { place } => {
            let netns = place.open(&mut RedirectIntent::default())?;
            drop_capabilities()?;
            let text =
                if netns.run(crate::remove)?? { "the redirect is removed" } else { "there was no redirect" };
            writeln!(out, "{text}")?;
        }
        Command::Show { place } => {
            let netns = Netns::open(&place.path())?;
            drop_capabilities()?;
            print(&mut out, &netns.run(crate::show)??)?;
        }
        Command::Diff { place, options } => {
            let mut intent = options.intent()?;
            if place.host {
                keep_ssh(&mut intent);
            }
            let plan = Plan::compile(&intent)?;
            let netns = Netns::open(&place.path())?;
            drop_capabilities()?;
            let lines = netns.run(|| crate::diff(&plan))??;
            print(&mut out, &lines)?;
            return Ok(if lines.is_empty() { 0 } else { EXIT_DIFFERENT });
        }
        Command::Render { options } => {
            print(&mut out, &crate::nft::render(&Plan::compile(&options.intent()?)?))?;
        }
        Command::Completion { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "ursa-init", &mut out);
        }
        Command::Man { dir: None } => clap_mangen::Man::new(Cli::command()).render(&mut out)?,
        Command::Man { dir: Some(dir) } => clap_mangen::generate_to(Cli::command(), &dir)
            .with_context(|| format!("can't write manual pages to {}", dir.display()))?,
    }
    Ok(0)
}

/// The exit code for an error.
pub fn exit_code(error: &anyhow::Error) -> u8 {
    let invalid =
        error.is::<crate::InvalidIntent>() || error.downcast_ref::<crate::yaml::Unreadable>().is_some();
    if invalid { EXIT_INVALID } else { 1 }
}

fn print(out: &mut impl std::io::Write, lines: &[String]) -> std::io::Result<()> {
    lines.iter().try_for_each(|line| writeln!(out, "{line}"))
}

impl Place {
    fn path(&self) -> PathBuf {
        self.netns.clone().unwrap_or_else(|| PathBuf::from("/proc/thread-self/ns/net"))
    }

    /// Opens the namespace, which must not be the machine's own unless the operator said so.
    fn open(&self, intent: &mut RedirectIntent) -> anyhow::Result<Netns> {
        let netns = Netns::open(&self.path())?;
        if self.host {
            keep_ssh(intent);
        } else {
            netns.refuse_host()?;
        }
        Ok(netns)
    }
}

/// On a host the operator's way in stays open.
fn keep_ssh(intent: &mut RedirectIntent) {
    let ssh = Ports::one(22);
    if intent.inbound.include_ports.is_empty() && !intent.inbound.exclude_ports.contains(&ssh) {
        intent.inbound.exclude_ports.push(ssh);
    }
}

/// Keeps only what changing rules and entering a namespace need; everything else was opened before.
fn drop_capabilities() -> anyhow::Result<()> {
    let keep: CapsHashSet = [Capability::CAP_NET_ADMIN, Capability::CAP_SYS_ADMIN].into();
    let what = "can't drop capabilities";
    caps::clear(None, CapSet::Ambient).context(what)?;
    for set in [CapSet::Effective, CapSet::Permitted] {
        let held = caps::read(None, set).context(what)?;
        caps::set(None, set, &held.intersection(&keep).copied().collect()).context(what)?;
    }
    caps::clear(None, CapSet::Inheritable).context(what)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn intent(args: &[&str]) -> RedirectIntent {
        let cli = Cli::try_parse_from(["ursa-init", "render"].iter().chain(args)).unwrap();
        let Command::Render { options } = cli.command else { unreachable!() };
        options.intent().unwrap()
    }

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn flags_win_over_the_file() {
        let file = std::env::temp_dir().join(format!("ursa-init-cli-{}.yaml", std::process::id()));
        std::fs::write(&file, "proxyUids: [5678]\noutbound: {port: 15101, excludePorts: [22, 8000-8100]}\n")
            .unwrap();
        let path = file.to_str().unwrap();
        let read = intent(&["--config", path, "--exclude-outbound-ports", "443,9000-9001", "--dns", "off"]);
        std::fs::remove_file(&file).unwrap();
        assert_eq!((read.proxy_uids, read.outbound.port, read.dns.enabled), (vec![5678], 15101, false));
        let ports: Vec<_> = read.outbound.exclude_ports.iter().map(ToString::to_string).collect();
        assert_eq!(ports, ["443", "9000-9001"]);
    }

    #[test]
    fn resolvers_come_from_resolv_conf() {
        let text =
            "# x\nnameserver 127.0.0.53\noptions edns0\nnameserver fd00::53\nnameserver fe80::1%eth0\n";
        assert_eq!(resolvers(text), ["127.0.0.53".parse::<IpAddr>().unwrap(), "fd00::53".parse().unwrap()]);
    }
}
