//! The words of the CNI specification: versions, environment, errors.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde_json::{Value, json};

/// The versions that the plugin speaks; the result always echoes the version it was asked in.
pub const VERSIONS: [&str; 5] = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];
/// The newest of them.
pub const NEWEST: &str = "1.1.0";

/// An error as the runtime wants it: on standard output, with a code.
#[derive(Debug, thiserror::Error)]
#[error("{message} ({details})")]
pub struct Failure {
    /// What kind of error.
    pub code: Code,
    /// What was tried, and what was found.
    pub message: String,
    /// More of that, and what to do next.
    pub details: String,
}

/// Codes of the specification, and ours from 100.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Code {
    /// The version isn't one of [`VERSIONS`].
    IncompatibleVersion = 1,
    /// A variable is missing or wrong.
    InvalidEnvironment = 4,
    /// Reading or writing failed.
    Io = 5,
    /// The configuration is no JSON.
    Decode = 6,
    /// The configuration is wrong.
    InvalidConfig = 7,
    /// The network namespace is wrong, as libcni's own plugins say it.
    InvalidNamespace = 8,
    /// Try again later.
    TryAgain = 11,
    /// An ADD would fail now.
    NotAvailable = 50,
    /// The same, and connections of containers that are there are refused meanwhile.
    LimitedConnectivity = 51,
    /// The redirect can't be put in place.
    Redirect = 100,
    /// CHECK found other rules than there should be.
    Drifted = 101,
    /// CHECK found no sidecar.
    SidecarGone = 102,
}

impl Failure {
    /// An error.
    pub fn new(code: Code, message: impl Into<String>, details: impl Into<String>) -> Self {
        Self { code, message: message.into(), details: details.into() }
    }

    /// As it is written, in the version that was asked in.
    pub fn to_json(&self, version: &str) -> Value {
        json!({"cniVersion": version, "code": self.code as u32, "msg": self.message, "details": self.details})
    }
}

/// What the runtime wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verb {
    /// A container gets its network.
    Add,
    /// It loses it.
    Del,
    /// Is it as ADD left it?
    Check,
    /// Could an ADD succeed?
    Status,
    /// These attachments exist, and no others.
    Gc,
    /// Which versions are spoken?
    Version,
}

/// The runtime's variables.
#[derive(Debug)]
pub struct Environment {
    /// `CNI_COMMAND`.
    pub verb: Verb,
    /// `CNI_CONTAINERID`.
    pub container_id: String,
    /// `CNI_IFNAME`.
    pub ifname: String,
    /// `CNI_NETNS`; with DEL it may be gone.
    pub netns: Option<PathBuf>,
    /// `CNI_ARGS`.
    pub args: BTreeMap<String, String>,
}

impl Environment {
    /// Reads and checks the variables; what is missing is reported all at once.
    pub fn read(get: impl Fn(&str) -> Option<String>) -> Result<Self, Failure> {
        let given = |name: &str| get(name).filter(|value| !value.is_empty());
        let invalid =
            |message: String, details: &str| Failure::new(Code::InvalidEnvironment, message, details);
        let command = given("CNI_COMMAND");
        let verb = match command.as_deref() {
            Some("ADD") => Verb::Add,
            Some("DEL") => Verb::Del,
            Some("CHECK") => Verb::Check,
            Some("STATUS") => Verb::Status,
            Some("GC") => Verb::Gc,
            Some("VERSION") => Verb::Version,
            Some(other) => {
                return Err(invalid(
                    format!("unknown CNI_COMMAND `{other}`"),
                    "known: ADD DEL CHECK STATUS GC VERSION",
                ));
            }
            None => {
                let hint =
                    "this program is a CNI plugin: the container runtime starts it; see `ursa-cni --help`";
                return Err(invalid("CNI_COMMAND is not set".to_owned(), hint));
            }
        };
        let per_container = matches!(verb, Verb::Add | Verb::Del | Verb::Check);
        let needs_netns = matches!(verb, Verb::Add | Verb::Check);
        let missing: Vec<_> =
            [("CNI_CONTAINERID", per_container), ("CNI_IFNAME", per_container), ("CNI_NETNS", needs_netns)]
                .into_iter()
                .filter(|(name, needed)| *needed && given(name).is_none())
                .map(|(name, _)| name)
                .collect();
        if !missing.is_empty() {
            return Err(invalid(
                format!("missing: {}", missing.join(", ")),
                "the container runtime must set them",
            ));
        }
        let container_id = given("CNI_CONTAINERID").unwrap_or_default();
        let ifname = given("CNI_IFNAME").unwrap_or_default();
        if per_container && !is_container_id(&container_id) {
            return Err(invalid(
                format!("CNI_CONTAINERID `{container_id}` is invalid"),
                "letters, digits, `_`, `.`, `-`; starts with a letter or digit",
            ));
        }
        if per_container && !is_ifname(&ifname) {
            return Err(invalid(
                format!("CNI_IFNAME `{ifname}` is invalid"),
                "at most 15 bytes, no `/`, `:` or white space, not `.` or `..`",
            ));
        }
        // Without `=` an argument means nothing; runtimes add IgnoreUnknown=1 and their own.
        let args = given("CNI_ARGS").unwrap_or_default();
        let args = args.split(';').filter_map(|pair| pair.split_once('='));
        let args = args.map(|(k, v)| (k.trim().to_owned(), v.to_owned())).collect();
        Ok(Self { verb, container_id, ifname, netns: given("CNI_NETNS").map(PathBuf::from), args })
    }

    /// One of `CNI_ARGS`, unless it is empty.
    pub fn argument(&self, name: &str) -> Option<&str> {
        self.args.get(name).map(String::as_str).filter(|value| !value.is_empty())
    }
}

fn is_container_id(id: &str) -> bool {
    id.starts_with(|c: char| c.is_ascii_alphanumeric())
        && id.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-'))
}

fn is_ifname(name: &str) -> bool {
    let forbidden = |c: char| c == '/' || c == ':' || c.is_whitespace();
    !name.is_empty() && name.len() <= 15 && name != "." && name != ".." && !name.contains(forbidden)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(vars: &[(&str, &str)]) -> Result<Environment, Failure> {
        Environment::read(|name| vars.iter().find(|(k, _)| *k == name).map(|(_, v)| (*v).to_owned()))
    }

    #[test]
    fn names_everything_that_is_missing() {
        let failure = read(&[("CNI_COMMAND", "ADD")]).unwrap_err();
        assert_eq!(failure.code, Code::InvalidEnvironment);
        assert_eq!(failure.message, "missing: CNI_CONTAINERID, CNI_IFNAME, CNI_NETNS");
    }

    #[test]
    fn del_needs_no_namespace() {
        let vars =
            [("CNI_COMMAND", "DEL"), ("CNI_CONTAINERID", "a1"), ("CNI_IFNAME", "eth0"), ("CNI_NETNS", "")];
        assert_eq!(read(&vars).unwrap().netns, None);
    }

    #[test]
    fn arguments_are_pairs() {
        let vars = [("CNI_COMMAND", "VERSION"), ("CNI_ARGS", "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;x")];
        assert_eq!(read(&vars).unwrap().argument("K8S_POD_NAMESPACE"), Some("shop"));
    }

    #[test]
    fn refuses_names_that_escape() {
        for (id, ifname) in
            [("../x", "eth0"), ("a", "e/th"), ("a", ".."), ("a", "sixteen-letters-"), ("-a", "eth0")]
        {
            let vars = [("CNI_COMMAND", "DEL"), ("CNI_CONTAINERID", id), ("CNI_IFNAME", ifname)];
            assert!(read(&vars).is_err(), "{id} {ifname}");
        }
    }
}
