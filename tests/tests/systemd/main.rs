//! What systemd does with our units and packages, on virtual machines of the lab.
//!
//! One binary, because each test binary links the whole tree again; see [`ursa_tests::lab::vm`] for what a test builds on.

#![allow(clippy::unwrap_used, reason = "a test that can't go on has failed")]

mod lab;
mod ordering;
mod packages;
mod polkit;
mod shipped;
mod sidecar;
mod units;
