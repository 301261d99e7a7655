//! The only place that reads or writes YAML, so that its traps are closed once.
//!
//! `yes` and `on` stay texts, and `0777` is not a decimal number.

use serde::{Serialize, de::DeserializeOwned};
use serde_saphyr::Options;

/// A text that can't be read, or a value that can't be written, as YAML.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Error(String);

fn options() -> Options {
    let mut options = Options::default();
    options.strict_booleans = true;
    options.legacy_octal_numbers = true;
    options
}

/// Reads one document.
pub fn from_str<T: DeserializeOwned>(text: &str) -> Result<T, Error> {
    serde_saphyr::from_str_with_options(text, options()).map_err(|error| Error(error.to_string()))
}

/// Reads all documents of a stream.
pub fn from_documents<T: DeserializeOwned>(text: &str) -> Result<Vec<T>, Error> {
    serde_saphyr::from_multiple_with_options(text, options()).map_err(|error| Error(error.to_string()))
}

/// Writes one document.
pub fn to_string<T: Serialize>(value: &T) -> Result<String, Error> {
    serde_saphyr::to_string(value).map_err(|error| Error(error.to_string()))
}
