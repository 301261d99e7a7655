//! The plan as a script that `nft -f` loads, for people and for machines where Ursa may not write rules itself.

use std::fmt::Write as _;

use super::TABLE;
use crate::plan::{Action, Chain, HookKind, HookPoint, Match, Plan, Protocol, Rule};

/// nft's own limit on a comment.
const COMMENT: usize = 128;

/// The plan's rules as one script. It replaces our table as a whole, in one transaction.
pub fn script(plan: &Plan) -> String {
    // Deleting what isn't there fails, so it is made first.
    let mut out = format!("table inet {TABLE}\ndelete table inet {TABLE}\ntable inet {TABLE} {{\n");
    for chain in &plan.chains {
        write_chain(&mut out, chain);
    }
    out.push_str("}\n");
    out
}

fn write_chain(out: &mut String, chain: &Chain) {
    // Writing to a text can't fail.
    let _ = writeln!(out, "\tchain {} {{", chain.name);
    if let Some(hook) = chain.hook {
        let kind = match hook.kind {
            HookKind::Filter => "filter",
            HookKind::Nat => "nat",
            HookKind::Route => "route",
        };
        let point = match hook.point {
            HookPoint::Prerouting => "prerouting",
            HookPoint::Output => "output",
        };
        let _ = writeln!(out, "\t\ttype {kind} hook {point} priority {}; policy accept;", hook.priority);
    }
    for rule in &chain.rules {
        for (matches, action) in lines(rule) {
            let comment: String = rule.reason.chars().filter(|c| *c != '"').take(COMMENT).collect();
            let _ = writeln!(out, "\t\t{matches}counter {action} comment \"{comment}\"");
        }
    }
    out.push_str("\t}\n");
}

/// One rule, or one for TCP and one for the rest where a refusal must say it in each one's words.
fn lines(rule: &Rule) -> Vec<(String, String)> {
    let text = |matches: &[Match]| matches.iter().fold(String::new(), |text, m| format!("{text}{m} "));
    let matches = text(&rule.matches);
    let reset = || "reject with tcp reset".to_owned();
    let unreachable = || "reject with icmpx type port-unreachable".to_owned();
    match &rule.action {
        Action::Reject => {
            let protocol =
                rule.matches.iter().find_map(|m| if let Match::Protocol(p) = m { Some(*p) } else { None });
            match protocol {
                Some(Protocol::Tcp) => vec![(matches, reset())],
                Some(_) => vec![(matches, unreachable())],
                None => {
                    let tcp = format!("{matches}{} ", Match::Protocol(Protocol::Tcp));
                    vec![(tcp, reset()), (matches, unreachable())]
                }
            }
        }
        // As the netlink backend does: a connection that was handed over needs no further look.
        action @ Action::Tproxy(_) => vec![(matches, format!("{action} accept"))],
        action => vec![(matches, action.to_string())],
    }
}
