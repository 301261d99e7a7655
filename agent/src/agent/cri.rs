//! Finding pods that the CNI plugin has missed: those that started before plugin and agent were there.

mod client;
mod proto;
mod repair;

pub use repair::{PodProblem, PodReport, Repair};
