//! Both backends on the real kernel: the rules of iptables of both kinds, the way from one backend to another, random
//! packets through random plans, and faults.

#![allow(clippy::unwrap_used, reason = "a test that can't go on has failed")]

mod faults;
mod iptables;
mod kill;
#[path = "../kernel/lab.rs"]
mod lab;
mod load;
mod packets;
mod support;
mod tracer;
