//! The plugin that does nothing, left behind until the last pod that knows it has gone.
//!
//! Runtimes keep the list that a pod was started with and call DEL by it, long after the configuration is gone; a
//! missing program would keep such a pod from ending. The stub is the plugin itself under another name, with a link
//! in its old place: no gap, no copy, and `ls -l` shows it.

use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::PathBuf;

use super::error::{InstallError, io};
use super::{Layout, file};

const NAME: &str = "ursa-cni-stub";

/// Whether this process is the stub: it passes every pod on as it is.
pub(crate) fn is_stub() -> bool {
    std::env::current_exe().is_ok_and(|path| path.file_name().is_some_and(|name| name == NAME))
}

/// The stub's file.
pub(super) fn path(layout: &Layout) -> PathBuf {
    layout.bin_dir.join(NAME)
}

/// Whether the stub is in the program's place.
pub(super) fn is_in_place(layout: &Layout) -> bool {
    fs::read_link(layout.program()).is_ok_and(|target| target.ends_with(NAME)) && path(layout).is_file()
}

/// Puts it into the program's place. Under the installers' lock.
pub(super) fn put(layout: &Layout) -> Result<(), InstallError> {
    if is_in_place(layout) {
        return Ok(());
    }
    let (program, stub) = (layout.program(), path(layout));
    file::clean(&layout.bin_dir)?;
    file::remove(&stub)?;
    if fs::hard_link(&program, &stub).is_err() {
        // It is gone already, or the file system knows no links: this very program does as well.
        let own = std::env::current_exe().map_err(io("find", &program))?;
        file::replace_program(&stub, &own, |_| Ok(()))?;
    }
    let unfinished = file::beside(&program, ".ursa-cni.unfinished-link");
    symlink(NAME, &unfinished).map_err(io("write", &unfinished))?;
    file::rename(&unfinished, &program)
}

/// Removes its file, where the program itself is in place again.
pub(super) fn forget(layout: &Layout) -> Result<(), InstallError> {
    match fs::symlink_metadata(layout.program()) {
        Ok(meta) if meta.is_symlink() => Ok(()),
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io("read", &layout.program())(error)),
        _ => file::remove(&path(layout)).map(drop),
    }
}
