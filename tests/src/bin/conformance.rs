//! `conformance CORPUS_DIR [--group 02] [--json]`: judges the project by the peer corpus.

use std::{path::PathBuf, process::ExitCode};

use clap::Parser;
use ursa_tests::conformance::{GROUPS, GroupReport, Outcome, deviations::ARRANGEMENTS};

/// Judges the project by cases of the peer corpus.
#[derive(Debug, Parser)]
struct Arguments {
    /// Root of the corpus.
    corpus: PathBuf,
    /// Only groups whose name starts with this, for example 02.
    #[arg(long)]
    group: Option<String>,
    /// Everything as JSON.
    #[arg(long)]
    json: bool,
}

fn main() -> anyhow::Result<ExitCode> {
    let arguments = Arguments::parse();
    anyhow::ensure!(
        arguments.corpus.is_dir(),
        "{} is no directory: give the root of the corpus, which holds folders such as 02-validation",
        arguments.corpus.display()
    );
    let wanted = arguments.group.unwrap_or_default();
    let reports: Vec<GroupReport> = GROUPS
        .iter()
        .filter(|group| group.name.starts_with(&wanted))
        .map(|group| group.judge(&arguments.corpus))
        .collect();
    anyhow::ensure!(!reports.is_empty(), "no group starts with {wanted:?}");
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(&reports)?);
    } else {
        reports.iter().for_each(print);
    }
    let failed = reports.iter().any(|report| report.counts().1 > 0);
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn print(report: &GroupReport) {
    let (passed, failed, unsupported) = report.counts();
    let deviating =
        report.cases.iter().filter(|case| matches!(case.outcome, Outcome::Deviates { .. })).count();
    println!(
        "{}: {passed} passed, {failed} failed, {unsupported} unsupported, {deviating} differ on purpose",
        report.group
    );
    for row in ARRANGEMENTS.iter().filter(|row| row.group == report.group) {
        println!("  arranged for {}: {:?}, since {}", row.cases, row.does, row.reason);
    }
    let indented = |text: &str| text.replace('\n', "\n    ");
    for case in &report.cases {
        match &case.outcome {
            Outcome::Passed => {}
            Outcome::Unsupported { missing } => println!("  unsupported {}: {missing}", case.id),
            Outcome::Deviates { difference, reason } => {
                println!("  deviates {}: {reason}\n    {}", case.id, indented(difference));
            }
            Outcome::Failed { difference } => {
                println!("  FAILED {}\n    {}", case.id, indented(difference));
            }
        }
    }
}
