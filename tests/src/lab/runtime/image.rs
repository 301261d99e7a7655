//! The one image of all containers, made by hand: a shell for pauses, and places for the machine's libraries.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context as _;
use serde_json::json;
use sha2::{Digest as _, Sha256};

use crate::lab::{Lab, create_open, mesh};

/// Its name. No registry has it.
pub const NAME: &str = "localhost/ursa-lab:1";
/// The lab's program in a container.
pub const APP: &str = "/lab/lab-app";
/// A static program.
const BUSYBOX: &str = "/bin/busybox";

/// Folders of the machine that every container sees, and where: `lab-app` wants the C library it was linked with.
pub fn mounts(lab_programs: &Path) -> [(PathBuf, &'static str); 2] {
    [(PathBuf::from("/usr"), "/usr"), (lab_programs.to_owned(), "/lab")]
}

/// Writes it as an archive that `podman load` and `ctr images import` read.
pub fn archive(lab: &Lab) -> anyhow::Result<PathBuf> {
    let dir = lab.dir().join("image");
    let (root, archive) = (dir.join("root"), dir.join("image.tar"));
    create_open(&dir)?;
    create_open(&root)?;
    for folder in ["usr", "lab", "proc", "sys", "dev", "etc", "tmp", "run"] {
        create_open(&root.join(folder))?;
    }
    std::fs::copy(BUSYBOX, root.join("busybox"))
        .with_context(|| format!("cannot copy {BUSYBOX}: run scripts/need-tools.sh"))?;
    for folder in ["bin", "sbin", "lib", "lib64"] {
        symlink(format!("usr/{folder}"), root.join(folder))?;
    }
    let tar = |to: &Path, from: &Path, what: &[&str]| {
        let mut command = Command::new("tar");
        command.args(["--owner=0", "--group=0", "-cf"]).arg(to).arg("-C").arg(from).args(what);
        mesh::run(&mut command, "").context("cannot pack the image")
    };
    tar(&dir.join("layer.tar"), &root, &["."])?;
    let layer = Sha256::digest(std::fs::read(dir.join("layer.tar"))?);
    let config = json!({
        "architecture": if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" },
        "os": "linux",
        "config": {"Entrypoint": ["/busybox", "sleep", "1000000"], "Env": ["PATH=/usr/sbin:/usr/bin"]},
        "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{layer:x}")]},
    });
    let manifest = json!([{"Config": "config.json", "RepoTags": [NAME], "Layers": ["layer.tar"]}]);
    std::fs::write(dir.join("config.json"), config.to_string())?;
    std::fs::write(dir.join("manifest.json"), manifest.to_string())?;
    tar(&archive, &dir, &["manifest.json", "config.json", "layer.tar"])?;
    Ok(archive)
}
