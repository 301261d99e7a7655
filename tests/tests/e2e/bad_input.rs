//! Bad input gets an error that says what was tried, what was found and what to do; and nothing is half done.
//!
//! * [`resources`]: what the operator writes.
//! * [`daemons`]: settings of control plane and agents.
//! * [`rights`]: ordinary users, and kernels without nf_tables.
//! * [`disk`]: no space left.
//! * [`crowd`]: very many, at once, twice.

mod crowd;
mod daemons;
mod disk;
mod resources;
mod rights;

use std::collections::BTreeMap;
use std::hash::{Hash as _, Hasher as _};
use std::process::Command;
use std::time::Duration;

use ursa_tests::lab::mesh::{self, Control, Node, Outcome};
use ursa_tests::lab::pair::SOON;
use ursa_tests::lab::soak::census;
use ursa_tests::lab::{Lab, Programs, http, wait};

/// A lab with a control plane. Fields are dropped in their order: programs before the lab.
struct Ground {
    control: Control,
    lab: Lab,
}

fn ground() -> Ground {
    let mut lab = Lab::new(&Programs::discover().unwrap()).unwrap();
    let control = Control::start(&mut lab).unwrap();
    let ground = Ground { control, lab };
    // The last of the defaults that a new mesh gets.
    let last = "secrets default dataplane-token-signing-key-default-1";
    wait::until("the defaults of the mesh", SOON, || match ground.stored() {
        stored if stored.contains_key(last) => Ok(()),
        stored => Err(format!("{:?}", stored.keys())),
    })
    .unwrap();
    ground
}

fn differences(before: &BTreeMap<String, u64>, now: &BTreeMap<String, u64>) -> String {
    let gone = before.keys().filter(|key| !now.contains_key(*key)).map(|key| format!("- {key}"));
    let other = now
        .iter()
        .filter(|(key, digest)| before.get(*key) != Some(digest))
        .map(|(key, _)| format!("+ {key}"));
    gone.chain(other).collect::<Vec<_>>().join(", ")
}

/// A refusal: the command fails with this code, and what it says holds all of these and no panic.
#[track_caller]
fn refused(command: &mut Command, input: &str, code: i32, words: &[&str]) -> Outcome {
    let outcome = mesh::outcome(command, input).unwrap();
    assert_eq!(outcome.code, Some(code), "{outcome:?}");
    let said = format!("{}{}", outcome.err, outcome.out);
    assert!(said.len() < 4000, "{} bytes of error", said.len());
    for word in words {
        assert!(said.contains(word), "{word:?} is missing in: {said}");
    }
    assert!(!said.contains("panicked"), "{said}");
    outcome
}

impl Ground {
    /// `ursa apply` of this text is refused, and nothing is stored.
    #[track_caller]
    fn refuses(&self, yaml: &str, words: &[&str]) {
        let before = self.stored();
        refused(self.control.command().args(["apply", "-f", "-"]), yaml, 1, words);
        assert_eq!(differences(&before, &self.stored()), "", "something was stored");
    }

    /// The API refuses this body with this status, and nothing is stored.
    #[track_caller]
    fn api_refuses(&self, path: &str, body: &str, status: u16, words: &[&str]) {
        let before = self.stored();
        let reply =
            http::ask(&self.control.socket, "PUT", path, Some(body), Duration::from_secs(30)).unwrap();
        assert_eq!(reply.status, status, "{}", reply.brief());
        for word in words {
            assert!(reply.body.contains(word), "{word:?} is missing in: {}", reply.brief());
        }
        assert_eq!(differences(&before, &self.stored()), "", "something was stored");
    }

    /// Everything that the API lists and somebody wrote: where → a digest of what, for there are keys among it.
    fn stored(&self) -> BTreeMap<String, u64> {
        let ask = |path: &str| {
            let reply = http::ask(&self.control.socket, "GET", path, None, Duration::from_secs(30)).unwrap();
            assert!(reply.ok(), "{path}: {}", reply.status);
            reply.json().unwrap()
        };
        let mut found = BTreeMap::new();
        for kind in ask("/_resources")["resources"].as_array().unwrap() {
            let path = kind["path"].as_str().unwrap();
            // Counted when it is asked for, and says when that was.
            if path == "mesh-insights" {
                continue;
            }
            for item in ask(&format!("/{path}?size=1000"))["items"].as_array().unwrap() {
                let mut digest = std::hash::DefaultHasher::new();
                item.to_string().hash(&mut digest);
                let text = |field: &str| item[field].as_str().unwrap_or_default().to_owned();
                found.insert(format!("{path} {} {}", text("mesh"), text("name")), digest.finish());
            }
        }
        found
    }

    /// A node whose ticket grants these workloads.
    fn node(&mut self, name: &str, workloads: &[&str]) -> Node {
        let ticket = self.control.ticket(workloads).unwrap();
        Node::join(&mut self.lab, name, &ticket).unwrap()
    }
}

/// Waits until the agent's status holds all of these.
#[track_caller]
fn complains(node: &Node, words: &[&str]) -> String {
    let (said, _) = wait::until("the agent to say what is wrong", SOON, || {
        let status = node.status().map_err(|error| format!("{error:#}"))?.to_string();
        match words.iter().find(|word| !status.contains(**word)) {
            None => Ok(status),
            Some(missing) => Err(format!("{missing:?} is missing in {status}")),
        }
    })
    .unwrap();
    assert!(!said.contains("panicked"), "{said}");
    said
}

/// What would be left of a redirect: rules, routes, addresses.
fn network(host: &ursa_tests::lab::net::Host) -> Vec<String> {
    census::network(host).unwrap()
}
