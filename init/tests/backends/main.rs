//! Both backends on the real kernel: the rules of iptables of both kinds, the way from one backend to another, random
//! packets through random plans, and faults.

#![allow(clippy::unwrap_used, reason = "a test that can't go on has failed")]

mod iptables;
#[path = "../kernel/lab.rs"]
mod lab;
mod packets;
mod support;
