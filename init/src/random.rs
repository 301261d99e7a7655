//! Numbers that nobody can guess.

use std::fs::File;
use std::io::{self, Read as _};

/// 128 random bits as 32 hexadecimal digits.
pub(crate) fn token() -> io::Result<String> {
    let mut bytes = [0; 16];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes.iter().fold(String::new(), |text, byte| format!("{text}{byte:02x}")))
}
