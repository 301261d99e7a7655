//! A change that nobody confirms is undone, whatever dies meanwhile.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use ursa_init::nft::{self, Counters};

use crate::lab::Namespace;
use crate::tool::{Done, init_in, inside, ok, run};

const PATIENCE: Duration = Duration::from_secs(60);

/// Everything that `ursa-init` could have changed.
fn state(ns: &Namespace) -> String {
    let rules = ns.run(nft::read_back).unwrap().map(|rules| rules.lines(Counters::Hide).join("\n"));
    format!("{}{}{}", rules.unwrap_or_default(), saved(ns), ns.network())
}

/// The rules of both kinds of iptables, without times and counters.
fn saved(ns: &Namespace) -> String {
    let all = ["iptables-nft", "ip6tables-nft", "iptables-legacy", "ip6tables-legacy"];
    let text = all.map(|kind| inside(ns, &format!("{kind}-save"), &[], "").out).concat();
    // A table that is there and empty is none.
    text.lines()
        .filter(|line| line.starts_with("-A") || line.starts_with(":URSA"))
        .fold(String::new(), |all, line| format!("{all}{}\n", line.split(" [").next().unwrap_or_default()))
}

/// A namespace with a redirect of before, and how it looks.
fn before() -> (Namespace, tempfile::TempDir, String) {
    let (ns, folder) = (Namespace::new(), tempfile::tempdir().unwrap());
    ok(&mut with(&ns, folder.path(), &["apply", "--proxy-uid", "5678", "--outbound-port", "15101"]));
    // What somebody added by hand comes back as well.
    let done =
        inside(&ns, "nft", &["add", "rule", "inet", "ursa", "output", "tcp", "dport", "7", "return"], "");
    assert_eq!(done.code, 0, "{}", done.err);
    let looks = state(&ns);
    (ns, folder, looks)
}

fn with(ns: &Namespace, folder: &Path, args: &[&str]) -> Command {
    let mut command = init_in(ns, args);
    command.arg("--run-dir").arg(folder);
    command
}

fn change(ns: &Namespace, folder: &Path, time: &str) -> String {
    ok(&mut with(ns, folder, &["apply", "--proxy-uid", "5678", "--dns", "off", "--confirm", time]))
}

fn confirm(ns: &Namespace, folder: &Path) -> Done {
    run(&mut with(ns, folder, &["confirm"]))
}

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::yield_now();
    }
}

/// The guards of a run directory.
fn guards(folder: &Path) -> Vec<Pid> {
    let folder = folder.to_str().unwrap();
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    let ours = processes.filter_map(|process| {
        let line = std::fs::read(process.path().join("cmdline")).ok()?;
        let words: Vec<_> = line.split(|b| *b == 0).map(String::from_utf8_lossy).collect();
        let guard = words.iter().any(|word| word == "guard") && words.iter().any(|word| word == folder);
        guard.then(|| process.file_name().to_str()?.parse().ok().map(Pid::from_raw))?
    });
    ours.collect()
}

#[test]
fn what_is_confirmed_stays() {
    let (ns, folder, before) = before();
    let text = change(&ns, folder.path(), "10s");
    assert!(text.contains("in place") && text.contains("ursa-init confirm"), "{text}");
    let after = state(&ns);
    assert_ne!(after, before);
    // Only one at a time.
    let second = run(&mut with(&ns, folder.path(), &["apply", "--proxy-uid", "1", "--confirm", "9s"]));
    assert!(second.code == 1 && second.err.contains("still waits to be confirmed"), "{}", second.err);
    assert_eq!(confirm(&ns, folder.path()).code, 0);
    until("the guards end", || guards(folder.path()).is_empty());
    assert_eq!(state(&ns), after);
    let again = confirm(&ns, folder.path());
    assert!(again.code == 1 && again.err.contains("nothing waits"), "{}", again.err);
}

#[test]
fn what_nobody_confirms_is_undone() {
    let (ns, folder, before) = before();
    change(&ns, folder.path(), "1s");
    assert_ne!(state(&ns), before);
    until("rolled back", || state(&ns) == before);
    until("the guards end", || guards(folder.path()).is_empty());
    let late = confirm(&ns, folder.path());
    assert!(late.code == 1 && late.err.contains("is rolled back"), "{}", late.err);
}

#[test]
fn without_rules_before_there_are_none_after() {
    let (ns, folder) = (Namespace::new(), tempfile::tempdir().unwrap());
    ns.ip("link set lo up");
    let before = state(&ns);
    change(&ns, folder.path(), "1s");
    until("rolled back", || state(&ns) == before);
}

#[test]
fn killing_one_guard_rolls_back_at_once() {
    for signal in [Signal::SIGKILL, Signal::SIGTERM] {
        for victim in 0..2 {
            let (ns, folder, before) = before();
            change(&ns, folder.path(), "60m");
            let both = guards(folder.path());
            assert_eq!(both.len(), 2);
            kill(both[victim], signal).unwrap();
            until("rolled back", || state(&ns) == before);
            until("the other guard ends", || guards(folder.path()).iter().all(|pid| is_zombie(*pid)));
        }
    }
}

fn is_zombie(pid: Pid) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).map_or(true, |stat| stat.contains(") Z "))
}

#[test]
fn a_closed_terminal_changes_nothing() {
    let (ns, folder, _) = before();
    change(&ns, folder.path(), "60m");
    let after = state(&ns);
    for guard in guards(folder.path()) {
        kill(guard, Signal::SIGHUP).unwrap();
    }
    // Confirmed all the same: had one rolled back, there would be nothing to confirm.
    assert_eq!(confirm(&ns, folder.path()).code, 0);
    assert_eq!(state(&ns), after);
    for guard in guards(folder.path()) {
        let _ = kill(guard, Signal::SIGTERM);
    }
    until("the guards end", || guards(folder.path()).iter().all(|pid| is_zombie(*pid)));
    assert_eq!(state(&ns), after, "confirmed is confirmed");
}

#[test]
fn whoever_kills_both_guards_leaves_it_to_the_next_command() {
    let (ns, folder, before) = before();
    change(&ns, folder.path(), "6s");
    let both = guards(folder.path());
    // Stopped first, so that neither sees the other one die.
    for signal in [Signal::SIGSTOP, Signal::SIGKILL] {
        for pid in &both {
            kill(*pid, signal).unwrap();
        }
    }
    until("both are gone", || guards(folder.path()).iter().all(|pid| is_zombie(*pid)));
    let other = Namespace::new();
    let late = {
        let deadline = Instant::now() + Duration::from_millis(6200);
        while Instant::now() < deadline {
            std::thread::yield_now();
        }
        // Elsewhere nothing is undone, and nothing is forgotten.
        let elsewhere = confirm(&other, folder.path());
        assert!(
            elsewhere.code == 1 && elsewhere.err.contains("another network namespace"),
            "{}",
            elsewhere.err
        );
        ok(&mut with(&other, folder.path(), &["apply", "--proxy-uid", "5678"]));
        confirm(&ns, folder.path())
    };
    assert!(late.code == 1 && late.err.contains("too late"), "{}", late.err);
    assert!(!folder.path().join("confirm.json").exists());
    assert_eq!(state(&ns), before);
}

#[test]
fn a_change_that_fails_waits_for_nothing() {
    let (ns, folder, _) = before();
    // Without any address on lo the kernel takes no local routes.
    ns.ip("addr flush dev lo");
    let before = state(&ns);
    let done = run(&mut with(&ns, folder.path(), &["apply", "--proxy-uid", "5678", "--confirm", "60m"]));
    assert!(done.code == 1 && done.err.contains("route local"), "{}", done.err);
    assert_eq!(state(&ns), before);
    assert!(confirm(&ns, folder.path()).err.contains("nothing waits"));
    for guard in guards(folder.path()) {
        let _ = kill(guard, Signal::SIGTERM);
    }
    until("the guards end", || guards(folder.path()).iter().all(|pid| is_zombie(*pid)));
    assert_eq!(state(&ns), before);
}

#[test]
fn while_a_change_waits_nothing_else_is_changed() {
    let (ns, folder, _) = before();
    change(&ns, folder.path(), "60m");
    let after = state(&ns);
    for args in [
        &["apply", "--proxy-uid", "5678", "--outbound-port", "15102"][..],
        &["remove"],
        &["watch", "--proxy-uid", "5678"],
        &["transparent-proxy", "--kuma-dp-user", "5678"],
    ] {
        let done = run(&mut with(&ns, folder.path(), args));
        assert!(done.code == 1 && done.err.contains("still waits to be confirmed"), "{args:?}: {}", done.err);
        assert_eq!(state(&ns), after, "{args:?}");
    }
    // In another namespace it concerns nobody.
    ok(&mut with(&Namespace::new(), folder.path(), &["apply", "--proxy-uid", "5678"]));
    assert_eq!(confirm(&ns, folder.path()).code, 0);
    ok(&mut with(&ns, folder.path(), &["remove"]));
    for guard in guards(folder.path()) {
        let _ = kill(guard, Signal::SIGTERM);
    }
}

#[test]
fn rules_of_iptables_are_undone_too() {
    for kind in ["nft", "legacy"] {
        let backend = format!("iptables-{kind}");
        // By the same backend, and by the other one, which takes the first one's rules away.
        for new in [backend.as_str(), "nftables"] {
            let (ns, folder) = (Namespace::new(), tempfile::tempdir().unwrap());
            // Others have rules before and behind ours.
            let iptables = |args: &[&str]| assert_eq!(inside(&ns, &backend, args, "").code, 0, "{args:?}");
            iptables(&["-t", "nat", "-A", "OUTPUT", "-d", "192.0.2.1", "-j", "ACCEPT"]);
            let old = ["apply", "--proxy-uid", "5678", "--outbound-port", "15101", "--backend", &backend];
            ok(&mut with(&ns, folder.path(), &old));
            iptables(&["-t", "nat", "-I", "OUTPUT", "1", "-d", "192.0.2.2", "-j", "ACCEPT"]);
            iptables(&["-t", "nat", "-I", "URSA_OUTPUT", "1", "-p", "tcp", "--dport", "7", "-j", "RETURN"]);
            let before = state(&ns);
            let change =
                ["apply", "--proxy-uid", "5678", "--dns", "off", "--backend", new, "--confirm", "60m"];
            ok(&mut with(&ns, folder.path(), &change));
            assert_ne!(state(&ns), before);
            kill(guards(folder.path())[0], Signal::SIGKILL).unwrap();
            until("rolled back", || !folder.path().join("confirm.json").exists());
            assert_eq!(state(&ns), before, "{backend}, then {new}");
        }
    }
}

/// `ursa-init` for which a kind of iptables is another program: this script, which finds the real one as `real`.
fn with_programs(folder: &Path, kind: &str, script: &str) -> Command {
    let multi = format!("/usr/sbin/xtables-{kind}-multi");
    let (copy, fake) = (folder.join("real"), folder.join("fake"));
    std::fs::copy(&multi, &copy).unwrap();
    let name = "name=$(basename \"$0\")";
    let text = format!(
        "#!/bin/bash\n{name}\nreal() {{ (exec -a \"$name\" '{}' \"$@\"); }}\n{script}\n",
        copy.display()
    );
    std::fs::write(&fake, text).unwrap();
    std::fs::set_permissions(&fake, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let mut command = Command::new("unshare");
    command.args(["-m", "sh", "-ec", &format!("mount --bind \"$0\" {multi}; exec \"$@\"")]).arg(&fake);
    command.arg(env!("CARGO_BIN_EXE_ursa-init")).env("LIE", folder.join("lie"));
    command
}

#[test]
fn what_cannot_be_put_back_at_once_is_tried_again() {
    let (ns, folder) = (Namespace::new(), tempfile::tempdir().unwrap());
    let old = ["apply", "--proxy-uid", "5678", "--outbound-port", "15101", "--backend", "iptables-legacy"];
    ok(&mut with(&ns, folder.path(), &old));
    let before = state(&ns);
    // The new port becomes another one on its way into the kernel, and the old one is refused, as long as it lies.
    let script = "case $name in *-restore) text=$(cat); \
         if [ -e $LIE ]; then case $text in *'to-ports 15101'*) echo 'not now' >&2; exit 1;; esac; fi; \
         printf '%s\\n' \"${text//to-ports 15102/to-ports 9999}\" | real \"$@\";; *) real \"$@\";; esac";
    std::fs::write(folder.path().join("lie"), "").unwrap();
    let mut apply = with_programs(folder.path(), "legacy", script);
    apply.args(["apply", "--proxy-uid", "5678", "--outbound-port", "15102", "--backend", "iptables-legacy"]);
    apply.args(["--confirm", "60m", "--run-dir"]).arg(folder.path()).arg("--netns").arg(ns.path());
    let done = run(&mut apply);
    assert_eq!(done.code, 1, "{}", done.err);
    for words in ["reads back other rules", "could NOT be put back", "not now", "tried again"] {
        assert!(done.err.contains(words), "{words}: {}", done.err);
    }
    assert_ne!(state(&ns), before);
    // The guards still know what was there.
    assert_eq!(guards(folder.path()).len(), 2);
    std::fs::remove_file(folder.path().join("lie")).unwrap();
    kill(guards(folder.path())[0], Signal::SIGTERM).unwrap();
    until("rolled back", || !folder.path().join("confirm.json").exists());
    assert_eq!(state(&ns), before);
}
