//! Slices are started before the rules are loaded, and rights are as in the unit.

use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::lab::{APP, Namespace};
use crate::tool::{init, init_in, inside, run};

/// Ends with the test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Cgroups of a test's own, gone when dropped.
struct Cgroups(PathBuf);

impl Drop for Cgroups {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir(self.0.join(Self::inner("web")));
        let _ = std::fs::remove_dir(self.0.join(Self::inner("shop")));
        let _ = std::fs::remove_dir(self.0.join(format!("{}.slice", Self::name())));
    }
}

impl Cgroups {
    fn new() -> Self {
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        let line = mounts.lines().find(|line| line.contains(" - cgroup2 ")).expect("cgroup2 is mounted");
        Self(PathBuf::from(line.split(' ').nth(4).unwrap()))
    }

    fn name() -> String {
        format!("ursatestsd{}", std::process::id())
    }

    fn inner(of: &str) -> String {
        format!("{0}.slice/{0}-{of}.slice", Self::name())
    }
}

/// A stand-in for systemd's: it makes the slices where systemd would, and keeps what it was asked for.
fn systemctl(folder: &Path, root: &Path) {
    let script = format!(
        "#!/bin/sh\necho \"$@\" >> {asked}\nshift 3\nfor unit; do\n  case $unit in *bad*) echo 'no such unit' >&2; exit 5;; \
         esac\n  mkdir -p {root}/${{unit%%-*}}.slice/$unit\ndone\n",
        asked = folder.join("asked").display(),
        root = root.display(),
    );
    let path = folder.join("systemctl");
    std::fs::write(&path, script).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
}

#[test]
fn watch_has_the_slices_started_before_the_rules_are_loaded() {
    let (ns, folder, cgroups) = (Namespace::new(), tempfile::tempdir().unwrap(), Cgroups::new());
    systemctl(folder.path(), &cgroups.0);
    let document = folder.path().join("redirect.yaml");
    let workload = |name: &str, base: u16| {
        let slice = Cgroups::inner(name);
        format!(
            "- {{name: {name}, slices: [{slice}], proxyUids: [{base}], inbound: {{port: {base}6, includePorts: [{base}]}}, \
             outbound: {{port: {base}1}}, dns: {{port: {base}3}}}}\n"
        )
    };
    let write = |workloads: &[String]| {
        std::fs::write(&document, format!("workloads:\n{}", workloads.concat())).unwrap();
    };
    write(&[workload("web", 1510)]);
    let path = format!("{}:{}", folder.path().display(), std::env::var("PATH").unwrap());
    let mut watch = init_in(&ns, &["watch", "--start-slices"]);
    watch.env("PATH", path).arg("--config").arg(&document).arg("--run-dir").arg(folder.path());
    let mut watch = Running(watch.stderr(Stdio::piped()).spawn().unwrap());
    let mut lines = BufReader::new(watch.0.stderr.take().unwrap()).lines().map(Result::unwrap);
    let pid = Pid::from_raw(watch.0.id().cast_signed());
    let asked = || std::fs::read_to_string(folder.path().join("asked")).unwrap();

    // Nothing is said before: at no time was it missing.
    assert_eq!(lines.next().unwrap(), "ursa-init: the redirect is in place and watched");
    assert_eq!(asked(), format!("start --no-ask-password -- {}-web.slice\n", Cgroups::name()));
    assert!(cgroups.0.join(Cgroups::inner("web")).is_dir());

    // A document that names another one; the one that is there isn't asked for again.
    write(&[workload("web", 1510), workload("shop", 1520)]);
    kill(pid, Signal::SIGHUP).unwrap();
    assert_eq!(lines.next().unwrap(), "ursa-init: read again; the redirect is in place and watched");
    assert_eq!(
        asked().lines().last().unwrap(),
        format!("start --no-ask-password -- {}-shop.slice", Cgroups::name())
    );

    // What can't be started is said, and hinders nobody.
    write(&[workload("web", 1510), workload("bad", 1520)]);
    kill(pid, Signal::SIGHUP).unwrap();
    let line = lines.next().unwrap();
    assert!(line.contains("-bad.slice` failed") && line.contains("no such unit"), "{line}");
    assert_eq!(lines.next().unwrap(), "ursa-init: read again; the redirect is in place and watched");
    assert!(lines.next().unwrap().contains("doesn't exist"));
    // And where systemd would never make it.
    write(&[workload("web", 1510).replace("sd", "sd/x")]);
    kill(pid, Signal::SIGHUP).unwrap();
    let line = lines.next().unwrap();
    assert!(line.contains("systemd makes no slice at"), "{line}");
}

#[test]
fn the_old_tables_can_be_used_with_the_rights_of_the_unit() {
    let (web, _stranger) = Namespace::pair();
    web.listen(&[15001]);
    let unit =
        std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../systemd/ursa-redirect.service"));
    let unit = unit.unwrap();
    let setting = |name: &str| unit.lines().find_map(|line| line.strip_prefix(name)).unwrap();
    assert_eq!(setting("NoNewPrivileges="), "yes");
    let rights = setting("CapabilityBoundingSet=").to_lowercase().replace("cap_", "+").replace(' ', ",");
    // What ursa-init drops is gone for the programs that it starts.
    let mut apply = Command::new("setpriv");
    apply.args(["--no-new-privs", "--bounding-set", &format!("-all,{rights}"), "--inh-caps", "-all", "--"]);
    apply.arg(init().get_program()).args(["apply", "--proxy-uid", "5678", "--backend", "iptables-legacy"]);
    let done = web.run(|| run(&mut apply));
    assert_eq!(done.code, 0, "{}", done.err);
    assert_eq!(web.tcp(APP, "10.77.0.2:80"), Ok(15001));
    assert!(inside(&web, "iptables-legacy", &["-t", "nat", "-S"], "").out.contains("URSA_"));
    assert!(setting("ExecStart=").contains(" --start-slices "), "{unit}");
}
