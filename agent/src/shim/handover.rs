//! What a shim leaves to the binary that replaces it in the same process: everything that must not begin anew.
//!
//! The state is JSON in a memfd, descriptors are numbers that survive `execve`. Either side may be the newer one, so
//! unknown fields are ignored and every field added later has a default; what can't be read that way takes another
//! [`VERSION`], which the installed binary is asked about ([`check`]) before anything is given up.

use std::ffi::{CString, OsString};
use std::fs::File;
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use nix::fcntl::{F_DUPFD, F_SETFD, FdFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use serde::{Deserialize, Serialize};
use tokio::io::AsyncWriteExt;
use tokio::process::Command;
use tokio::time::timeout;

use super::envoy::Snapshot;
use super::protocol::Settings;
use super::work::Present;

/// The version of [`Handover`].
pub const VERSION: u32 = 1;
/// Names the descriptor of the state to the binary that takes over.
const VARIABLE: &str = "URSA_SHIM_HANDOVER";
/// The first argument by which a binary is asked whether it can take over the state on its standard input.
pub const QUESTION: &str = "takes-over";
/// How long it may think about that: less than a client of `control.sock` waits for the answer.
const PATIENCE: Duration = Duration::from_secs(4);
/// Must wait until the new binary has its handlers: their default is to end the process.
const HELD: [Signal; 3] = [Signal::SIGHUP, Signal::SIGTERM, Signal::SIGINT];

/// The state of a shim between two binaries.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Handover {
    pub(super) version: u32,
    pub(super) control: Passed,
    pub(super) xds: Passed,
    pub(super) lock: Passed,
    #[serde(default)]
    pub(super) dns: Option<DnsSockets>,
    /// What an agent has configured; without it, the arguments or the settings on disk say.
    #[serde(default)]
    pub(super) settings: Option<Settings>,
    #[serde(default)]
    pub(super) log_level: Option<String>,
    pub(super) envoy: Snapshot,
    /// systemd was told that we are ready.
    #[serde(default)]
    pub(super) ready: bool,
    #[serde(default)]
    pub(super) reexecs: u32,
    /// It was told to stop while it let go, and how long that may take.
    #[serde(default)]
    pub(super) stop_ms: Option<u64>,
}

/// The sockets of the name server.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct DnsSockets {
    pub(super) port: u16,
    pub(super) udp: Vec<Passed>,
    pub(super) tcp: Vec<Passed>,
}

/// A descriptor that `execve` leaves open, by its number.
#[derive(Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub(super) struct Passed(RawFd);

impl Passed {
    /// A copy of the descriptor.
    pub(super) fn copy(fd: impl AsFd) -> io::Result<Self> {
        // Not close-on-exec: nothing is started between here and `execve`.
        Ok(Self(fcntl(fd, fcntl_dup())?))
    }

    /// Takes it, once.
    pub(super) fn claim(self) -> io::Result<OwnedFd> {
        claim(self.0)
    }
}

#[expect(unsafe_code, reason = "a descriptor comes as a plain number")]
fn claim(number: RawFd) -> io::Result<OwnedFd> {
    if number < 0 {
        return Err(io::Error::other("no descriptor was handed over"));
    }
    // SAFETY: whoever named it gave it away; the call below finds out whether it is open.
    let fd = unsafe { BorrowedFd::borrow_raw(number) };
    fcntl(fd, F_SETFD(FdFlag::FD_CLOEXEC))
        .map_err(|error| io::Error::other(format!("descriptor {number} was not handed over: {error}")))?;
    // SAFETY: it is open, and it is ours alone: each is claimed once.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

fn fcntl_dup<'a>() -> nix::fcntl::FcntlArg<'a> {
    // Not in the place of a standard stream.
    F_DUPFD(3)
}

impl Handover {
    /// One that looks like the real one, to ask about: its descriptors are none.
    pub(super) fn sample(present: Present, envoy: Snapshot) -> Self {
        Self {
            version: VERSION,
            control: Passed(-1),
            xds: Passed(-1),
            lock: Passed(-1),
            dns: None,
            settings: present.settings,
            log_level: present.log_level,
            envoy,
            ready: false,
            reexecs: 0,
            stop_ms: None,
        }
    }

    /// What an earlier binary left to this process, if it did.
    pub(super) fn inherited() -> io::Result<Option<Self>> {
        let Some(number) = taken(VARIABLE) else { return Ok(None) };
        let number = number.to_str().and_then(|text| text.parse().ok());
        let number = number.ok_or_else(|| io::Error::other(format!("{VARIABLE} is no number")))?;
        let mut file = File::from(Passed(number).claim()?);
        file.rewind()?;
        let mut text = Vec::new();
        file.read_to_end(&mut text)?;
        Self::parse(&text).map(Some).map_err(io::Error::other)
    }

    fn parse(text: &[u8]) -> Result<Self, String> {
        #[derive(Deserialize)]
        struct Version {
            version: u32,
        }
        let Version { version } = serde_json::from_slice(text).map_err(|error| error.to_string())?;
        if version != VERSION {
            return Err(format!("the state has version {version}, this binary knows version {VERSION}"));
        }
        serde_json::from_slice(text).map_err(|error| error.to_string())
    }

    /// Replaces this process's program, with signals held ([`hold_signals`]). Returns only if that failed; nothing is lost
    /// then.
    pub(super) fn exec(&self, binary: &Path, arguments: &[OsString]) -> io::Error {
        let attempt = || -> io::Result<std::convert::Infallible> {
            // Stays open: no MFD_CLOEXEC.
            let mut state = File::from(memfd_create(c"ursa-shim", MFdFlags::empty())?);
            state.write_all(&serde_json::to_vec(self)?)?;
            let program = CString::new(binary.as_os_str().as_bytes())?;
            let arguments = arguments
                .iter()
                .map(|argument| CString::new(argument.as_bytes()))
                .collect::<Result<Vec<_>, _>>()?;
            let mut environment = Vec::new();
            for (name, value) in std::env::vars_os().filter(|(name, _)| name != VARIABLE) {
                environment.push(CString::new([name.as_bytes(), b"=", value.as_bytes()].concat())?);
            }
            environment.push(CString::new(format!("{VARIABLE}={}", state.as_raw_fd()))?);
            Ok(nix::unistd::execve(&program, &arguments, &environment)?)
        };
        match attempt() {
            Ok(never) => match never {},
            Err(error) => error,
        }
    }
}

#[expect(unsafe_code, reason = "the environment is cleaned while there is one thread")]
fn taken(variable: &str) -> Option<OsString> {
    let value = std::env::var_os(variable)?;
    // SAFETY: the caller is on the main thread, before any other exists.
    unsafe { std::env::remove_var(variable) };
    Some(value)
}

/// Holds back signals for this thread, until the next program takes them.
pub(super) fn hold_signals() -> io::Result<()> {
    Ok(sigprocmask(SigmaskHow::SIG_BLOCK, Some(&held()), None)?)
}

/// Lets signals through that were held while the program was replaced. Call it when they have handlers.
pub(super) fn let_signals_through() -> io::Result<()> {
    Ok(sigprocmask(SigmaskHow::SIG_UNBLOCK, Some(&held()), None)?)
}

fn held() -> SigSet {
    HELD.into_iter().collect()
}

/// The program that was started as this process: by the path that it was started with, where a package puts the next
/// version. Call it before that can have happened.
pub(super) fn installed_binary() -> io::Result<PathBuf> {
    let named = std::env::args_os().next().map(PathBuf::from).filter(|path| path.is_absolute());
    named.map_or_else(std::env::current_exe, Ok)
}

/// What a binary says to [`QUESTION`].
#[derive(Debug, Serialize, Deserialize)]
struct Consent {
    takes_over: u32,
    #[serde(default)]
    version: String,
}

/// Answers [`QUESTION`]: whether this binary understands the state on standard input.
pub fn answer() -> Result<String, String> {
    let mut text = Vec::new();
    io::stdin().lock().read_to_end(&mut text).map_err(|error| error.to_string())?;
    let Handover { version, .. } = Handover::parse(&text)?;
    let consent = Consent { takes_over: version, version: env!("CARGO_PKG_VERSION").into() };
    serde_json::to_string(&consent).map_err(|error| error.to_string())
}

/// Asks the installed binary whether it takes over a state such as `sample`, and returns its version.
pub(super) async fn check(binary: &Path, sample: &Handover) -> Result<String, String> {
    let ask = async {
        let mut child = Command::new(binary)
            .arg(QUESTION)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(|error| format!("it cannot be started: {error}"))?;
        let text = serde_json::to_vec(sample).map_err(|error| error.to_string())?;
        if let Some(mut stdin) = child.stdin.take() {
            // One that doesn't read may still say why.
            let _ = stdin.write_all(&text).await;
        }
        let output = child.wait_with_output().await.map_err(|error| error.to_string())?;
        let consent = serde_json::from_slice::<Consent>(&output.stdout).ok();
        match consent.filter(|consent| output.status.success() && consent.takes_over == VERSION) {
            Some(consent) => Ok(consent.version),
            None => Err(format!(
                "it does not say that it takes over ({}){}",
                output.status,
                String::from_utf8_lossy(&output.stderr)
                    .lines()
                    .next()
                    .map(|line| format!(": {line}"))
                    .unwrap_or_default()
            )),
        }
    };
    timeout(PATIENCE, ask)
        .await
        .unwrap_or_else(|_| Err(format!("it gives no answer within {PATIENCE:?}")))
        .map_err(|reason| format!("{} cannot replace this shim, which goes on: {reason}", binary.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Handover {
        Handover {
            version: VERSION,
            control: Passed(5),
            xds: Passed(6),
            lock: Passed(7),
            dns: Some(DnsSockets { port: 15053, udp: vec![Passed(8)], tcp: vec![Passed(9)] }),
            settings: None,
            log_level: None,
            envoy: Snapshot::default(),
            ready: true,
            reexecs: 3,
            stop_ms: None,
        }
    }

    #[test]
    fn a_state_of_another_binary_is_read_as_far_as_it_is_known() {
        let mut state = serde_json::to_value(sample()).unwrap();
        state["later"] = 1.into();
        state["envoy"]["later"] = 1.into();
        for missing in ["dns", "settings", "log_level", "ready", "reexecs"] {
            state.as_object_mut().unwrap().remove(missing);
        }
        let read = Handover::parse(state.to_string().as_bytes()).unwrap();
        assert_eq!((read.control.0, read.reexecs), (5, 0));
        state["version"] = 99.into();
        let error = Handover::parse(state.to_string().as_bytes()).unwrap_err();
        assert!(error.contains("version 99"), "{error}");
    }

    #[test]
    fn what_is_not_open_is_not_taken() {
        let (reader, mut writer) = io::pipe().unwrap();
        let passed = Passed::copy(&reader).unwrap();
        drop(reader);
        let mut claimed = File::from(passed.claim().unwrap());
        writer.write_all(b"x").unwrap();
        claimed.read_exact(&mut [0]).unwrap();
        assert!(Passed(100_000).claim().is_err());
    }

    #[tokio::test]
    async fn only_a_binary_that_says_so_takes_over() {
        for (binary, words) in [
            ("/nonexistent", "cannot be started"),
            ("/bin/true", "does not say"),
            ("/bin/false", "status: 1"),
        ] {
            let error = check(Path::new(binary), &sample()).await.unwrap_err();
            assert!(error.contains(words) && error.contains("goes on"), "{error}");
        }
    }
}
