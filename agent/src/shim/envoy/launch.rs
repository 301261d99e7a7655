//! Envoy's command line.

use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::sys::prctl;
use nix::sys::signal::Signal;
use nix::unistd::getppid;
use sha2::{Digest, Sha256};

use super::logs;
use crate::shim::memory;

/// How Envoy is started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Launch {
    /// The binary.
    pub binary: PathBuf,
    /// Its bootstrap.
    pub bootstrap: PathBuf,
    /// Where the bootstrap puts its admin interface.
    pub admin: PathBuf,
    /// Tells Envoys on one host apart.
    pub base_id: u32,
    /// Worker threads.
    pub concurrency: u32,
    /// Seconds over which a graceful drain discourages connections.
    pub drain_time: Duration,
    /// Envoy's log level.
    pub log_level: String,
}

impl Launch {
    /// What starts it. The caller must be on a thread that lives as long as this process.
    #[expect(unsafe_code, reason = "only the child itself can ask to die with its parent")]
    pub(super) fn command(&self) -> Command {
        let mut command = Command::new(&self.binary);
        command.arg("-c").arg(&self.bootstrap);
        if let Some(limit) = memory::limit() {
            // Laid over the bootstrap, whoever wrote that: the limit may have changed since.
            command.arg("--config-yaml").arg(memory::overload_manager(limit).to_string());
        }
        command
            .args(["--base-id", &self.base_id.to_string()])
            // Without hot restart Envoy makes no shared memory, which nobody would remove after a SIGKILL.
            .arg("--disable-hot-restart")
            .args(["--concurrency", &self.concurrency.to_string()])
            // A changed policy replaces a listener's filter chain; connections of the old one, which still has the old
            // policy, are told to go at their next response rather than at random within the drain time.
            .args(["--drain-strategy", "immediate"])
            .args(["--drain-time-s", &self.drain_time.as_secs().to_string()])
            .args(["--log-level", &self.log_level])
            .args(["--log-format", logs::FORMAT])
            .env_clear()
            .current_dir(self.bootstrap.parent().unwrap_or(Path::new("/")))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let parent = nix::unistd::getpid();
        // SAFETY: between fork and exec this only makes system calls, and allocates nothing.
        unsafe {
            std::os::unix::process::CommandExt::pre_exec(&mut command, move || {
                prctl::set_pdeathsig(Signal::SIGKILL)?;
                // The parent may have died before the line above.
                if getppid() != parent {
                    return Err(io::Error::from(io::ErrorKind::BrokenPipe));
                }
                Ok(())
            });
        }
        command
    }
}

/// Tells Envoys on one host apart, by their shim's directory. Envoy multiplies it by ten within 32 bits.
pub fn base_id(dir: &Path) -> u32 {
    let digest = Sha256::digest(dir.as_os_str().as_encoded_bytes());
    u32::from_be_bytes([digest[0], digest[1], digest[2], digest[3]]) & 0x0fff_ffff
}

/// Enough of SHA-256 to tell two bootstraps apart.
pub(super) fn hash(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    Sha256::digest(bytes).iter().take(8).fold(String::with_capacity(16), |mut text, byte| {
        // Writing to a string can't fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}
