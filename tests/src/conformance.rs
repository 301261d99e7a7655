//! Judges the project by cases of the peer corpus.
//!
//! A case counts as passed only when the project's public code computed what it expects. Cases are data
//! outside the repository; a case about something that doesn't exist yet is unsupported, and a difference on
//! purpose is a row in [`deviations::DEVIATIONS`]. A list without cases has failed: it judged nothing.

use std::path::{Path, PathBuf};

use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;

pub mod api;
pub mod cni;
pub mod deviations;
pub mod naming;
pub mod redirect;
pub mod validation;

/// How one case ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase", tag = "result")]
pub enum Outcome {
    /// The project computed what the case expects.
    Passed,
    /// It computed something else.
    Failed {
        /// Expected and computed.
        difference: String,
    },
    /// It computed something else, on purpose.
    Deviates {
        /// Expected and computed.
        difference: String,
        /// Why.
        reason: String,
    },
    /// The case is about something that doesn't exist yet.
    Unsupported {
        /// What is missing.
        missing: String,
    },
}

/// One judged case.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CaseReport {
    /// Its id in the corpus.
    pub id: String,
    /// How it ended.
    #[serde(flatten)]
    pub outcome: Outcome,
}

/// All judged cases of a group.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct GroupReport {
    /// `02-validation`.
    pub group: String,
    /// Its cases in the order of the corpus.
    pub cases: Vec<CaseReport>,
}

impl GroupReport {
    /// No case yet.
    pub fn new(group: impl Into<String>) -> Self {
        Self { group: group.into(), cases: Vec::new() }
    }

    /// Notes a case that is as expected (`None`) or differs.
    pub fn judged(&mut self, id: impl Into<String>, difference: Option<String>) {
        let outcome = difference.map_or(Outcome::Passed, |difference| Outcome::Failed { difference });
        self.cases.push(CaseReport { id: id.into(), outcome });
    }

    /// A case, unless it can't be read, which is noted.
    fn readable<T: DeserializeOwned>(&mut self, case: &Value) -> Option<T> {
        match T::deserialize(case) {
            Ok(case) => Some(case),
            Err(error) => {
                let id = case["id"].as_str().unwrap_or("a case without an id");
                self.judged(id, Some(format!("can't be read: {error}")));
                None
            }
        }
    }

    /// Notes a case about something that doesn't exist yet.
    pub fn unsupported(&mut self, id: impl Into<String>, missing: impl Into<String>) {
        let outcome = Outcome::Unsupported { missing: missing.into() };
        self.cases.push(CaseReport { id: id.into(), outcome });
    }

    /// How many passed, failed, are unsupported.
    pub fn counts(&self) -> (usize, usize, usize) {
        let count =
            |wanted: fn(&Outcome) -> bool| self.cases.iter().filter(|case| wanted(&case.outcome)).count();
        (
            count(|outcome| matches!(outcome, Outcome::Passed)),
            count(|outcome| matches!(outcome, Outcome::Failed { .. })),
            count(|outcome| matches!(outcome, Outcome::Unsupported { .. })),
        )
    }
}

/// A group of the corpus, and what judges it.
pub struct Group {
    /// Name of its folder.
    pub name: &'static str,
    /// Judges all its cases; gets the corpus' root.
    pub run: fn(&Path) -> GroupReport,
}

impl Group {
    /// Judges its cases, and excuses what differs on purpose.
    pub fn judge(&self, corpus: &Path) -> GroupReport {
        let mut report = (self.run)(corpus);
        deviations::excuse(&mut report);
        report
    }
}

/// Every group that is judged.
pub const GROUPS: &[Group] = &[
    Group { name: "02-validation", run: validation::run },
    Group { name: "03-transparent-proxy", run: redirect::run },
    Group { name: "05-cni", run: cni::run },
    Group { name: "07-api-server", run: api::run },
    Group { name: "08-naming-and-labels", run: naming::run },
];

/// The YAML files of a folder, sorted; none when there is no such folder.
pub(crate) fn yaml_files(folder: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = std::fs::read_dir(folder)
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|extension| extension == "yaml"))
        .collect();
    files.sort();
    files
}

/// The list under `key` of a file that was read. One that is missing or empty is a failed case: nothing judged
/// is no success.
pub(crate) fn listed<'a>(content: &'a Value, key: &str, file: &str, report: &mut GroupReport) -> &'a [Value] {
    let list = content[key].as_array().map_or(&[][..], Vec::as_slice);
    // A file that couldn't be read is noted already.
    if list.is_empty() && !content.is_null() {
        report.judged(file, Some(format!("expected cases under {key:?}; found none")));
    }
    list
}

/// Reads a list of cases; a list that can't be read is a failed case, so that it isn't overlooked.
pub(crate) fn read_list(file: &Path, report: &mut GroupReport) -> Value {
    let read = std::fs::read_to_string(file)
        .map_err(|error| error.to_string())
        .and_then(|text| ursa_model::yaml::from_str(&text).map_err(|error| error.to_string()));
    let mut failed = |error: String| {
        report.judged(file.display().to_string(), Some(error));
        Value::Null
    };
    match read {
        Ok(Value::Null) => failed("holds nothing".to_owned()),
        Ok(content) => content,
        Err(error) => failed(format!("can't be read: {error}")),
    }
}
