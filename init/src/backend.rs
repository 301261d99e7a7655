//! Which of the two backends serves a namespace, and the way from one to the other.
//!
//! Rules of both may stand together for a moment: whichever is first redirects, and whichever refuses refuses. So
//! the new backend's rules come first and the old one's go then, and at no time is there neither.

use std::collections::BTreeSet;
use std::path::Path;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::cgroup;
use crate::error::Error;
use crate::iptables::{self, DISPATCHERS, Table, Variant};
use crate::nft;
use crate::plan::{Family, Plan};

/// What puts the rules in place.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum Backend {
    /// nftables where the kernel has nf_tables, else iptables.
    #[default]
    Auto,
    /// nf_tables by netlink, without a program.
    Nftables,
    /// iptables, of the kind that the host uses already; else on nf_tables where the kernel has it.
    Iptables,
    /// iptables on nf_tables.
    IptablesNft,
    /// iptables on the old tables.
    IptablesLegacy,
}

impl Backend {
    /// Every choice, with its name.
    pub const ALL: [(&'static str, Self); 5] = [
        ("auto", Self::Auto),
        ("nftables", Self::Nftables),
        ("iptables", Self::Iptables),
        ("iptables-nft", Self::IptablesNft),
        ("iptables-legacy", Self::IptablesLegacy),
    ];
}

/// The text names no backend.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no backend; there are auto, nftables, iptables, iptables-nft and iptables-legacy")]
pub struct ParseBackendError(String);

impl FromStr for Backend {
    type Err = ParseBackendError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let found = Self::ALL.into_iter().find(|(name, _)| *name == text);
        found.map(|(_, backend)| backend).ok_or_else(|| ParseBackendError(text.to_owned()))
    }
}

impl std::fmt::Display for Backend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let name = Self::ALL.iter().find(|(_, backend)| backend == self).map(|(name, _)| *name);
        f.write_str(name.unwrap_or_default())
    }
}

/// A backend that was chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Chosen {
    Nftables,
    Iptables(Variant),
}

impl Backend {
    fn choose(self) -> Result<Chosen, Error> {
        Ok(match self {
            Self::Nftables => Chosen::Nftables,
            Self::IptablesNft => Chosen::Iptables(Variant::Nft),
            Self::Iptables => Chosen::Iptables(usual_variant()?),
            Self::Auto if nft::works()? => Chosen::Nftables,
            Self::IptablesLegacy | Self::Auto => Chosen::Iptables(Variant::Legacy),
        })
    }
}

/// The kind of iptables that others use here, then the one that we used, then the one on nf_tables.
fn usual_variant() -> Result<Variant, Error> {
    if !nft::works()? {
        return Ok(Variant::Legacy);
    }
    // A kind whose programs are missing, or who can't read its rules, isn't the one that is used.
    let nft = iptables::in_use(Variant::Nft);
    let legacy = if legacy_tables() { iptables::in_use(Variant::Legacy) } else { Ok((false, false)) };
    let (nft_ours, nft_foreign) = *nft.as_ref().unwrap_or(&(false, false));
    let (legacy_ours, legacy_foreign) = *legacy.as_ref().unwrap_or(&(false, false));
    if (legacy_foreign && !nft_foreign) || (legacy_ours && !nft_ours && !nft_foreign) {
        return Ok(Variant::Legacy);
    }
    match nft {
        Ok(_) => Ok(Variant::Nft),
        // The old programs alone will do; if they are missing as well, it is this error that names what to install.
        Err(error) => iptables::in_use(Variant::Legacy).map(|_| Variant::Legacy).map_err(|_| error),
    }
}

/// Whether the old tables are in use in this namespace at all; unreadable without rights, and then not ours.
fn legacy_tables() -> bool {
    ["ip_tables_names", "ip6_tables_names"].iter().any(|file| {
        let path = Path::new("/proc/thread-self/net").join(file);
        std::fs::read_to_string(path).is_ok_and(|names| !names.trim().is_empty())
    })
}

/// Whether nf_tables, which works, holds iptables' rules of ours.
fn holds_iptables() -> Result<bool, Error> {
    nft::holds_chains(&Table::ALL.map(Table::name), &DISPATCHERS)
}

/// Whether iptables of a kind holds rules of ours. Starts a program only where the old tables are in use.
pub(crate) fn left_over(variant: Variant) -> Result<bool, Error> {
    match variant {
        Variant::Nft => Ok(nft::works()? && holds_iptables()?),
        Variant::Legacy if legacy_tables() => match iptables::in_use(Variant::Legacy) {
            Ok((ours, _)) => Ok(ours),
            Err(error) => {
                // Whoever made the tables had the programs; ours would have been made by them.
                tracing::debug!(error = error.with_causes(), "the old tables of iptables can't be read");
                Ok(false)
            }
        },
        Variant::Legacy => Ok(false),
    }
}

/// Puts the plan's rules in place by the backend, and removes what another one left. Returns whether anything changed.
pub(crate) fn apply(plan: &Plan, backend: Backend) -> Result<bool, Error> {
    let chosen = backend.choose()?;
    // Looked for first, so that a failure to look changes nothing.
    let others = others(chosen, backend == Backend::Auto && chosen == Chosen::Nftables)?;
    let changed = match chosen {
        Chosen::Nftables => match nft::apply(plan) {
            // A part is missing: what can't be done here may be done there.
            Err(error) if backend == Backend::Auto && error.is_unsupported() => {
                tracing::warn!(
                    error = error.with_causes(),
                    "nf_tables can't hold the rules; trying iptables"
                );
                let done = iptables::apply(plan, Variant::Legacy).map_err(|_| error)?;
                let others: Vec<_> =
                    others.into_iter().filter(|o| *o != Chosen::Iptables(Variant::Legacy)).collect();
                return Ok(remove_each(&others)? || done);
            }
            done => done?,
        },
        Chosen::Iptables(variant) => iptables::apply(plan, variant)?,
    };
    Ok(remove_each(&others)? || changed)
}

/// The backends besides one that have rules in place. `known` when it is known already that nf_tables works.
fn others(kept: Chosen, known: bool) -> Result<Vec<Chosen>, Error> {
    let mut found = Vec::new();
    let nf_tables = known || nft::works()?;
    if kept != Chosen::Nftables && nf_tables && nft::read_back()?.is_some() {
        found.push(Chosen::Nftables);
    }
    if kept != Chosen::Iptables(Variant::Nft) && nf_tables && holds_iptables()? {
        found.push(Chosen::Iptables(Variant::Nft));
    }
    if kept != Chosen::Iptables(Variant::Legacy) && left_over(Variant::Legacy)? {
        found.push(Chosen::Iptables(Variant::Legacy));
    }
    Ok(found)
}

fn remove_each(backends: &[Chosen]) -> Result<bool, Error> {
    let mut removed = false;
    for backend in backends {
        removed |= match backend {
            Chosen::Nftables => nft::remove()?,
            Chosen::Iptables(variant) => iptables::remove(*variant)?,
        };
    }
    Ok(removed)
}

/// Removes what any backend left. Returns whether there was anything.
pub(crate) fn remove() -> Result<bool, Error> {
    let mut removed = false;
    for variant in Variant::ALL {
        if left_over(variant)? {
            removed |= iptables::remove(variant)?;
        }
    }
    if nft::works()? {
        removed |= nft::remove()?;
    }
    Ok(removed)
}

/// The rules of every backend as they stood, to be put back as they were.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Saved {
    /// `None` when there was no table.
    #[serde(rename = "rules")]
    nftables: Option<nft::Saved>,
    /// Of each kind that had rules.
    #[serde(default)]
    iptables: Vec<iptables::Snapshot>,
}

/// Reads what is in place, by whichever backends.
pub(crate) fn save() -> Result<Saved, Error> {
    let mut saved = Saved { nftables: if nft::works()? { nft::save()? } else { None }, iptables: Vec::new() };
    for variant in Variant::ALL {
        if left_over(variant)? {
            saved.iptables.push(iptables::snapshot(variant)?);
        }
    }
    Ok(saved)
}

/// Puts back what was saved, and then removes what wasn't there: at no time is there neither.
pub(crate) fn restore(saved: &Saved) -> Result<(), Error> {
    if let Some(table) = &saved.nftables {
        nft::restore(table)?;
    }
    for snapshot in &saved.iptables {
        iptables::restore(snapshot)?;
    }
    for variant in Variant::ALL {
        if saved.iptables.iter().all(|snapshot| snapshot.variant() != variant) && left_over(variant)? {
            iptables::remove(variant)?;
        }
    }
    if saved.nftables.is_none() && nft::works()? {
        nft::remove()?;
    }
    Ok(())
}

/// What is in place, by whichever backend.
pub(crate) fn show() -> Result<Vec<String>, Error> {
    let mut lines = match if nft::works()? { nft::read_back()? } else { None } {
        Some(found) => {
            let mut lines = found.lines(nft::Counters::Show);
            lines.extend(gone_slices(&found));
            lines
        }
        None => Vec::new(),
    };
    for variant in Variant::ALL {
        if left_over(variant)? {
            lines.extend(iptables::show(variant)?);
        }
    }
    Ok(lines)
}

/// What the rules in place can't tell apart, because the slice that they name is gone or isn't there yet.
fn gone_slices(found: &nft::Ruleset) -> BTreeSet<String> {
    let held = [Family::V4, Family::V6].map(|family| found.held(family).unwrap_or_default());
    let rules = held.iter().flat_map(|held| &held.chains).flat_map(|chain| &chain.rules);
    let gone = rules.filter(|rule| rule.cgroups().any(cgroup::is_gone));
    gone.map(|rule| format!("! {}: its slice doesn't exist now, so that matches nothing", rule.reason))
        .collect()
}

/// The differences between what is in place and the plan. Without a choice, the backend that is in place is asked.
pub(crate) fn diff(plan: &Plan, backend: Backend) -> Result<Vec<String>, Error> {
    let chosen = match backend.choose()? {
        Chosen::Nftables if backend == Backend::Auto && nft::read_back()?.is_none() => {
            let variants = Variant::ALL.into_iter();
            let mut found = variants.filter_map(|v| left_over(v).map(|ours| ours.then_some(v)).transpose());
            found.next().transpose()?.map_or(Chosen::Nftables, Chosen::Iptables)
        }
        chosen => chosen,
    };
    let mut lines = match chosen {
        Chosen::Nftables => nft::diff(plan)?,
        Chosen::Iptables(variant) => iptables::diff(plan, variant)?,
    };
    if chosen != Chosen::Nftables && nft::works()? && nft::read_back()?.is_some() {
        lines.push("- table inet ursa, of the backend nftables".to_owned());
    }
    for variant in Variant::ALL {
        if chosen != Chosen::Iptables(variant) && left_over(variant)? {
            lines.push(format!("- chains URSA_ of the backend iptables-{}", variant.name()));
        }
    }
    Ok(lines)
}
