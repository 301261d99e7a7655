//! HostnameGenerator: how destinations get their names.

use crate::{
    hostname,
    meta::Meta,
    policy::LabelSelector,
    registry::Descriptor,
    resource::{NoStatus, ResourceSpec},
    spec_struct, validate,
    violation::{Path, Violations},
};

/// All that is known of the type.
pub static DESCRIPTOR: Descriptor = Descriptor {
    scope: crate::Scope::Global,
    ..Descriptor::of::<HostnameGenerator>(
        "HostnameGenerator",
        "hostnamegenerators",
        "hg",
        "Hostname Generator",
        "Hostname Generators",
    )
};

spec_struct! {
    /// A template of names, and for which destinations.
    pub struct HostnameGenerator {
        pub selector: Selector,
        pub template: String,
        pub extension: Option<Extension>,
    }
    /// Exactly one of these.
    pub struct Selector {
        pub mesh_service: Option<LabelSelector>,
        pub mesh_external_service: Option<LabelSelector>,
        pub mesh_multi_zone_service: Option<LabelSelector>,
    }
    /// Something that makes names instead of the template.
    pub struct Extension {
        #[serde(rename = "type")]
        pub extension_type: String,
        pub config: Option<serde_json::Value>,
    }
}

impl ResourceSpec for HostnameGenerator {
    const DESCRIPTOR: &'static Descriptor = &DESCRIPTOR;
    type Status = NoStatus;

    fn validate(&self, _meta: &Meta, out: &mut Violations) {
        let spec = Path::spec();
        let selectors = [
            &self.selector.mesh_service,
            &self.selector.mesh_external_service,
            &self.selector.mesh_multi_zone_service,
        ];
        if selectors.iter().filter(|selector| selector.is_some()).count() != 1 {
            out.add(
                spec.field("selector"),
                "exact one selector (meshService, meshExternalService) must be defined",
            );
        }
        let path = spec.field("template");
        if self.template.is_empty() {
            out.add(path, validate::MUST_NOT_BE_EMPTY);
        } else if let Some(fault) = hostname::faults_of_template(&self.template) {
            out.add(path, fault);
        }
        if self.extension.as_ref().is_some_and(|extension| extension.extension_type.is_empty()) {
            out.add(spec.field("extension.type"), validate::MUST_NOT_BE_EMPTY);
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::table::faults;

    #[rstest::rstest]
    #[case::nothing(
        "extension: {}",
        &[
            "spec.selector: exact one selector (meshService, meshExternalService) must be defined",
            "spec.template: must not be empty",
            "spec.extension.type: must not be empty",
        ]
    )]
    #[case::two_selectors(
        "{selector: {meshService: {}, meshMultiZoneService: {}}, template: a.mesh}",
        &["spec.selector: exact one selector (meshService, meshExternalService) must be defined"]
    )]
    #[case::extension("{selector: {meshService: {}}, template: a.mesh, extension: {type: a}}", &[])]
    #[case::labels("{selector: {meshService: {}}, template: '{{ .DisplayName }}.{{ label \"a\" }}.mesh'}", &[])]
    fn generators(#[case] spec: &str, #[case] expected: &[&str]) {
        assert_eq!(faults("HostnameGenerator", spec), expected);
    }

    #[test]
    fn a_field_that_no_template_has_is_refused() {
        let faults =
            faults("HostnameGenerator", "{selector: {meshService: {}}, template: '{{ .Pod }}.mesh'}");
        assert!(
            faults[0].starts_with("spec.template: couldn't render template with stub values: "),
            "{faults:?}"
        );
    }
}
