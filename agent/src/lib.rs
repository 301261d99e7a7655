//! The node agent and the shim: workloads, their identity, xDS relay and SDS, launching and adoption.

pub mod agent;
pub mod host;
mod inotify;
pub mod launcher;
pub mod notify;
pub mod redirected;
pub mod relay;
pub mod shim;
pub mod systemd;
