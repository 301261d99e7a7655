//! Kuma's forms of a redirect: the settings of `kumactl install transparent-proxy` and the annotations of a pod.
//!
//! Both are flat lists of settings, named by their path in kumactl's YAML (`redirect.inbound.excludePorts`). Lists
//! that are given replace what was there before. Nothing here reads a file or asks anybody.

mod annotations;
mod settings;
mod words;

pub use annotations::{for_pod, from_annotations, is_known};
pub use settings::{Lookups, ReadResolvers, Settings};
pub use words::{ParseUidsError, bridges, cidrs, owner_exclusions};

use super::Violation;

/// What applying Kuma's settings found besides the intent.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Findings {
    /// What is wrong; the intent must not be used.
    pub violations: Vec<Violation>,
    /// What has no effect here, and why.
    pub warnings: Vec<Violation>,
}

impl Findings {
    fn wrong(&mut self, field: &str, message: impl Into<String>) {
        self.violations.push(Violation { field: field.to_owned(), message: message.into() });
    }

    fn warn(&mut self, field: &str, message: impl Into<String>) {
        self.warnings.push(Violation { field: field.to_owned(), message: message.into() });
    }
}
