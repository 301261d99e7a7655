//! The machine: commands that are run on it and files that are written there. Everything else in this module is decided
//! without it.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Write as _};
use std::net::{IpAddr, ToSocketAddrs as _, UdpSocket};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::unistd::{Group, Uid, User};
use serde::Deserialize;
use tokio::time::{Instant, sleep};
use ursa_init::watch::State;

use super::facts::{self, Service};
use super::plan::{Ids, Made};
use super::{HostError, Result};

/// Between two looks at something that tells nobody when it changes.
const LOOK: Duration = Duration::from_millis(50);
/// The group of all sidecars.
const GROUP: &str = "ursa-proxy";

/// Refuses where join can't work at all.
pub(super) fn check() -> Result<()> {
    if !Uid::effective().is_root() {
        return Err(HostError::new(
            "this reads and changes systemd's units and users: run it as root (`sudo …`)",
        ));
    }
    if !crate::systemd::is_booted() {
        return Err(HostError::new(
            "systemd isn't this machine's first process, and services with sidecars are its units; describe the workload in \
             /etc/ursa/workloads.d and let the agent start its sidecar (`launcher: fork`) instead",
        ));
    }
    if Group::from_name(GROUP).ok().flatten().is_none() {
        return Err(HostError::new(format!(
            "there is no group {GROUP}: the package ursa-agent isn't installed as a whole; install it again, or run \
             `systemd-sysusers`"
        )));
    }
    Ok(())
}

/// Runs a command; what it printed. An error says what it said.
pub(super) fn run(program: &str, args: &[&str]) -> Result<String> {
    let path = std::env::var("PATH").unwrap_or_default();
    let output = Command::new(program)
        // Not everybody's root has the folders of root's programs there.
        .env("PATH", format!("{path}:/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin"))
        .args(args)
        .stdin(Stdio::null())
        .env("LC_ALL", "C")
        .env("SYSTEMD_PAGER", "")
        .output()
        .map_err(|error| HostError::new(format!("can't run {program}: {error}; is it installed?")))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let said = said.trim();
    let said = if said.is_empty() { output.status.to_string() } else { said.replace('\n', "; ") };
    Err(format!("`{program} {}` failed: {said}", args.join(" ")).into())
}

/// Whether a command succeeds, and nothing more.
pub(super) fn succeeds(program: &str, args: &[&str]) -> bool {
    run(program, args).is_ok()
}

/// A service as systemd knows it.
pub(super) fn service(unit: &str) -> Result<Service> {
    let text = run("systemctl", &["show", unit, "--property", facts::PROPERTIES])?;
    Ok(facts::services(&text).into_iter().next().unwrap_or_default())
}

/// All services: those that systemd has loaded and those that it could load. Templates are none.
pub(super) fn services() -> Result<Vec<Service>> {
    let files = run("systemctl", &["list-unit-files", "--type=service", "--plain", "--no-legend"])?;
    let loaded = run("systemctl", &["list-units", "--all", "--type=service", "--plain", "--no-legend"])?;
    let names: BTreeSet<&str> = files
        .lines()
        .chain(loaded.lines())
        .filter_map(|line| line.split_whitespace().next())
        .filter(|name| name.ends_with(".service") && !name.ends_with("@.service"))
        .collect();
    if names.is_empty() {
        return Ok(Vec::new());
    }
    let mut args = vec!["show", "--property", facts::PROPERTIES, "--"];
    args.extend(names);
    Ok(facts::services(&run("systemctl", &args)?))
}

/// The number of a user by name or number.
pub(super) fn uid(user: &str) -> Option<u32> {
    user.parse().ok().or_else(|| User::from_name(user).ok().flatten().map(|user| user.uid.as_raw()))
}

/// The numbers of a user, if it exists.
pub(super) fn ids(user: &str) -> Option<Ids> {
    let user = User::from_name(user).ok().flatten()?;
    Some(Ids { uid: user.uid.as_raw(), gid: user.gid.as_raw() })
}

/// Makes the user that this file of systemd-sysusers describes.
pub(super) fn make_user(file: &Path, user: &str) -> Result<Ids> {
    if ids(user).is_none() {
        run("systemd-sysusers", &[&file.display().to_string()])?;
    }
    ids(user).ok_or_else(|| {
        format!(
            "systemd-sysusers made no user {user} of {}; see what it says about that file",
            file.display()
        )
        .into()
    })
}

/// Removes a user; no matter if there is none.
pub(super) fn remove_user(user: &str) -> Result<bool> {
    if ids(user).is_none() {
        return Ok(false);
    }
    run("userdel", &[user])?;
    Ok(true)
}

/// The ports that somebody has bound in the machine's own network namespace.
pub(super) fn taken_ports() -> BTreeSet<u16> {
    let read = |name: &str, tcp| {
        let text = fs::read_to_string(format!("/proc/self/net/{name}")).unwrap_or_default();
        facts::bound_ports(&text, tcp)
    };
    [read("tcp", true), read("tcp6", true), read("udp", false), read("udp6", false)]
        .into_iter()
        .flatten()
        .collect()
}

/// The address from which this machine reaches `host:port`. Sends nothing.
pub(super) fn source_address(target: &str) -> Option<IpAddr> {
    let target = target.to_socket_addrs().ok()?.next()?;
    let any = if target.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = UdpSocket::bind(any).ok()?;
    socket.connect(target).ok()?;
    let address = socket.local_addr().ok()?.ip();
    (!address.is_unspecified() && !address.is_loopback()).then_some(address)
}

/// This machine's name.
pub(super) fn host_name() -> String {
    nix::unistd::gethostname()
        .ok()
        .and_then(|name| name.into_string().ok())
        .unwrap_or_else(|| "node".to_owned())
}

fn aside(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.ursa-new"))
}

/// Writes a file as a whole, for all to read, and keeps it over a power cut. Says whether anything was new.
pub(super) fn write(file: &Made) -> Result<bool> {
    let Made { path, text } = file;
    if fs::read_to_string(path).is_ok_and(|there| there == *text) {
        return Ok(false);
    }
    let aside = aside(path);
    let write = || {
        let mut new = fs::File::create(&aside)?;
        new.set_permissions(fs::Permissions::from_mode(0o644))?;
        new.write_all(text.as_bytes())?;
        new.sync_all()?;
        fs::rename(&aside, path)
    };
    write().map_err(|error: io::Error| {
        let _ = fs::remove_file(&aside);
        HostError::new(format!("can't write {}: {error}", path.display()))
    })?;
    Ok(true)
}

/// Removes a file, and what an interrupted write of it left. Says whether it was there.
pub(super) fn remove(path: &Path) -> Result<bool> {
    let _ = fs::remove_file(aside(path));
    match fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(format!("can't remove {}: {error}", path.display()).into()),
    }
}

/// The folders above these files that don't exist, outermost first.
pub(super) fn missing_folders<'a>(files: impl Iterator<Item = &'a Path>) -> Vec<PathBuf> {
    let mut missing = BTreeSet::new();
    for file in files {
        missing.extend(file.ancestors().skip(1).take_while(|folder| !folder.exists()).map(Path::to_owned));
    }
    missing.into_iter().collect()
}

/// Makes folders that all may read.
pub(super) fn make_folders(folders: &[PathBuf]) -> Result<()> {
    for folder in folders {
        let made = fs::create_dir_all(folder)
            .and_then(|()| fs::set_permissions(folder, fs::Permissions::from_mode(0o755)));
        made.map_err(|error| HostError::new(format!("can't make {}: {error}", folder.display())))?;
    }
    Ok(())
}

/// Removes those of these folders that are empty, innermost first.
pub(super) fn remove_folders(folders: &[PathBuf]) -> Vec<String> {
    let gone = folders.iter().rev().filter(|folder| fs::remove_dir(folder).is_ok());
    gone.map(|folder| folder.display().to_string()).collect()
}

/// What a redirect unit says of itself; of later versions only what is known here.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct RedirectStatus {
    pub(super) state: State,
    pub(super) pid: u32,
    pub(super) repairs: u64,
    pub(super) workloads: Vec<String>,
    pub(super) left_out: Vec<String>,
    pub(super) message: String,
}

/// Reads it; `None` when there is none that is understood.
pub(super) fn redirect_status(path: &Path) -> Option<RedirectStatus> {
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}

/// Looks again and again until `probe` finds something; the error is what it said last.
pub(super) async fn until<T>(
    deadline: Duration,
    mut probe: impl AsyncFnMut() -> Result<Option<T>, String>,
) -> Result<T, String> {
    let end = Instant::now() + deadline;
    loop {
        let last = match probe().await {
            Ok(Some(found)) => return Ok(found),
            Ok(None) => String::new(),
            Err(why) => why,
        };
        if Instant::now() >= end {
            return Err(last);
        }
        sleep(LOOK).await;
    }
}

/// Bytes that are free for a file there, and how many of a hundred files more there may be.
pub(super) fn free_space(path: &Path) -> Option<(u64, u64)> {
    let stat = nix::sys::statvfs::statvfs(path).ok()?;
    let bytes = stat.blocks_available() * stat.fragment_size();
    let inodes = (stat.files_available() * 100).checked_div(stat.files()).unwrap_or(100);
    Some((bytes, inodes))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that can't go on has failed")]
    use super::*;

    #[test]
    fn a_file_is_written_once_and_removed_with_its_remains() {
        let dir = tempfile::tempdir().unwrap();
        let file = Made { path: dir.path().join("web.yaml"), text: "a".into() };
        assert!(write(&file).unwrap());
        assert!(!write(&file).unwrap());
        fs::write(aside(&file.path), "half").unwrap();
        assert!(remove(&file.path).unwrap());
        assert!(!remove(&file.path).unwrap());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn only_folders_that_were_missing_and_are_empty_go() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a/b/c");
        let missing = missing_folders([file.as_path()].into_iter());
        assert_eq!(missing, [dir.path().join("a"), dir.path().join("a/b")]);
        make_folders(&missing).unwrap();
        fs::write(dir.path().join("a/x"), "").unwrap();
        assert_eq!(remove_folders(&missing), [dir.path().join("a/b").display().to_string()]);
        assert!(missing_folders([dir.path().join("a/y").as_path()].into_iter()).is_empty());
    }

    #[test]
    fn a_status_of_a_later_version_is_understood() {
        let status: RedirectStatus =
            serde_json::from_str(r#"{"state":"inPlace","pid":7,"workloads":["web"],"later":{}}"#).unwrap();
        assert_eq!((status.state, status.workloads), (State::InPlace, vec!["web".to_owned()]));
    }
}
