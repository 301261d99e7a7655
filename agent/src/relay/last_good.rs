//! The last-good configuration on disk: one checksummed file per resource, replaced atomically.
//!
//! A torn, foreign or corrupted file is left out with a warning: control sends the resource again, and until then
//! its absence refuses traffic rather than misdirecting it.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use nix::libc;
use sha2::{Digest, Sha256};

use super::access::grant;
use super::{Item, Kind, item_from_encoded};

const MAGIC: &[u8; 8] = b"URSALG1\n";
const CHECKSUM: usize = 32;
/// The most that is read of one file. Control's messages are smaller.
const MAX_FILE: u64 = 16 << 20;
/// The most that is read of all of a workload's files.
const MAX_ALL: u64 = 256 << 20;
/// Directories stay root's, so that the files' owner can't put anything else in their place; names are hashes.
const DIR_MODE: u32 = 0o755;

/// The last-good directory can't be read or written.
#[derive(Debug, thiserror::Error)]
#[error("can't {what} {}: {cause}", path.display())]
pub struct LastGoodError {
    what: &'static str,
    path: PathBuf,
    cause: io::Error,
}

fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> LastGoodError {
    let path = path.to_owned();
    move |cause| LastGoodError { what, path, cause }
}

/// The user of a shim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reader {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
}

/// The `xds` directory of one workload.
#[derive(Debug)]
pub struct LastGood {
    dir: PathBuf,
    /// Who may read the files: the shim's user, which can't read what is root's.
    reader: Option<Reader>,
    /// What is on disk: (type, name) → version.
    written: BTreeMap<(Kind, String), String>,
}

impl LastGood {
    /// The last-good directory under `dir`, which needn't exist yet.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into(), reader: None, written: BTreeMap::new() }
    }

    /// Files that are written from now on belong to `reader` alone, and only it can read them.
    #[must_use]
    pub fn readable_by(mut self, reader: Option<Reader>) -> Self {
        self.reader = reader;
        self
    }

    /// Reads whatever is there and intact.
    pub fn load(&mut self) -> Result<Vec<(Kind, String, Item)>, LastGoodError> {
        let mut items = Vec::new();
        let mut left = MAX_ALL;
        for kind in Kind::ALL {
            let dir = self.dir.join(kind.as_str());
            let entries = match fs::read_dir(&dir) {
                Ok(entries) => entries,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(failed("list", &dir)(error)),
            };
            for entry in entries {
                let path = entry.map_err(failed("list", &dir))?.path();
                if path.extension().is_none_or(|extension| extension != "pb") {
                    continue; // a temporary file of a process that died
                }
                let content = match read(&path, left.min(MAX_FILE)) {
                    Ok(content) => content,
                    Err(error) => {
                        tracing::warn!(path = %path.display(), %error,
                            "a last-good file can't be read and is left out; control will send the resource again");
                        continue;
                    }
                };
                left = left.saturating_sub(content.len() as u64);
                match parse(content) {
                    Some((name, item)) if path == self.path(kind, &name) => {
                        self.written.insert((kind, name.clone()), item.version.clone());
                        items.push((kind, name, item));
                    }
                    _ => {
                        tracing::warn!(path = %path.display(),
                        "a last-good file is damaged and left out; control will send the resource again");
                    }
                }
            }
        }
        Ok(items)
    }

    /// Makes the directory equal to `items`, writing only what differs. Additions go first, so that a full disk
    /// costs nothing that is already there.
    pub fn store(&mut self, items: &[(Kind, String, Item)]) -> Result<(), LastGoodError> {
        let mut gone: BTreeMap<(Kind, String), String> = self.written.clone();
        for (kind, name, item) in items {
            let key = (*kind, name.clone());
            gone.remove(&key);
            if self.written.get(&key) == Some(&item.version) {
                continue;
            }
            self.write(*kind, name, item)?;
            self.written.insert(key, item.version.clone());
        }
        for (key, _) in gone {
            let path = self.path(key.0, &key.1);
            match fs::remove_file(&path) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(failed("remove", &path)(error)),
            }
            self.written.remove(&key);
        }
        Ok(())
    }

    fn path(&self, kind: Kind, name: &str) -> PathBuf {
        // Names may hold any character and be longer than a file name.
        self.dir.join(kind.as_str()).join(format!("{}.pb", hex(&Sha256::digest(name.as_bytes())[..16])))
    }

    fn write(&self, kind: Kind, name: &str, item: &Item) -> Result<(), LastGoodError> {
        let path = self.path(kind, name);
        if let Some(dir) = path.parent() {
            fs::DirBuilder::new()
                .recursive(true)
                .mode(DIR_MODE)
                .create(dir)
                .map_err(failed("create", dir))?;
        }
        let mut content = Vec::with_capacity(MAGIC.len() + CHECKSUM + item.bytes.len());
        content.extend_from_slice(MAGIC);
        content.extend_from_slice(&Sha256::digest(&item.bytes));
        content.extend_from_slice(&item.bytes);
        write_atomic(&path, &content, 0o600, self.reader).map_err(failed("write", &path))
    }
}

/// Reads a file that belongs to somebody less trusted, who can't replace it but may have made it endless, or hold a
/// lease on it that would keep us waiting.
fn read(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("it is no regular file"));
    }
    let mut content = Vec::new();
    file.take(limit.saturating_add(1)).read_to_end(&mut content)?;
    if content.len() as u64 > limit {
        return Err(io::Error::other(format!("it is longer than the {limit} bytes that are left for it")));
    }
    Ok(content)
}

fn parse(mut content: Vec<u8>) -> Option<(String, Item)> {
    let body = content.strip_prefix(MAGIC.as_slice())?;
    let (checksum, body) = body.split_at_checked(CHECKSUM)?;
    if Sha256::digest(body).as_slice() != checksum {
        return None;
    }
    let start = content.len() - body.len();
    content.drain(..start);
    item_from_encoded(Bytes::from(content)).ok()
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        let _ = write!(text, "{byte:02x}"); // writing to a String can't fail
        text
    })
}

/// Writes beside the target and renames: a reader sees the old content or the new, never half of it.
pub(crate) fn write_atomic(path: &Path, content: &[u8], mode: u32, owner: Option<Reader>) -> io::Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".tmp");
    let temporary = path.with_file_name(name);
    match fs::remove_file(&temporary) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let result = (|| {
        let mut file: File = OpenOptions::new().write(true).create_new(true).mode(mode).open(&temporary)?;
        file.write_all(content)?;
        if let Some(owner) = owner {
            grant(&file, owner)?;
        }
        file.sync_data()?;
        fs::rename(&temporary, path)
    })();
    if result.is_err() {
        let _ = fs::remove_file(&temporary); // the first error is the one that matters
    }
    result
}

#[cfg(test)]
mod tests;
