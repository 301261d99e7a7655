//! Which of two policies wins.

use std::cmp::Reverse;

use ursa_model::{
    Meta, labels,
    policy::{TargetKind, TargetRef},
};

/// Orders policies, the weakest first: the kind of the target, its section, where the policy was written, for
/// whom it speaks; among equals the name that comes first in the alphabet wins.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Rank {
    kind: u8,
    section: bool,
    origin: Origin,
    role: Role,
    name: Reverse<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Origin {
    Global,
    Zone,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Role {
    System,
    Producer,
    Consumer,
    WorkloadOwner,
}

impl Rank {
    pub(crate) fn of(meta: &Meta, target: Option<&TargetRef>) -> Self {
        let kind = u8::from(target.is_some_and(|target| target.kind == TargetKind::Dataplane));
        Self {
            kind,
            section: target
                .and_then(|target| target.section_name.as_ref())
                .is_some_and(|name| !name.is_empty()),
            origin: match meta.label(labels::ORIGIN) {
                Some("global") => Origin::Global,
                _ => Origin::Zone,
            },
            role: match meta.label(labels::POLICY_ROLE) {
                Some("producer") => Role::Producer,
                Some("consumer") => Role::Consumer,
                Some("workload-owner") => Role::WorkloadOwner,
                _ => Role::System,
            },
            name: Reverse(meta.display_name().to_owned()),
        }
    }

    /// The rank without the name: items of `to` are compared by it before what they point at.
    pub(crate) fn without_name(&self) -> impl Ord + use<> {
        (self.kind, self.section, self.origin, self.role)
    }

    /// The name, so that the first in the alphabet is the strongest.
    pub(crate) fn by_name(&self) -> &Reverse<String> {
        &self.name
    }
}
