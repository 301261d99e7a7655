//! What can go wrong while talking to the kernel, and what to do then.

use std::io;
use std::path::PathBuf;

use crate::intent::InvalidIntent;

/// What the operator can do about an error; appended to its text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hint(pub &'static str);

impl std::fmt::Display for Hint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.0.is_empty() { Ok(()) } else { write!(f, " ({})", self.0) }
    }
}

/// Why the redirect could not be applied, read or removed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The intent is invalid.
    #[error(transparent)]
    Intent(#[from] InvalidIntent),
    /// The namespace can't be entered.
    #[error("can't {what} the network namespace {}{hint}", path.display())]
    Namespace {
        /// What was tried.
        what: &'static str,
        /// The namespace.
        path: PathBuf,
        /// What to do.
        hint: Hint,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The namespace is the machine's own.
    #[error(
        "{} is the machine's own network namespace: a redirect there captures every service and the way in. \
         Name the workload's namespace (--netns), or pass --host if the whole machine is the workload",
        .0.display()
    )]
    HostNamespace(PathBuf),
    /// The namespace belongs to another user namespace.
    #[error(
        "{} belongs to a user namespace of its own (a pod with `hostUsers: false`, a rootless container): the kernel \
         would take the user ids in the rules for that namespace's, and the proxy's connections would be sent back to \
         it. Run ursa-init inside of it, or give the pod `hostUsers: true`",
        .0.display()
    )]
    OtherUsers(PathBuf),
    /// The namespace is another pod's.
    #[error(
        "{} isn't this pod's network namespace: the pod has {expected}, in there is {found}; nothing was changed. Look \
         for a runtime or plugin that mixes up namespaces",
        path.display()
    )]
    Stranger {
        /// The namespace.
        path: PathBuf,
        /// The pod's addresses.
        expected: String,
        /// Those in the namespace.
        found: String,
    },
    /// The kernel refused a request.
    #[error("the kernel refused to {what}{hint}")]
    Kernel {
        /// What was tried.
        what: String,
        /// What to do.
        hint: Hint,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A program of iptables is missing, or refused.
    #[error("can't {what}: {detail}{hint}")]
    Iptables {
        /// What was tried.
        what: String,
        /// What was found, or what the program said.
        detail: String,
        /// What to do, empty or in parentheses.
        hint: String,
    },
    /// A rule that only nftables can express.
    #[error("iptables can't express {0}; use the backend nftables")]
    Inexpressible(String),
    /// The kernel's answer makes no sense.
    #[error("the kernel's answer to '{what}' can't be understood: {detail}")]
    Answer {
        /// What was tried.
        what: String,
        /// What was odd.
        detail: String,
    },
    /// A rule in our table, or in one of our chains, isn't one that Ursa writes.
    #[error(
        "the redirect in place holds a rule that Ursa doesn't write: `{0}`; `ursa-init apply` puts its own back"
    )]
    ForeignRule(String),
    /// Other programs kept changing rules meanwhile.
    #[error(
        "rules were changed by other programs {attempts} times while Ursa was writing its own; nothing was changed. \
         Try again; if it persists, find out who rewrites rules all the time (`nft monitor`)"
    )]
    Contended {
        /// How often it was tried.
        attempts: usize,
    },
    /// The kernel holds other rules than those that were sent.
    #[error(
        "the kernel reads back other rules than were sent{}. Differences: {}",
        if *.restored { "; the previous rules are in place again" } else { ", AND THE PREVIOUS RULES COULD NOT BE PUT BACK" },
        differences.join(" | ")
    )]
    ReadBack {
        /// `-` lines are in the kernel, `+` lines in the plan.
        differences: Vec<String>,
        /// Whether the previous rules are back.
        restored: bool,
    },
    /// The thread that works in the namespace died.
    #[error("the work in the network namespace panicked: {0}")]
    Panicked(String),
}

impl Error {
    /// The error and its causes in one line, for where only a text can go on.
    pub fn with_causes(&self) -> String {
        let mut text = self.to_string();
        let mut cause = std::error::Error::source(self);
        while let Some(next) = cause {
            text = format!("{text}: {next}");
            cause = next.source();
        }
        text
    }

    /// Whether the kernel lacks a part of what was asked for.
    pub(crate) fn is_unsupported(&self) -> bool {
        use libc_errno::{EAFNOSUPPORT, ENOENT, EOPNOTSUPP, EPROTONOSUPPORT};
        let Self::Kernel { source, .. } = self else { return false };
        let unsupported = [EAFNOSUPPORT, ENOENT, EOPNOTSUPP, EPROTONOSUPPORT];
        source.raw_os_error().is_some_and(|errno| unsupported.contains(&errno))
    }

    /// A refusal by the kernel, with the remedy that its error number suggests.
    pub fn kernel(what: impl Into<String>, source: io::Error) -> Self {
        let hint = Hint(match source.raw_os_error() {
            Some(libc_errno::EPERM | libc_errno::EACCES) => {
                "needs CAP_NET_ADMIN in the namespace's user namespace: run as root or grant the capability"
            }
            Some(libc_errno::ENOBUFS | libc_errno::ENOMEM) => "the kernel has no memory for it; try again",
            _ => "",
        });
        Self::Kernel { what: what.into(), hint, source }
    }

    /// A refusal by nf_tables, which may lack a part.
    pub(crate) fn nf_tables(what: impl Into<String>, source: io::Error) -> Self {
        match source.raw_os_error() {
            Some(libc_errno::EPROTONOSUPPORT | libc_errno::EOPNOTSUPP | libc_errno::ENOENT) => {
                let hint = Hint(
                    "the kernel lacks nf_tables or a part of it: `modprobe -a nf_tables nft_chain_nat nft_redir \
                     nft_reject_inet nft_fib_inet nft_ct`, or use a kernel of 5.10 or later that has them",
                );
                Self::Kernel { what: what.into(), hint, source }
            }
            _ => Self::kernel(what, source),
        }
    }
}

/// The error numbers that have a remedy.
pub(crate) mod libc_errno {
    use nix::errno::Errno;
    pub(crate) const EPERM: i32 = Errno::EPERM as i32;
    pub(crate) const ENOENT: i32 = Errno::ENOENT as i32;
    pub(crate) const EINTR: i32 = Errno::EINTR as i32;
    pub(crate) const EAGAIN: i32 = Errno::EAGAIN as i32;
    pub(crate) const EINVAL: i32 = Errno::EINVAL as i32;
    pub(crate) const EEXIST: i32 = Errno::EEXIST as i32;
    pub(crate) const EAFNOSUPPORT: i32 = Errno::EAFNOSUPPORT as i32;
    pub(crate) const EADDRNOTAVAIL: i32 = Errno::EADDRNOTAVAIL as i32;
    pub(crate) const ESRCH: i32 = Errno::ESRCH as i32;
    /// A batch whose generation is no longer current; known to the kernel only, so libc has it, but nix hasn't.
    pub(crate) const ERESTART: i32 = nix::libc::ERESTART;
    pub(crate) const EACCES: i32 = Errno::EACCES as i32;
    pub(crate) const ENOMEM: i32 = Errno::ENOMEM as i32;
    pub(crate) const ENOBUFS: i32 = Errno::ENOBUFS as i32;
    pub(crate) const EPROTONOSUPPORT: i32 = Errno::EPROTONOSUPPORT as i32;
    pub(crate) const EOPNOTSUPP: i32 = Errno::EOPNOTSUPP as i32;
}
