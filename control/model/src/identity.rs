//! Which MeshIdentity a Dataplane gets, and which SPIFFE id that gives it.

use crate::{
    labels,
    meta::Meta,
    resource::Resource,
    spiffe::{
        DEFAULT_KUBERNETES_PATH_TEMPLATE, DEFAULT_PATH_TEMPLATE, DEFAULT_TRUST_DOMAIN_TEMPLATE,
        InvalidSpiffe, SpiffeId, TrustDomain,
    },
    template::{Template, TemplateError},
    types::mesh_identity::{MeshIdentity, MeshIdentityStatus},
};

/// Why an identity gives a Dataplane no SPIFFE id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// A template is none, or names what the Dataplane doesn't have.
    #[error("template {template:?} of the MeshIdentity: {error}")]
    Template {
        /// The template.
        template: String,
        /// What is wrong with it.
        error: TemplateError,
    },
    /// The Dataplane lacks a label that the path is made from.
    #[error("the Dataplane has no label {0:?}, which the SPIFFE id is made from: set it")]
    MissingLabel(&'static str),
    /// The templates gave something that is no id.
    #[error("the MeshIdentity gives an invalid id: {0}")]
    Invalid(InvalidSpiffe),
}

/// Whether an identity selects a Dataplane. One without a selector selects nothing.
pub fn selects(identity: &MeshIdentity, dataplane: &labels::Labels) -> bool {
    identity
        .selector
        .as_ref()
        .and_then(|selector| selector.dataplane.as_ref())
        .is_some_and(|selector| selector.matches(dataplane))
}

/// The identity of a Dataplane: the one that asks for most labels, then the first by name.
pub fn select<'a>(
    identities: impl IntoIterator<Item = (&'a Meta, &'a MeshIdentity)>,
    dataplane: &labels::Labels,
) -> Option<(&'a Meta, &'a MeshIdentity)> {
    identities.into_iter().filter(|(_, identity)| selects(identity, dataplane)).min_by(|a, b| {
        let wanted = |identity: &MeshIdentity| {
            let selector = identity.selector.as_ref().and_then(|selector| selector.dataplane.as_ref());
            selector.map_or(0, |selector| selector.match_labels.len())
        };
        wanted(b.1).cmp(&wanted(a.1)).then_with(|| a.0.name.cmp(&b.0.name))
    })
}

/// Whether an identity is set up, so that certificates come from it.
pub fn is_ready(status: &MeshIdentityStatus) -> bool {
    status
        .conditions
        .iter()
        .any(|condition| condition.condition_type == "Ready" && condition.status == "True")
}

/// The trust domain of an identity.
pub fn trust_domain(identity: &MeshIdentity, mesh: &str, zone: &str) -> Result<TrustDomain, IdentityError> {
    let template = identity
        .spiffe_id
        .as_ref()
        .and_then(|id| id.trust_domain.as_deref())
        .filter(|template| !template.is_empty())
        .unwrap_or(DEFAULT_TRUST_DOMAIN_TEMPLATE);
    let failed = |error| IdentityError::Template { template: template.to_owned(), error };
    let text = Template::parse(template)
        .map_err(failed)?
        .render(&[("Mesh", mesh), ("Zone", zone)], &labels::Labels::new())
        .map_err(failed)?;
    text.parse().map_err(IdentityError::Invalid)
}

/// The template of an identity's paths.
pub fn path_template(identity: &MeshIdentity, kubernetes: bool) -> &str {
    let default = if kubernetes { DEFAULT_KUBERNETES_PATH_TEMPLATE } else { DEFAULT_PATH_TEMPLATE };
    let path = identity.spiffe_id.as_ref().and_then(|id| id.path.as_deref());
    path.filter(|template| !template.is_empty()).unwrap_or(default)
}

/// Whether paths are made from the workload label, so that a token must be bound to it.
pub fn path_uses_workload(identity: &MeshIdentity, kubernetes: bool) -> bool {
    Template::parse(path_template(identity, kubernetes))
        .is_ok_and(|template| template.uses_field("Workload") || template.uses_label(labels::WORKLOAD))
}

/// The SPIFFE id that an identity gives in a zone to a Dataplane of a mesh with these labels. A Dataplane with a
/// service account is one of a pod.
pub fn spiffe_id(
    identity: &MeshIdentity,
    mesh: &str,
    dataplane: &labels::Labels,
    zone: &str,
) -> Result<SpiffeId, IdentityError> {
    let domain = trust_domain(identity, mesh, zone)?;
    let template = path_template(identity, dataplane.contains_key(labels::SERVICE_ACCOUNT));
    let failed = |error| IdentityError::Template { template: template.to_owned(), error };
    let parsed = Template::parse(template).map_err(failed)?;
    let sources = [
        ("Namespace", labels::NAMESPACE),
        ("ServiceAccount", labels::SERVICE_ACCOUNT),
        ("Workload", labels::WORKLOAD),
    ];
    let mut fields = vec![("TrustDomain", domain.as_str())];
    for (field, label) in sources {
        let value = dataplane.get(label).map(String::as_str).unwrap_or_default();
        if value.is_empty() && parsed.uses_field(field) {
            return Err(IdentityError::MissingLabel(label));
        }
        fields.push((field, value));
    }
    let path = parsed.render(&fields, dataplane).map_err(failed)?;
    SpiffeId::new(domain.clone(), &path).map_err(IdentityError::Invalid)
}

/// The typed identities of erased resources; those that don't parse are left out.
pub fn typed<'a>(
    resources: impl IntoIterator<Item = &'a Resource>,
) -> Vec<(&'a Meta, MeshIdentity, MeshIdentityStatus)> {
    resources
        .into_iter()
        .filter_map(|resource| {
            let identity = resource.spec_as::<MeshIdentity>().ok()?;
            let status = resource.status_as::<MeshIdentity>().unwrap_or_default();
            Some((&resource.meta, identity, status))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(text: &str) -> MeshIdentity {
        crate::yaml::from_str(text).expect("identity")
    }

    #[test]
    fn an_id_is_made_of_mesh_zone_and_workload() {
        let identity = identity("selector: {dataplane: {}}");
        let labels = |name: &str, value: &str| labels::Labels::from([(name.to_owned(), value.to_owned())]);
        assert_eq!(
            spiffe_id(&identity, "default", &labels::Labels::new(), "east").expect_err("no workload"),
            IdentityError::MissingLabel(labels::WORKLOAD)
        );
        let id = spiffe_id(&identity, "default", &labels(labels::WORKLOAD, "web"), "east").expect("id");
        assert_eq!(id.to_string(), "spiffe://default.east.mesh.local/workload/web");
        assert!(spiffe_id(&identity, "default", &labels(labels::WORKLOAD, "../web"), "east").is_err());
        assert_eq!(
            spiffe_id(&identity, "default", &labels(labels::SERVICE_ACCOUNT, "web"), "east")
                .expect_err("no namespace"),
            IdentityError::MissingLabel(labels::NAMESPACE)
        );
    }

    #[test]
    fn a_path_may_name_its_trust_domain() {
        let identity = identity("{selector: {dataplane: {}}, spiffeID: {path: '/{{ .TrustDomain }}/a'}}");
        let id = spiffe_id(&identity, "m", &labels::Labels::new(), "z").expect("id");
        assert_eq!(id.to_string(), "spiffe://m.z.mesh.local/m.z.mesh.local/a");
    }

    #[test]
    fn the_narrowest_selector_wins() {
        let (all, none) = (identity("selector: {dataplane: {}}"), identity("{}"));
        let web = identity("selector: {dataplane: {matchLabels: {app: web}}}");
        let metas = [Meta::new("m", "a"), Meta::new("m", "b"), Meta::new("m", "c")];
        let labels = labels::Labels::from([("app".to_owned(), "web".to_owned())]);
        let all = [(&metas[0], &all), (&metas[1], &none), (&metas[2], &web)];
        assert_eq!(select(all, &labels).map(|(meta, _)| meta.name.as_str()), Some("c"));
        assert_eq!(select(all, &labels::Labels::new()).map(|(meta, _)| meta.name.as_str()), Some("a"));
    }
}
