//! The plugin's order of sources: what the call says, what the agent wrote down, and the agent itself.
//!
//! | annotations | agent's file | decision |
//! | --- | --- | --- |
//! | say yes or no | – | that |
//! | delivered, silent | there | namespace's word, else the default (the plugin's, else the file's) |
//! | delivered, silent | absent | the plugin's default: `disabled` unless set; `ask` waits for the agent |
//! | wanted, not delivered | knows this pod's UID | as above, by what the pod said |
//! | wanted, not delivered | – | the agent's word, or try again later: they might say yes |
//! | any | damaged | the agent's word, or try again later |
//! | any | older than the agent's configuration, or without room for all namespaces | the agent's word, or try again later |

use std::fs::File;
use std::io::{self, Read as _};
use std::path::Path;

use serde_json::Value;
use ursa_cni_protocol::decisions;
use ursa_model::injection::{Decision, Injection, Invalid, Knowledge, MAX_FILE, Verdict, decide};
use ursa_model::labels::Labels;

use crate::agent::{self, WAIT_FOR_AGENT};
use crate::config::{NetConf, Silent};
use crate::spec::{Code, Environment, Failure};

/// Decides by what is at hand: no socket, no waiting.
pub(crate) fn at_hand(environment: &Environment, conf: &NetConf) -> Result<Verdict, Failure> {
    let nothing = Labels::new();
    let pod = conf.pod(environment, &nothing);
    let mut rules = conf.rules(None);
    let verdict = decide(&pod, &rules).map_err(|e| invalid(&e))?;
    if verdict.decision != Decision::Undecided {
        return Ok(verdict);
    }
    let (path, stale) = (decisions::file(&conf.state_dir), decisions::stale(&conf.run_dir));
    // Doubt is no permission.
    if !matches!(stale.try_exists(), Ok(false)) {
        let why = format!(
            "{} is older than the agent's configuration ({} says so)",
            path.display(),
            stale.display()
        );
        return Ok(Verdict { reason: why, ..verdict });
    }
    let knowledge = match read(&path) {
        Ok(Some(knowledge)) => knowledge,
        Ok(None) => Knowledge::new(match conf.default {
            Some(Silent::Ask) => return Ok(verdict),
            _ => Some(Injection::Disabled),
        }),
        Err(why) => {
            eprintln!("ursa-cni: {} isn't used: {why}", path.display());
            return Ok(Verdict { reason: format!("{}: {why}", path.display()), ..verdict });
        }
    };
    let namespace = knowledge.namespace_of(&pod);
    rules.default = rules.default.or(knowledge.default);
    let uid = environment.argument("K8S_POD_UID").unwrap_or_default();
    decide(&knowledge.complete(pod, uid, namespace.as_ref(), &nothing), &rules).map_err(|e| invalid(&e))
}

/// Decides, and asks the agent when nothing at hand does.
pub(crate) fn certainly(environment: &Environment, conf: &NetConf) -> Result<Verdict, Failure> {
    let verdict = at_hand(environment, conf)?;
    if verdict.decision != Decision::Undecided {
        return Ok(verdict);
    }
    let later = |why: String| {
        let hint = "start ursa-agent on this node (`systemctl status ursa-agent`); or say it where the plugin finds \
                    it: annotation kuma.io/sidecar-injection on the pod (with a runtime that delivers annotations, \
                    containerd 1.7 or CRI-O 1.28), or `annotations` in ursa-cni's configuration";
        let reason = &verdict.reason;
        Failure::new(
            Code::TryAgain,
            format!("whether the pod is meshed isn't decided: {reason}; {why}"),
            hint,
        )
    };
    let request = agent::request("cni-decide", &conf.call(environment));
    let answer = agent::ask(&conf.run_dir, &request, WAIT_FOR_AGENT, WAIT_FOR_AGENT)
        .map_err(|why| later(why.to_string()))?;
    let answer = answer.get("verdict").cloned().unwrap_or(Value::Null);
    match serde_json::from_value::<Verdict>(answer) {
        Ok(said) if said.decision != Decision::Undecided => Ok(said),
        Ok(said) => Err(later(format!("and the agent doesn't know either: {}", said.reason))),
        Err(why) => Err(later(format!("and the agent's answer can't be understood: {why}"))),
    }
}

fn invalid(why: &Invalid) -> Failure {
    Failure::new(
        Code::InvalidConfig,
        why.to_string(),
        "the pod starts neither in the mesh nor past it until then",
    )
}

/// Reads the agent's file; `None` when there is none.
fn read(path: &Path) -> Result<Option<Knowledge>, String> {
    let file = match File::open(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file.map_err(|e| e.to_string())?,
    };
    let mut text = Vec::new();
    file.take(MAX_FILE as u64 + 1).read_to_end(&mut text).map_err(|e| e.to_string())?;
    if text.len() > MAX_FILE {
        return Err(format!("it is longer than {MAX_FILE} bytes"));
    }
    Knowledge::parse(&text).map(Some).map_err(|e| e.to_string())
}
