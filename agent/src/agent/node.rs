//! The node's own identity: joined by a ticket, renewed by itself; the key never leaves this machine.

use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rcgen::{CertificateParams, KeyPair};
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use tonic::transport::Channel;
use ursa_wire::join::{JoinClient, JoinRequest, NodeCertificate, RenewRequest};
use ursa_wire::ticket::{Ticket, TicketError};
use ursa_wire::tls::{self, TlsError};

use super::identity::half_life;
use crate::relay::write_atomic;

const KEY: &str = "key.pem";
const NODE: &str = "node.json";
/// How long a join may take, connection included.
const DEADLINE: Duration = Duration::from_secs(15);

/// The node can't join, or its identity can't be used.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// A file of the node's identity.
    #[error("can't {what} {}", path.display())]
    File {
        /// What was tried.
        what: &'static str,
        /// With which file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The stored identity is damaged.
    #[error("the node's identity in {} is damaged: {reason}; join again with a new ticket", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// The text is no ticket.
    #[error(transparent)]
    Ticket(#[from] TicketError),
    /// The ticket's time is over.
    #[error("the ticket expired {ago} s ago; ask for a new one with `ursa ticket create`")]
    Expired {
        /// For how long.
        ago: i64,
    },
    /// No key or request could be made.
    #[error("can't make a key or certificate request: {0}")]
    Crypto(String),
    /// The connection can't be set up.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// Control said no, or didn't answer.
    #[error("the control plane at {address} refused: {reason}")]
    Refused {
        /// Where.
        address: String,
        /// In its words.
        reason: String,
    },
    /// The node was revoked, and its key with it.
    #[error("the control plane at {address} refused this node's key: {reason}")]
    RevokedKey {
        /// Where.
        address: String,
        /// In its words.
        reason: String,
    },
    /// There is nobody, or somebody else.
    #[error(
        "can't reach the control plane at {address}: {reason}; check the address in the ticket, that ursa-control runs there, and that port is open"
    )]
    Unreachable {
        /// Where.
        address: String,
        /// What was found.
        reason: String,
    },
}

/// What is known about the node, beside its key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeIdentity {
    /// `host:port` of the control plane.
    pub address: String,
    /// The zone.
    pub zone: String,
    /// The node's id.
    pub node_id: String,
    /// Unix seconds.
    pub not_before: i64,
    /// Unix seconds.
    pub not_after: i64,
    /// When to renew it, in Unix seconds: at half of the life that it had when it came.
    #[serde(default)]
    pub renew_at: i64,
    /// The certificate chain, leaf first.
    pub chain_pem: String,
    /// The control CA.
    pub ca_pem: String,
    /// The private key; stored in a file of its own.
    #[serde(skip)]
    pub key_pem: String,
}

impl NodeIdentity {
    /// Reads the node's identity; `None` if it hasn't joined.
    pub fn load(dir: &Path) -> Result<Option<Self>, NodeError> {
        let path = dir.join(NODE);
        let Some(text) = read(&path)? else { return Ok(None) };
        let mut node: Self = serde_json::from_str(&text)
            .map_err(|error| NodeError::Damaged { path: path.clone(), reason: error.to_string() })?;
        let key = dir.join(KEY);
        node.key_pem = read(&key)?
            .ok_or_else(|| NodeError::Damaged { path: key, reason: "the key is missing".to_owned() })?;
        Ok(Some(node))
    }

    /// Exchanges a ticket for a certificate. Repeating it with the same ticket is safe: the key is kept, and the
    /// ticket is bound to it.
    pub async fn join(dir: &Path, ticket: &str, name: &str) -> Result<Self, NodeError> {
        let ticket: Ticket = ticket.trim().parse()?;
        let ago = OffsetDateTime::now_utc().unix_timestamp() - ticket.expires;
        let (key_pem, csr_der, fresh) = key_and_request(dir)?;
        if ago > 0 && fresh {
            return Err(NodeError::Expired { ago });
        }
        let channel = tls::channel(&ticket.address, tls::joining_config(&ticket.fingerprint)?)?;
        let join = |csr_der| {
            let request = JoinRequest { ticket: ticket.secret.clone(), csr_der, node_name: name.to_owned() };
            let channel = channel.clone();
            answered(&ticket.address, async move { JoinClient::new(channel).join(request).await })
        };
        let (key_pem, certificate) = match join(csr_der).await {
            Err(NodeError::RevokedKey { .. }) => {
                let path = dir.join(KEY);
                tracing::warn!("this node's key was revoked; joining with a new one");
                fs::remove_file(&path).map_err(|source| NodeError::File { what: "remove", path, source })?;
                let (key_pem, csr_der, _) = key_and_request(dir)?;
                (key_pem, join(csr_der).await?)
            }
            answer => (key_pem, answer?),
        };
        let node = Self::from_certificate(certificate, ticket.address, key_pem);
        node.save(dir)?;
        Ok(node)
    }

    /// Renews the certificate over a connection that the present one authenticates.
    pub async fn renew(&self, dir: &Path, channel: Channel) -> Result<Self, NodeError> {
        let (key_pem, csr_der, _) = key_and_request(dir)?;
        let certificate =
            answered(
                &self.address,
                async move { JoinClient::new(channel).renew(RenewRequest { csr_der }).await },
            )
            .await?;
        let node = Self::from_certificate(certificate, self.address.clone(), key_pem);
        node.save(dir)?;
        Ok(node)
    }

    fn from_certificate(certificate: NodeCertificate, address: String, key_pem: String) -> Self {
        let now = OffsetDateTime::now_utc().unix_timestamp();
        Self {
            address,
            zone: certificate.zone,
            node_id: certificate.node_id,
            not_before: certificate.not_before,
            not_after: certificate.not_after,
            renew_at: now + half_life(now, certificate.not_after),
            chain_pem: certificate.chain_pem,
            ca_pem: certificate.ca_pem,
            key_pem,
        }
    }

    fn save(&self, dir: &Path) -> Result<(), NodeError> {
        let path = dir.join(NODE);
        let text = serde_json::to_vec_pretty(self).map_err(|error| NodeError::Crypto(error.to_string()))?;
        write_atomic(&path, &text, 0o600, None).map_err(|source| NodeError::File {
            what: "write",
            path,
            source,
        })
    }

    /// A channel to control that authenticates as this node.
    pub fn channel(&self, address: Option<&str>) -> Result<Channel, NodeError> {
        let config = tls::node_config(&self.ca_pem, &self.chain_pem, &self.key_pem)?;
        Ok(tls::channel(address.unwrap_or(&self.address), config)?)
    }
}

fn read(path: &Path) -> Result<Option<String>, NodeError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(NodeError::File { what: "read", path: path.to_owned(), source }),
    }
}

/// The node's key, made at first use, and a request for it; also whether the key is new.
fn key_and_request(dir: &Path) -> Result<(String, Vec<u8>, bool), NodeError> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(|source| NodeError::File {
        what: "create",
        path: dir.to_owned(),
        source,
    })?;
    let path = dir.join(KEY);
    let stored = read(&path)?;
    let fresh = stored.is_none();
    let key = match stored {
        Some(pem) => KeyPair::from_pem(&pem)
            .map_err(|error| NodeError::Damaged { path: path.clone(), reason: error.to_string() })?,
        None => KeyPair::generate().map_err(|error| NodeError::Crypto(error.to_string()))?,
    };
    let pem = key.serialize_pem();
    if fresh {
        // Before the request goes out: the ticket binds to this key, also if the answer is lost.
        write_atomic(&path, pem.as_bytes(), 0o600, None).map_err(|source| NodeError::File {
            what: "write",
            path,
            source,
        })?;
    }
    Ok((pem, request_for(&key).map_err(NodeError::Crypto)?, fresh))
}

/// A certificate request with nothing but the public key in it: control decides all names.
pub(super) fn request_for(key: &KeyPair) -> Result<Vec<u8>, String> {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    let request = params.serialize_request(key).map_err(|error| error.to_string())?;
    Ok(request.der().to_vec())
}

async fn answered(
    address: &str,
    call: impl Future<Output = Result<NodeCertificate, tonic::Status>>,
) -> Result<NodeCertificate, NodeError> {
    let address = address.to_owned();
    match tokio::time::timeout(DEADLINE, call).await {
        Ok(Ok(certificate)) => Ok(certificate),
        Ok(Err(status)) if status.code() == tonic::Code::Unavailable => {
            Err(NodeError::Unreachable { address, reason: reason(&status) })
        }
        // The one precondition of a join: a key that wasn't revoked.
        Ok(Err(status)) if status.code() == tonic::Code::FailedPrecondition => {
            Err(NodeError::RevokedKey { address, reason: reason(&status) })
        }
        Ok(Err(status)) => Err(NodeError::Refused { address, reason: reason(&status) }),
        Err(_) => Err(NodeError::Unreachable {
            address,
            reason: format!("no answer within {} s", DEADLINE.as_secs()),
        }),
    }
}

/// A status with the causes that tonic keeps apart: "transport error" alone helps nobody.
pub(super) fn reason(status: &tonic::Status) -> String {
    let mut text = if status.message().is_empty() {
        status.code().description().to_owned()
    } else {
        status.message().to_owned()
    };
    let mut cause = std::error::Error::source(status);
    while let Some(error) = cause {
        let words = error.to_string();
        if !text.contains(&words) {
            text.push_str(": ");
            text.push_str(&words);
        }
        cause = error.source();
    }
    text
}
