//! Files that are there whole or not at all, whenever the power goes.

use std::fs::{self, File, Metadata, OpenOptions, Permissions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _, fchown};
use std::path::{Path, PathBuf};

use super::error::{InstallError, io};

/// Begins the name of everything unfinished. Runtimes skip it: it ends in no extension that they know.
const UNFINISHED: &str = ".ursa-cni.unfinished";

/// Removes what a killed installer left. Only under the installers' lock.
pub(super) fn clean(dir: &Path) -> Result<(), InstallError> {
    for entry in fs::read_dir(dir).map_err(io("read", dir))?.flatten() {
        if entry.file_name().to_string_lossy().starts_with(UNFINISHED) {
            fs::remove_file(entry.path()).map_err(io("remove", &entry.path()))?;
        }
    }
    Ok(())
}

/// Puts `content` where `path` is, with mode and owner of what was there.
pub(super) fn replace(path: &Path, content: &[u8]) -> Result<(), InstallError> {
    replace_like(path, content, path)
}

/// Puts `content` where `path` is, with mode and owner of `like`; 0644 without one.
pub(super) fn replace_like(path: &Path, content: &[u8], like: &Path) -> Result<(), InstallError> {
    let like = match fs::symlink_metadata(like) {
        Ok(meta) => Some(meta),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(io("read", path)(error)),
    };
    write(path, &mut &*content, like.as_ref(), 0o644, |_| Ok(()))
}

/// Copies a program to where `path` is, once `works` says that the copy does.
pub(super) fn replace_program(
    path: &Path,
    from: &Path,
    works: impl FnOnce(&Path) -> Result<(), InstallError>,
) -> Result<(), InstallError> {
    let mut source = File::open(from).map_err(io("read", from))?;
    write(path, &mut source, None, 0o755, works)
}

fn write(
    path: &Path,
    content: &mut dyn io::Read,
    like: Option<&Metadata>,
    mode: u32,
    works: impl FnOnce(&Path) -> Result<(), InstallError>,
) -> Result<(), InstallError> {
    let unfinished = beside(path, UNFINISHED);
    let written = fill(&unfinished, content, like, mode)
        .map_err(io("write", path))
        .and_then(|()| works(&unfinished))
        .and_then(|()| rename(&unfinished, path));
    if written.is_err() {
        let _ = fs::remove_file(&unfinished);
    }
    written
}

fn fill(path: &Path, content: &mut dyn io::Read, like: Option<&Metadata>, mode: u32) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    let mut buffer = vec![0; 1 << 16];
    loop {
        let n = content.read(&mut buffer)?;
        if n == 0 {
            break;
        }
        file.write_all(&buffer[..n])?;
    }
    let mode = like.map_or(mode, |like| like.mode() & 0o7777);
    if let Some(like) = like {
        let own = file.metadata()?;
        if (own.uid(), own.gid()) != (like.uid(), like.gid()) {
            fchown(&file, Some(like.uid()), Some(like.gid()))?;
        }
    }
    file.set_permissions(Permissions::from_mode(mode))?;
    file.sync_all()
}

/// Renames within a directory, and has that written.
pub(super) fn rename(from: &Path, to: &Path) -> Result<(), InstallError> {
    fs::rename(from, to).map_err(io("write", to))?;
    sync_parent(to)
}

/// Removes a file, if it is there, and has that written.
pub(super) fn remove(path: &Path) -> Result<bool, InstallError> {
    match fs::remove_file(path) {
        Ok(()) => sync_parent(path).map(|()| true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(io("remove", path)(error)),
    }
}

fn sync_parent(path: &Path) -> Result<(), InstallError> {
    let dir = path.parent().unwrap_or(path);
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(io("sync", dir))
}

/// A name in the same directory.
pub(super) fn beside(path: &Path, name: &str) -> PathBuf {
    path.parent().unwrap_or(path).join(name)
}

/// Whether two files hold the same.
pub(super) fn same(a: &Path, b: &Path) -> bool {
    let read = || -> io::Result<bool> {
        let (mut a, mut b) = (File::open(a)?, File::open(b)?);
        if a.metadata()?.len() != b.metadata()?.len() {
            return Ok(false);
        }
        let (mut left, mut right) = (Vec::new(), Vec::new());
        a.read_to_end(&mut left)?;
        b.read_to_end(&mut right)?;
        Ok(left == right)
    };
    read().unwrap_or(false)
}
