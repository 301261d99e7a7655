//! What the tests of backends share.

use std::process::Command;

use ursa_init::backend::Backend;
use ursa_init::intent::{Ids, Outbound, RedirectIntent};
use ursa_init::{Applied, Error, Plan};

use crate::lab::{Namespace, PROXY};

pub(crate) const EXCLUDED: u32 = 33;
/// The backends that can be chosen, all of which work on the kernels that tests run on.
pub(crate) const BACKENDS: [Backend; 3] = [Backend::Nftables, Backend::IptablesNft, Backend::IptablesLegacy];
pub(crate) const IPTABLES: [Backend; 2] = [Backend::IptablesNft, Backend::IptablesLegacy];

pub(crate) fn intent() -> RedirectIntent {
    RedirectIntent {
        proxy_uids: vec![PROXY, PROXY + 1],
        outbound: Outbound {
            exclude_ports: vec!["5432".parse().unwrap()],
            exclude_cidrs: vec!["10.88.0.0/16".parse().unwrap()],
            exclude_uids: vec![Ids::one(EXCLUDED)],
            ..Outbound::default()
        },
        ..RedirectIntent::default()
    }
}

pub(crate) fn plan(intent: &RedirectIntent) -> Plan {
    Plan::compile(intent).unwrap()
}

/// The same as [`intent`], with all ports of the proxy moved by `by`.
pub(crate) fn moved(by: u16) -> RedirectIntent {
    let mut intent = intent();
    for port in [&mut intent.inbound.port, &mut intent.outbound.port, &mut intent.dns.port] {
        *port += by;
    }
    intent
}

impl Namespace {
    /// A namespace with `lo` up and nothing else.
    pub(crate) fn alone() -> Self {
        let ns = Self::new();
        ns.ip("link set lo up");
        ns
    }

    pub(crate) fn apply(&self, plan: &Plan, backend: Backend) -> Result<Applied, Error> {
        self.run(|| ursa_init::apply_with(plan, backend))
    }

    pub(crate) fn diff(&self, plan: &Plan, backend: Backend) -> Vec<String> {
        self.run(|| ursa_init::diff_with(plan, backend)).unwrap()
    }

    /// Runs a shell command inside; what it wrote.
    pub(crate) fn sh(&self, script: &str) -> String {
        self.run(|| {
            let output = Command::new("sh").args(["-ec", script]).output().unwrap();
            assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
            String::from_utf8(output.stdout).unwrap()
        })
    }

    /// The rules of both kinds of iptables, without times and counters.
    pub(crate) fn saved(&self) -> String {
        let all = ["iptables-nft", "ip6tables-nft", "iptables-legacy", "ip6tables-legacy"];
        let text = all.map(|kind| format!("# {kind}\n{}", self.sh(&format!("{kind}-save")))).concat();
        let keep = |line: &&str| !line.starts_with("# Generated") && !line.starts_with("# Completed");
        // The counters of built-in chains move by themselves.
        let bare = |line: &str| line.split(" [").next().unwrap_or_default().to_owned();
        text.lines().filter(keep).map(bare).collect::<Vec<_>>().join("\n")
    }
}
