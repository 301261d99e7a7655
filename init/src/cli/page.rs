//! `docs/redirect.md` names every field with its default, flag and variable, or these tests say what it lacks.

use clap::CommandFactory as _;
use serde_json::Value;

use super::Cli;
use super::fields::FIELDS;
use super::layers::Layers;
use crate::intent::{Bridge, OwnerExclusion, Workload};

const PAGE: &str = include_str!("../../../docs/redirect.md");

/// The beginning of a field's row.
fn row(path: &str, default: &Value) -> String {
    // `--dns` says two fields.
    let parent = path.rsplit_once('.').map(|(parent, _)| parent);
    let field = FIELDS.iter().find(|f| f.path == path).or(FIELDS.iter().find(|f| Some(f.path) == parent));
    let field = field.unwrap_or_else(|| panic!("no flag gives {path}"));
    format!("| `{path}` | `{default}` | `--{}` `{}` |", field.flag, field.variable)
}

#[test]
fn every_field_has_a_row_with_its_default_flag_and_variable() {
    let missing: Vec<_> = Layers::default()
        .leaves()
        .iter()
        .map(|(path, default)| row(path, default))
        .filter(|row| !PAGE.contains(row.as_str()))
        .collect();
    assert!(missing.is_empty(), "docs/redirect.md lacks these rows:\n{}", missing.join("\n"));
}

#[test]
fn no_row_is_about_a_field_that_is_gone() {
    let leaves = Layers::default().leaves();
    let rows = PAGE.lines().filter(|line| line.contains("` | `--"));
    let gone: Vec<_> =
        rows.filter(|line| !leaves.iter().any(|(p, d)| line.starts_with(&row(p, d)))).collect();
    assert!(gone.is_empty(), "docs/redirect.md has rows of nothing:\n{}", gone.join("\n"));
}

#[test]
fn what_is_inside_of_lists_is_named() {
    let bridge = Bridge { interface: crate::intent::Interface::lo(), local_cidrs: Vec::new() };
    let inside = [
        serde_json::to_value(Workload::default()),
        serde_json::to_value(OwnerExclusion::default()),
        serde_json::to_value(bridge),
    ];
    for value in inside.map(Result::unwrap) {
        for key in value.as_object().unwrap().keys() {
            assert!(PAGE.contains(&format!("`{key}`")), "docs/redirect.md doesn't name {key}");
        }
    }
}

#[test]
fn every_flag_that_a_variable_can_give_is_named() {
    // kumactl's own are kumactl's to describe.
    let cli = Cli::command();
    let commands = cli.get_subcommands().filter(|c| !c.is_hide_set() && c.get_name() != "transparent-proxy");
    for argument in commands.flat_map(clap::Command::get_arguments) {
        let (Some(flag), Some(variable)) = (argument.get_long(), argument.get_env()) else { continue };
        let words = format!("`--{flag}` `{}`", variable.display());
        assert!(PAGE.contains(&words), "docs/redirect.md lacks {words}");
    }
}
