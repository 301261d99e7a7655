//! `ursa-init check`.

use std::io::Write;
use std::time::Duration;

use anyhow::Context as _;
use clap::Args;

use super::options::Options;
use super::place::Place;
use crate::check::{Found, check};

#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Checking")]
pub(super) struct Arguments {
    /// How long to wait for each answer, in milliseconds
    #[arg(long, env = "URSA_CHECK_TIMEOUT", value_name = "MS", default_value = "1000",
          value_parser = clap::value_parser!(u64).range(1..=60_000))]
    timeout: u64,
    /// As JSON
    #[arg(long)]
    json: bool,
}

/// Tries the redirect; whether nothing is missing.
pub(super) fn run(
    out: &mut impl Write,
    place: &Place,
    options: &Options,
    arguments: &Arguments,
) -> anyhow::Result<bool> {
    let (mut intent, _) = options.resolve()?;
    if options.is_empty() {
        // Only for asking; what is asked for are the usual ports.
        intent.proxy_gids = vec![5678];
        intent.proxy_uids = vec![5678];
    }
    let netns = place.look()?;
    place.keep_ssh(&netns, &mut intent, None)?;
    let patience = Duration::from_millis(arguments.timeout);
    let findings = place.inside(&netns, || check(&intent, patience))?.context("can't check")?;
    let missing = findings.iter().filter(|finding| matches!(finding.found, Found::Missing(_))).count();
    let good = findings.iter().filter(|finding| matches!(finding.found, Found::Good(_))).count();
    if arguments.json {
        writeln!(out, "{}", serde_json::to_string_pretty(&findings)?)?;
        return Ok(missing == 0 && good > 0);
    }
    for finding in &findings {
        let (word, detail) = match &finding.found {
            Found::Good(detail) => ("ok      ", detail),
            Found::Missing(detail) => ("MISSING ", detail),
            Found::Skipped(detail) => ("skipped ", detail),
        };
        writeln!(out, "{word} {}: {detail}", finding.what)?;
    }
    match (missing, good) {
        (0, 0) => writeln!(out, "Nothing could be tried; see the reasons above.")?,
        (0, _) => writeln!(out, "The redirect works.")?,
        _ => writeln!(
            out,
            "{missing} of {} are MISSING: `ursa-init apply` puts them in place.",
            findings.len()
        )?,
    }
    Ok(missing == 0 && good > 0)
}
