//! The examples of `--help` work as they stand, and the pages are made.

use std::fmt::Write as _;
use std::process::Command;

use crate::tool::{init, ok, run};

/// The lines between two headings.
fn section<'a>(help: &'a str, from: &str, to: &str) -> Vec<&'a str> {
    let lines = help.lines().skip_while(|line| !line.starts_with(from)).skip(1);
    lines.take_while(|line| !line.starts_with(to)).collect()
}

#[test]
fn every_example_works() {
    let help = ok(init().arg("--help"));
    let folder = tempfile::tempdir().unwrap();
    let file: Vec<_> = section(&help, "A file looks like this", "Precedence")
        .into_iter()
        .map(|l| l.trim_start_matches("  "))
        .collect();
    std::fs::write(folder.path().join("redirect.yaml"), file.join("\n")).unwrap();
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_ursa-init"), folder.path().join("ursa-init")).unwrap();
    let examples: Vec<_> = section(&help, "Examples:", "A file looks like this")
        .into_iter()
        .map(str::trim)
        .filter(|line| line.starts_with("ursa-init"))
        .collect();
    assert!(examples.len() >= 15, "{help}");
    // A machine of its own: network, /run and the names of namespaces.
    let mut script = "set -e\nmount -t tmpfs none /run\nip netns add web\n".to_owned();
    for example in &examples {
        writeln!(script, "echo \"example: {}\"", example.replace('`', "")).unwrap();
        // This one only ends when it is told to.
        if example.starts_with("ursa-init watch") {
            writeln!(script, "code=0; timeout 1 {example} || code=$?; test $code = 124").unwrap();
        } else {
            writeln!(script, "{example} > /dev/null").unwrap();
        }
    }
    let path = format!("{}:{}", folder.path().display(), std::env::var("PATH").unwrap());
    let mut shell = Command::new("unshare");
    shell.args(["--net", "--mount", "bash", "-o", "pipefail", "-c", &script]).current_dir(folder.path());
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("URSA_")) {
        shell.env_remove(name);
    }
    let done = run(shell.env("PATH", path).env_remove("SSH_CONNECTION"));
    assert_eq!(done.code, 0, "{}{}", done.out, done.err);
    assert_eq!(done.out.lines().filter(|line| line.starts_with("example: ")).count(), examples.len());
}

#[test]
fn exit_codes_and_commands_are_listed() {
    let help = ok(init().arg("--help"));
    for words in
        ["apply", "remove", "confirm", "show", "diff", "check", "explain", "render", "config", "watch"]
    {
        assert!(
            section(&help, "Commands:", "Options:").iter().any(|line| line.trim().starts_with(words)),
            "{words}: {help}"
        );
    }
    assert!(!help.contains("guard"), "nobody types this");
    assert_eq!(section(&help, "Exit codes:", "never").len(), 5);
    for shell in ["bash", "zsh", "fish"] {
        assert!(ok(init().args(["completion", shell])).contains("exclude-outbound-owners"), "{shell}");
    }
    let pages = tempfile::tempdir().unwrap();
    ok(init().arg("man").arg(pages.path()));
    let page = std::fs::read_to_string(pages.path().join("ursa-init-apply.1")).unwrap();
    let page = page.replace('\\', "");
    assert!(page.contains("exclude-outbound-owners") && page.contains("ARRIVING CONNECTIONS"), "{page}");
}
