//! The agent's relay and the shim by their public interfaces, with a real Envoy.

#![allow(clippy::unwrap_used, reason = "a test's panic is its report")]

mod lab;
mod reexec;
mod relay_envoy;
mod shim;
mod sidecar;
mod transcript;
mod transparent;
mod unit;
