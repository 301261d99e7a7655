//! Names of users, read from `/etc/passwd` and nowhere else: the name service could ask a network that isn't there
//! yet, and hang.

use std::path::Path;

/// The file of users.
pub const PASSWD: &str = "/etc/passwd";

/// The number of a user.
pub fn uid(passwd: &Path, name: &str) -> Result<u32, String> {
    let text =
        std::fs::read_to_string(passwd).map_err(|e| format!("can't read {}: {e}", passwd.display()))?;
    let entry = |line: &str| {
        let mut fields = line.split(':');
        (fields.next()? == name).then(|| fields.nth(1)?.parse().ok())?
    };
    text.lines().find_map(entry).ok_or_else(|| {
        format!(
            "there is no user `{name}` in {}: create it (`useradd --system --no-create-home {name}`), or pass its \
             number; users of a directory service aren't looked up, because a lookup can hang",
            passwd.display()
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_from_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let passwd = folder.path().join("passwd");
        std::fs::write(&passwd, "root:x:0:0:root:/root:/bin/sh\nkuma-dp:x:5678:5678::/:/bin/false\nbad:x\n")
            .unwrap();
        assert_eq!(uid(&passwd, "kuma-dp"), Ok(5678));
        assert_eq!(uid(&passwd, "root"), Ok(0));
        for missing in ["kuma", "bad", ""] {
            assert!(uid(&passwd, missing).unwrap_err().contains("useradd"), "{missing}");
        }
        assert!(uid(Path::new("/nowhere"), "x").unwrap_err().contains("can't read"));
    }
}
