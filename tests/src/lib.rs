//! End-to-end lab, conformance runner and benchmark peers.

pub mod conformance;
pub mod lab;
