//! The operator's unix socket: systemd's (`ursa-control.socket`), or one of our own.

use std::fs;
use std::io;
use std::os::fd::{FromRawFd as _, OwnedFd};
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::os::unix::net::UnixListener as StdListener;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use tokio::net::{UnixListener, UnixStream};

/// Its name in `ursa-control.socket`.
const NAME: &str = "api";

/// The operator's socket. The file of one that was made here goes with it: also when the start fails at something that
/// comes later.
#[derive(Debug)]
pub(super) struct OperatorSocket {
    listener: UnixListener,
    made: Option<PathBuf>,
}

impl OperatorSocket {
    /// The socket that systemd holds, which outlives this process; else one at `path`, which is none when that is empty.
    pub(super) fn open(path: &str) -> anyhow::Result<Option<Self>> {
        if let Some(listener) = passed().context("can't take the socket that systemd passed")? {
            let found = listener.local_addr().context("can't look at the socket that systemd passed")?;
            if found.as_pathname() != Some(Path::new(path)) {
                tracing::warn!(
                    socket = ?found.as_pathname(),
                    "ursa-control.socket says where the local socket is, not apiServer.socket; to move it: systemctl \
                     edit ursa-control.socket"
                );
            }
            return Ok(Some(Self { listener, made: None }));
        }
        if path.is_empty() { Ok(None) } else { Self::bind(Path::new(path)).map(Some) }
    }

    fn bind(path: &Path) -> anyhow::Result<Self> {
        let shown = path.display();
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir)
                .with_context(|| format!("can't create {} for apiServer.socket", dir.display()))?;
        }
        // A socket that nobody answers on is left from a process that was killed.
        if fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket()) {
            anyhow::ensure!(
                std::os::unix::net::UnixStream::connect(path).is_err(),
                "can't listen on {shown}: another control plane answers there; stop it, or set apiServer.socket to another path"
            );
            fs::remove_file(path).with_context(|| format!("can't remove the old socket {shown}"))?;
        }
        let listener = UnixListener::bind(path).with_context(|| {
            format!("can't listen on {shown}; check apiServer.socket and the rights of its folder")
        })?;
        // Everybody may connect; who is admin is decided by the peer's credentials.
        fs::set_permissions(path, fs::Permissions::from_mode(0o666))
            .with_context(|| format!("can't set the mode of {shown}"))?;
        Ok(Self { listener, made: Some(path.to_owned()) })
    }

    /// The next client.
    pub(super) async fn accept(&self) -> io::Result<(UnixStream, tokio::net::unix::SocketAddr)> {
        self.listener.accept().await
    }
}

impl Drop for OperatorSocket {
    fn drop(&mut self) {
        let Some(path) = &self.made else { return };
        // While it is still listened on: whoever comes next takes only a socket on which nobody answers.
        if let Err(error) = fs::remove_file(path)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(path = %path.display(), %error, "the socket can't be removed");
        }
    }
}

/// The socket that systemd passed (`man 3 sd_listen_fds`). Asked once: a second time it would belong to two.
fn passed() -> anyhow::Result<Option<UnixListener>> {
    let Some((fd, _)) = sd_notify::listen_fds_with_names()?.find(|(_, name)| name == NAME) else {
        return Ok(None);
    };
    #[expect(unsafe_code, reason = "systemd passes descriptors by their numbers")]
    // SAFETY: systemd says that the descriptor is open and ours, and nobody else asks for it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    let listener = StdListener::from(fd);
    listener.set_nonblocking(true)?;
    Ok(Some(UnixListener::from_std(listener)?))
}
