//! The redirect: one typed [`RedirectIntent`] → one [`Plan`] → a backend → read-back.
//!
//! * [`intent`]: what the operator wants, validated with every violation reported.
//! * [`plan`]: the rules in no backend's words, their precedence, and a simulator.
//! * [`nft`]: the nftables backend, one netlink batch, no binary.
//! * [`iptables`]: the iptables backend, for what can't have nf_tables.
//! * [`backend`]: which of both serves a namespace.
//! * [`routes`]: mesh addresses routed to `lo`, so that they never leave, with or without rules.
//! * [`explain`]: which rule decides about a packet, and what would change that.
//! * [`check`]: real connections through the rules.
//! * [`watch`]: keeping it in place.
//! * [`confirm`]: changes that are rolled back unless somebody confirms them.
//! * [`probes`]: the kubelet's probes, which have no certificate.
//! * [`slices`]: those by which workloads are told apart, while they come and go.
//! * [`ssh`]: the operator's way in, which is left alone.
//! * [`netns`]: running all that in another network namespace.
//!
//! ```no_run
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use ursa_init::{Plan, RedirectIntent, in_netns};
//! let intent = RedirectIntent { proxy_uids: vec![5678], ..RedirectIntent::default() };
//! let plan = Plan::compile(&intent)?;
//! let applied = in_netns("/run/netns/web".as_ref(), || ursa_init::apply(&plan))??;
//! println!("changed: {}", applied.changed());
//! # Ok(()) }
//! ```

pub mod backend;
mod cgroup;
pub mod check;
pub mod cli;
pub mod confirm;
mod error;
pub mod explain;
mod in_place;
pub mod intent;
pub mod iptables;
mod netlink;
pub mod netns;
pub mod nft;
pub mod plan;
pub mod probes;
mod random;
pub mod routes;
pub mod slices;
pub mod ssh;
pub mod users;
pub mod watch;
pub mod yaml;

pub use backend::Backend;
pub use error::{Error, Hint};
pub use in_place::InPlace;
pub use intent::{InvalidIntent, RedirectIntent};
pub use netns::in_netns;
pub use plan::Plan;

/// What [`apply`] did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Applied {
    /// Whether rules were replaced; `false` when the kernel already held exactly these.
    pub rules_changed: bool,
    /// Routes and addresses that were added or removed.
    pub routes_changed: usize,
}

impl Applied {
    /// Whether anything changed at all.
    pub const fn changed(&self) -> bool {
        self.rules_changed || self.routes_changed > 0
    }
}

/// Puts the plan in place in the calling thread's network namespace by [`Backend::Auto`]; see [`apply_with`].
pub fn apply(plan: &Plan) -> Result<Applied, Error> {
    apply_with(plan, Backend::Auto)
}

/// Puts the plan in place in the calling thread's network namespace: missing routes first (they close), then the rules,
/// then a read-back, then what another backend or the plan before left is removed. Nothing changes when the plan is already in place;
/// on failure what this call changed is undone. A slice that doesn't exist is no failure: see [`slices::missing`].
pub fn apply_with(plan: &Plan, backend: Backend) -> Result<Applied, Error> {
    netns::Netns::current()?.refuse_other_users()?;
    if plan.is_none() {
        return remove().map(|rules_changed| Applied { rules_changed, ..Applied::default() });
    }
    let routes = routes::ensure(plan)?;
    match backend::apply(plan, backend) {
        Ok(rules_changed) => Ok(Applied { rules_changed, routes_changed: routes.finish()? }),
        Err(error) => {
            // The first error is the one to report; a failing undo leaves routes that only close, never open.
            if let Err(undo) = routes.undo() {
                tracing::warn!(%undo, "routes could not be put back");
            }
            Err(error)
        }
    }
}

/// Removes everything that [`apply`] put in place by any backend, and nothing else. Returns whether there was anything.
pub fn remove() -> Result<bool, Error> {
    let rules = backend::remove()?;
    let routes = routes::remove()?;
    Ok(rules || routes > 0)
}

/// What is in place now, as text: one line per chain, rule, route and address.
pub fn show() -> Result<Vec<String>, Error> {
    let mut lines = backend::show()?;
    lines.extend(routes::read_back()?.lines());
    Ok(lines)
}

/// The differences between what is in place and the plan: `-` lines are only in the kernel, `+` lines only in
/// the plan. Empty when they are equal. Asks the backend that is in place; see [`diff_with`].
pub fn diff(plan: &Plan) -> Result<Vec<String>, Error> {
    diff_with(plan, Backend::Auto)
}

/// As [`diff`], for rules that a chosen backend was to put in place.
pub fn diff_with(plan: &Plan, backend: Backend) -> Result<Vec<String>, Error> {
    if plan.is_none() {
        return Ok(show()?.into_iter().map(|line| format!("- {line}")).collect());
    }
    let mut lines = backend::diff(plan, backend)?;
    lines.extend(routes::diff(plan)?);
    Ok(lines)
}
