//! Entering the workload's network namespace and giving up every right, in this order and before any thread or
//! child exists: both are properties of a thread.

use std::fs::File;
use std::path::{Path, PathBuf};

use caps::{CapSet, Capability, CapsHashSet};
use nix::sched::{CloneFlags, setns};
use nix::sys::prctl;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, setsockopt, socket, sockopt};
use nix::unistd::{Gid, Uid, getresgid, getresuid, setgroups, setresgid, setresuid};

const NONE: &str = "no capabilities";

/// Why the shim must not go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PrivilegeError {
    /// The namespace can't be entered. Running in the host's instead would bypass every rule of the workload.
    #[error("cannot enter the network namespace {}; does it still exist, and may we (CAP_SYS_ADMIN)?", path.display())]
    Namespace {
        /// The namespace's file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// A right could not be given up, or a limit not be set.
    #[error("cannot set up the process: {step}")]
    Drop {
        /// What was tried.
        step: &'static str,
        /// What the system said.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Envoy can't have what a redirect by TPROXY takes.
    #[error(
        "cannot let Envoy keep the clients' addresses (redirect by TPROXY): that takes CAP_NET_RAW (before Linux 5.17 \
         CAP_NET_ADMIN), and we hold neither in the workload's network namespace; give it to ursa-agent \
         (CapabilityBoundingSet= of its unit, securityContext.capabilities of its container), or leave inbound.mode \
         at redirect"
    )]
    Transparent,
    /// It would run with rights that it shouldn't have, or as somebody else.
    #[error("refusing to run Envoy as {found}, expected uid {uid} gid {gid} with {expected}; {hint}")]
    Identity {
        /// What was found.
        found: String,
        /// The user asked for.
        uid: u32,
        /// The group asked for.
        gid: u32,
        /// The capabilities it may have.
        expected: String,
        /// What to do.
        hint: &'static str,
    },
}

/// Refuses to run a sidecar as root.
pub fn check(uid: u32, gid: u32) -> Result<(), PrivilegeError> {
    if uid == 0 || gid == 0 {
        return Err(PrivilegeError::Identity {
            found: "root".into(),
            uid,
            gid,
            expected: NONE.to_owned(),
            hint: "give the sidecar a user and a group of its own",
        });
    }
    Ok(())
}

/// Moves this thread into a network namespace.
pub fn enter_netns(path: &Path) -> Result<(), PrivilegeError> {
    let enter = || -> std::io::Result<()> { Ok(setns(File::open(path)?, CloneFlags::CLONE_NEWNET)?) };
    enter().map_err(|source| PrivilegeError::Namespace { path: path.to_owned(), source })
}

/// Allows this process and its Envoy as many descriptors as the system lets it: the usual 1,024 are for programs that
/// use `select`, and would end a busy proxy.
pub fn raise_descriptor_limit() -> Result<(), PrivilegeError> {
    let failed = |error| failed("raising the limit of open files to its maximum", error);
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).map_err(failed)?;
    if soft < hard {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard).map_err(failed)?;
    }
    Ok(())
}

/// The least capability by which a process can accept connections to addresses that the machine hasn't got, call others
/// from them, and mark what it sends. Asks the kernel, in the network namespace that this thread is in.
pub fn for_transparent_sockets() -> Result<Capability, PrivilegeError> {
    let effective = read(CapSet::Effective)?;
    // The weaker one first. Marks are for CAP_NET_ADMIN alone before Linux 5.17.
    let found = [Capability::CAP_NET_RAW, Capability::CAP_NET_ADMIN].into_iter().find(|capability| {
        // One that we haven't got can't be set.
        caps::set(None, CapSet::Effective, &CapsHashSet::from([*capability])).is_ok()
            && is_transparent_allowed()
    });
    caps::set(None, CapSet::Effective, &effective)
        .map_err(|error| failed("taking capabilities back", error.to_string()))?;
    found.ok_or(PrivilegeError::Transparent)
}

fn is_transparent_allowed() -> bool {
    let attempt = || -> nix::Result<()> {
        let socket = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
        setsockopt(&socket, sockopt::IpTransparent, &true)?;
        setsockopt(&socket, sockopt::Mark, &1)
    };
    attempt().is_ok()
}

/// Becomes `uid`:`gid` without supplementary groups, without any capability but `kept`, and without a way to gain one.
///
/// This process itself doesn't use what it keeps: it takes effect in the programs that it starts.
pub fn drop_to(uid: u32, gid: u32, kept: Option<Capability>) -> Result<(), PrivilegeError> {
    check(uid, gid)?;
    let kept: CapsHashSet = kept.into_iter().collect();
    if Uid::effective().is_root() {
        // Only what is in the bounding set can become inheritable.
        set(CapSet::Inheritable, &kept)?;
        // The bounding set first: dropping from it takes a capability (CAP_SETPCAP) itself.
        set(CapSet::Bounding, &CapsHashSet::new())?;
        set(CapSet::Ambient, &CapsHashSet::new())?;
        caps::securebits::set_keepcaps(!kept.is_empty())
            .map_err(|error| failed("keeping capabilities over the change of user", error.to_string()))?;
        let (user, group) = (Uid::from_raw(uid), Gid::from_raw(gid));
        setgroups(&[]).map_err(|error| failed("leaving supplementary groups", error))?;
        setresgid(group, group, group).map_err(|error| failed("changing the group", error))?;
        setresuid(user, user, user).map_err(|error| failed("changing the user", error))?;
        caps::securebits::set_keepcaps(false)
            .map_err(|error| failed("keeping no capabilities from here on", error.to_string()))?;
    }
    set(CapSet::Effective, &CapsHashSet::new())?;
    for which in [CapSet::Inheritable, CapSet::Permitted, CapSet::Ambient] {
        set(which, &kept)?;
    }
    prctl::set_no_new_privs().map_err(|error| failed("forbidding new privileges by exec", error))?;
    verify(uid, gid, &kept)
}

/// A unit's filter of system calls may forbid the change, and then it is none.
fn set(which: CapSet, to: &CapsHashSet) -> Result<(), PrivilegeError> {
    if read(which)? == *to {
        return Ok(());
    }
    let done = if to.is_empty() { caps::clear(None, which) } else { caps::set(None, which, to) };
    done.map_err(|error| failed(step(which), error.to_string()))
}

const fn step(which: CapSet) -> &'static str {
    match which {
        CapSet::Bounding => "dropping the bounding set",
        CapSet::Ambient => "setting ambient capabilities",
        CapSet::Effective => "giving up effective capabilities",
        CapSet::Inheritable => "setting inheritable capabilities",
        CapSet::Permitted => "giving up permitted capabilities",
    }
}

fn read(which: CapSet) -> Result<CapsHashSet, PrivilegeError> {
    caps::read(None, which).map_err(|error| failed("reading capabilities", error.to_string()))
}

fn failed(step: &'static str, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> PrivilegeError {
    PrivilegeError::Drop { step, source: source.into() }
}

/// Believes the kernel, not the calls above.
fn verify(uid: u32, gid: u32, kept: &CapsHashSet) -> Result<(), PrivilegeError> {
    let users = getresuid().map_err(|error| failed("reading the user", error))?;
    let groups = getresgid().map_err(|error| failed("reading the group", error))?;
    let same_user = [users.real, users.effective, users.saved].iter().all(|user| user.as_raw() == uid);
    let same_group = [groups.real, groups.effective, groups.saved].iter().all(|group| group.as_raw() == gid);
    let held = [CapSet::Permitted, CapSet::Inheritable, CapSet::Ambient].map(read);
    let [permitted, inheritable, ambient] = held;
    let held = [permitted?, inheritable?, ambient?];
    let effective = read(CapSet::Effective)?;
    if same_user && same_group && effective.is_empty() && held.iter().all(|held| held == kept) {
        return Ok(());
    }
    let all = held.iter().chain([&effective]).flatten().copied().collect();
    Err(PrivilegeError::Identity {
        found: format!("uid {} gid {} with {}", users.real, groups.real, names(&all)),
        uid,
        gid,
        expected: names(kept),
        hint: "start the shim as root, or as the sidecar's user",
    })
}

fn names(capabilities: &CapsHashSet) -> String {
    let mut names: Vec<_> = capabilities.iter().map(ToString::to_string).collect();
    names.sort_unstable();
    if names.is_empty() { NONE.to_owned() } else { names.join(" ") }
}
