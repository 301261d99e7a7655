//! A workload's dataplane token: read from its file whenever the workload is registered, and kept nowhere.

use std::fs;
use std::io::Read as _;
use std::path::Path;

/// A token is about a kilobyte.
const LONGEST: u64 = 64 * 1024;

/// The token in `path`. The error says what to do; it never quotes the file.
pub(super) fn read(path: &Path) -> Result<String, String> {
    let failed = |why: String| {
        format!(
            "the dataplane token file {} {why}; write a token there (`ursa generate dataplane-token`), or take `dataplaneTokenFile` out",
            path.display()
        )
    };
    let unreadable = |error: std::io::Error| failed(format!("can't be read: {error}"));
    // Looked at first: opening a pipe would wait for somebody to write into it.
    let kind = fs::metadata(path).map_err(unreadable)?;
    if !kind.is_file() {
        return Err(failed("is no regular file".to_owned()));
    }
    if kind.len() > LONGEST {
        return Err(failed(format!("has {} bytes, which is no token", kind.len())));
    }
    let mut text = String::new();
    fs::File::open(path).and_then(|file| file.take(LONGEST).read_to_string(&mut text)).map_err(unreadable)?;
    let token = text.trim();
    if token.is_empty() {
        return Err(failed("is empty".to_owned()));
    }
    Ok(token.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_the_files_text_and_anything_else_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("token");
        let error = read(&file).unwrap_err();
        assert!(error.contains("No such file") && error.contains("generate dataplane-token"), "{error}");
        fs::write(&file, " \n").unwrap();
        assert!(read(&file).unwrap_err().contains("is empty"));
        fs::write(&file, "a.b.c\n").unwrap();
        assert_eq!(read(&file).unwrap(), "a.b.c");
        assert!(read(dir.path()).unwrap_err().contains("no regular file"));
        fs::write(&file, "x".repeat(70_000)).unwrap();
        assert!(read(&file).unwrap_err().contains("70000 bytes"));
    }
}
