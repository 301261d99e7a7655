//! Where Ursa differs from its peer on purpose.

/// A difference on purpose.
#[derive(Debug, Clone, Copy)]
pub struct Deviation {
    /// Which cases: an id, where a last `*` stands for any rest.
    pub cases: &'static str,
    /// Why Ursa differs.
    pub reason: &'static str,
}

/// All of them. A difference that isn't here is a failure.
pub const DEVIATIONS: &[Deviation] = &[
    Deviation {
        cases: "workload-003",
        reason: "about the longest valid name, but the corpus gives it the name of workload-001, which is too long and must \
             be refused there",
    },
    Deviation {
        cases: "policy-dataplanes/meshtimeout_consumer_dataplanes",
        reason: "its input has a label twice; Ursa refuses such YAML, since nobody could tell which one was meant",
    },
    Deviation {
        cases: "base/index",
        reason: "the product is Ursa, and `basedOnKuma` names the version whose API it speaks",
    },
    Deviation {
        cases: "misc/auth-*",
        reason: "who sends no credentials is asked for them (401) on every endpoint but `/` and health; 403 is for those \
             who are known and may not",
    },
];

/// A text that goes on where the peer's ends; whatever else is in the answer is judged as ever.
#[derive(Debug, Clone, Copy)]
pub struct Wording {
    /// The peer's whole text.
    pub theirs: &'static str,
    /// How Ursa's longer one begins.
    pub ours: &'static str,
    /// Why Ursa says more.
    pub reason: &'static str,
}

/// All of them.
pub const WORDINGS: &[Wording] =
    &[Wording { theirs: "Not found", ours: "Not found: ", reason: "an error names what was asked for" }];

/// The deviation that covers a case.
pub fn of(id: &str) -> Option<&'static Deviation> {
    DEVIATIONS.iter().find(|deviation| match deviation.cases.strip_suffix('*') {
        Some(prefix) => id.starts_with(prefix),
        None => id == deviation.cases,
    })
}
