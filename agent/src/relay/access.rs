//! Who may read what the agent keeps on disk for a shim.

use std::fs::File;
use std::io;
use std::os::unix::fs::fchown;

use nix::unistd::Uid;
use rustix::fs::{XattrFlags, fsetxattr};

use super::Reader;

/// The extended attribute that holds a file's access control list (`acl(5)`).
const ATTRIBUTE: &str = "system.posix_acl_access";
/// Its version in the kernel's form (`linux/posix_acl_xattr.h`).
const VERSION: u32 = 2;
const READ: u16 = 4;
const WRITE: u16 = 2;

/// Lets `reader` read the file. Root hands it over; an agent that isn't root, which can't, stays its owner and names
/// the reader in the file's access control list.
pub(super) fn grant(file: &File, reader: Reader) -> io::Result<()> {
    if Uid::effective().is_root() {
        return fchown(file, Some(reader.uid), Some(reader.gid));
    }
    fsetxattr(file, ATTRIBUTE, &list(reader.uid), XattrFlags::empty()).map_err(|error| {
        let error = io::Error::from(error);
        io::Error::new(
            error.kind(),
            format!(
                "{error} (naming uid {} in its access control list; does this file system have them?)",
                reader.uid
            ),
        )
    })
}

/// `u::rw-,u:<uid>:r--,g::---,m::r--,o::---`, sorted as the kernel wants it.
fn list(uid: u32) -> Vec<u8> {
    /// No id belongs to the entry (`ACL_UNDEFINED_ID`).
    const NOBODY: u32 = u32::MAX;
    let entries: [(u16, u16, u32); 5] = [
        (0x01, READ | WRITE, NOBODY), // ACL_USER_OBJ
        (0x02, READ, uid),            // ACL_USER
        (0x04, 0, NOBODY),            // ACL_GROUP_OBJ
        (0x10, READ, NOBODY),         // ACL_MASK
        (0x20, 0, NOBODY),            // ACL_OTHER
    ];
    let mut bytes = VERSION.to_le_bytes().to_vec();
    for (tag, rights, id) in entries {
        bytes.extend(tag.to_le_bytes());
        bytes.extend(rights.to_le_bytes());
        bytes.extend(id.to_le_bytes());
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    /// As root, reading as somebody else: the list names one user and nobody besides.
    #[test]
    fn the_kernel_reads_the_list_as_it_is_meant() {
        if !Uid::effective().is_root() {
            return; // only root can become the readers
        }
        let dir = tempfile::tempdir().unwrap();
        std::fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o711)).unwrap();
        let path = dir.path().join("leaf");
        std::fs::write(&path, "key").unwrap();
        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
        let file = File::open(&path).unwrap();
        fsetxattr(&file, ATTRIBUTE, &list(70_001), XattrFlags::empty()).unwrap();
        let reads = |uid: u32, gid: u32| {
            use std::os::unix::process::CommandExt;
            let mut cat = Command::new("cat");
            let cat = cat.arg(&path).uid(uid).gid(gid).stderr(std::process::Stdio::null());
            cat.output().unwrap().stdout == b"key"
        };
        assert!(reads(70_001, 70_001), "whom the list names");
        assert!(!reads(70_002, 70_001) && !reads(70_002, 0), "nobody else, the owner's group neither");
    }
}
