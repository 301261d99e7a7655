//! The gRPC services `ursa.v1.Join` and `ursa.v1.Identity`.

use std::sync::Arc;

use tonic::{Request, Response, Status};
use ursa_wire::identity::{Identity, IssueRequest, IssuedIdentity};
use ursa_wire::join::{Join, JoinRequest, NodeCertificate, RenewRequest};

use super::ca::ProvenKey;
use super::tls::Peer;
use super::workload::WorkloadIssuer;
use super::{ControlIdentity, IdentityError, tickets};
use crate::diagnostics::Metrics;

/// Serves joining and issuing.
#[derive(Debug)]
pub struct IdentityService {
    identity: Arc<ControlIdentity>,
    issuer: WorkloadIssuer,
    metrics: Arc<Metrics>,
}

impl IdentityService {
    /// A service around its parts.
    pub fn new(identity: Arc<ControlIdentity>, issuer: WorkloadIssuer, metrics: Arc<Metrics>) -> Self {
        Self { identity, issuer, metrics }
    }

    fn answer(&self, certificate: tickets::NodeCertificate) -> Response<NodeCertificate> {
        self.metrics.certificate_issued("node");
        Response::new(NodeCertificate {
            chain_pem: certificate.chain_pem,
            ca_pem: self.identity.authority().certificate_pem().to_owned(),
            zone: self.identity.zone().to_owned(),
            node_id: certificate.node_id,
            not_before: certificate.not_before,
            not_after: certificate.not_after,
        })
    }

    /// Logs a refusal, which is what an operator looks for when somebody complains or attacks.
    fn refuse(&self, what: &str, address: &str, error: IdentityError) -> Status {
        if let IdentityError::Refused { reason, .. } = &error {
            tracing::warn!(peer = address, "refused {what}: {reason}");
        } else if let IdentityError::Ca(error) = &error {
            tracing::warn!(peer = address, "refused {what}: {error}");
        }
        self.metrics.identity_refused();
        error.into()
    }
}

fn address_of<T>(request: &Request<T>) -> String {
    request.extensions().get::<Peer>().map_or_else(|| "unknown".to_owned(), |peer| peer.address.to_string())
}

impl Join for IdentityService {
    async fn join(&self, request: Request<JoinRequest>) -> Result<Response<NodeCertificate>, Status> {
        let address = address_of(&request);
        let JoinRequest { ticket, csr_der, node_name } = request.into_inner();
        let result = async {
            let key = ProvenKey::from_csr(&csr_der)?;
            self.identity.redeem(&ticket, &key, &node_name).await
        };
        match result.await {
            Ok(certificate) => Ok(self.answer(certificate)),
            Err(error) => Err(self.refuse("a join", &address, error)),
        }
    }

    async fn renew(&self, request: Request<RenewRequest>) -> Result<Response<NodeCertificate>, Status> {
        let address = address_of(&request);
        let has_certificate =
            request.extensions().get::<Peer>().is_some_and(|peer| peer.certificate.is_some());
        let node = if has_certificate { Some(self.identity.authenticate(&request)?) } else { None };
        let csr = request.into_inner().csr_der;
        let result = async {
            let key = ProvenKey::from_csr(&csr)?;
            self.identity.renew(node.as_deref(), &key).await
        };
        match result.await {
            Ok(certificate) => Ok(self.answer(certificate)),
            Err(error) => Err(self.refuse("a node's renewal", &address, error)),
        }
    }
}

impl Identity for IdentityService {
    async fn issue(&self, request: Request<IssueRequest>) -> Result<Response<IssuedIdentity>, Status> {
        let address = address_of(&request);
        let node = self.identity.authenticate(&request).inspect_err(|_| self.metrics.identity_refused())?;
        let IssueRequest { mesh, dataplane, csr_der } = request.into_inner();
        match self.issuer.issue(&node, &mesh, &dataplane, &csr_der).await {
            Ok(issued) => {
                self.metrics.certificate_issued("workload");
                Ok(Response::new(issued))
            }
            Err(error) => {
                let what = format!("a certificate for {dataplane:?} in mesh {mesh:?} to node {}", node.id);
                Err(self.refuse(&what, &address, error))
            }
        }
    }
}
