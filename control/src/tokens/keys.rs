//! RSA keys in the forms that secrets hold them.

use aws_lc_rs::{
    encoding::AsDer,
    rsa::{KeyPair, KeySize},
    signature::KeyPair as _,
};
use jsonwebtoken::{DecodingKey, EncodingKey};

/// A new RSA key of 2048 bits in PEM. Takes up to a second of CPU, so not on the async threads.
pub(super) async fn generate() -> Result<String, String> {
    tokio::task::spawn_blocking(|| {
        let pair = KeyPair::generate(KeySize::Rsa2048).map_err(|_| "key generation failed".to_owned())?;
        let der = AsDer::<aws_lc_rs::encoding::Pkcs8V1Der<'_>>::as_der(&pair)
            .map_err(|_| "a new key can't be encoded".to_owned())?;
        Ok(pem::encode(&pem::Pem::new("PRIVATE KEY", der.as_ref())))
    })
    .await
    .map_err(|error| error.to_string())?
}

/// The key pair in a secret: PEM, or DER as old versions wrote it.
fn pair(secret: &[u8]) -> Result<KeyPair, String> {
    let der = pem::parse(secret).map_or_else(|_| secret.to_vec(), |parsed| parsed.contents().to_vec());
    KeyPair::from_pkcs8(&der)
        .or_else(|_| KeyPair::from_der(&der))
        .map_err(|error| format!("it is no RSA private key in PEM ({error})"))
}

/// The key that signs.
pub(super) fn signing(secret: &[u8]) -> Result<EncodingKey, String> {
    let pair = pair(secret)?;
    let der = AsDer::<aws_lc_rs::encoding::Pkcs8V1Der<'_>>::as_der(&pair)
        .map_err(|_| "the key can't be encoded".to_owned())?;
    let text = pem::encode(&pem::Pem::new("PRIVATE KEY", der.as_ref()));
    EncodingKey::from_rsa_pem(text.as_bytes()).map_err(|error| error.to_string())
}

/// The key that verifies: the public half of a private key, or a public key.
pub(super) fn verifying(secret: &[u8]) -> Result<DecodingKey, String> {
    match pair(secret) {
        Ok(pair) => Ok(DecodingKey::from_rsa_der(pair.public_key().as_ref())),
        Err(reason) => DecodingKey::from_rsa_pem(secret).map_err(|_| reason),
    }
}

/// The public half of a private key in PEM.
pub(super) fn public_pem(secret: &[u8]) -> Result<String, String> {
    Ok(pem::encode(&pem::Pem::new("RSA PUBLIC KEY", pair(secret)?.public_key().as_ref())))
}
