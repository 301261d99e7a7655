//! Where to work, and what keeps the operator's way in open there.

use std::path::PathBuf;

use clap::Args;

use super::layers::{Layers, Source};
use crate::intent::RedirectIntent;
use crate::netns::Netns;
use crate::ssh;

/// Where to work.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Where")]
pub(super) struct Place {
    /// The workload's network namespace [default: the one this program runs in]
    #[arg(long, env = "URSA_NETNS", value_name = "PATH")]
    pub(super) netns: Option<PathBuf>,
    /// Allow the machine's own network namespace; the ports that sshd listens on are left alone then
    #[arg(long, env = "URSA_HOST")]
    pub(super) host: bool,
}

impl Place {
    /// The namespace's path.
    pub(super) fn path(&self) -> PathBuf {
        self.netns.clone().unwrap_or_else(|| PathBuf::from("/proc/thread-self/ns/net"))
    }

    /// Opens the namespace to look at it.
    pub(super) fn look(&self) -> anyhow::Result<Netns> {
        Ok(Netns::open(&self.path())?)
    }

    /// Looks at something inside. Where no other namespace is named that needs no right.
    pub(super) fn inside<T: Send>(&self, netns: &Netns, f: impl FnOnce() -> T + Send) -> anyhow::Result<T> {
        if self.netns.is_none() { Ok(f()) } else { Ok(netns.run(f)?) }
    }

    /// Opens the namespace to change it: it must not be the machine's own unless the operator said so.
    pub(super) fn open(&self) -> anyhow::Result<Netns> {
        let netns = self.look()?;
        if !self.host {
            netns.refuse_host()?;
        }
        Ok(netns)
    }

    /// On a host the operator's way in stays open.
    pub(super) fn keep_ssh(
        &self,
        netns: &Netns,
        intent: &mut RedirectIntent,
        layers: Option<&mut Layers>,
    ) -> anyhow::Result<()> {
        if !self.host {
            return Ok(());
        }
        let found = self.inside(netns, ssh::ports)?;
        ssh::keep(intent, &found.ports);
        if let Some(layers) = layers {
            layers.change(intent, &Source::Machine(found.evidence));
        }
        Ok(())
    }
}
