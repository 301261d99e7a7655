//! The command line of `ursa-init`.
//!
//! * `fields`, `layers`, `options`: from files, annotations, variables and flags to one redirect.
//! * `kumactl`: the same from kumactl's arguments.
//! * `place`: where to work.
//! * `probation`: changes that wait to be confirmed.
//! * `check`, `explain`, `watch`: a command each.

mod check;
mod explain;
mod fields;
mod kumactl;
mod layers;
mod options;
#[cfg(test)]
mod page;
mod parts;
mod place;
mod probation;
mod watch;

use std::io::Write as _;
use std::path::PathBuf;

use anyhow::Context as _;
use caps::{CapSet, Capability, CapsHashSet};
use clap::{CommandFactory as _, Parser, Subcommand, ValueEnum};
use serde_json::{Value, json};

use crate::backend::Backend;
use crate::intent::RedirectIntent;
use crate::plan::{Family, Plan};
use options::Options;
use place::Place;
use probation::{Confirm, RunDir};

/// Exit code for a document or flag that is wrong; the same as for wrong usage.
const EXIT_INVALID: u8 = 2;
/// Exit code of `diff` when there are differences.
const EXIT_DIFFERENT: u8 = 3;

/// Exit code of `check` when something isn't redirected, and of `apply` when a workload's slice doesn't exist.
const EXIT_MISSING: u8 = 4;

const EXAMPLES: &str = "\
Examples:
  # redirect the workload in namespace `web`; the proxy runs as uid 5678
  ursa-init apply --netns /run/netns/web --proxy-uid 5678

  # the same from a file; what is in place, with packet counters; what differs from the file
  ursa-init apply --netns /run/netns/web --config redirect.yaml
  ursa-init show --netns /run/netns/web
  ursa-init diff --netns /run/netns/web --config redirect.yaml

  # does it work? tries real connections, before the proxy runs or beside it
  ursa-init check --netns /run/netns/web --config redirect.yaml

  # which rule decides, where does the packet land, what would change that? of a sender inside, and of one outside
  ursa-init explain --netns /run/netns/web --from uid 1000 --to 10.0.0.1:5432/tcp
  ursa-init explain --netns /run/netns/web --from 10.0.0.9 --to :8080/tcp

  # what do file, variables and flags say together, and which of them says it? needs no rights, as the next ones
  ursa-init config --config redirect.yaml --exclude-outbound-ports 5432,8000-8100
  ursa-init explain --config redirect.yaml --from uid 33 gid 33 --to [2001:db8::1]:443/tcp
  ursa-init render --config redirect.yaml | nft -c -f -
  ursa-init render --config redirect.yaml --format iptables

  # the words of `kumactl install transparent-proxy`
  ursa-init transparent-proxy --netns /run/netns/web --kuma-dp-user 5678 --redirect-all-dns-traffic

  # take back exactly what `apply` made
  ursa-init remove --netns /run/netns/web

  # a whole machine: sshd's ports are left alone, and without the second line the rules from before come back
  ursa-init apply --host --config redirect.yaml --confirm 30s
  ursa-init confirm

  # keep it so, whoever flushes rules (as ursa-redirect.service does)
  ursa-init watch --host --config redirect.yaml

A file looks like this; every field has a default:
  proxyUids: [5678]
  inbound: {port: 15006, excludePorts: [22]}
  outbound: {port: 15001, excludePorts: [5432, \"8000-8100\"], excludeCidrs: [10.9.0.0/16], excludeUids: [33]}
  dns: {port: 15053, capture: all}

Precedence, lowest first: defaults, files in the order given, a pod's annotations (--annotations), URSA_… variables,
flags. A list that is given replaces the one below it; an empty one (--exclude-outbound-ports '') empties it.

Exit codes:
  0  done
  1  the kernel or the system refused; nothing was changed, or what was there before is back
  2  wrong usage or document
  3  `diff` found differences
  4  `check` found something not redirected, or could try nothing; `apply` lacks a workload's slice";

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
        /// What puts the rules in place: auto, nftables, iptables, iptables-nft, iptables-legacy
        #[arg(long, env = "URSA_BACKEND", default_value_t)]
        backend: Backend,
        #[command(flatten)]
        confirm: Confirm,
        /// Print the resulting document with each value's source and change nothing; the same as `config`
        #[arg(long)]
        print_config: bool,
    },
    /// Remove exactly what `apply` put in place
    Remove {
        #[command(flatten)]
        place: Place,
        #[command(flatten)]
        run_dir: RunDir,
    },
    /// Keep what `apply --confirm` put in place
    Confirm {
        #[command(flatten)]
        place: Place,
        #[command(flatten)]
        run_dir: RunDir,
    },
    #[command(hide = true)]
    Guard(probation::GuardArguments),
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
        /// What was to put the rules in place
        #[arg(long, env = "URSA_BACKEND", default_value_t)]
        backend: Backend,
    },
    /// Open real connections through the rules and say what isn't redirected (exit code 4 if anything isn't)
    ///
    /// Works before the proxy runs, as an init container does: its ports are held meanwhile, and a random token must
    /// come back. Where the proxy holds them already, the rules' counters tell.
    Check {
        #[command(flatten)]
        place: Place,
        #[command(flatten)]
        options: Options,
        #[command(flatten)]
        check: check::Arguments,
    },
    /// Say which rule decides about a packet, where it lands, and what would change that
    ///
    /// Asks the rules in place (needs rights), or the document where one is given (needs none).
    Explain {
        #[command(flatten)]
        packet: explain::Arguments,
        #[command(flatten)]
        place: Place,
        #[command(flatten)]
        options: Options,
    },
    /// Print the rules of the document as text; needs no rights
    Render {
        #[command(flatten)]
        options: Options,
        /// In whose words
        #[arg(long, value_enum, default_value_t = Format::Nft)]
        format: Format,
    },
    /// Print the document that files, annotations, variables and flags make together, and each value's source
    Config {
        #[command(flatten)]
        place: Place,
        #[command(flatten)]
        options: Options,
        /// As JSON: {"config": …, "sources": …}
        #[arg(long)]
        json: bool,
    },
    /// Put a redirect in place that is said in the words of `kumactl install transparent-proxy`
    TransparentProxy {
        #[command(flatten)]
        place: Place,
        #[command(flatten)]
        arguments: kumactl::Arguments,
        /// What puts the rules in place: auto, nftables, iptables, iptables-nft, iptables-legacy
        #[arg(long, env = "URSA_BACKEND", default_value_t)]
        backend: Backend,
        #[command(flatten)]
        confirm: Confirm,
        /// Print the resulting document and change nothing
        #[arg(long)]
        print_config: bool,
    },
    /// Keep the redirect in place: put back what others change, within milliseconds
    Watch {
        #[command(flatten)]
        place: Place,
        #[command(flatten)]
        options: Options,
        #[command(flatten)]
        watch: watch::Arguments,
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

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Format {
    /// A script that `nft -f -` loads
    Nft,
    /// What `iptables-restore --noflush` takes
    Iptables,
    /// What `ip6tables-restore --noflush` takes
    Ip6tables,
    /// One line per rule, as `show` and `diff` write them
    Lines,
}

/// Wrong usage that clap can't know.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Usage(String);

/// Runs the command; the result is the exit code.
pub fn run(cli: Cli) -> anyhow::Result<u8> {
    let mut out = std::io::stdout().lock();
    match cli.command {
        Command::Apply { place, options, print_config: true, .. } => {
            config(&mut out, &place, &options, false)?;
        }
        Command::Apply { place, options, backend, confirm, .. } => {
            return apply(&mut out, &place, options.resolve()?.0, backend, &confirm);
        }
        Command::Remove { place, run_dir } => {
            let netns = place.open()?;
            drop_capabilities()?;
            run_dir.settle(&netns)?;
            let text =
                if netns.run(crate::remove)?? { "the redirect is removed" } else { "there was no redirect" };
            writeln!(out, "{text}")?;
        }
        Command::Confirm { place, run_dir } => {
            writeln!(out, "{}", probation::confirm(&place, &run_dir)?)?;
        }
        Command::Guard(arguments) => probation::run_guard(&arguments)?,
        Command::Show { place } => {
            let netns = place.look()?;
            drop_capabilities()?;
            print(&mut out, &netns.run(crate::show)??)?;
        }
        Command::Diff { place, options, backend } => {
            let (mut intent, _) = options.resolve()?;
            let netns = place.look()?;
            place.keep_ssh(&netns, &mut intent, None)?;
            let plan = Plan::compile(&intent)?;
            drop_capabilities()?;
            let mut lines = netns.run(|| crate::diff_with(&plan, backend))??;
            lines.extend(crate::slices::missing(&plan).iter().map(|slice| format!("! {slice}")));
            print(&mut out, &lines)?;
            return Ok(if lines.is_empty() { 0 } else { EXIT_DIFFERENT });
        }
        Command::Check { place, options, check } => {
            let good = check::run(&mut out, &place, &options, &check)?;
            return Ok(if good { 0 } else { EXIT_MISSING });
        }
        Command::Explain { packet, place, options } => explain::run(&mut out, &place, &options, &packet)?,
        Command::Render { options, format } => {
            let plan = Plan::compile(&options.resolve()?.0)?;
            match format {
                Format::Nft => script(&mut out, &plan)?,
                Format::Iptables => restore(&mut out, &plan, Family::V4)?,
                Format::Ip6tables => restore(&mut out, &plan, Family::V6)?,
                Format::Lines => print(&mut out, &crate::nft::render(&plan))?,
            }
        }
        Command::Config { place, options, json } => config(&mut out, &place, &options, json)?,
        Command::TransparentProxy { place, arguments, backend, confirm, print_config } => {
            let resolved = arguments.resolve()?;
            for warning in &resolved.warnings {
                eprintln!("ursa-init: warning: {}: {}", warning.field, warning.message);
            }
            if print_config {
                writeln!(out, "{}", serde_json::to_string_pretty(&resolved.intent)?)?;
            } else if resolved.dry_run {
                script(&mut out, &Plan::compile(&resolved.intent)?)?;
            } else {
                return apply(&mut out, &place, resolved.intent, backend, &confirm);
            }
        }
        Command::Watch { place, options, watch } => watch::run(&place, &options, &watch)?,
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
    let invalid = error.is::<crate::InvalidIntent>()
        || error.is::<Usage>()
        || error.downcast_ref::<crate::yaml::Unreadable>().is_some();
    if invalid { EXIT_INVALID } else { 1 }
}

fn apply(
    out: &mut impl std::io::Write,
    place: &Place,
    mut intent: RedirectIntent,
    backend: Backend,
    confirm: &Confirm,
) -> anyhow::Result<u8> {
    let netns = place.open()?;
    place.keep_ssh(&netns, &mut intent, None)?;
    let plan = Plan::compile(&intent)?;
    drop_capabilities()?;
    let (applied, more) =
        confirm.around(place, &netns, || Ok(netns.run(|| crate::apply_with(&plan, backend))??))?;
    let text =
        if applied.changed() { "the redirect is in place" } else { "the redirect was in place already" };
    writeln!(out, "{text}")?;
    if let Some(more) = more {
        writeln!(out, "{more}")?;
    }
    let missing = crate::slices::missing(&plan);
    for slice in &missing {
        eprintln!("ursa-init: warning: {slice}");
    }
    Ok(if missing.is_empty() { 0 } else { EXIT_MISSING })
}

/// Prints the document and where its values come from.
fn config(out: &mut impl std::io::Write, place: &Place, options: &Options, json: bool) -> anyhow::Result<()> {
    let (mut intent, mut layers) = options.resolve()?;
    place.keep_ssh(&place.look()?, &mut intent, Some(&mut layers))?;
    if json {
        let sources: serde_json::Map<_, _> = layers
            .leaves()
            .into_keys()
            .map(|path| (path.clone(), Value::from(layers.source(&path).to_string())))
            .collect();
        let document = json!({"config": intent, "sources": sources});
        writeln!(out, "{}", serde_json::to_string_pretty(&document)?)?;
    } else {
        print(out, &layers.annotated())?;
    }
    Ok(intent.validate()?)
}

/// The rules as a script, with the routes that belong to them as comments.
fn script(out: &mut impl std::io::Write, plan: &Plan) -> std::io::Result<()> {
    writeln!(out, "#!/usr/sbin/nft -f")?;
    for route in &plan.local_routes {
        writeln!(out, "# ip route add local {route} dev lo proto {}", crate::routes::PROTOCOL)?;
    }
    for address in &plan.loopback_addresses {
        writeln!(
            out,
            "# ip address add {} dev lo proto {}",
            ipnet::IpNet::from(*address),
            crate::routes::PROTOCOL
        )?;
    }
    if let Some(policy) = plan.policy_route {
        for family in [policy.ipv4.then_some("-4"), policy.ipv6.then_some("-6")].into_iter().flatten() {
            writeln!(out, "# ip {family} rule add fwmark {:#x} lookup {}", policy.mark, policy.table)?;
            writeln!(out, "# ip {family} route add local default dev lo table {}", policy.table)?;
        }
    }
    write!(out, "{}", crate::nft::script(plan))
}

/// The tables of one family, those that guard first.
fn restore(out: &mut impl std::io::Write, plan: &Plan, family: Family) -> anyhow::Result<()> {
    for (_, _, text) in crate::iptables::render(plan)?.into_iter().filter(|(of, ..)| *of == family) {
        write!(out, "{text}")?;
    }
    Ok(())
}

fn print(out: &mut impl std::io::Write, lines: &[String]) -> std::io::Result<()> {
    lines.iter().try_for_each(|line| writeln!(out, "{line}"))
}

/// Keeps only what changing rules and entering a namespace need; everything else was opened before. iptables-legacy
/// asks the kernel by a raw socket, and where no program may gain privileges it has no more than this one.
fn drop_capabilities() -> anyhow::Result<()> {
    drop_capabilities_but(&[])
}

/// As [`drop_capabilities`], but for what is needed besides.
fn drop_capabilities_but(more: &[Capability]) -> anyhow::Result<()> {
    let mut keep: CapsHashSet =
        [Capability::CAP_NET_ADMIN, Capability::CAP_NET_RAW, Capability::CAP_SYS_ADMIN].into();
    keep.extend(more);
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

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
