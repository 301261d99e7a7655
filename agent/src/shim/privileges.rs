//! Entering the workload's network namespace and giving up every right, in this order and before any thread or
//! child exists: both are properties of a thread.

use std::fs::File;
use std::path::{Path, PathBuf};

use caps::CapSet;
use nix::sched::{CloneFlags, setns};
use nix::sys::prctl;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::{Gid, Uid, getresgid, getresuid, setgroups, setresgid, setresuid};

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
    /// It would run with rights, or as somebody else.
    #[error("refusing to run Envoy as {found}, expected uid {uid} gid {gid} without capabilities; {hint}")]
    Identity {
        /// What was found.
        found: String,
        /// The user asked for.
        uid: u32,
        /// The group asked for.
        gid: u32,
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

/// Becomes `uid`:`gid` without supplementary groups, without any capability, and without a way to gain one.
pub fn drop_to(uid: u32, gid: u32) -> Result<(), PrivilegeError> {
    check(uid, gid)?;
    if Uid::effective().is_root() {
        // The bounding set first: dropping from it takes a capability (CAP_SETPCAP) itself.
        clear(CapSet::Bounding, "dropping the bounding set")?;
        clear(CapSet::Ambient, "dropping ambient capabilities")?;
        let (user, group) = (Uid::from_raw(uid), Gid::from_raw(gid));
        setgroups(&[]).map_err(|error| failed("leaving supplementary groups", error))?;
        setresgid(group, group, group).map_err(|error| failed("changing the group", error))?;
        setresuid(user, user, user).map_err(|error| failed("changing the user", error))?;
    }
    for set in [CapSet::Inheritable, CapSet::Effective, CapSet::Permitted] {
        clear(set, "dropping capabilities")?;
    }
    prctl::set_no_new_privs().map_err(|error| failed("forbidding new privileges by exec", error))?;
    verify(uid, gid)
}

fn clear(set: CapSet, step: &'static str) -> Result<(), PrivilegeError> {
    caps::clear(None, set).map_err(|error| failed(step, error.to_string()))
}

fn failed(step: &'static str, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> PrivilegeError {
    PrivilegeError::Drop { step, source: source.into() }
}

/// Believes the kernel, not the calls above.
fn verify(uid: u32, gid: u32) -> Result<(), PrivilegeError> {
    let users = getresuid().map_err(|error| failed("reading the user", error))?;
    let groups = getresgid().map_err(|error| failed("reading the group", error))?;
    let same_user = [users.real, users.effective, users.saved].iter().all(|user| user.as_raw() == uid);
    let same_group = [groups.real, groups.effective, groups.saved].iter().all(|group| group.as_raw() == gid);
    let mut held = Vec::new();
    for set in [CapSet::Permitted, CapSet::Effective, CapSet::Inheritable, CapSet::Ambient] {
        let found =
            caps::read(None, set).map_err(|error| failed("reading capabilities", error.to_string()))?;
        held.extend(found.into_iter().map(|capability| capability.to_string()));
    }
    if same_user && same_group && held.is_empty() {
        return Ok(());
    }
    Err(PrivilegeError::Identity {
        found: format!("uid {} gid {} with {}", users.real, groups.real, held.join(" ")),
        uid,
        gid,
        hint: "start the shim as root, or as the sidecar's user",
    })
}
