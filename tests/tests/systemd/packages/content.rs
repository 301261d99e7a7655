//! What the packages are, looked at without installing them.

use std::path::Path;
use std::process::{Command, Output};

use ursa_tests::lab::packages::{Format, Packages};
use ursa_tests::lab::{Lab, Programs};

const OURS: [&str; 4] = ["ursa", "ursa-agent", "ursa-control", "ursa-cni"];

fn lab() -> Lab {
    Lab::new(&Programs::discover().unwrap()).unwrap()
}

fn run(program: &str, arguments: &[&str], files: &[impl AsRef<Path>]) -> Output {
    let files = files.iter().map(AsRef::as_ref);
    Command::new(program)
        .args(arguments)
        .args(files)
        .output()
        .unwrap_or_else(|error| panic!("{program}: {error}"))
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

#[test]
fn lintian_finds_no_error() {
    let lab = lab();
    // Envoy as well: the whole list.
    let dir = lab.dir().join("all");
    let packages =
        Packages::build_into(&dir, &Programs::discover().unwrap(), Format::Deb, "0.1.0", &[]).unwrap();
    let files = packages.files().unwrap();
    assert_eq!(files.len(), OURS.len() + 1);
    let found = run("lintian", &["--no-cfg", "--allow-root", "--fail-on=error", "--show-overrides"], &files);
    eprintln!("{}", text(&found));
    assert!(found.status.success(), "{}", text(&found));
    assert!(!text(&found).lines().any(|line| line.starts_with("E: ")));
}

#[test]
fn rpm_finds_what_it_needs_to_know() {
    let lab = lab();
    let packages = Packages::build(&lab, Format::Rpm, "0.1.0", &OURS).unwrap();
    for file in packages.files().unwrap() {
        let query = |arguments: &[&str]| {
            let output = run("rpm", &[&["--query", "--package"], arguments].concat(), &[&file]);
            assert!(output.status.success(), "{}", text(&output));
            String::from_utf8(output.stdout).unwrap()
        };
        assert!(text(&run("rpm", &["--checksig"], &[&file])).contains("digests OK"));
        let name = query(&["--queryformat", "%{NAME}"]);
        // path, size, time, digest, mode, owner, group, isconfig, isdoc, …
        for line in query(&["--dump"]).lines() {
            let fields: Vec<_> = line.split(' ').collect();
            let [path, _, _, _, mode, owner, group, config, ..] = fields[..] else { panic!("{line}") };
            assert_eq!((owner, group), ("root", "root"), "{line}");
            let folder = mode.starts_with("04");
            assert_eq!(config == "1", path.starts_with("/etc/") && !folder, "{line}");
            assert!(mode.ends_with("644") || mode.ends_with("755"), "{line}");
        }
        // `n` is noreplace: what somebody edited stays.
        for line in query(&["--queryformat", "[%{FILENAMES} %{FILEFLAGS:fflags}\n]"]).lines() {
            let (path, flags) = line.split_once(' ').unwrap();
            assert!(!flags.contains('c') || flags.contains('n'), "{line}");
            assert!(!path.starts_with("/usr/local"), "{line}");
        }
        let requires = query(&["--requires"]);
        assert!(
            name == "ursa" || name == "ursa-cni" || requires.contains("ursa = 0.1.0-1"),
            "{name}: {requires}"
        );
        assert!(requires.contains("libc.so.6"), "{name}: {requires}");
    }
}

/// Every maintainer script is one that the smallest of shells can read.
#[test]
fn scripts_are_plain_shell() {
    let lab = lab();
    let packages = Packages::build(&lab, Format::Deb, "0.1.0", &OURS).unwrap();
    let mut seen = 0;
    for file in packages.files().unwrap() {
        let dir = lab.dir().join("control").join(file.file_stem().unwrap());
        std::fs::create_dir_all(dir.parent().unwrap()).unwrap();
        let file = file.to_str().unwrap();
        let done = run("dpkg-deb", &["--control", file, dir.to_str().unwrap()], &[] as &[&str]);
        assert!(done.status.success(), "{}", text(&done));
        for kind in ["preinst", "postinst", "prerm", "postrm"] {
            let script = dir.join(kind);
            if script.exists() {
                seen += 1;
                let read = run("dash", &["-n"], &[&script]);
                assert!(read.status.success(), "{}", text(&read));
                // Called as nobody calls it, it does nothing and says that it is done.
                let odd =
                    run("dash", &[script.to_str().unwrap(), "a-call-that-nobody-makes"], &[] as &[&str]);
                assert!(odd.status.success(), "{file} {kind}: {}", text(&odd));
            }
        }
    }
    assert_eq!(seen, 7, "three of the agent, three of the control plane, one of the plugin");
}

#[test]
fn equal_inputs_make_equal_packages() {
    let lab = lab();
    for format in [Format::Deb, Format::Rpm] {
        let build = |folder: &str| {
            let dir = lab.dir().join(format!("{folder}-{}", format.name()));
            Packages::build_into(&dir, &lab.programs, format, "0.1.0", &["ursa-cni"])
                .unwrap()
                .files()
                .unwrap()
        };
        let (one, two) = (build("one"), build("two"));
        let read = |files: &[std::path::PathBuf]| std::fs::read(&files[0]).unwrap();
        assert_eq!(one[0].file_name(), two[0].file_name());
        assert!(read(&one) == read(&two), "{} differs", one[0].display());
    }
}
