//! End-to-end lab, conformance runner and benchmark peers.

pub mod bench;
pub mod conformance;
pub mod lab;
