//! `ursa-cni install | uninstall | status` on a scratch root, as people and containers run them.

#![allow(clippy::unwrap_used, reason = "a test that can't go on has failed")]

mod hostile;
mod kills;
mod manifests;
mod scratch;
mod steps;
mod watch;
