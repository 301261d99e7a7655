//! A workload's certificate: control decides the name, the request only brings a public key.

use std::sync::Arc;

use time::{Duration, OffsetDateTime};
use tonic::Code;
use ursa_engine::ProxyKey;
use ursa_model::types::dataplane::Dataplane;
use ursa_model::types::mesh_trust::MeshTrust;
use ursa_model::{Resource, ResourceKey, ResourceSpec as _, labels};
use ursa_wire::identity::IssuedIdentity;

use super::ca::{Leaf, ProvenKey, Usage};
use super::mesh_ca::{self, MeshAuthorities};
use super::nodes::NodeRecord;
use super::{IdentityError, naming};
use crate::session::{Insights, Registry};
use crate::tokens::Tokens;
use crate::world::World;

/// How long a leaf lives unless its identity says otherwise: a day without control is survived from any
/// moment, since it is renewed at half its life.
pub const LEAF_LIFETIME: Duration = Duration::hours(48);

/// Signs workloads.
#[derive(Debug)]
pub struct WorkloadIssuer {
    world: World,
    registry: Arc<Registry>,
    authorities: Arc<MeshAuthorities>,
    insights: Insights,
    tokens: Tokens,
    /// Whether a node's grant isn't enough.
    token_required: bool,
    zone: String,
}

impl WorkloadIssuer {
    /// An issuer for one zone.
    pub fn new(
        world: World,
        registry: Arc<Registry>,
        authorities: Arc<MeshAuthorities>,
        insights: Insights,
        tokens: Tokens,
        token_required: bool,
        zone: &str,
    ) -> Self {
        Self { world, registry, authorities, insights, tokens, token_required, zone: zone.to_owned() }
    }

    /// Issues a certificate for one of the node's own Dataplanes.
    pub async fn issue(
        &self,
        node: &NodeRecord,
        mesh: &str,
        name: &str,
        csr: &[u8],
    ) -> Result<IssuedIdentity, IdentityError> {
        let dataplane = self.dataplane_of(node, mesh, name).await?;
        let key = ProvenKey::from_csr(csr)?;
        let identity = self.world.read(|index| naming::select(index, &dataplane)).ok_or_else(|| {
            IdentityError::refused(
                Code::FailedPrecondition,
                format!("no MeshIdentity selects Dataplane {name:?} in mesh {mesh:?}; write one (`ursa apply`), until then it has no identity"),
            )
        })?;
        let not_ready = |reason: String| {
            IdentityError::refused(
                Code::FailedPrecondition,
                format!("{} can't issue: {reason}", identity.resource.key()),
            )
        };
        let spiffe_id = identity.spiffe_id(&dataplane, &self.zone).map_err(not_ready)?;
        let domain = spiffe_id.trust_domain().clone();
        let authority = self.authorities.get(&identity).await.map_err(not_ready)?;
        let issued = authority.sign(
            &key,
            &Leaf {
                uri: Some(&spiffe_id.to_string()),
                dns: &[],
                usage: Usage::Peer,
                now: OffsetDateTime::now_utc(),
                lifetime: mesh_ca::leaf_lifetime(&identity),
            },
        )?;
        let bundle_pem =
            self.bundle(mesh, domain.as_str()).unwrap_or_else(|| authority.certificate_pem().to_owned());
        tracing::info!(
            node = node.id,
            mesh,
            dataplane = name,
            spiffe_id = %spiffe_id,
            until = %issued.not_after,
            "issued a workload certificate"
        );
        let proxy = ProxyKey { mesh: mesh.to_owned(), name: name.to_owned() };
        self.insights.certified(&proxy, identity.secret_name(), issued.not_after);
        Ok(IssuedIdentity {
            secret_name: identity.secret_name(),
            spiffe_id: spiffe_id.to_string(),
            chain_pem: issued.pem,
            not_before: issued.not_before.unix_timestamp(),
            not_after: issued.not_after.unix_timestamp(),
            bundle_pem,
        })
    }

    /// The Dataplane, if this node registered it and its grant, or its token, (still) covers the workload.
    async fn dataplane_of(
        &self,
        node: &NodeRecord,
        mesh: &str,
        name: &str,
    ) -> Result<Arc<Resource>, IdentityError> {
        if !self.registry.owns(&node.id, mesh, name) {
            return Err(IdentityError::refused(
                Code::PermissionDenied,
                format!(
                    "Dataplane {name:?} in mesh {mesh:?} is not registered by this node; a node obtains identities only for Dataplanes that it registered in its session"
                ),
            ));
        }
        let key = ResourceKey::new(Dataplane::DESCRIPTOR, mesh, name);
        let dataplane = self.world.get(&key).ok_or_else(|| {
            IdentityError::refused(Code::Unavailable, format!("{key} is not known yet; try again"))
        })?;
        // The registration was checked, but somebody may have relabelled the Dataplane since.
        let workload = dataplane.meta.label(labels::WORKLOAD);
        let refused = |reason| Err(IdentityError::refused(Code::PermissionDenied, reason));
        if node.grant.covers(mesh, workload) && !self.token_required {
            return Ok(dataplane);
        }
        let Some(token) = self.registry.vouched_by_token(mesh, name, workload) else {
            return refused(format!(
                "workload {:?} is neither granted to this node, which was granted {}, nor vouched for by a dataplane token; make a ticket for it (`ursa ticket create --mesh {mesh} --workload …`) and join again, or show a token",
                workload.unwrap_or("(none)"),
                super::describe_grant(&node.grant),
            ));
        };
        let revoked = self.tokens.was_revoked(mesh, &token).await.map_err(|error| {
            IdentityError::refused(
                Code::Unavailable,
                format!("the dataplane token can't be checked: {error}"),
            )
        })?;
        if revoked {
            return refused(format!(
                "the dataplane token {token:?} that vouched for {name:?} in mesh {mesh:?} is revoked; put a new one into the workload's `dataplaneTokenFile` and restart the agent"
            ));
        }
        Ok(dataplane)
    }

    /// The CA certificates of a trust domain, from every `MeshTrust` of the mesh.
    fn bundle(&self, mesh: &str, domain: &str) -> Option<String> {
        let bundle = self.world.read(|index| {
            index
                .list(MeshTrust::DESCRIPTOR.name, mesh)
                .filter_map(|trust| trust.spec_as::<MeshTrust>().ok())
                .filter(|trust| trust.trust_domain == domain)
                .flat_map(|trust| trust.ca_bundles)
                .filter_map(|bundle| bundle.pem)
                .fold(String::new(), |mut text, pem| {
                    text.push_str(pem.value.trim_end());
                    text.push('\n');
                    text
                })
        });
        (!bundle.is_empty()).then_some(bundle)
    }
}
