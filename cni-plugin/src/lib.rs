//! The CNI plugin of Ursa: puts pods into the mesh, chained after the plugin that gives the pod its addresses.
//!
//! A runtime's call ([`runtime`]) calls no API server, holds no token and starts no other program: the decision comes
//! with the configuration, the redirect goes to the kernel by netlink, the sidecar is the agent's work. People's
//! commands are [`cli`].

mod agent;
pub mod cli;
pub mod config;
mod decide;
mod explain;
pub mod install;
mod json;
mod pod;
pub mod runtime;
pub mod spec;
mod verbs;
