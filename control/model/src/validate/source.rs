//! Data that is kept elsewhere.

use super::MUST_BE_DEFINED;
use crate::{
    Path, Violations,
    policy::{DataSource, DataSourceType},
};

/// Judges a source that the control plane reads for an operator.
pub fn of_control_plane(path: &Path, source: &DataSource, out: &mut Violations) {
    let all = [
        DataSourceType::EnvVar,
        DataSourceType::InsecureInline,
        DataSourceType::File,
        DataSourceType::Secret,
    ];
    data_source(path, source, &all, out);
}

/// Judges a source whose kinds are restricted to `allowed`.
pub fn data_source(path: &Path, source: &DataSource, allowed: &[DataSourceType], out: &mut Violations) {
    let given = &source.source_type;
    if !allowed.contains(given) {
        let allowed: Vec<&str> = allowed.iter().map(DataSourceType::as_str).collect();
        out.add(path.field("type"), format!("{given} must be one of: {}", allowed.join(", ")));
        return;
    }
    let defined = |field: &str, value: Option<&str>, part: &str, out: &mut Violations| match value {
        None => out.add(path.field(field), MUST_BE_DEFINED),
        Some("") => out.add(path.field(field).field(part), MUST_BE_DEFINED),
        Some(_) => {}
    };
    match given {
        DataSourceType::File => {
            let file = source.file.as_ref().map(|file| file.path.as_str());
            defined("file", file, "path", out);
            if let Some(fault) = file.filter(|file| !file.is_empty()).and_then(fault_of_file) {
                out.add(path.field("file.path"), fault);
            }
        }
        DataSourceType::EnvVar => {
            defined("envVar", source.env_var.as_ref().map(|variable| variable.name.as_str()), "name", out);
        }
        DataSourceType::InsecureInline => {
            let inline = source.insecure_inline.as_ref().map(|inline| inline.value.as_str());
            defined("insecureInline", inline, "value", out);
        }
        DataSourceType::Secret => {
            if let Some(secret) = source.secret_ref.as_ref().filter(|secret| secret.kind != "Secret") {
                out.add(path.field("secretRef.kind"), format!("{} must be one of: Secret", secret.kind));
            }
            defined("secretRef", source.secret_ref.as_ref().map(|secret| secret.name.as_str()), "name", out);
        }
        DataSourceType::Unknown(_) => {}
    }
}

/// The control plane reads the file, so a path must say plainly which one.
fn fault_of_file(path: &str) -> Option<String> {
    if path.contains("..") {
        Some(format!("file path contains directory traversal sequence: {path}"))
    } else if path.starts_with('/') {
        None
    } else {
        Some(format!("file path must be absolute: {path}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::yaml;

    #[rstest::rstest]
    #[case("{type: File}", &["d.file: must be defined"])]
    #[case("{type: File, file: {}}", &["d.file.path: must be defined"])]
    #[case("{type: File, file: {path: a/b}}", &["d.file.path: file path must be absolute: a/b"])]
    #[case("{type: File, file: {path: /a/../b}}", &["d.file.path: file path contains directory traversal sequence: /a/../b"])]
    #[case("{type: EnvVar, envVar: {}}", &["d.envVar.name: must be defined"])]
    #[case("{type: InsecureInline, insecureInline: {}}", &["d.insecureInline.value: must be defined"])]
    #[case("{type: Secret}", &["d.secretRef: must be defined"])]
    #[case("{type: Secret, secretRef: {kind: Other}}", &["d.secretRef.kind: Other must be one of: Secret", "d.secretRef.name: must be defined"])]
    #[case("{type: Other}", &["d.type: Other must be one of: EnvVar, InsecureInline, File, Secret"])]
    fn a_source_has_what_its_type_wants(#[case] text: &str, #[case] expected: &[&str]) {
        let mut out = Violations::new();
        of_control_plane(&Path::root().field("d"), &yaml::from_str(text).expect("source"), &mut out);
        assert_eq!(out.lines(), expected);
    }
}
