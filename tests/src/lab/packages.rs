//! Packages of the programs under test, as `make packages PROFILE=debug` makes them.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, bail, ensure};

use super::runtime::daemonset::repository;
use super::vm::Vm;
use super::vm::exec::Output;
use super::{Lab, Programs};

/// Which kind of packages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// Debian's.
    Deb,
    /// Those of Fedora, Red Hat and SUSE. Without their dependencies: a machine of the lab has only Debian's.
    Rpm,
}

/// Packages of one version in a folder.
#[derive(Debug, Clone)]
pub struct Packages {
    /// Where they are.
    pub dir: PathBuf,
    format: Format,
}

impl Packages {
    /// Builds these packages with this version number into a folder of the lab.
    pub fn build(lab: &Lab, format: Format, version: &str, names: &[&str]) -> anyhow::Result<Self> {
        let dir = lab.dir().join(format!("packages-{}-{version}", format.name()));
        Self::build_into(&dir, &lab.programs, format, version, names)
    }

    /// Builds them into any folder.
    pub fn build_into(
        dir: &Path,
        programs: &Programs,
        format: Format,
        version: &str,
        names: &[&str],
    ) -> anyhow::Result<Self> {
        let doc = dir.join("doc");
        let run = |command: &mut Command| -> anyhow::Result<()> {
            let output = command.current_dir(repository()).output().context("cannot build packages")?;
            let text = String::from_utf8_lossy(&output.stderr);
            ensure!(output.status.success(), "packages can't be built: {text}");
            Ok(())
        };
        run(Command::new("scripts/man.sh").arg(&programs.bin_dir).arg(&doc))?;
        run(Command::new("packaging/build.py")
            .arg("--bin")
            .arg(&programs.bin_dir)
            .arg("--envoy")
            .arg(&programs.envoy)
            .arg("--doc")
            .arg(&doc)
            .arg("--out")
            .arg(dir)
            .args(["--fast", "--format", format.name(), "--version", version])
            .args(names))?;
        Ok(Self { dir: dir.to_owned(), format })
    }

    /// Their files.
    pub fn files(&self) -> anyhow::Result<Vec<PathBuf>> {
        let mut files = Vec::new();
        for entry in std::fs::read_dir(&self.dir)? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == self.format.name()) {
                files.push(path);
            }
        }
        files.sort();
        Ok(files)
    }

    /// Installs them all on a machine, in place of any other version, newer or older. The machine may be off.
    pub fn install(&self, vm: &Vm) -> anyhow::Result<Output> {
        let mut command: Vec<String> = match self.format {
            Format::Deb => ["dpkg", "--install"].map(str::to_owned).into(),
            Format::Rpm => {
                ["rpm", "--upgrade", "--oldpackage", "--replacepkgs", "--nodeps"].map(str::to_owned).into()
            }
        };
        for file in self.files()? {
            let name =
                file.file_name().context("invariant: a file has a name")?.to_string_lossy().into_owned();
            let place = format!("/var/cache/packages/{name}");
            vm.copy_in(&file, &place, 0o644)?;
            command.push(place);
        }
        let done = vm.run(&command.iter().map(String::as_str).collect::<Vec<_>>())?;
        vm.sh("rm -r /var/cache/packages")?;
        if !done.ok() {
            bail!("{command:?} on {}: {}", vm.host.netns, done.brief());
        }
        Ok(done)
    }
}

impl Format {
    /// As files are called.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Deb => "deb",
            Self::Rpm => "rpm",
        }
    }

    /// Removes packages; `settings` is what is in the environment then.
    pub fn remove(self, vm: &Vm, settings: &[&str], names: &[&str]) -> anyhow::Result<Output> {
        let remove: &[&str] = match self {
            Self::Deb => &["dpkg", "--remove"],
            Self::Rpm => &["rpm", "--erase"],
        };
        vm.run(&[&["env"], settings, remove, names].concat())
    }

    /// Removes packages and everything that was made by them.
    pub fn purge(self, vm: &Vm, settings: &[&str], names: &[&str]) -> anyhow::Result<Output> {
        match self {
            Self::Deb => vm.run(&[&["env"], settings, &["dpkg", "--purge"], names].concat()),
            Self::Rpm => self.remove(vm, &[&["URSA_PURGE=1"], settings].concat(), names),
        }
    }

    /// Whether a package is installed, apart from its configuration.
    pub fn installed(self, vm: &Vm, name: &str) -> anyhow::Result<bool> {
        Ok(match self {
            Self::Deb => vm
                .run(&["dpkg-query", "--show", "--showformat=${Status}", name])?
                .stdout
                .ends_with("ok installed"),
            Self::Rpm => vm.run(&["rpm", "--query", name])?.ok(),
        })
    }
}
