//! MeshProxyPatch: changes to Envoy's own configuration, for what no policy says.

use crate::{
    Path,
    meta::Meta,
    open_enum,
    policy::TargetRef,
    registry::{Descriptor, PolicyTraits},
    resource::{NoStatus, ResourceSpec},
    spec_struct, validate,
    violation::Violations,
    yaml,
};

/// All that is known of the type.
pub static DESCRIPTOR: Descriptor = Descriptor {
    acted_on: false,
    ..Descriptor::policy::<MeshProxyPatch>(
        PolicyTraits::PROXY,
        "MeshProxyPatch",
        "meshproxypatches",
        "mpp",
        "Mesh Proxy Patch",
        "Mesh Proxy Patches",
    )
};

open_enum! {
    /// What is done.
    pub enum Operation {
        Add = "Add", Patch = "Patch", Remove = "Remove", AddFirst = "AddFirst", AddLast = "AddLast",
        AddBefore = "AddBefore", AddAfter = "AddAfter",
    }
}

spec_struct! {
    /// Changes to the selected proxies.
    pub struct MeshProxyPatch {
        pub target_ref: Option<TargetRef>,
        pub default: Conf,
    }
    /// One after the other.
    pub struct Conf {
        pub append_modifications: Vec<Modification>,
    }
    /// Exactly one of these.
    pub struct Modification {
        pub cluster: Option<Change>,
        pub listener: Option<Change>,
        pub virtual_host: Option<Change>,
        pub network_filter: Option<Change>,
        pub http_filter: Option<Change>,
    }
    /// What is changed how.
    pub struct Change {
        pub operation: Operation,
        #[serde(rename = "match")]
        pub matched: Option<Match>,
        pub value: Option<String>,
        pub json_patches: Vec<validate::PatchOperation>,
    }
    /// Which of them; all that is said must hold.
    pub struct Match {
        pub name: Option<String>,
        pub origin: Option<String>,
        pub tags: std::collections::BTreeMap<String, String>,
        pub listener_name: Option<String>,
        pub listener_tags: std::collections::BTreeMap<String, String>,
        pub route_configuration_name: Option<String>,
    }
}

/// Operations on clusters, listeners and virtual hosts.
const WHOLE: [&str; 3] = ["Add", "Patch", "Remove"];
/// Operations on filters, which have an order.
const ORDERED: [&str; 6] = ["AddFirst", "AddLast", "AddBefore", "AddAfter", "Patch", "Remove"];

impl ResourceSpec for MeshProxyPatch {
    const DESCRIPTOR: &'static Descriptor = &DESCRIPTOR;
    type Status = NoStatus;

    fn validate(&self, _meta: &Meta, out: &mut Violations) {
        validate::top_level(self.target_ref.as_ref(), false, out);
        let path = Path::spec().field("default.appendModifications");
        if self.default.append_modifications.is_empty() {
            out.add(&path, validate::MUST_NOT_BE_EMPTY);
        }
        for (i, modification) in self.default.append_modifications.iter().enumerate() {
            modification.validate(&path.index(i), out);
        }
    }
}

impl Modification {
    fn validate(&self, path: &Path, out: &mut Violations) {
        let all = [
            ("cluster", &self.cluster),
            ("listener", &self.listener),
            ("virtualHost", &self.virtual_host),
            ("networkFilter", &self.network_filter),
            ("httpFilter", &self.http_filter),
        ];
        let defined = all.iter().filter(|(_, change)| change.is_some()).count();
        if defined != 1 {
            return out.add(
                path,
                format!(
                    "exactly one modification can be defined at a time. Currently, {defined} modifications are defined"
                ),
            );
        }
        for (kind, change) in all {
            if let Some(change) = change {
                change.validate(kind, &path.field(kind), out);
            }
        }
    }
}

impl Change {
    fn validate(&self, kind: &str, path: &Path, out: &mut Violations) {
        let is_filter = matches!(kind, "networkFilter" | "httpFilter");
        let operations: &[&str] = if is_filter { &ORDERED } else { &WHOLE };
        if !operations.contains(&self.operation.as_str()) {
            let operations: Vec<String> =
                operations.iter().map(|operation| format!("{operation:?}")).collect();
            return out.add(
                path.field("operation"),
                format!("invalid operation. Available operations: {}", operations.join(", ")),
            );
        }
        let name = self.matched.as_ref().and_then(|matched| matched.name.as_ref());
        if is_filter && name.is_none() {
            let wanted = match self.operation {
                Operation::AddBefore => {
                    Some("must be defined. You need to pick a filter before which this one will be added")
                }
                Operation::AddAfter => {
                    Some("must be defined. You need to pick a filter after which this one will be added")
                }
                Operation::Patch => Some(validate::MUST_BE_DEFINED),
                _ => None,
            };
            if let Some(wanted) = wanted {
                out.add(path.field("match.name"), wanted);
            }
        }
        if self.operation == Operation::Add {
            if kind == "virtualHost" {
                if name.is_some() {
                    out.add(path.field("match.name"), validate::MUST_NOT_BE_DEFINED);
                }
            } else if self.matched.is_some() {
                out.add(path.field("match"), validate::MUST_NOT_BE_DEFINED);
            }
        }
        match self.operation {
            Operation::Remove => {
                if self.value.is_some() {
                    out.add(path.field("value"), validate::MUST_NOT_BE_DEFINED);
                }
            }
            Operation::Patch => match (&self.value, self.json_patches.as_slice()) {
                (Some(_), [_, ..]) => {
                    out.add(path, format!("{kind} must have only one type defined: value, jsonPatches"));
                }
                (None, []) => {
                    out.add(path, format!("{kind} must have exactly one defined: value, jsonPatches"));
                }
                (Some(value), []) => validate_value(&path.field("value"), value, out),
                (None, patches) => validate::json_patches(&path.field("jsonPatches"), patches, out),
            },
            _ => match &self.value {
                None => out.add(path.field("value"), validate::MUST_BE_DEFINED),
                Some(value) => validate_value(&path.field("value"), value, out),
            },
        }
    }
}

/// The value must at least be an object; whether Envoy knows its fields is told by what generates the configuration.
fn validate_value(path: &Path, value: &str, out: &mut Violations) {
    match yaml::from_str::<serde_json::Value>(value) {
        Ok(serde_json::Value::Object(_)) => {}
        Ok(_) => out.add(path, "native Envoy resource is not valid: it must be an object"),
        // Go's word for a text that ends too early is what clients look for.
        Err(_) if value.trim() == "{" => out.add(path, "native Envoy resource is not valid: unexpected EOF"),
        Err(error) => out.add(path, format!("native Envoy resource is not valid: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use crate::table::faults;

    #[rstest::rstest]
    #[case::nothing("{}", &["spec.default.appendModifications: must not be empty"])]
    #[case::no_value(
        "default: {appendModifications: [{cluster: {operation: Add}}, {cluster: {operation: Patch}}]}",
        &[
            "spec.default.appendModifications[0].cluster.value: must be defined",
            "spec.default.appendModifications[1].cluster: cluster must have exactly one defined: value, jsonPatches",
        ]
    )]
    fn patches(#[case] spec: &str, #[case] expected: &[&str]) {
        assert_eq!(faults("MeshProxyPatch", spec), expected);
    }
}
