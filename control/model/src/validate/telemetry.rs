//! What policies say of OpenTelemetry.

use super::{MUST_BE_DEFINED, must_be_one_of};
use crate::{Path, Violations};

/// Judges a static OpenTelemetry attribute name.
pub fn otel_attribute_name(text: &str) -> Option<&'static str> {
    if text.is_empty() {
        return Some(MUST_BE_DEFINED);
    }
    if text.contains('%') {
        return Some(
            "must be a static OpenTelemetry attribute name; placeholders are only supported in values",
        );
    }
    if text.starts_with("otel.") {
        return Some("must not use the reserved OpenTelemetry prefix 'otel.'");
    }
    let segment = |segment: &str| {
        !segment.is_empty() && segment.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit())
    };
    let starts = text.as_bytes().first().is_some_and(u8::is_ascii_lowercase);
    if starts && text.split(['.', '_']).all(segment) {
        return None;
    }
    Some(
        "must start with a lowercase letter, use only lowercase letters, digits, '.' or '_', avoid consecutive delimiters, and end with a letter or digit",
    )
}

/// Judges the reference to a collector.
pub fn otel_backend_ref(
    path: &Path,
    reference: Option<&crate::policy::OtelBackendRef>,
    out: &mut Violations,
) {
    let Some(reference) = reference else { return out.add(path, MUST_BE_DEFINED) };
    if reference.kind != "MeshOpenTelemetryBackend" {
        out.add(path.field("kind"), must_be_one_of("kind", &["MeshOpenTelemetryBackend"]));
    }
    if reference.labels.is_empty() {
        out.add(path, "backendRef must have exactly one defined: labels");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[rstest::rstest]
    #[case("a.b_c1", true)]
    #[case("otel", true)]
    #[case("otel.a", false)]
    #[case("1a", false)]
    #[case("a..b", false)]
    #[case("a_", false)]
    fn attribute_names(#[case] text: &str, #[case] valid: bool) {
        assert_eq!(otel_attribute_name(text).is_none(), valid);
    }
}
