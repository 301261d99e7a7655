//! The node agent and the shim: workloads, their identity, xDS relay and SDS, launching and adoption.

pub mod agent;
pub mod launcher;
pub mod relay;
pub mod shim;
