//! Envelope encryption of what must not be readable in the database file.
//!
//! Every value has a data key of its own; the data key is wrapped by a key of the key file, whose id
//! stands in the value. So a rotation of the key file's key rewraps 60 bytes per value.

use std::{
    collections::BTreeMap,
    fs,
    io::{ErrorKind, Write},
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::Path,
};

use aws_lc_rs::{
    aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey},
    rand::{SecureRandom, SystemRandom},
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde::{Deserialize, Serialize};

use super::StoreError;

const FORMAT: u8 = 1;
const KEY_LEN: usize = 32;
const WRAPPED_LEN: usize = NONCE_LEN + KEY_LEN + 16;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct KeyFile {
    /// The id of the key that new values are wrapped with.
    primary: String,
    /// Id → key in base64.
    keys: BTreeMap<String, String>,
}

/// The keys of the key file, ready for use.
pub(super) struct Vault {
    primary: String,
    keys: BTreeMap<String, LessSafeKey>,
    origin: String,
    random: SystemRandom,
}

impl Vault {
    /// Reads the key file, or makes one.
    pub(super) fn open(path: &Path) -> Result<Self, StoreError> {
        let origin = path.display().to_string();
        let text = match fs::read(path) {
            Ok(text) => text,
            Err(error) if error.kind() == ErrorKind::NotFound => create(path)?,
            Err(error) => {
                return Err(StoreError::Key(format!(
                    "can't read the store's key file {origin}: {error}; it must be readable by the user of ursa-control"
                )));
            }
        };
        let mode = fs::metadata(path).map(|found| found.permissions().mode() & 0o777);
        if let Ok(mode) = mode
            && mode & 0o077 != 0
        {
            return Err(StoreError::Key(format!(
                "the store's key file {origin} can be read by others (mode {mode:o}); run: chmod 600 {origin}"
            )));
        }
        let file: KeyFile = serde_json::from_slice(&text).map_err(|error| {
            StoreError::Key(format!(
                "the store's key file {origin} is broken: {error}; restore it from a backup"
            ))
        })?;
        let mut keys = BTreeMap::new();
        for (id, encoded) in &file.keys {
            let raw = STANDARD.decode(encoded).ok().filter(|raw| raw.len() == KEY_LEN).ok_or_else(|| {
                StoreError::Key(format!(
                    "key {id:?} in the store's key file {origin} isn't {KEY_LEN} bytes in base64"
                ))
            })?;
            keys.insert(id.clone(), cipher(&raw)?);
        }
        if !keys.contains_key(&file.primary) {
            return Err(StoreError::Key(format!(
                "the store's key file {origin} names {:?} as primary, but holds no such key",
                file.primary
            )));
        }
        Ok(Self { primary: file.primary, keys, origin, random: SystemRandom::new() })
    }

    /// Encrypts `plain`, bound to the place it is stored at.
    pub(super) fn seal(&self, place: &str, plain: &[u8]) -> Result<Vec<u8>, StoreError> {
        let mut data_key = [0_u8; KEY_LEN];
        self.random.fill(&mut data_key).map_err(|_| random_failed())?;
        let kek = &self.keys[&self.primary];
        let id_len = u8::try_from(self.primary.len())
            .map_err(|_| StoreError::Key(format!("key id {:?} is longer than 255 bytes", self.primary)))?;
        let mut out = vec![FORMAT, id_len];
        out.extend_from_slice(self.primary.as_bytes());
        self.encrypt(kek, place, &data_key, &mut out)?;
        self.encrypt(&cipher(&data_key)?, place, plain, &mut out)?;
        Ok(out)
    }

    /// Decrypts what [`Vault::seal`] made for the same place.
    pub(super) fn unseal(&self, place: &str, sealed: &[u8]) -> Result<Vec<u8>, StoreError> {
        let corrupt = || StoreError::Corrupt(place.to_owned(), "its encryption doesn't fit".into());
        let (&[format, id_len], rest) = sealed.split_first_chunk::<2>().ok_or_else(corrupt)?;
        if format != FORMAT || rest.len() < usize::from(id_len) + WRAPPED_LEN {
            return Err(corrupt());
        }
        let (id, rest) = rest.split_at(usize::from(id_len));
        let id = String::from_utf8_lossy(id);
        let kek = self.keys.get(id.as_ref()).ok_or_else(|| {
            StoreError::Key(format!(
                "{place} is encrypted with key {id:?}, which the key file {} doesn't hold; add that key to it again",
                self.origin
            ))
        })?;
        let (wrapped, body) = rest.split_at(WRAPPED_LEN);
        let data_key = decrypt(kek, place, wrapped).ok_or_else(corrupt)?;
        decrypt(&cipher(&data_key)?, place, body).ok_or_else(corrupt)
    }

    fn encrypt(
        &self,
        key: &LessSafeKey,
        place: &str,
        plain: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<(), StoreError> {
        let mut nonce = [0_u8; NONCE_LEN];
        self.random.fill(&mut nonce).map_err(|_| random_failed())?;
        let mut body = plain.to_vec();
        key.seal_in_place_append_tag(
            Nonce::assume_unique_for_key(nonce),
            Aad::from(place.as_bytes()),
            &mut body,
        )
        .map_err(|_| StoreError::Failed("encryption failed".into()))?;
        out.extend_from_slice(&nonce);
        out.extend_from_slice(&body);
        Ok(())
    }
}

fn decrypt(key: &LessSafeKey, place: &str, sealed: &[u8]) -> Option<Vec<u8>> {
    let (nonce, body) = sealed.split_at_checked(NONCE_LEN)?;
    let mut body = body.to_vec();
    let nonce = Nonce::try_assume_unique_for_key(nonce).ok()?;
    let plain = key.open_in_place(nonce, Aad::from(place.as_bytes()), &mut body).ok()?;
    Some(plain.to_vec())
}

fn cipher(raw: &[u8]) -> Result<LessSafeKey, StoreError> {
    let key = UnboundKey::new(&AES_256_GCM, raw)
        .map_err(|_| StoreError::Key("a key isn't 32 bytes long".into()))?;
    Ok(LessSafeKey::new(key))
}

fn random_failed() -> StoreError {
    StoreError::Failed("the system's random generator failed".into())
}

/// Writes a new key file with one key; durable before anything is encrypted with it.
fn create(path: &Path) -> Result<Vec<u8>, StoreError> {
    let fail = |error: std::io::Error| {
        StoreError::Key(format!("can't create the store's key file {}: {error}", path.display()))
    };
    let mut raw = [0_u8; KEY_LEN];
    SystemRandom::new().fill(&mut raw).map_err(|_| random_failed())?;
    let id = uuid::Uuid::new_v4().simple().to_string()[..8].to_owned();
    let file = KeyFile { primary: id.clone(), keys: BTreeMap::from([(id, STANDARD.encode(raw))]) };
    let mut text = serde_json::to_vec_pretty(&file).map_err(|error| StoreError::Key(error.to_string()))?;
    text.push(b'\n');
    let draft = path.with_extension("key.new");
    let mut out = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&draft)
        .map_err(fail)?;
    out.write_all(&text).map_err(fail)?;
    out.sync_all().map_err(fail)?;
    fs::rename(&draft, path).map_err(fail)?;
    if let Some(dir) = path.parent().filter(|dir| !dir.as_os_str().is_empty()) {
        fs::File::open(dir).and_then(|dir| dir.sync_all()).map_err(fail)?;
    }
    Ok(text)
}
