//! What others put into the tables stays, byte by byte, and so does what nobody asked us to touch.

use std::path::Path;
use std::process::Command;

use serde_json::Value;
use ursa_init::Plan;
use ursa_init::backend::Backend;

use super::fire::lab::Lab;
use super::{BACKENDS, Kumactl};
use crate::conformance::{GroupReport, listed, read_list};

const VARIANTS: [&str; 2] = ["nft", "legacy"];
const FAMILIES: [&str; 2] = ["iptables", "ip6tables"];

/// Custom rules, the redirect, no redirect: as before. And a variant that wasn't chosen stays without rules.
pub(super) fn judge(root: &Path, report: &mut GroupReport) {
    let rules = read_list(&root.join("uninstall.yaml"), report);
    let rules = listed(&rules, "customRules", "uninstall.yaml", report).to_vec();
    let cases = read_list(&root.join("iptables-save/cases.yaml"), report);
    for (input, call) in cases["inputs"].as_object().into_iter().flatten() {
        let plan = Kumactl::of_input(call).intent().and_then(|intent| {
            Plan::compile(&intent).map_err(|error| error.to_string()).map(|plan| (intent, plan))
        });
        let (intent, plan) = match plan {
            Ok(plan) => plan,
            Err(why) => {
                report.judged(format!("uninstall/{input}"), Some(why));
                continue;
            }
        };
        for backend in BACKENDS {
            let lab = Lab::new(&[], &intent);
            let difference = lab.run(|| around(&rules, &plan, backend));
            report.judged(format!("uninstall/{input} by {backend}"), difference.err());
        }
        for backend in BACKENDS {
            let lab = Lab::new(&[], &intent);
            let difference = lab.run(|| untouched(&plan, backend));
            report.judged(format!("noRuleFiles/{input} by {backend}"), difference.err());
        }
    }
}

fn around(rules: &[Value], plan: &Plan, backend: Backend) -> Result<(), String> {
    for rule in rules {
        let words: Vec<&str> = rule.as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        for program in
            FAMILIES.iter().flat_map(|family| VARIANTS.map(|variant| format!("{family}-{variant}")))
        {
            run(Command::new(program).args(&words))?;
        }
    }
    let before = dumps(&VARIANTS)?;
    ursa_init::apply_with(plan, backend).map_err(|error| error.to_string())?;
    let meanwhile = dumps(&VARIANTS)?;
    ursa_init::remove().map_err(|error| error.to_string())?;
    let after = dumps(&VARIANTS)?;
    if backend != Backend::Nftables && meanwhile == before {
        return Err("expected rules while the redirect is in place; found none".to_owned());
    }
    if before == after { Ok(()) } else { Err(format!("expected {before}\nfound    {after}")) }
}

fn untouched(plan: &Plan, backend: Backend) -> Result<(), String> {
    ursa_init::apply_with(plan, backend).map_err(|error| error.to_string())?;
    let others: &[&str] = match backend {
        Backend::IptablesNft => &["legacy"],
        Backend::IptablesLegacy => &["nft"],
        _ => &VARIANTS,
    };
    let found = dumps(others)?;
    if found.is_empty() { Ok(()) } else { Err(format!("expected no rules; found {found}")) }
}

/// All rules and chains that are somebody's; empty tables come and go with whoever looks at them.
fn dumps(variants: &[&str]) -> Result<String, String> {
    let mut all = String::new();
    for variant in variants {
        for family in FAMILIES {
            let program = format!("{family}-{variant}-save");
            let dump = run(&mut Command::new(&program))?;
            let mut table = "";
            for line in dump.lines() {
                if let Some(name) = line.strip_prefix('*') {
                    table = name;
                }
                let own_chain = line.starts_with(':') && line.contains(" - ");
                if own_chain || line.starts_with("-A") {
                    let line = line.split(" [").next().unwrap_or(line);
                    all.extend([program.as_str(), " ", table, " ", line, "\n"]);
                }
            }
        }
    }
    Ok(all)
}

fn run(command: &mut Command) -> Result<String, String> {
    let output = command.output().map_err(|error| format!("{command:?}: {error}"))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(format!("{command:?}: {}", String::from_utf8_lossy(&output.stderr)))
}
