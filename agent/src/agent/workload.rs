//! One workload: what it is, and its life from appearing to being gone.

mod bootstrap;
mod files;
mod inspect;
mod machine;
mod names;
mod redirect;
mod spec;

pub use files::{Scan, WorkloadFiles};
pub use inspect::inspect;
pub use machine::{Machine, Shared};
pub use redirect::{Place, Redirects, place_of, plan as redirect_of};
pub use spec::{Origin, POD_UIDS, SpecError, WorkloadSpec, id_of};
