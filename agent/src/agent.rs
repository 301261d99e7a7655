//! The agent: the workloads on this node, from join to drain.

pub mod cni;
pub mod config;
pub mod control;
pub mod cri;
pub mod identity;
pub mod metrics;
pub mod node;
pub mod retry;
pub mod session;
pub mod socket;
pub mod status;
pub mod supervisor;
mod token;
pub mod workload;

mod run;
mod service;

pub use run::run;
pub use service::{Reload, SetLogLevel};
