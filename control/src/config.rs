//! Configuration: defaults, then the file, then `URSA_` variables, then flags.
//!
//! Each layer is laid over the one before as JSON values; the result is read into [`Config`], which
//! refuses a key that it doesn't know and names it. A variable's name is `URSA_` and the path in
//! upper snake case: `apiServer.http.port` is `URSA_API_SERVER_HTTP_PORT`. Lists are comma-separated.

mod check;
mod overlay;
mod sections;

#[cfg(test)]
mod tests;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use serde_json::Value;

pub use sections::*;

/// Where the configuration is looked for unless told otherwise.
pub const DEFAULT_PATH: &str = "/etc/ursa/control.yaml";

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file can't be read.
    #[error("can't read the configuration file {path}: {reason}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        reason: String,
    },
    /// The file isn't YAML.
    #[error("the configuration file {path} isn't valid YAML: {reason}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and what.
        reason: String,
    },
    /// A key that doesn't exist.
    #[error("unknown configuration key {key:?} in {origin}{hint}")]
    UnknownKey {
        /// The dotted path.
        key: String,
        /// File, variable or flag.
        origin: String,
        /// The nearest key that exists, if there is one.
        hint: String,
    },
    /// A value of the wrong form.
    #[error("configuration key {key:?} in {origin}: {reason}")]
    Value {
        /// The dotted path.
        key: String,
        /// File, variable or flag.
        origin: String,
        /// What is wrong with it.
        reason: String,
    },
}

/// A variable that sets nothing, but looks as if it was meant to.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the variable {name} is no setting and is ignored; did you mean {meant}?")]
pub struct Misspelled {
    /// The variable that is set.
    pub name: String,
    /// The nearest one that exists.
    pub meant: String,
}

/// Which of these variables were probably meant to be settings. Others are left alone: they may belong to
/// another program, of ours or not.
pub fn misspelled(names: impl IntoIterator<Item = String>) -> Vec<Misspelled> {
    let look = |name: String| overlay::meant(&name).map(|meant| Misspelled { name, meant });
    names.into_iter().filter_map(look).collect()
}

/// Loads the configuration from a file (none: only defaults), variables (name → value; those that are no
/// setting are ignored, see [`misspelled`]) and flags (dotted path → value).
pub fn load(
    file: Option<&Path>,
    variables: impl IntoIterator<Item = (String, String)>,
    flags: &[(String, String)],
) -> Result<Config, ConfigError> {
    let mut value = overlay::defaults();
    if let Some(path) = file {
        let text = std::fs::read_to_string(path)
            .map_err(|error| ConfigError::Read { path: path.into(), reason: error.to_string() })?;
        let layer: Value = ursa_model::yaml::from_str(&text)
            .map_err(|error| ConfigError::Parse { path: path.into(), reason: error.to_string() })?;
        overlay::merge(&mut value, layer, &path.display().to_string())?;
    }
    let variables: BTreeMap<String, String> = variables.into_iter().collect();
    overlay::variables(&mut value, &variables)?;
    for (key, text) in flags {
        overlay::set(&mut value, key, text, "the flags")?;
    }
    overlay::read(value)
}

impl Config {
    /// The configuration with single settings changed, by dotted path.
    pub fn with(self, settings: &[(String, Value)]) -> Result<Self, ConfigError> {
        let mut value = overlay::to_value(&self);
        for (key, setting) in settings {
            overlay::set_value(&mut value, key, setting.clone(), "the settings")?;
        }
        overlay::read(value)
    }

    /// Settings that were made and that nothing acts on yet: the key, and what does not happen.
    pub fn without_effect(&self) -> Vec<(&'static str, &'static str)> {
        check::without_effect(self)
    }

    /// The whole configuration with secrets replaced by stars.
    pub fn redacted(&self) -> Value {
        let mut value = overlay::to_value(self);
        overlay::redact(&mut value);
        value
    }
}
