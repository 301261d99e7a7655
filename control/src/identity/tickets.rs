//! Join tickets: an operator's grant as text, good for the first key that uses it.
//!
//! A ticket is stored under the hash of its secret. At first use it is bound to the hash of the node's public
//! key, before a certificate is made: the same key may try again after a lost answer, any other key is
//! refused, and so a ticket that was seen by somebody else is worth nothing once its owner has used it.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::Arc;
use time::{Duration, OffsetDateTime};
use tonic::Code;
use ursa_wire::ticket::Ticket;

use super::ca::{Leaf, ProvenKey, Usage, hex_digest};
use super::nodes::{Grant, NodeRecord, REVOKED};
use super::{ControlIdentity, IdentityError};

const BUCKET: &str = "tickets";

/// How long a bound ticket may be used again by its key, beyond its expiry.
const RETRY: Duration = Duration::hours(24);

/// The longest that a ticket may be valid.
pub const LONGEST: Duration = Duration::days(30);

/// How long after its end a node certificate is renewed by its unchanged key.
const RENEWABLE: Duration = Duration::days(90);

/// The most bytes in a node's name.
const LONGEST_NAME: usize = 253;

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct StoredTicket {
    grant: Grant,
    expires: i64,
    uses: u32,
    /// Key hash → node id.
    bindings: BTreeMap<String, String>,
}

/// What an operator asks for.
#[derive(Debug, Clone)]
pub struct TicketRequest {
    /// What the node may have.
    pub grant: Grant,
    /// From now.
    pub valid_for: Duration,
    /// How many nodes may use it.
    pub uses: u32,
    /// `host:port` at which nodes reach this control plane.
    pub address: String,
}

/// A node's certificate, as text.
#[derive(Debug, Clone)]
pub struct NodeCertificate {
    /// The node.
    pub node_id: String,
    /// The leaf.
    pub chain_pem: String,
    /// Unix seconds.
    pub not_before: i64,
    /// Unix seconds.
    pub not_after: i64,
}

impl ControlIdentity {
    /// Makes a ticket. Its text is not stored and can't be shown again.
    pub async fn create_ticket(&self, request: &TicketRequest) -> Result<Ticket, IdentityError> {
        if request.grant.mesh.is_empty() || request.grant.workloads.is_empty() {
            return Err(IdentityError::refused(
                Code::InvalidArgument,
                "a ticket names a mesh and at least one workload; `*` is every workload of the mesh",
            ));
        }
        if request.valid_for <= Duration::ZERO || request.valid_for > LONGEST {
            return Err(IdentityError::refused(
                Code::InvalidArgument,
                format!("a ticket is valid for more than 0 s and at most {} days", LONGEST.whole_days()),
            ));
        }
        let secret = random_secret()?;
        let expires = (OffsetDateTime::now_utc() + request.valid_for).unix_timestamp();
        let stored = StoredTicket {
            grant: request.grant.clone(),
            expires,
            uses: request.uses.max(1),
            bindings: BTreeMap::new(),
        };
        self.forget_old_tickets().await?;
        self.store.put_private(BUCKET, &hex_digest(secret.as_bytes()), to_bytes(&stored)?, Some(0)).await?;
        tracing::info!(
            grant = super::describe_grant(&stored.grant),
            uses = stored.uses,
            "made a join ticket"
        );
        Ok(Ticket {
            address: request.address.clone(),
            fingerprint: self.authority().fingerprint(),
            secret,
            expires,
        })
    }

    /// Exchanges a ticket's secret and a proven key for a node certificate.
    pub async fn redeem(
        &self,
        secret: &str,
        key: &ProvenKey,
        node_name: &str,
    ) -> Result<NodeCertificate, IdentityError> {
        let name = hex_digest(secret.as_bytes());
        check_name(node_name)?;
        if self.nodes().by_key(key.hash()).is_some_and(|node| node.revoked) {
            return Err(IdentityError::refused(
                Code::FailedPrecondition,
                "the node with this key was revoked, so the key is worth nothing any more; join with a new key",
            ));
        }
        let (node_id, grant) = loop {
            let Some(record) = self.store.private(BUCKET, &name).await? else {
                return Err(IdentityError::refused(
                    Code::PermissionDenied,
                    "the ticket is not known here; ask the operator of this control plane for a new one (`ursa ticket create`)",
                ));
            };
            let mut ticket: StoredTicket = from_bytes(&record.value)?;
            let now = OffsetDateTime::now_utc().unix_timestamp();
            if let Some(node_id) = ticket.bindings.get(key.hash()) {
                if now > ticket.expires + RETRY.whole_seconds() {
                    return Err(expired());
                }
                break (node_id.clone(), ticket.grant);
            }
            if ticket.bindings.len() >= usize::try_from(ticket.uses).unwrap_or(usize::MAX) {
                return Err(IdentityError::refused(
                    Code::PermissionDenied,
                    "the ticket was already used by another key; if that was not you, revoke that node; ask for a new ticket in any case",
                ));
            }
            if now > ticket.expires {
                return Err(expired());
            }
            let node_id = uuid::Uuid::new_v4().to_string();
            ticket.bindings.insert(key.hash().to_owned(), node_id.clone());
            match self.store.put_private(BUCKET, &name, to_bytes(&ticket)?, Some(record.version)).await {
                Ok(_) => break (node_id, ticket.grant),
                // Somebody else bound it first: look again.
                Err(error) if error.is_conflict() => {}
                Err(error) => return Err(error.into()),
            }
        };
        let node = match self.nodes().get(&node_id) {
            Some(node) => NodeRecord::clone(&node),
            None => NodeRecord {
                id: node_id,
                name: node_name.to_owned(),
                key_hash: key.hash().to_owned(),
                grant,
                not_after: 0,
                revoked: false,
                revoked_at: None,
            },
        };
        self.certify(node, key).await
    }

    /// Renews a node's certificate. `authenticated`: the node that the connection proved to be, if it still
    /// had a valid certificate; otherwise the request's own signature proves the unchanged key, which is
    /// enough, since the certificate is of use to nobody else.
    pub async fn renew(
        &self,
        authenticated: Option<&NodeRecord>,
        key: &ProvenKey,
    ) -> Result<NodeCertificate, IdentityError> {
        let node = match authenticated {
            Some(node) if node.key_hash != key.hash() => {
                return Err(IdentityError::refused(
                    Code::PermissionDenied,
                    "the request's key is not the one of this connection's certificate; a node renews its own certificate with its own key",
                ));
            }
            Some(node) => NodeRecord::clone(node),
            None => self.nodes().by_key(key.hash()).map(|node| NodeRecord::clone(&node)).ok_or_else(|| {
                IdentityError::refused(
                    Code::PermissionDenied,
                    "no node joined with this key; renew with the key of the old certificate, or join again with a new ticket",
                )
            })?,
        };
        if node.revoked {
            return Err(IdentityError::refused(Code::PermissionDenied, REVOKED));
        }
        let now = OffsetDateTime::now_utc().unix_timestamp();
        if now > node.not_after + RENEWABLE.whole_seconds() {
            return Err(IdentityError::refused(
                Code::PermissionDenied,
                format!(
                    "the node's certificate ended more than {} days ago; join again with a new ticket",
                    RENEWABLE.whole_days()
                ),
            ));
        }
        self.certify(node, key).await
    }

    async fn certify(&self, mut node: NodeRecord, key: &ProvenKey) -> Result<NodeCertificate, IdentityError> {
        let issued = self.authority().sign(
            key,
            &Leaf {
                uri: Some(&self.node_uri(&node.id)),
                dns: &[],
                usage: Usage::Client,
                now: OffsetDateTime::now_utc(),
                lifetime: self.node_validity,
            },
        )?;
        node.not_after = issued.not_after.unix_timestamp();
        let nodes = Arc::clone(&self.nodes);
        let Some(node) = super::to_the_end(async move { nodes.certified(node).await }).await? else {
            return Err(IdentityError::refused(Code::PermissionDenied, REVOKED));
        };
        tracing::info!(
            node = node.id,
            name = node.name,
            grant = super::describe_grant(&node.grant),
            "issued a node certificate"
        );
        Ok(NodeCertificate {
            node_id: node.id.clone(),
            chain_pem: issued.pem,
            not_before: issued.not_before.unix_timestamp(),
            not_after: issued.not_after.unix_timestamp(),
        })
    }

    async fn forget_old_tickets(&self) -> Result<(), IdentityError> {
        let oldest = (OffsetDateTime::now_utc() - RETRY).unix_timestamp();
        for record in self.store.privates(BUCKET).await? {
            match from_bytes(&record.value) {
                Ok(ticket) if ticket.expires < oldest => {
                    self.store.delete_private(BUCKET, &record.key).await?;
                }
                Ok(_) => {}
                // It is worth nothing, but new ones are made all the same.
                Err(error) => {
                    tracing::warn!(ticket = record.key, "left out a join ticket that can't be read: {error}");
                }
            }
        }
        Ok(())
    }
}

/// A node's name is stored, logged and shown; it is a host's name or the like.
fn check_name(name: &str) -> Result<(), IdentityError> {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_');
    if name.len() <= LONGEST_NAME && name.chars().all(fits) {
        return Ok(());
    }
    let start: String = name.chars().take(40).collect();
    Err(IdentityError::refused(
        Code::InvalidArgument,
        format!(
            "the node's name, {} bytes that begin with {start:?}, is not one of at most {LONGEST_NAME} letters, digits, `-`, `.` and `_`; join with another name (`ursa-agent join --name`)",
            name.len()
        ),
    ))
}

fn expired() -> IdentityError {
    IdentityError::refused(
        Code::PermissionDenied,
        "the ticket has expired; ask for a new one (`ursa ticket create`)",
    )
}

fn random_secret() -> Result<String, IdentityError> {
    use base64::Engine as _;
    let mut bytes = [0_u8; 32];
    aws_lc_rs::rand::fill(&mut bytes)
        .map_err(|_| IdentityError::Damaged("random source", "it gave nothing".into()))?;
    Ok(base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(bytes))
}

fn to_bytes(ticket: &StoredTicket) -> Result<Vec<u8>, IdentityError> {
    serde_json::to_vec(ticket).map_err(|error| IdentityError::Damaged("ticket", error.to_string()))
}

fn from_bytes(bytes: &[u8]) -> Result<StoredTicket, IdentityError> {
    serde_json::from_slice(bytes).map_err(|error| IdentityError::Damaged("ticket", error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{Store, StoreOptions};

    #[tokio::test]
    async fn one_damaged_record_stands_in_nobodys_way() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&StoreOptions::in_dir(dir.path())).unwrap();
        store.put_private("nodes", "x", b"{".to_vec(), None).await.unwrap();
        store.put_private(BUCKET, "x", b"{".to_vec(), None).await.unwrap();
        let identity = ControlIdentity::open(store, "zone-1", Duration::hours(1)).await.unwrap();
        let grant = Grant { mesh: "default".into(), workloads: vec!["*".into()] };
        let request =
            TicketRequest { grant, valid_for: Duration::hours(1), uses: 1, address: "cp:5678".into() };
        identity.create_ticket(&request).await.unwrap();
    }

    #[tokio::test]
    async fn a_change_ends_although_its_caller_is_gone() {
        let (begin, begun) = tokio::sync::oneshot::channel::<()>();
        let (end, ended) = tokio::sync::oneshot::channel();
        let mut change = Box::pin(super::super::to_the_end(async move {
            let _ = begun.await;
            let _ = end.send(());
            Ok(())
        }));
        assert!(futures_util::poll!(&mut change).is_pending());
        drop(change);
        begin.send(()).unwrap();
        ended.await.unwrap();
    }

    #[test]
    fn a_nodes_name_is_short_and_plain() {
        assert!(check_name("web-1.example_org").is_ok());
        for wrong in ["a b", "a\nb", "ä", &"a".repeat(LONGEST_NAME + 1)] {
            assert!(check_name(wrong).is_err(), "{wrong}");
        }
    }
}
