//! All that takes rights: entering a namespace, reading and writing its rules, hearing of changes. An agent that leaves
//! redirects to a unit does without this module and what builds on it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use ursa_init::Error;
use ursa_init::confirm::Probation;
use ursa_init::netns::Netns;
use ursa_init::watch::{Process, owner};

/// What tells namespaces apart as long as they live.
pub(super) type Id = (u64, u64);

/// Who may write a namespace's rules now.
pub(super) enum Say {
    /// This agent.
    Ours,
    /// `ursa-init watch`, until it ends.
    Watch(Process),
    /// An operator's change that waits to be confirmed for so long; what is written meanwhile would go with it.
    Pending(Duration),
}

/// A network namespace whose rules are this agent's business.
#[derive(Debug)]
pub(super) struct Namespace {
    netns: Netns,
    is_own: bool,
    run_dir: PathBuf,
    name: String,
}

impl Namespace {
    /// The namespace at a path, which must not be the machine's or the agent's own; the agent's own without a path.
    pub(super) fn open(path: Option<&Path>, run_dir: &Path) -> Result<Self, String> {
        let netns = match path {
            // What was the workload's may be another's by now: a path below /proc is used again.
            Some(path) => Netns::open(path).and_then(|netns| netns.refuse_own_or_host().map(|()| netns)),
            None => Netns::current(),
        };
        let netns = netns.map_err(|error| error.with_causes())?;
        let name = path.map_or_else(|| "the agent's own".to_owned(), |path| path.display().to_string());
        Ok(Self { netns, is_own: path.is_none(), run_dir: run_dir.to_owned(), name })
    }

    pub(super) fn id(&self) -> Result<Id, String> {
        self.netns.id().map_err(|error| error.with_causes())
    }

    /// For logs.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Runs `work` inside.
    pub(super) fn run<T: Send>(&self, work: impl FnOnce() -> Result<T, Error> + Send) -> Result<T, String> {
        let done = if self.is_own { work() } else { self.netns.run(work).and_then(|done| done) };
        done.map_err(|error| error.with_causes())
    }

    /// Who has the say. Where that can't be found out it is this agent: traffic must not stay open for it.
    pub(super) fn say(&self) -> Say {
        match owner::owner(&self.run_dir, &self.netns) {
            Ok(Some(process)) => return Say::Watch(process),
            Ok(None) => {}
            Err(error) => {
                tracing::warn!(namespace = %self.name, %error, "whether ursa-init watch keeps a redirect can't be found out");
            }
        }
        let probation = Probation::new(&self.run_dir);
        match probation.settle(&self.netns).and_then(|_| probation.pending(&self.netns)) {
            Ok(Some(left)) => Say::Pending(left),
            Ok(None) => Say::Ours,
            Err(error) => {
                tracing::warn!(namespace = %self.name, %error, "whether a change waits to be confirmed can't be found out");
                Say::Ours
            }
        }
    }

    /// Removes the redirect, if it is this agent's to remove.
    pub(super) fn remove(&self) -> Result<(), String> {
        match self.say() {
            Say::Ours => self.run(|| ursa_init::remove().map(drop)),
            Say::Watch(_) => Ok(()),
            Say::Pending(left) => Err(pending(left)),
        }
    }
}

/// Why nothing is written now.
pub(super) fn pending(left: Duration) -> String {
    format!(
        "a change of this namespace's redirect waits to be confirmed for {} s: run `ursa-init confirm`, or wait until it is \
         rolled back",
        left.as_secs() + 1
    )
}
