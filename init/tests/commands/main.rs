//! The program `ursa-init` itself, in namespaces of the tests' own.

#![allow(clippy::unwrap_used, reason = "a test that can't go on has failed")]

mod check;
mod confirm;
mod explain;
mod help;
#[path = "../kernel/lab.rs"]
mod lab;
mod render;
mod slices;
mod sources;
mod ssh;
mod tool;
mod watch;
