//! Group 03: where packets land with the peer's rules and with ours, on the real kernel.

use std::collections::BTreeSet;
use std::path::Path;
use std::thread;

use serde::Deserialize;
use serde_json::Value;
use ursa_init::intent::RedirectIntent;
use ursa_init::{Plan, backend::Backend};

use super::deviations::{Does, arranged};
use super::{GroupReport, listed, read_list};
use fire::differences::{Named, Sorted, between};
use fire::lab::{Lab, Restore};
use fire::matrix::{Edges, matrix};
use fire::probe::{Origin, Probe};
use kumactl::Kumactl;

#[path = "../../../init/tests/oracle/fire/mod.rs"]
mod fire;
mod kumactl;
mod uninstall;

const GROUP: &str = "03-transparent-proxy";

/// The kinds of differences from the peer; each has its reason in the table of deviations.
const ALLOWED: &[Named] = &[
    Named::MeshAddressesAreClosed,
    Named::OwnPortsAreClosed,
    Named::ForwardedIsLeftAlone,
    Named::LoopbackIsAllOfIt,
    Named::LookupsOverTcp,
    Named::LookupsOfGuests,
    Named::ShimAsksDirectly,
    Named::HairpinHonoursInboundPorts,
    Named::HairpinIgnoresOutboundExclusions,
    Named::DeliveriesAreNoLookups,
];

/// Judges all cases of the group; `corpus` is the root of the corpus.
pub fn run(corpus: &Path) -> GroupReport {
    let mut report = GroupReport::new(GROUP);
    if !nix::unistd::geteuid().is_root() {
        let why = "packets are sent through rules in namespaces of the runner's own: run as root";
        report.judged(GROUP, Some(why.to_owned()));
        return report;
    }
    let root = corpus.join(GROUP);
    let mut met = BTreeSet::new();
    saved(&root, &mut report, &mut met);
    printed(&root, &mut report, &mut met);
    fragments(&root, &mut report, &mut met);
    uninstall::judge(&root, &mut report);
    for file in firewalld(&root) {
        let why = "rules are never stored in firewalld: `ursa-init watch` puts them back after its reload";
        report.unsupported(file, why);
    }
    // A row of the table that explains nothing any more is stale.
    for named in ALLOWED.iter().filter(|named| !met.contains(named)) {
        report.judged(format!("every case {named:?}"), None);
    }
    report
}

fn firewalld(root: &Path) -> Vec<String> {
    let files = std::fs::read_dir(root.join("firewalld")).into_iter().flatten().flatten();
    let names = files.map(|file| file.file_name().to_string_lossy().into_owned());
    let inputs = names.filter_map(|name| name.strip_suffix(".input.txt").map(|id| format!("firewalld/{id}")));
    let mut inputs: Vec<_> = inputs.collect();
    inputs.sort();
    inputs
}

/// A peer's rules, and the packets that are to land where they land with ours.
struct Rules {
    restore: Restore,
    v4: String,
    v6: String,
    /// Which of the possible packets are fired.
    fired: fn(&Probe) -> bool,
}

impl Rules {
    /// Fires the matrix through both, and notes what differs: without a name at the case, with one beside it.
    fn judge(&self, id: &str, intent: &RedirectIntent, report: &mut GroupReport, met: &mut BTreeSet<Named>) {
        let mut probes = matrix(&Edges::of(&[&self.v4, &self.v6]), intent);
        probes.retain(self.fired);
        let plan = match Plan::compile(intent) {
            Ok(plan) => plan,
            Err(error) => return report.judged(id, Some(error.to_string())),
        };
        let (theirs, ours) = thread::scope(|scope| {
            let theirs = scope.spawn(|| {
                let lab = Lab::new(&probes, intent);
                lab.load(self.restore, &self.v4, &self.v6);
                lab.fire(&probes)
            });
            let ours = scope.spawn(|| {
                let lab = Lab::new(&probes, intent);
                lab.apply(&plan, Backend::Nftables)
                    .map(|()| lab.fire(&probes))
                    .map_err(|error| error.to_string())
            });
            let panicked = |_| "the lab failed; its message is above".to_owned();
            (theirs.join().map_err(panicked), ours.join().map_err(panicked).and_then(|ours| ours))
        });
        let (theirs, ours) = match (theirs, ours) {
            (Ok(theirs), Ok(ours)) => (theirs, ours),
            (Err(why), _) | (_, Err(why)) => return report.judged(id, Some(why)),
        };
        let sorted = Sorted::new(between(&probes, &theirs, &ours), ALLOWED, intent);
        let unnamed = (!sorted.unnamed.is_empty()).then(|| some_of(&sorted.unnamed, probes.len()));
        report.judged(id, unnamed);
        for (named, differences) in sorted.named {
            met.insert(named);
            report.judged(format!("{id} {named:?}"), Some(some_of(&differences, probes.len())));
        }
    }
}

fn some_of(differences: &[fire::differences::Difference], all: usize) -> String {
    let first: Vec<_> = differences.iter().take(3).map(ToString::to_string).collect();
    format!("{} of {all} packets, such as {}", differences.len(), first.join("; "))
}

#[derive(Debug, Deserialize)]
struct Saved {
    id: String,
    input: String,
    family: String,
    expected: String,
}

/// What `iptables-save` prints after the peer's installation.
fn saved(root: &Path, report: &mut GroupReport, met: &mut BTreeSet<Named>) {
    let file = "iptables-save/cases.yaml";
    let content = read_list(&root.join(file), report);
    for case in listed(&content, "cases", file, report) {
        let Some(case) = report.readable::<Saved>(case) else { continue };
        let id = format!("iptables-save/{}", case.id);
        let found = Kumactl::of_input(&content["inputs"][&case.input]).intent().and_then(|intent| {
            let dump = std::fs::read_to_string(root.join(&case.expected));
            Ok((intent, dump.map_err(|error| format!("{}: {error}", case.expected))?))
        });
        let (intent, dump) = match found {
            Ok(found) => found,
            Err(why) => {
                report.judged(id, Some(why));
                continue;
            }
        };
        let restore = if case.id.ends_with("legacy") { Restore::Legacy } else { Restore::Nft };
        let dump = loadable(&dump);
        let rules = if case.family == "ipv6" {
            Rules { restore, v4: String::new(), v6: dump, fired: |probe| probe.to.is_ipv6() }
        } else {
            Rules { restore, v4: dump, v6: String::new(), fired: |probe| probe.to.is_ipv4() }
        };
        rules.judge(&id, &intent, report, met);
    }
}

/// The corpus' dumps hold a placeholder for `lo` and no counters.
fn loadable(dump: &str) -> String {
    let line = |line: &str| {
        let line = line.replace("ifPlaceholder", "lo").replace("dnsJumpTargetPlaceholder", "RETURN");
        if line.starts_with(':') { format!("{line} [0:0]\n") } else { format!("{line}\n") }
    };
    dump.lines().map(line).collect()
}

#[derive(Debug, Deserialize)]
struct Printed {
    id: String,
    args: Vec<String>,
    #[serde(default)]
    expected: String,
    #[serde(default)]
    stale: bool,
    #[serde(default)]
    stderr: Value,
}

/// What `--dry-run` prints: rules, or why there are none.
fn printed(root: &Path, report: &mut GroupReport, met: &mut BTreeSet<Named>) {
    let file = "dry-run/cases.yaml";
    let content = read_list(&root.join(file), report);
    for case in listed(&content, "cases", file, report) {
        let Some(case) = report.readable::<Printed>(case) else { continue };
        let id = format!("dry-run/{}", case.id);
        if case.stale {
            report.unsupported(id, "the corpus says that its expectation is stale");
            continue;
        }
        let text = match std::fs::read_to_string(root.join(&case.expected)) {
            Ok(text) => text,
            Err(error) => {
                report.judged(id, Some(format!("{}: {error}", case.expected)));
                continue;
            }
        };
        let user = arranged(GROUP, &id).find_map(|does| match does {
            Does::Flag("--kuma-dp-user", user) => Some(user),
            _ => None,
        });
        let mut call = Kumactl::of_arguments(&case.args);
        if let Some(user) = user {
            call.run_proxy_as(user);
        }
        match call.intent() {
            Ok(intent) => {
                let rules = Rules {
                    restore: Restore::Nft,
                    v4: restorable(&text, user),
                    v6: String::new(),
                    fired: |_| true,
                };
                rules.judge(&id, &intent, report, met);
            }
            Err(why) => report.judged(id, Some(why)),
        }
    }
    for case in listed(&content, "errors", file, report) {
        let Some(case) = report.readable::<Printed>(case) else { continue };
        let expected = ["Equal", "ContainSubstring"].into_iter().find_map(|how| case.stderr[how].as_str());
        // How a program begins its last words is its own.
        let expected = expected.unwrap_or_default().trim().trim_start_matches("Error: ");
        let found = Kumactl::of_arguments(&case.args).intent();
        let difference = match found {
            Err(said) if !expected.is_empty() && said.contains(expected) => None,
            found => Some(format!("expected {expected}\nfound    {found:?}")),
        };
        report.judged(format!("dry-run/{}", case.id), difference);
    }
}

/// Printed rules in the form that `iptables-restore` reads: matches and ranges are spelled as for a person.
fn restorable(text: &str, proxy: Option<&str>) -> String {
    let line = |line: &str| {
        let several = line.contains("-m multiport");
        let mut line = line.replacen("* ", "*", 1);
        if several {
            line = line.replace("--dport ", "--dports ");
            // Of two words with a colon in it, the user's is a range with a dash.
            let words: Vec<_> = line.split(' ').collect();
            let dashed = words.iter().enumerate().map(|(i, word)| match i.checked_sub(1).map(|i| words[i]) {
                Some("--uid-owner") => word.replace(':', "-"),
                _ => (*word).to_owned(),
            });
            line = dashed.collect::<Vec<_>>().join(" ");
        } else if let Some(proxy) = proxy {
            line = line.replace("--uid-owner 0 ", &format!("--uid-owner {proxy} "));
        }
        line
    };
    let rules = text.lines().filter(|line| !line.starts_with('#')).map(line).collect::<Vec<_>>();
    loadable(&rules.join("\n"))
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Fragments {
    description: String,
    vnet: Vec<String>,
    ipv6: bool,
    #[serde(default)]
    inbound_port: Option<u16>,
    #[serde(default)]
    outbound_port: Option<u16>,
    #[serde(default)]
    dns_port: Option<u16>,
    #[serde(rename = "containsFragments")]
    pieces: Vec<String>,
}

/// The rules for guests, of which the corpus has only those before routing.
fn fragments(root: &Path, report: &mut GroupReport, met: &mut BTreeSet<Named>) {
    let file = "prerouting-fragments.yaml";
    let content = read_list(&root.join(file), report);
    for (i, case) in listed(&content, "cases", file, report).iter().enumerate() {
        let Some(case) = report.readable::<Fragments>(case) else { continue };
        let id = format!("prerouting/{i} {}", case.description);
        let mut arguments = vec!["--redirect-all-dns-traffic".to_owned()];
        for (flag, port) in [
            ("--redirect-inbound-port", case.inbound_port),
            ("--redirect-outbound-port", case.outbound_port),
            ("--redirect-dns-port", case.dns_port),
        ] {
            arguments.extend(port.into_iter().flat_map(|port| [flag.to_owned(), port.to_string()]));
        }
        arguments.extend(case.vnet.iter().flat_map(|vnet| ["--vnet".to_owned(), vnet.clone()]));
        match Kumactl::of_arguments(&arguments).intent() {
            Ok(intent) => {
                let rules = assembled(&case.pieces, intent.inbound.port);
                let rules = if case.ipv6 {
                    let fired =
                        |probe: &Probe| probe.to.is_ipv6() && !matches!(probe.origin, Origin::Web { .. });
                    Rules { restore: Restore::Nft, v4: String::new(), v6: rules, fired }
                } else {
                    let fired =
                        |probe: &Probe| probe.to.is_ipv4() && !matches!(probe.origin, Origin::Web { .. });
                    Rules { restore: Restore::Nft, v4: rules, v6: String::new(), fired }
                };
                rules.judge(&id, &intent, report, met);
            }
            Err(why) => report.judged(id, Some(why)),
        }
    }
}

/// Fragments are pieces of one rule or whole ones; a rule begins with how it is put into its chain.
fn assembled(fragments: &[String], inbound: u16) -> String {
    let mut text = "*nat\n:KUMA_MESH_INBOUND - [0:0]".to_owned();
    for fragment in fragments {
        let begins =
            ["-I ", "-A ", "--insert ", "--append "].iter().any(|option| fragment.starts_with(option));
        text.push_str(if begins { "\n" } else { " " });
        text.push_str(fragment);
    }
    text + &format!("\n-A KUMA_MESH_INBOUND -p tcp -j REDIRECT --to-ports {inbound}\nCOMMIT\n")
}

/// Every backend, for what is judged with each.
const BACKENDS: [Backend; 3] = [Backend::Nftables, Backend::IptablesNft, Backend::IptablesLegacy];
