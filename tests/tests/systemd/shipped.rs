//! The files of `systemd/` on a machine, without the packages that bring them.

use std::path::{Path, PathBuf};

use ursa_tests::lab::vm::Vm;

/// Our programs, where the units look for them; what they do doesn't matter here.
const PROGRAMS: [&str; 4] =
    ["/usr/bin/ursa-agent", "/usr/bin/ursa-control", "/usr/libexec/ursa/ursa-shim", "/usr/sbin/ursa-init"];

/// Puts units, users, folders, presets and polkit rule where the packages do, and stubs for the programs; the names of the
/// units. The machine is off.
pub(crate) fn install(vm: &Vm) -> Vec<String> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../systemd");
    let mut units = Vec::new();
    for (folder, target) in [
        ("", "/usr/lib/systemd/system"),
        ("sysusers.d", "/usr/lib/sysusers.d"),
        ("tmpfiles.d", "/usr/lib/tmpfiles.d"),
        ("presets", "/usr/lib/systemd/system-preset"),
        ("polkit", "/usr/share/polkit-1/rules.d"),
    ] {
        for file in files(&source.join(folder)) {
            let name = file.file_name().unwrap().to_str().unwrap();
            vm.copy_in(&file, &format!("{target}/{name}"), 0o644).unwrap();
            if folder.is_empty() {
                units.push(name.to_owned());
            }
        }
    }
    assert!(units.len() > 5, "{units:?}");
    for program in PROGRAMS {
        vm.write_as(program, "root", 0o755, b"#!/bin/sh\nexit 1\n").unwrap();
    }
    units
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let mut files: Vec<PathBuf> = entries.filter(|path| path.is_file()).collect();
    files.sort();
    files
}
