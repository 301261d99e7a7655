//! Where Ursa differs from its peer on purpose: the one table of it.

use super::{GroupReport, Outcome};

/// A difference on purpose.
#[derive(Debug, Clone, Copy)]
pub struct Deviation {
    /// The folder of the group.
    pub group: &'static str,
    /// Which cases: an id, where `*` stands for any text.
    pub cases: &'static str,
    /// Their difference, where `*` stands for any text; another one is a failure.
    pub difference: &'static str,
    /// Why Ursa differs.
    pub reason: &'static str,
}

/// All of them. A difference that isn't here is a failure, and so is a row whose cases all pass.
pub const DEVIATIONS: &[Deviation] = &[
    Deviation {
        group: "02-validation",
        cases: "workload-003",
        difference: "expected no violation\nfound    name: value length must less or equal 253; name: must not be longer than \
                     253 characters",
        reason: "about the longest valid name, but the corpus gives it the name of workload-001, which is too long and must \
             be refused there",
    },
    Deviation {
        group: "03-transparent-proxy",
        cases: "* MeshAddressesAreClosed",
        difference: "*",
        reason: "the mesh's addresses exist in the workload's namespace alone: redirected or refused there, and never taken from the wire",
    },
    Deviation {
        group: "03-transparent-proxy",
        cases: "* OwnPortsAreClosed",
        difference: "*",
        reason: "the peer answers for the proxy's own ports as if the application had them; Ursa refuses who isn't redirected there",
    },
    Deviation {
        group: "03-transparent-proxy",
        cases: "* ForwardedIsLeftAlone",
        difference: "*",
        reason: "connections that only pass through (of a host's containers) aren't the workload's",
    },
    Deviation {
        group: "03-transparent-proxy",
        cases: "* LoopbackIsAllOfIt",
        difference: "*",
        reason: "all of 127/8 is loopback for the proxy too, not only 127.0.0.1",
    },
    Deviation {
        group: "03-transparent-proxy",
        cases: "* LookupsOverTcp",
        difference: "*",
        reason: "lookups over TCP go to the shim as those over UDP do, or a long answer would go past the mesh",
    },
    Deviation {
        group: "03-transparent-proxy",
        cases: "* LookupsOfGuests",
        difference: "*",
        reason: "the peer's shim answers guests in another conntrack zone than they asked in, so that no guest gets an answer",
    },
    Deviation {
        group: "03-transparent-proxy",
        cases: "* ShimAsksDirectly",
        difference: "*",
        reason: "what the shim asks a resolver of its own namespace over TCP would arrive at the inbound listener",
    },
    Deviation {
        group: "03-transparent-proxy",
        cases: "* HairpinHonoursInboundPorts",
        difference: "*",
        reason: "a workload's call of itself goes to the inbound listener under the rules of everybody's calls",
    },
    Deviation {
        group: "03-transparent-proxy",
        cases: "* HairpinIgnoresOutboundExclusions",
        difference: "*",
        reason: "exclusions are about what the application opens; its proxy's call of the workload is an arriving one",
    },
    Deviation {
        group: "03-transparent-proxy",
        cases: "* DeliveriesAreNoLookups",
        difference: "*",
        reason: "what comes from the address of the proxy's deliveries is one, whatever its port",
    },
    Deviation {
        group: "07-api-server",
        cases: "policy-dataplanes/meshtimeout_consumer_dataplanes",
        difference: "error: line * column *: duplicate mapping key: *",
        reason: "its input has a label twice; Ursa refuses such YAML, since nobody could tell which one was meant",
    },
    Deviation {
        group: "07-api-server",
        cases: "base/index",
        difference: "GET /: product: expected \"Kuma\", got \"Ursa\"",
        reason: "the product is Ursa, and `basedOnKuma` names the version whose API it speaks",
    },
    Deviation {
        group: "07-api-server",
        cases: "misc/auth-*",
        difference: "GET /*: expected status 403, got 401: *",
        reason: "who sends no credentials is asked for them (401) on every endpoint but `/` and health; 403 is for those \
             who are known and may not",
    },
];

/// A text that goes on where the peer's ends; whatever else is in the answer is judged as ever.
#[derive(Debug, Clone, Copy)]
pub struct Wording {
    /// The peer's whole text.
    pub theirs: &'static str,
    /// How Ursa's longer one begins.
    pub ours: &'static str,
    /// Why Ursa says more.
    pub reason: &'static str,
}

/// All of them.
pub const WORDINGS: &[Wording] =
    &[Wording { theirs: "Not found", ours: "Not found: ", reason: "an error names what was asked for" }];

/// What the runner does beside what a case says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Does {
    /// Requests that the corpus sends from localhost carry the admin's token.
    AdminToken,
    /// The API runs with this switch of its configuration on.
    SwitchesOn(&'static str),
    /// A command runs with this flag of this value.
    Flag(&'static str, &'static str),
}

/// Cases that the runner gives what Ursa asks for and the peer doesn't.
#[derive(Debug, Clone, Copy)]
pub struct Arrangement {
    /// The folder of the group.
    pub group: &'static str,
    /// Which cases: an id, where `*` stands for any text.
    pub cases: &'static str,
    /// What is done.
    pub does: Does,
    /// Why.
    pub reason: &'static str,
}

/// All of them; nothing is arranged that isn't here.
pub const ARRANGEMENTS: &[Arrangement] = &[
    Arrangement {
        group: "03-transparent-proxy",
        cases: "dry-run/*",
        does: Does::Flag("--kuma-dp-user", "5678"),
        reason: "root can't be the proxy: everything that root does would go past the mesh; the expected rules get the \
                 same user",
    },
    Arrangement {
        group: "07-api-server",
        cases: "*",
        does: Does::AdminToken,
        reason: "nobody is admin for coming from localhost: any program of the machine, and any page in its browser, does",
    },
    Arrangement {
        group: "07-api-server",
        cases: "localhost-admin/*",
        does: Does::SwitchesOn("apiServer.authn.localhostIsAdmin"),
        reason: "these cases are about just that; it is off unless an operator wants it",
    },
    Arrangement {
        group: "05-cni",
        cases: "chain-into-conf*",
        does: Does::Flag("--network-name", "k8s-pod-network"),
        reason: "a single plugin that becomes a list keeps its network's name unless told: under another one, host-local \
             forgets which addresses are taken, and gives them out twice",
    },
];

/// What is arranged for a case.
pub fn arranged(group: &str, id: &str) -> impl Iterator<Item = Does> {
    let here = move |row: &&Arrangement| row.group == group && covers(row.cases, id);
    ARRANGEMENTS.iter().filter(here).map(|row| row.does)
}

/// Whether a text is as a pattern says, in which `*` stands for any text.
fn covers(pattern: &str, text: &str) -> bool {
    let Some((first, rest)) = pattern.split_once('*') else { return pattern == text };
    let Some(mut text) = text.strip_prefix(first) else { return false };
    let mut parts = rest.split('*').peekable();
    while let Some(part) = parts.next() {
        if parts.peek().is_none() {
            return text.ends_with(part);
        }
        match text.split_once(part) {
            Some((_, after)) => text = after,
            None => return false,
        }
    }
    true
}

/// Excuses the differences of a group that are in the table, and fails the rows that nothing needs any more.
///
/// A row without a case in this corpus says nothing: parts of the corpus are held back.
pub fn excuse(report: &mut GroupReport) {
    excuse_by(DEVIATIONS, report);
}

fn excuse_by(rows: &[Deviation], report: &mut GroupReport) {
    let mut stale = Vec::new();
    for row in rows.iter().filter(|row| row.group == report.group) {
        let mut differing = None;
        for case in report.cases.iter_mut().filter(|case| covers(row.cases, &case.id)) {
            let differs = differing.get_or_insert(false);
            if let Outcome::Failed { difference } = &case.outcome {
                *differs = true;
                if covers(row.difference, difference) {
                    let difference = difference.clone();
                    case.outcome = Outcome::Deviates { difference, reason: row.reason.to_owned() };
                }
            }
        }
        if differing == Some(false) {
            stale.push(row.cases);
        }
    }
    for cases in stale {
        let what = "expected a difference, as its row in deviations.rs says; found none: remove the row";
        report.judged(format!("stale deviation {cases}"), Some(what.to_owned()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROWS: &[Deviation] =
        &[Deviation { group: "g", cases: "a/*", difference: "*403, got 401", reason: "because" }];

    fn report(cases: &[(&str, Option<&str>)]) -> GroupReport {
        let mut report = GroupReport::new("g");
        for (id, difference) in cases {
            report.judged(*id, difference.map(str::to_owned));
        }
        excuse_by(ROWS, &mut report);
        report
    }

    #[test]
    fn a_row_excuses_its_difference_and_no_other() {
        let report = report(&[("a/1", Some("expected 403, got 401")), ("a/2", Some("got 500")), ("b", None)]);
        assert!(matches!(&report.cases[0].outcome, Outcome::Deviates { reason, .. } if reason == "because"));
        assert!(matches!(report.cases[1].outcome, Outcome::Failed { .. }));
        assert_eq!((report.cases.len(), report.counts()), (3, (1, 1, 0)));
    }

    #[test]
    fn stars_stand_for_any_text() {
        for (pattern, text) in [("a", "a"), ("a*", "abc"), ("*c", "abc"), ("a*b*", "axbx"), ("*", "")] {
            assert!(covers(pattern, text), "{pattern} {text}");
        }
        for (pattern, text) in [("a", "ab"), ("a*", "ba"), ("*c", "cb"), ("a*b*c", "acb"), ("ab*b", "ab")] {
            assert!(!covers(pattern, text), "{pattern} {text}");
        }
    }

    #[test]
    fn a_row_that_nothing_needs_fails() {
        let found = report(&[("a/1", None), ("b", Some("403, got 401"))]);
        assert_eq!(found.cases[2].id, "stale deviation a/*");
        assert_eq!(found.counts(), (1, 2, 0));
        // Without its cases nobody can tell.
        assert_eq!(report(&[("b", None)]).cases.len(), 1);
    }
}
