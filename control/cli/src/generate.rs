//! `ursa generate`: tokens, certificates and keys.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context as _, bail};
use base64::Engine as _;
use serde_json::{Value, json};

use crate::args::{
    DataplaneTokenArgs, GenerateArgs, Global, OfflineArgs, PublicKeyArgs, SigningKeyArgs, TlsCertificateArgs,
    UserTokenArgs, ZoneTokenArgs, parse_duration,
};
use crate::config::Session;
use crate::output::{put, say};

/// `ursa generate`
pub(crate) async fn run(global: &Global, args: GenerateArgs) -> anyhow::Result<()> {
    match args {
        GenerateArgs::DataplaneToken(args) => dataplane_token(global, args).await,
        GenerateArgs::ZoneToken(args) => zone_token(global, args).await,
        GenerateArgs::UserToken(args) => user_token(global, args).await,
        GenerateArgs::TlsCertificate(args) => tls_certificate(&args),
        GenerateArgs::SigningKey(args) => signing_key(&args),
        GenerateArgs::PublicKey(args) => public_key(&args),
    }
}

async fn dataplane_token(global: &Global, args: DataplaneTokenArgs) -> anyhow::Result<()> {
    if !["", "dataplane"].contains(&args.proxy_type.as_str()) {
        bail!("{} is not a valid proxy type", args.proxy_type);
    }
    let mut tags: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for tag in &args.tags {
        let (name, values) =
            tag.split_once('=').with_context(|| format!("tag {tag:?} must be formatted as name=value"))?;
        tags.insert(name.to_owned(), values.split(',').map(str::to_owned).collect());
    }
    let session = Session::open(global)?;
    let mesh = session.mesh(args.mesh.as_deref());
    let claims = json!({"Name": args.name, "Mesh": mesh, "Tags": tags, "Type": args.proxy_type,
        "Workload": args.workload});
    let request = json!({"name": args.name, "mesh": mesh, "tags": tags, "type": args.proxy_type,
        "workload": args.workload, "validFor": args.valid_for});
    issue(&session, "/tokens/dataplane", &request, claims, &args.offline, &args.valid_for).await
}

async fn zone_token(global: &Global, args: ZoneTokenArgs) -> anyhow::Result<()> {
    let claims = json!({"Zone": args.zone, "Scope": args.scope});
    let request = json!({"zone": args.zone, "scope": args.scope, "validFor": args.valid_for});
    issue(&Session::open(global)?, "/tokens/zone", &request, claims, &args.offline, &args.valid_for).await
}

async fn user_token(global: &Global, args: UserTokenArgs) -> anyhow::Result<()> {
    let claims = json!({"Name": args.name, "Groups": args.groups});
    let request = json!({"name": args.name, "groups": args.groups, "validFor": args.valid_for});
    issue(&Session::open(global)?, "/tokens/user", &request, claims, &args.offline, &args.valid_for).await
}

/// Asks the control plane, or signs here with a key that the operator holds.
async fn issue(
    session: &Session,
    path: &str,
    request: &Value,
    claims: Value,
    offline: &OfflineArgs,
    valid_for: &str,
) -> anyhow::Result<()> {
    match (&offline.signing_key_path, &offline.kid) {
        (None, None) => {
            put!("{}", session.api.post(path, request).await.context("failed to generate a token")?.text());
            Ok(())
        }
        (None, Some(_)) => bail!(
            "--kid names the key of --signing-key-path, which isn't given; without it the control plane signs"
        ),
        (Some(_), None) => bail!("--kid is required when --signing-key-path is used"),
        (Some(key), Some(kid)) => {
            put!("{}", sign(claims, key, kid, valid_for)?);
            Ok(())
        }
    }
}

/// Signs as the control plane does: a few seconds backdated, for clocks that differ.
fn sign(mut claims: Value, key: &Path, kid: &str, valid_for: &str) -> anyhow::Result<String> {
    let lifetime = parse_duration(valid_for).map_err(anyhow::Error::msg).context("--valid-for")?;
    let now = time::OffsetDateTime::now_utc().unix_timestamp();
    let begin = now - 5;
    if let Value::Object(claims) = &mut claims {
        claims.insert("jti".into(), uuid::Uuid::new_v4().to_string().into());
        claims.insert("iat".into(), begin.into());
        claims.insert("nbf".into(), begin.into());
        claims.insert("exp".into(), now.saturating_add_unsigned(lifetime.as_secs()).into());
    }
    let pem = std::fs::read(key).with_context(|| format!("cannot read the signing key {}", key.display()))?;
    let key = jsonwebtoken::EncodingKey::from_rsa_pem(&pem)
        .with_context(|| format!("{} is not an RSA private key in PEM form", key.display()))?;
    let mut header = jsonwebtoken::Header::new(jsonwebtoken::Algorithm::RS256);
    header.kid = Some(kid.to_owned());
    Ok(jsonwebtoken::encode(&header, &claims, &key)?)
}

fn tls_certificate(args: &TlsCertificateArgs) -> anyhow::Result<()> {
    let algorithm = match args.key_type.as_str() {
        "rsa" => &rcgen::PKCS_RSA_SHA256,
        _ => &rcgen::PKCS_ECDSA_P256_SHA256,
    };
    let key = rcgen::KeyPair::generate_for(algorithm).context("cannot generate the key")?;
    let mut params = rcgen::CertificateParams::new(args.hostnames.clone())?;
    params.not_before = time::OffsetDateTime::now_utc() - time::Duration::minutes(5);
    params.not_after = params.not_before + time::Duration::days(3650);
    params.distinguished_name.push(rcgen::DnType::CommonName, args.hostnames[0].as_str());
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    params.key_usages = vec![
        rcgen::KeyUsagePurpose::DigitalSignature,
        rcgen::KeyUsagePurpose::KeyEncipherment,
        rcgen::KeyUsagePurpose::KeyCertSign,
    ];
    params.extended_key_usages = vec![if args.usage == "server" {
        rcgen::ExtendedKeyUsagePurpose::ServerAuth
    } else {
        rcgen::ExtendedKeyUsagePurpose::ClientAuth
    }];
    let certificate = params.self_signed(&key)?;
    write(&args.key_file, &key.serialize_pem(), 0o600)?;
    write(&args.cert_file, &certificate.pem(), 0o644)?;
    if args.key_file != "-" {
        eprintln!("Private key saved in {}", args.key_file);
    }
    if args.cert_file != "-" {
        eprintln!("Certificate saved in {}", args.cert_file);
    }
    Ok(())
}

fn write(path: &str, text: &str, mode: u32) -> anyhow::Result<()> {
    use std::io::Write as _;
    use std::os::unix::fs::OpenOptionsExt as _;
    if path == "-" {
        put!("{text}");
        return Ok(());
    }
    std::fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(mode)
        .open(path)
        .and_then(|mut file| file.write_all(text.as_bytes()))
        .with_context(|| format!("cannot write {path}"))
}

fn signing_key(args: &SigningKeyArgs) -> anyhow::Result<()> {
    let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_RSA_SHA256).context("cannot generate the key")?;
    let pem = key.serialize_pem();
    if args.format == "pem" {
        put!("{pem}");
    } else {
        say!("{}", base64::engine::general_purpose::STANDARD.encode(pem));
    }
    Ok(())
}

fn public_key(args: &PublicKeyArgs) -> anyhow::Result<()> {
    use rcgen::PublicKeyData as _;
    let path = args.signing_key_path.display();
    let pem =
        std::fs::read_to_string(&args.signing_key_path).with_context(|| format!("cannot read {path}"))?;
    let key =
        rcgen::KeyPair::from_pem(&pem).with_context(|| format!("{path} is not a private key in PEM form"))?;
    let encoded = base64::engine::general_purpose::STANDARD.encode(key.subject_public_key_info());
    say!("-----BEGIN PUBLIC KEY-----");
    for line in encoded.as_bytes().chunks(64) {
        say!("{}", String::from_utf8_lossy(line));
    }
    say!("-----END PUBLIC KEY-----");
    Ok(())
}
