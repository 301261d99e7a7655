//! Which versions the plugins of a list speak, and which runtime reads drop-in directories: both are asked, by
//! starting the programs. Only the installer starts any; ADD and DEL never do.

use std::fs;
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use serde_json::Value;

/// How long a program may take to say what it is.
const PATIENCE: Duration = Duration::from_secs(10);
/// More than any answer takes, in bytes.
const LONGEST: u64 = 1 << 20;
/// The first containerd whose libcni (1.3) reads `<directory>/<network>/*.conf`.
const CONTAINERD_WITH_DROP_INS: (u32, u32) = (2, 2);

/// Runs a program that answers at once.
fn answer(
    program: &Path,
    argument: Option<&str>,
    env: &[(&str, &str)],
    input: &str,
) -> Result<String, String> {
    let mut child = Command::new(program)
        .args(argument)
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .envs(env.iter().copied())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|error| format!("it can't be started: {error}"))?;
    if let Some(mut stdin) = child.stdin.take() {
        // It may answer without reading.
        let _ = stdin.write_all(input.as_bytes());
    }
    let output = child.stdout.take().ok_or("it has no output")?;
    let (tell, told) = mpsc::channel();
    // In a thread of its own, for a program that doesn't end, or leaves its output to one that doesn't.
    thread::spawn(move || {
        let mut text = String::new();
        let read = output.take(LONGEST).read_to_string(&mut text).map(|_| text);
        let _ = tell.send(read);
    });
    let text = told.recv_timeout(PATIENCE);
    let _ = child.kill();
    let _ = child.wait();
    match text {
        Ok(text) => text.map_err(|error| error.to_string()),
        Err(_) => Err(format!("it didn't answer within {} s", PATIENCE.as_secs())),
    }
}

/// The versions that a plugin says it supports.
pub(super) fn supported(program: &Path) -> Result<Vec<String>, String> {
    // Some refuse VERSION without the variables of other verbs.
    let env = [
        ("CNI_COMMAND", "VERSION"),
        ("CNI_PATH", "/opt/cni/bin"),
        ("CNI_CONTAINERID", "x"),
        ("CNI_IFNAME", "eth0"),
    ];
    let text = answer(program, None, &env, "{\"cniVersion\":\"1.0.0\"}")?;
    let versions = serde_json::from_str::<Value>(&text).ok();
    let versions = versions.as_ref().and_then(|v| v.get("supportedVersions")).and_then(Value::as_array);
    let versions: Vec<_> =
        versions.into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect();
    if versions.is_empty() { Err("its answer to VERSION names no versions".to_owned()) } else { Ok(versions) }
}

/// What is known of the plugins of a list.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Verdict {
    /// Plugins that don't speak a version that a runtime may choose.
    pub(super) refused: Vec<String>,
    /// Plugins that couldn't be asked.
    pub(super) unknown: Vec<String>,
}

/// Asks every plugin of a list whether it speaks each version.
pub(super) fn judge<'a>(
    types: impl Iterator<Item = &'a str>,
    versions: &[String],
    ask: impl Fn(&str) -> Result<Vec<String>, String>,
) -> Verdict {
    let mut verdict = Verdict::default();
    for kind in types {
        match ask(kind) {
            Err(why) => verdict.unknown.push(format!("{kind}: {why}")),
            Ok(spoken) => {
                let missing: Vec<_> =
                    versions.iter().filter(|v| !spoken.contains(v)).map(String::as_str).collect();
                if !missing.is_empty() {
                    let (missing, spoken) = (missing.join(", "), spoken.join(", "));
                    verdict
                        .refused
                        .push(format!("plugin {kind} doesn't support cniVersion {missing}, only {spoken}"));
                }
            }
        }
    }
    verdict
}

/// Where a plugin's program is.
pub(super) fn find(kind: &str, dirs: &[PathBuf]) -> Result<PathBuf, String> {
    let is_name = !kind.contains('/') && kind != "..";
    let found = dirs.iter().map(|dir| dir.join(kind)).find(|path| is_name && path.is_file());
    found.ok_or_else(|| {
        let dirs: Vec<_> = dirs.iter().map(|dir| dir.display().to_string()).collect();
        format!("there is no such program in {}", dirs.join(", "))
    })
}

/// Whether the runtime of this machine surely reads drop-in directories. In doubt it doesn't: a drop-in that
/// nobody reads leaves pods outside the mesh, without a word.
pub(super) fn runtime_reads_drop_ins(root: &Path, processes: &Path) -> bool {
    let find = |name: &str| {
        ["usr/bin", "usr/local/bin", "bin", "opt/bin"]
            .iter()
            .map(|dir| root.join(dir).join(name))
            .find(|p| p.is_file())
    };
    // With two runtimes nobody knows which one reads the directory.
    if ["crio", "podman", "cri-dockerd"].iter().any(|name| find(name).is_some()) {
        return false;
    }
    let Some(containerd) = find("containerd") else { return false };
    let Ok(text) = answer(&containerd, Some("--version"), &[], "") else { return false };
    containerd_version(&text).is_some_and(|version| version >= CONTAINERD_WITH_DROP_INS)
        && !runs_a_deleted_program(processes, "containerd")
}

/// Of `containerd github.com/containerd/containerd/v2 v2.2.0 0123abc`.
fn containerd_version(text: &str) -> Option<(u32, u32)> {
    let word = text.split_whitespace().nth(2)?.trim_start_matches('v');
    let mut parts = word.split(['.', '~', '-', '+']);
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

/// Whether one of that name still runs whose program was replaced: it is older than what it says.
fn runs_a_deleted_program(processes: &Path, name: &str) -> bool {
    let Ok(entries) = fs::read_dir(processes) else { return false };
    let deleted = format!("/{name} (deleted)");
    entries.flatten().any(|entry| {
        fs::read_link(entry.path().join("exe")).is_ok_and(|exe| exe.to_string_lossy().ends_with(&deleted))
    })
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[test]
    fn names_the_plugin_and_the_version() {
        let ask = |kind: &str| match kind {
            "bridge" => Ok(vec!["0.4.0".to_owned(), "1.0.0".to_owned()]),
            "portmap" => Ok(vec!["1.0.0".to_owned(), "1.1.0".to_owned()]),
            _ => Err("there is no such program".to_owned()),
        };
        let verdict = judge(["bridge", "portmap", "odd"].into_iter(), &["1.1.0".to_owned()], ask);
        assert_eq!(verdict.refused, ["plugin bridge doesn't support cniVersion 1.1.0, only 0.4.0, 1.0.0"]);
        assert_eq!(verdict.unknown, ["odd: there is no such program"]);
    }

    #[rstest]
    #[case("containerd github.com/containerd/containerd/v2 v2.2.1 abc", Some((2, 2)))]
    #[case("containerd github.com/containerd/containerd 1.6.20~ds1 1.6.20~ds1-1+b1", Some((1, 6)))]
    #[case("containerd", None)]
    fn reads_the_runtimes_version(#[case] text: &str, #[case] version: Option<(u32, u32)>) {
        assert_eq!(containerd_version(text), version);
    }
}
