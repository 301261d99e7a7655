//! A systemd service of this machine put into the mesh by one command, and out of it by another.
//!
//! * `options`: what the operator says.
//! * `facts`: what systemd and the kernel say, read from their texts.
//! * `names`: users, slices and ports that follow from a service's name and its neighbours.
//! * `plan`: from these three to what is to be made, or why it can't be. Touches nothing.
//! * `record`: what was made, written down before it is, so that a join that was interrupted can be gone on with or
//!   undone.
//! * `system`: the only part that runs commands and writes files.
//! * `join`, `leave`, `selftest`, `doctor`: the commands.

mod doctor;
mod facts;
mod join;
mod leave;
mod names;
mod options;
mod plan;
mod record;
mod selftest;
mod show;
mod system;

pub use doctor::doctor;
pub use join::join;
pub use leave::leave;
pub use options::{DoctorOptions, JoinOptions, LeaveOptions};
pub use selftest::call as call_for_selftest;

/// A command of this module can't go on.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct HostError(String);

impl HostError {
    fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }
}

impl From<String> for HostError {
    fn from(text: String) -> Self {
        Self(text)
    }
}

type Result<T, E = HostError> = std::result::Result<T, E>;
