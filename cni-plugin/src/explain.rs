//! `ursa-cni explain`: the plugin's decision about a pod, from its manifest and before it starts.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use clap::Args;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use std::collections::BTreeMap;

use crate::config::INJECTION;

/// What to look at.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// The Pod's manifest, YAML or JSON
    pod: PathBuf,
}

#[derive(Debug, Deserialize)]
struct Manifest {
    #[serde(default)]
    kind: String,
    #[serde(default)]
    metadata: Metadata,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Metadata {
    annotations: BTreeMap<String, String>,
}

/// Prints the decision.
pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let pod: Manifest = read(&arguments.pod)?;
    if pod.kind != "Pod" {
        bail!("{} is a {}; pass the manifest of a Pod", arguments.pod.display(), pod.kind);
    }
    let value = pod.metadata.annotations.get(INJECTION).map(String::as_str);
    let meshed = matches!(value, Some("enabled" | "true"));
    println!("meshed: {}", if meshed { "yes" } else { "no" });
    Ok(())
}

fn read<T: DeserializeOwned>(path: &Path) -> anyhow::Result<T> {
    let text = std::fs::read_to_string(path).with_context(|| format!("can't read {}", path.display()))?;
    ursa_init::yaml::from_str(&text).with_context(|| format!("{} can't be understood", path.display()))
}
