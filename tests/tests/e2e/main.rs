//! The whole, on real parts: control plane, agents, Envoys and traffic in namespaces of a lab.
//!
//! One binary, because each test binary links the whole tree again; see [`ursa_tests::lab`] for what a test builds on.

#![allow(clippy::unwrap_used, reason = "a test that can't go on has failed")]

mod bad_input;
mod bench;
mod cni;
mod cni_manifests;
mod cni_repair;
mod cni_runtimes;
mod cni_storm;
mod cni_verbs;
mod deaths;
mod drain;
mod expiry;
mod identity;
mod impostor;
mod inspect;
mod journey;
mod kept;
mod lab;
mod neighbours;
mod operator;
mod plaintext;
mod policies;
mod policy_change;
mod rejected;
mod revoked;
mod sockets;
mod tokens;
mod tproxy;
