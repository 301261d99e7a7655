//! What names, labels and addresses may look like; each function says what is wrong, or `None`.

use std::net::IpAddr;

const DNS_1123_LABEL: &str = "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must start and end with an alphanumeric character (e.g. 'my-name',  or '123-abc', regex used for validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?')";
const DNS_1123_SUBDOMAIN: &str = "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start and end with an alphanumeric character (e.g. 'example.com', regex used for validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')";
const DNS_1035_LABEL: &str = "a DNS-1035 label must consist of lower case alphanumeric characters or '-', start with an alphabetic character, and end with an alphanumeric character (e.g. 'my-name',  or 'abc-123', regex used for validation is '[a-z]([-a-z0-9]*[a-z0-9])?')";
const QUALIFIED: &str = "must consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric character (e.g. 'MyName',  or 'my.name',  or '123-abc', regex used for validation is '([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]')";
const LABEL_VALUE: &str = "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric character (e.g. 'MyValue',  or 'my_value',  or '12345', regex used for validation is '(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?')";

fn is_dns_byte(b: u8) -> bool {
    b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-'
}

fn is_label_shaped(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(is_dns_byte) && !text.starts_with('-') && !text.ends_with('-')
}

fn too_long(text: &str, max: usize) -> Option<String> {
    (text.len() > max).then(|| format!("must be no more than {max} characters"))
}

/// A label of a DNS name: what the parts of an SNI are.
pub fn dns_1123_label(text: &str) -> Vec<String> {
    let shape = (!is_label_shaped(text)).then(|| DNS_1123_LABEL.to_owned());
    too_long(text, 63).into_iter().chain(shape).collect()
}

/// A label that starts with a letter: what meshes, zones and services are named.
pub fn dns_1035_label(text: &str) -> Vec<String> {
    let starts = text.as_bytes().first().is_some_and(u8::is_ascii_lowercase);
    let shape = (!is_label_shaped(text) || !starts).then(|| DNS_1035_LABEL.to_owned());
    too_long(text, 63).into_iter().chain(shape).collect()
}

/// A lower-case DNS name.
pub fn dns_1123_subdomain(text: &str) -> Vec<String> {
    let shape = (!text.split('.').all(is_label_shaped)).then(|| DNS_1123_SUBDOMAIN.to_owned());
    too_long(text, 253).into_iter().chain(shape).collect()
}

fn is_qualified(text: &str) -> bool {
    let bytes = text.as_bytes();
    text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
        && bytes.first().is_some_and(u8::is_ascii_alphanumeric)
        && bytes.last().is_some_and(u8::is_ascii_alphanumeric)
}

/// Key of a label: a name of at most 63 characters with an optional DNS name and slash before it.
pub fn label_key(text: &str) -> Vec<String> {
    let mut out = Vec::new();
    let name = match text.split('/').collect::<Vec<_>>().as_slice() {
        [name] => *name,
        [prefix, name] => {
            if prefix.is_empty() {
                out.push("prefix part must be non-empty".to_owned());
            } else {
                out.extend(
                    dns_1123_subdomain(prefix).into_iter().map(|message| format!("prefix part {message}")),
                );
            }
            *name
        }
        _ => {
            out.push(format!(
                "a valid label key {QUALIFIED} with an optional DNS subdomain prefix and '/' (e.g. 'example.com/MyName')"
            ));
            return out;
        }
    };
    if name.is_empty() {
        out.push("name part must be non-empty".to_owned());
    } else if name.len() > 63 {
        out.push("name part must be no more than 63 characters".to_owned());
    }
    if !is_qualified(name) {
        out.push(format!("name part {QUALIFIED}"));
    }
    out
}

/// Value of a label.
pub fn label_value(text: &str) -> Vec<String> {
    let shape = (!text.is_empty() && !is_qualified(text)).then(|| LABEL_VALUE.to_owned());
    too_long(text, 63).into_iter().chain(shape).collect()
}

/// Whether a text is an IP address.
pub fn is_ip(text: &str) -> bool {
    text.parse::<IpAddr>().is_ok()
}

/// Whether a text is a DNS name and no IP address: any case, underscores anywhere, a hyphen but at the start of a
/// part, as peers take them.
pub fn is_dns_name(text: &str) -> bool {
    let name = text.strip_suffix('.').unwrap_or(text);
    let is_part = |part: &str| {
        (1..=63).contains(&part.len())
            && !part.starts_with('-')
            && part.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
    };
    name.len() <= 255 && name.split('.').all(is_part) && !is_ip(text)
}

/// Whether a text says where something is reached: an IP address or a DNS name.
pub fn is_ip_or_dns_name(text: &str) -> bool {
    is_ip(text) || is_dns_name(text)
}

/// Longest name that a store of any kind takes.
const MAX_NAME_LENGTH: usize = 253;

/// The name of a copy of a resource in other zones: its display name and a hash of where it comes from, cut so that
/// it fits every store.
pub fn of_copy(mesh: &str, name: &str, zone: &str, namespace: &str) -> String {
    let hash = [mesh, name, zone, namespace]
        .iter()
        .flat_map(|part| part.bytes())
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
        });
    // Letters that spell no words, as Kubernetes writes hashes.
    let alphabet = b"bcdfghjklmnpqrstvwxz2456789";
    let hash: String = format!("{hash:016x}")
        .bytes()
        .map(|c| char::from(alphabet[usize::from(c) % alphabet.len()]))
        .collect();
    let mut end = name.len().min(MAX_NAME_LENGTH - 1 - hash.len());
    while !name.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}-{hash}", &name[..end])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_of_different_resources_have_different_names_that_fit() {
        let copy = of_copy("default", "a", "east", "");
        assert!(copy.starts_with("a-") && copy.len() == 18, "{copy}");
        assert_ne!(copy, of_copy("default", "a", "west", ""));
        let long = of_copy("default", &"a".repeat(253), "east", "");
        assert_eq!(long.len(), 253);
        assert!(dns_1123_subdomain(&long).is_empty());
    }

    #[rstest::rstest]
    #[case("a-1", true)]
    #[case("1a", false)]
    #[case("a-", false)]
    #[case("A", false)]
    #[case("", false)]
    fn judges_1035_labels(#[case] text: &str, #[case] valid: bool) {
        assert_eq!(dns_1035_label(text).is_empty(), valid);
    }

    #[rstest::rstest]
    #[case("a.example", true)]
    #[case("A_b.example.", true)]
    #[case("a-.example", true)]
    #[case("-a.example", false)]
    #[case("a..b", false)]
    #[case("..>_<..", false)]
    #[case("10.0.0.1", false)]
    #[case("", false)]
    fn judges_dns_names(#[case] text: &str, #[case] valid: bool) {
        assert_eq!(is_dns_name(text), valid);
    }

    #[rstest::rstest]
    #[case("app", true)]
    #[case("kuma.io/app", true)]
    #[case("kuma.io/Not Valid!", false)]
    #[case("/app", false)]
    #[case("a/b/c", false)]
    fn judges_label_keys(#[case] text: &str, #[case] valid: bool) {
        assert_eq!(label_key(text).is_empty(), valid);
    }
}
