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

/// Whether a text is a DNS name, of any case, underscores allowed.
pub fn is_dns_name(text: &str) -> bool {
    let text = text.strip_suffix('.').unwrap_or(text);
    !text.is_empty()
        && text.len() <= 255
        && text.split('.').all(|part| {
            let bytes = part.as_bytes();
            (1..=63).contains(&part.len())
                && part.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
                && bytes[0] != b'-'
                && bytes[bytes.len() - 1] != b'-'
        })
}

#[cfg(test)]
mod tests {
    use super::*;

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
    #[case("app", true)]
    #[case("kuma.io/app", true)]
    #[case("kuma.io/Not Valid!", false)]
    #[case("/app", false)]
    #[case("a/b/c", false)]
    fn judges_label_keys(#[case] text: &str, #[case] valid: bool) {
        assert_eq!(label_key(text).is_empty(), valid);
    }
}
