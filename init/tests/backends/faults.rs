//! What can go wrong around us: others who write, programs that lie or are missing, rights, parts of the kernel.

use std::process::{Command, Output};
use std::sync::atomic::{AtomicBool, Ordering};

use ursa_init::Backend;
use ursa_init::intent::RedirectIntent;

use crate::lab::Namespace;
use crate::support::{BACKENDS, IPTABLES, moved, plan};

/// The program, started by `before`, with a document on its standard input.
fn program(ns: &Namespace, before: &str, args: &str, intent: &RedirectIntent) -> Output {
    let script = format!(
        "{before} '{}' {args} --netns '{}' --config -",
        env!("CARGO_BIN_EXE_ursa-init"),
        ns.path().display()
    );
    let mut child = Command::new("sh")
        .args(["-ec", &script])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let document = serde_json::to_string(intent).unwrap();
    // It may end before it reads.
    let _ = std::io::Write::write_all(&mut child.stdin.take().unwrap(), document.as_bytes());
    child.wait_with_output().unwrap()
}

fn complaint(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Everything that a failed apply must leave as it was.
fn everything(ns: &Namespace) -> String {
    // The order of chains says nothing.
    let saved = ns.saved();
    let (mut chains, rules): (Vec<_>, Vec<_>) = saved.lines().partition(|line| line.starts_with(':'));
    chains.sort_unstable();
    let table =
        ns.run(ursa_init::nft::read_back).unwrap().map(|set| set.lines(ursa_init::nft::Counters::Hide));
    format!("{chains:#?}{rules:#?}{table:#?}{}", ns.network())
}

#[test]
fn what_others_write_meanwhile_stays() {
    for backend in BACKENDS {
        let web = Namespace::alone();
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let others = |script: &'static str| {
                let (web, over) = (&web, &over);
                move || {
                    let mut i = 0;
                    while !over.load(Ordering::Relaxed) {
                        web.sh(&script.replace("$i", &(i % 100 + 1).to_string()));
                        i += 1;
                    }
                    i
                }
            };
            // Each in iptables' own tables or beside them, adding and taking away.
            let table = "nft 'table ip other { chain c { type nat hook output priority -90; tcp dport $i accept; }; }'; nft delete table ip other";
            let chain = |kind: &str| -> &'static str {
                format!(
                    "{kind} -w -t nat -N OTHER; {kind} -w -t nat -A OTHER -p tcp --dport $i -j RETURN; \
                     {kind} -w -t nat -I OUTPUT -j OTHER; {kind} -w -t nat -D OUTPUT -j OTHER; \
                     {kind} -w -t nat -F OTHER; {kind} -w -t nat -X OTHER"
                )
                .leak()
            };
            let scripts = [table, chain("iptables-nft"), chain("iptables-legacy"), chain("ip6tables-nft")];
            let writers: Vec<_> = scripts.into_iter().map(|script| scope.spawn(others(script))).collect();
            for i in 0..12 {
                let applied = web.apply(&plan(&moved(i % 2 * 100)), backend);
                over.fetch_or(
                    applied.is_err() || writers.iter().any(std::thread::ScopedJoinHandle::is_finished),
                    Ordering::Relaxed,
                );
                applied.unwrap();
            }
            over.store(true, Ordering::Relaxed);
            for writer in writers {
                assert!(writer.join().unwrap() > 0);
            }
        });
        // Their last words, beside ours.
        web.sh("iptables-nft -t nat -A OUTPUT -p tcp --dport 7 -j RETURN; iptables-legacy -w -t nat -A OUTPUT -p tcp --dport 7 -j RETURN");
        assert_eq!(web.diff(&plan(&moved(100)), backend), Vec::<String>::new());
        web.run(ursa_init::remove).unwrap();
        let left: Vec<_> = web.saved().lines().filter(|l| l.starts_with("-A")).map(str::to_owned).collect();
        assert_eq!(left, ["-A OUTPUT -p tcp -m tcp --dport 7 -j RETURN"; 2], "{backend}");
    }
}

#[test]
fn applies_at_the_same_time_end_in_one_of_the_plans() {
    for backend in IPTABLES {
        let web = Namespace::alone();
        let plans: Vec<_> = (0..3).map(|i| plan(&moved(100 * i))).collect();
        for _ in 0..2 {
            std::thread::scope(|scope| {
                for plan in &plans {
                    scope.spawn(|| web.apply(plan, backend).unwrap());
                }
            });
            let equal = plans.iter().filter(|plan| web.diff(plan, backend).is_empty()).count();
            assert_eq!(equal, 1, "{backend}");
        }
    }
}

/// Programs that don't do what they are told, where the real ones are. Only the program under test sees them.
fn lying(kind: &str, script: &str) -> (String, tempdir::Folder) {
    let folder = tempdir::Folder::new();
    let multi = format!("/usr/sbin/xtables-{kind}-multi");
    let (copy, fake) = (folder.path().join("real"), folder.path().join("fake"));
    std::fs::copy(&multi, &copy).unwrap();
    let text = format!(
        "#!/bin/bash\nname=$(basename \"$0\")\nreal() {{ (exec -a \"$name\" '{}' \"$@\"); }}\n{script}\n",
        copy.display()
    );
    std::fs::write(&fake, text).unwrap();
    std::fs::set_permissions(&fake, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let before =
        format!("exec unshare -m sh -ec 'mount --bind \"$0\" {multi}; exec \"$@\"' '{}'", fake.display());
    (before, folder)
}

mod tempdir {
    use std::path::{Path, PathBuf};
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// A folder of its own, gone when dropped.
    pub(super) struct Folder(PathBuf);

    impl Folder {
        pub(super) fn new() -> Self {
            static NUMBER: AtomicUsize = AtomicUsize::new(0);
            let name =
                format!("ursa-faults-{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
            let path = std::env::temp_dir().join(name);
            std::fs::create_dir(&path).unwrap();
            Self(path)
        }

        pub(super) fn path(&self) -> &Path {
            &self.0
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }
}

#[test]
fn what_reads_back_differently_puts_the_old_rules_back() {
    for (backend, kind) in [(Backend::IptablesNft, "nft"), (Backend::IptablesLegacy, "legacy")] {
        let web = Namespace::alone();
        for old in [None, Some(moved(0))] {
            if let Some(old) = &old {
                web.apply(&plan(old), backend).unwrap();
            }
            let before = everything(&web);
            // The new plan's proxy port becomes another one on its way into the kernel.
            let (lie, _folder) = lying(
                kind,
                "case $name in *-restore) sed 's/to-ports 15101/to-ports 9999/' | real \"$@\";; *) real \"$@\";; esac",
            );
            let output = program(&web, &lie, &format!("apply --backend {backend}"), &moved(100));
            let text = complaint(&output);
            assert_eq!(output.status.code(), Some(1), "{text}");
            assert!(text.contains("reads back other rules") && text.contains("9999"), "{text}");
            assert!(text.contains("the previous rules are in place again"), "{text}");
            if old.is_some() {
                assert_eq!(everything(&web), before, "{backend}");
            } else {
                assert!(!web.saved().contains("URSA"), "{backend}: {}", web.saved());
            }
        }
    }
}

#[test]
fn a_table_that_is_refused_leaves_the_old_rules() {
    for (backend, kind) in [(Backend::IptablesNft, "nft"), (Backend::IptablesLegacy, "legacy")] {
        let web = Namespace::alone();
        web.apply(&plan(&moved(0)), backend).unwrap();
        let before = everything(&web);
        // The guards are written already when the redirects are refused.
        let (lie, _folder) = lying(
            kind,
            "case $name in *-restore) text=$(cat); case $text in *'to-ports 15101'*) echo 'no REDIRECT here' >&2; exit 3;; esac\n\
             printf '%s\\n' \"$text\" | real \"$@\";; *) real \"$@\";; esac",
        );
        let output = program(&web, &lie, &format!("apply --backend {backend}"), &moved(100));
        let text = complaint(&output);
        assert_eq!(output.status.code(), Some(1), "{text}");
        assert!(text.contains("no REDIRECT here"), "{text}");
        assert_eq!(everything(&web), before, "{backend}");
    }
}

/// Whichever of the programs that write is the one that fails.
#[test]
fn a_program_that_fails_leaves_the_old_rules() {
    for (backend, kind) in [(Backend::IptablesNft, "nft"), (Backend::IptablesLegacy, "legacy")] {
        let web = Namespace::alone();
        let (mut failed, mut n) = (0, 0);
        loop {
            n += 1;
            web.apply(&plan(&moved(0)), backend).unwrap();
            let before = everything(&web);
            let (lie, folder) = lying(
                kind,
                &format!(
                    "case $name in *-restore) echo >>$COUNT; \
                     [ $(wc -l <$COUNT) != {n} ] || {{ echo 'killed by somebody' >&2; exit 1; }};; esac; real \"$@\""
                ),
            );
            let counter = format!("export COUNT='{}'; {lie}", folder.path().join("count").display());
            let output = program(&web, &counter, &format!("apply --backend {backend}"), &moved(100));
            if output.status.success() {
                break;
            }
            failed += 1;
            assert!(complaint(&output).contains("killed by somebody"), "{}", complaint(&output));
            assert_eq!(everything(&web), before, "{backend}, program {n}");
        }
        assert_eq!(web.diff(&plan(&moved(100)), backend), Vec::<String>::new());
        // Guards of both plans, redirects, guards of the new one, of two families.
        assert_eq!(failed, 6, "{backend}");
    }
}

#[test]
fn a_kernel_without_comments_gets_rules_without_them() {
    for (backend, kind) in [(Backend::IptablesNft, "nft"), (Backend::IptablesLegacy, "legacy")] {
        let web = Namespace::alone();
        let (lie, _folder) = lying(
            kind,
            "case $name in *-restore) text=$(cat); case $text in *--comment*) echo 'no comment here' >&2; exit 2;; esac\n\
             printf '%s\\n' \"$text\" | real \"$@\";; *) real \"$@\";; esac",
        );
        let apply = format!("apply --backend {backend}");
        let output = program(&web, &lie, &apply, &moved(0));
        assert!(output.status.success(), "{}", complaint(&output));
        assert!(web.saved().contains("URSA_OUTPUT") && !web.saved().contains("--comment"));
        let output = program(&web, &lie, &apply, &moved(0));
        assert!(
            String::from_utf8_lossy(&output.stdout).contains("already"),
            "{backend}: {}",
            complaint(&output)
        );
    }
}

#[test]
fn a_missing_part_is_named_and_nothing_is_changed() {
    for backend in IPTABLES {
        let web = Namespace::alone();
        web.apply(&plan(&moved(0)), backend).unwrap();
        let before = everything(&web);
        let apply = format!("apply --backend {backend}");
        // The programs' own modules are away.
        let output = program(&web, "exec env XTABLES_LIBDIR=/nonexistent", &apply, &moved(100));
        let text = complaint(&output);
        assert_eq!(output.status.code(), Some(1), "{text}");
        assert!(text.contains("modprobe") && text.contains("or use the backend nftables"), "{text}");
        assert_eq!(everything(&web), before);
        // The programs are away.
        let hidden = "exec unshare -m sh -ec 'mount -t tmpfs none /usr/sbin; exec \"$@\"' sh";
        let output = program(&web, hidden, &apply, &moved(100));
        let text = complaint(&output);
        assert!(
            text.contains(&format!("find iptables-{}", backend.to_string().trim_start_matches("iptables-"))),
            "{text}"
        );
        assert!(text.contains("apt-get install iptables"), "{text}");
        assert_eq!(everything(&web), before);
    }
}

#[test]
fn without_rights_nothing_is_changed() {
    for backend in BACKENDS {
        let web = Namespace::alone();
        web.apply(&plan(&moved(0)), backend).unwrap();
        let before = everything(&web);
        let without = "exec setpriv --bounding-set=-net_admin,-net_raw --inh-caps=-all";
        let output = program(&web, without, &format!("apply --backend {backend}"), &moved(100));
        let text = complaint(&output);
        assert_eq!(output.status.code(), Some(1), "{text}");
        assert!(text.contains("CAP_NET_ADMIN"), "{text}");
        assert_eq!(everything(&web), before, "{backend}");
    }
}

#[test]
fn ipv6_that_is_switched_off_disturbs_nobody() {
    for backend in BACKENDS {
        let web = Namespace::new();
        web.sh("sysctl -qw net.ipv6.conf.all.disable_ipv6=1 net.ipv6.conf.default.disable_ipv6=1");
        web.ip("link set lo up");
        let plan = plan(&moved(0));
        web.apply(&plan, backend).unwrap();
        assert!(!web.apply(&plan, backend).unwrap().changed(), "{backend}");
        assert_eq!(web.diff(&plan, backend), Vec::<String>::new());
        assert!(web.run(ursa_init::remove).unwrap());
    }
}

/// Runs `apply` with one call of a kind failing, the n-th in the thread that works, for every n. Whatever happens,
/// success means the new rules and failure the old ones.
fn failing(backend: Backend, call: &str, errors: &[&str]) -> (usize, usize) {
    let web = Namespace::alone();
    let (mut done, mut failed) = (0, 0);
    for error in errors {
        for n in 1.. {
            let (old, new) = (plan(&moved(0)), plan(&moved(100)));
            web.apply(&old, backend).unwrap();
            let before = everything(&web);
            let log = tempdir::Folder::new();
            let log_path = log.path().join("log");
            let strace = format!(
                "exec strace -f -qq -o '{}' -e trace={call} -e inject={call}:error={error}:when={n}",
                log_path.display()
            );
            let output = program(&web, &strace, &format!("apply --backend {backend}"), &moved(100));
            if output.status.success() {
                done += 1;
                assert_eq!(web.diff(&new, backend), Vec::<String>::new(), "{call} {n} {error}");
            } else {
                failed += 1;
                let now = everything(&web);
                assert_eq!(now, before, "{call} {n} {error}: {}", complaint(&output));
            }
            if !std::fs::read_to_string(&log_path).unwrap().contains("(INJECTED)") {
                break;
            }
        }
    }
    (done, failed)
}

#[test]
fn every_refused_request_leaves_the_old_rules() {
    let (done, failed) = failing(Backend::Nftables, "sendto", &["EOPNOTSUPP", "ENOENT", "ENOBUFS", "EPERM"]);
    assert!(done > 0 && failed > 10, "{done} {failed}");
}

/// The kernel's answers are lost when the buffer is full, but what it did is done.
#[test]
fn a_full_buffer_is_no_half_work() {
    let (done, failed) = failing(Backend::Nftables, "recvfrom", &["ENOBUFS"]);
    assert!(done > 0, "{done} {failed}");
}

#[test]
fn a_kernel_without_nf_tables_is_served_by_iptables() {
    let mut served = 0;
    for n in 1..40 {
        let web = Namespace::alone();
        let strace = format!(
            "exec strace -f -qq -o /dev/null -e trace=sendto -e inject=sendto:error=EPROTONOSUPPORT:when={n}+"
        );
        let output = program(&web, &strace, "apply", &moved(0));
        let saved = web.saved();
        let (nft, legacy) = saved.split_once("# iptables-legacy").unwrap();
        if web.run(ursa_init::nft::read_back).unwrap().is_some() {
            // It was there when it was asked for.
            break;
        }
        assert!(!nft.contains("URSA_"));
        if legacy.contains("URSA_") {
            served += 1;
            assert!(output.status.success(), "{}", complaint(&output));
            assert_eq!(web.diff(&plan(&moved(0)), Backend::IptablesLegacy), Vec::<String>::new());
        }
    }
    assert!(served > 0);
}

/// A directory of users that is behind the network may never answer; iptables would ask it for a user called 5678.
#[test]
fn nobody_is_asked_for_a_name() {
    let folder = tempdir::Folder::new();
    let (config, log) = (folder.path().join("nsswitch.conf"), folder.path().join("log"));
    std::fs::write(&config, "passwd: ursatest files\ngroup: ursatest files\n").unwrap();
    let before = format!(
        "exec unshare -m sh -ec 'mount --bind {} /etc/nsswitch.conf; exec strace -f -qq -e trace=openat -o {} \"$@\"' sh",
        config.display(),
        log.display()
    );
    let asked = || std::fs::read_to_string(&log).unwrap().contains("libnss_ursatest");
    for backend in IPTABLES {
        let web = Namespace::alone();
        web.sh(&format!("{before} {backend} -w -t raw -A OUTPUT -m owner --uid-owner 4711 -j RETURN"));
        assert!(asked(), "{backend} by itself asks");
        let output = program(&web, &before, &format!("apply --backend {backend}"), &moved(0));
        assert!(output.status.success(), "{}", complaint(&output));
        assert!(!asked(), "{backend}");
    }
}
