//! Whether a unit has put a workload's redirect in place, as `ursa-init watch` writes it into a file.

use std::fs;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use ursa_init::watch::{Repair, State};

/// Where that is told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RedirectFile {
    /// The file.
    pub path: PathBuf,
    /// The workload's name in it; absent where the network namespace is the workload's alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workload: Option<String>,
    /// The unit that writes it.
    pub unit: String,
}

/// What is told, as far as it concerns one workload.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Told {
    /// How it stands.
    pub state: State,
    /// How often it was put back.
    pub repairs: u64,
    /// The last time.
    pub last_repair: Option<Repair>,
    /// The workloads that it is about.
    pub workloads: Vec<String>,
    /// Those that it should be about, and why it isn't.
    pub left_out: Vec<String>,
    /// What the operator should know.
    pub message: String,
}

impl RedirectFile {
    /// Reads it.
    pub fn read(&self) -> Result<Told, String> {
        let Self { path, unit, .. } = self;
        let text = fs::read(path).map_err(|error| {
            format!(
                "{unit} hasn't put it in place ({}: {error}); `systemctl status {unit}` tells why",
                path.display()
            )
        })?;
        serde_json::from_slice(&text).map_err(|error| format!("{} isn't understood: {error}", path.display()))
    }

    /// Whether the redirect is in place, or why it isn't.
    pub fn in_place(&self) -> Result<(), String> {
        let told = self.read()?;
        let unit = &self.unit;
        if let Some(name) = self.workload.as_ref().filter(|name| !told.workloads.contains(name)) {
            let why = told.left_out.iter().find(|why| why.contains(&format!("/{name}.y")));
            return Err(match why {
                Some(why) => format!("{why}; correct it, then `systemctl reload {unit}`"),
                None => format!(
                    "{unit} knows no workload {name}; put its part into /etc/ursa/redirect.d/{name}.yaml, then \
                     `systemctl reload {unit}`"
                ),
            });
        }
        match told.state {
            State::InPlace | State::Fighting => Ok(()),
            State::Failing => Err(told.message),
            State::Stopped => Err(format!("nobody keeps it in place; `systemctl start {unit}` does")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_told_is_in_place() {
        let dir = tempfile::tempdir().unwrap();
        let unit = "ursa-redirect.service".to_owned();
        let host = RedirectFile { path: dir.path().join("r.json"), workload: Some("web".into()), unit };
        let own = RedirectFile { workload: None, ..host.clone() };
        let error = host.in_place().unwrap_err();
        assert!(error.contains("systemctl status ursa-redirect.service"), "{error}");
        for (text, of_host, of_own) in [
            ("{", Some("isn't understood"), Some("isn't understood")),
            (
                r#"{"state":"inPlace","workloads":["shop"],"later":1}"#,
                Some("/etc/ursa/redirect.d/web.yaml"),
                None,
            ),
            (
                r#"{"workloads":["shop"],"leftOut":["/etc/ursa/redirect.d/web.yaml: no"]}"#,
                Some("web.yaml: no"),
                None,
            ),
            (
                r#"{"state":"failing","workloads":["web"],"message":"no rights"}"#,
                Some("no rights"),
                Some("no rights"),
            ),
            (r#"{"state":"stopped","workloads":["web"]}"#, Some("systemctl start"), Some("systemctl start")),
            (r#"{"state":"fighting","workloads":["web"]}"#, None, None),
            (r#"{"state":"inPlace","workloads":["web"],"repairs":3,"message":""}"#, None, None),
        ] {
            fs::write(&host.path, text).unwrap();
            for (file, expected) in [(&host, of_host), (&own, of_own)] {
                match (file.in_place(), expected) {
                    (Ok(()), None) => {}
                    (Err(error), Some(words)) if error.contains(words) => {}
                    (found, expected) => panic!("{text}: {found:?}, expected {expected:?}"),
                }
            }
        }
        assert_eq!(host.read().unwrap().repairs, 3);
    }
}
