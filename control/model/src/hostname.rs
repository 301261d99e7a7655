//! Names of destinations, made from the templates of HostnameGenerators.

use crate::{
    meta::Meta,
    names,
    template::{Template, TemplateError},
};

/// Why a destination gets no name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HostnameError {
    /// The template is none.
    #[error("failed compiling gotemplate error=\"{0}\"")]
    Template(TemplateError),
    /// The template wants what the destination doesn't have.
    #[error("pre evaluation of template with parameters failed with error=\"{0}\"")]
    Render(TemplateError),
    /// The result can't be looked up.
    #[error("generated hostname {hostname:?} is not a valid DNS name: {why}")]
    Name {
        /// What the template gave.
        hostname: String,
        /// What is wrong with it.
        why: String,
    },
}

/// The name that a template gives to a destination. `local_zone` stands in where it carries no zone.
pub fn evaluate(template: &str, meta: &Meta, local_zone: &str) -> Result<String, HostnameError> {
    let template = Template::parse(template).map_err(HostnameError::Template)?;
    let zone = if meta.zone().is_empty() { local_zone } else { meta.zone() };
    let fields = [
        ("Name", meta.name.as_str()),
        ("DisplayName", meta.display_name()),
        ("Namespace", meta.namespace()),
        ("Mesh", meta.mesh.as_str()),
        ("Zone", zone),
    ];
    let hostname = template.render(&fields, &meta.labels).map_err(HostnameError::Render)?;
    let faults = names::dns_1123_subdomain(&hostname);
    if faults.is_empty() {
        Ok(hostname)
    } else {
        Err(HostnameError::Name { hostname, why: faults.join("; ") })
    }
}

/// What is wrong with a template as such, before any destination is known.
pub(crate) fn faults_of_template(text: &str) -> Option<String> {
    let template = match Template::parse(text) {
        Ok(template) => template,
        Err(error) => return Some(format!("couldn't parse template: {error}")),
    };
    let fields = [
        ("Name", "name"),
        ("DisplayName", "displayname"),
        ("Namespace", "namespace"),
        ("Mesh", "mesh"),
        ("Zone", "zone"),
    ];
    let rendered = match template.render_with(&fields, |_| Some("label".to_owned())) {
        Ok(rendered) => rendered,
        Err(error) => return Some(format!("couldn't render template with stub values: {error}")),
    };
    let faults = names::dns_1123_subdomain(&rendered);
    (!faults.is_empty()).then(|| {
        format!("template renders to {rendered:?} which is not a valid DNS name: {}", faults.join(", "))
    })
}
