//! The same packets through two sets of rules: where does each land?
//!
//! * [`lab`]: a workload's namespace with guests behind bridges and the world behind a link, in which every address and
//!   port answers; two labs are equal except for the rules in them.
//! * [`probe`]: one packet, and where it landed.
//! * [`matrix`]: the packets that an intent's own edges ask for.
//! * [`differences`]: the differences that are on purpose, each by name.

#![allow(dead_code, reason = "each program that fires uses a part")]

pub(crate) mod differences;
pub(crate) mod lab;
pub(crate) mod matrix;
pub(crate) mod probe;
mod servers;

#[path = "../../kernel/lab.rs"]
mod namespace;
