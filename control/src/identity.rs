//! Certificate authorities, join tickets, node and workload certificates.
//!
//! There are two kinds of authority. The *control CA*, one per zone, signs this control plane's server
//! certificate and the nodes' client certificates; it never leaves the store's private records. A *mesh CA*
//! belongs to a `MeshIdentity` and signs workloads; it lies in two Secrets of the mesh, as in Kuma.
//!
//! An identity's way: [`tickets`] turn an operator's grant into a node ([`nodes`]), [`tls`] recognises the node
//! on each connection, [`service`] checks every request against node and grant, and [`workload`] decides the
//! SPIFFE id and signs. What is refused is logged with its reason and answered with what to do.

pub mod ca;
pub mod mesh_ca;
pub mod naming;
pub mod nodes;
pub mod service;
pub mod tickets;
pub mod tls;
pub mod workload;

use std::sync::Arc;

use rcgen::KeyPair;
use serde::{Deserialize, Serialize};
use time::{Duration, OffsetDateTime};
use tonic::Status;

use crate::store::{Store, StoreError};
use ca::{Authority, CaError};
use nodes::{Grant, NodeRecord, Nodes};
use tls::Peer;

/// The store's bucket of the control CA.
const CA_BUCKET: &str = "control-ca";
const CA_KEY: &str = "current";

/// Why something about identities failed.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A certificate could not be made.
    #[error(transparent)]
    Ca(#[from] CaError),
    /// A stored record is damaged.
    #[error("the stored {0} is damaged: {1}")]
    Damaged(&'static str, String),
    /// A change was broken off.
    #[error("the change was broken off: {0}")]
    BrokenOff(#[from] tokio::task::JoinError),
    /// Something was refused; the text says why and what to do.
    #[error("{reason}")]
    Refused {
        /// For gRPC.
        code: tonic::Code,
        /// Why, and what to do.
        reason: String,
    },
}

impl IdentityError {
    /// A refusal.
    pub fn refused(code: tonic::Code, reason: impl Into<String>) -> Self {
        Self::Refused { code, reason: reason.into() }
    }
}

impl From<IdentityError> for Status {
    fn from(error: IdentityError) -> Self {
        match error {
            IdentityError::Refused { code, reason } => Status::new(code, reason),
            IdentityError::Ca(error @ (CaError::Request(_) | CaError::KeyKind)) => {
                Status::invalid_argument(error.to_string())
            }
            other => {
                tracing::error!("identity: {other}");
                Status::unavailable(format!("the control plane could not do it now: {other}; try again"))
            }
        }
    }
}

/// Runs a change to its end, even if whoever asked for it hangs up before: what the store holds and what is known
/// in memory must not part.
pub(crate) async fn to_the_end<T: Send + 'static>(
    change: impl Future<Output = Result<T, IdentityError>> + Send + 'static,
) -> Result<T, IdentityError> {
    tokio::spawn(change).await?
}

#[derive(Serialize, Deserialize)]
struct StoredCa {
    certificate: String,
    key: String,
}

/// What decides who a node is and what it may have.
#[derive(Debug)]
pub struct ControlIdentity {
    store: Store,
    zone: String,
    authority: Authority,
    nodes: Arc<Nodes>,
    node_validity: Duration,
}

impl ControlIdentity {
    /// Loads the zone's control CA and nodes; makes the CA if there is none yet.
    pub async fn open(store: Store, zone: &str, node_validity: Duration) -> Result<Arc<Self>, IdentityError> {
        let authority = load_or_create_ca(&store, zone).await?;
        let nodes = Arc::new(Nodes::load(store.clone()).await?);
        Ok(Arc::new(Self { store, zone: zone.to_owned(), authority, nodes, node_validity }))
    }

    /// The control CA.
    pub fn authority(&self) -> &Authority {
        &self.authority
    }

    /// The zone's name.
    pub fn zone(&self) -> &str {
        &self.zone
    }

    /// The nodes that joined.
    pub fn nodes(&self) -> &Nodes {
        &self.nodes
    }

    /// The URI SAN of a node.
    pub fn node_uri(&self, node_id: &str) -> String {
        format!("spiffe://{}.ursa.local/node/{node_id}", self.zone)
    }

    /// The node behind a request, or why there is none.
    pub fn authenticate<T>(&self, request: &tonic::Request<T>) -> Result<Arc<NodeRecord>, Status> {
        let peer = request.extensions().get::<Peer>();
        let address = peer.map_or_else(|| "an unknown address".to_owned(), |peer| peer.address.to_string());
        let refuse = |reason: &str| {
            tracing::warn!(peer = %address, "refused: {reason}");
            Status::unauthenticated(reason.to_owned())
        };
        let Some(certificate) = peer.and_then(|peer| peer.certificate.as_ref()) else {
            return Err(refuse("this needs a node certificate; join first with `ursa join TICKET`"));
        };
        let prefix = self.node_uri("");
        let Some(id) = certificate.uri.strip_prefix(&prefix) else {
            return Err(refuse(
                "the certificate is no node certificate of this zone; join it with `ursa join TICKET`",
            ));
        };
        let Some(node) = self.nodes.get(id) else {
            return Err(refuse("this node is not known here (any more); join again with a new ticket"));
        };
        if node.revoked {
            return Err(refuse(nodes::REVOKED));
        }
        if node.key_hash != certificate.key_hash {
            return Err(refuse("the certificate's key is not the one that this node joined with"));
        }
        Ok(node)
    }

    /// Makes the certificate with which this control plane serves its nodes.
    fn server_certificate(&self, now: OffsetDateTime) -> Result<(KeyPair, ca::Issued), CaError> {
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
        let issued = self.authority.sign_own(
            &key,
            &ca::Leaf {
                uri: None,
                dns: &[ursa_wire::tls::SERVER_NAME],
                usage: ca::Usage::Server,
                now,
                lifetime: tls::SERVER_LIFETIME,
            },
        )?;
        Ok((key, issued))
    }
}

async fn load_or_create_ca(store: &Store, zone: &str) -> Result<Authority, IdentityError> {
    loop {
        if let Some(found) = store.private(CA_BUCKET, CA_KEY).await? {
            let stored: StoredCa = serde_json::from_slice(&found.value)
                .map_err(|error| IdentityError::Damaged("control CA", error.to_string()))?;
            return Ok(Authority::from_pem(&stored.certificate, &stored.key)?);
        }
        let authority = Authority::generate(
            "Control",
            &format!("{zone}.ursa.local"),
            &format!("spiffe://{zone}.ursa.local"),
            OffsetDateTime::now_utc(),
        )?;
        let stored = StoredCa {
            certificate: authority.certificate_pem().to_owned(),
            key: authority.key_pem().to_owned(),
        };
        let value = serde_json::to_vec(&stored)
            .map_err(|error| IdentityError::Damaged("control CA", error.to_string()))?;
        match store.put_private(CA_BUCKET, CA_KEY, value, Some(0)).await {
            Ok(_) => {
                tracing::info!(zone, fingerprint = authority.fingerprint(), "made the zone's control CA");
                return Ok(authority);
            }
            Err(error) if error.is_conflict() => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// The grant that a node needs for a workload, in words.
pub(crate) fn describe_grant(grant: &Grant) -> String {
    format!("mesh {:?}, workloads {:?}", grant.mesh, grant.workloads.join(", "))
}
