//! Reads a document with the same reading of YAML as the rest of Ursa: `yes` stays a text, `0777` isn't decimal.

use serde::de::DeserializeOwned;

/// A text that can't be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Unreadable(String);

/// Reads one document; JSON is YAML.
pub fn from_str<T: DeserializeOwned>(text: &str) -> Result<T, Unreadable> {
    let mut options = serde_saphyr::Options::default();
    options.strict_booleans = true;
    options.legacy_octal_numbers = true;
    serde_saphyr::from_str_with_options(text, options).map_err(|error| Unreadable(error.to_string()))
}
