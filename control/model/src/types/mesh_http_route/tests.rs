//! The rules of MeshHTTPRoute, a row each.

use crate::table::faults;

const RULE: &str = "spec.to[0].rules[0]";

fn judge(rule: &str, expected: &[&str]) {
    let spec = format!("to: [{{targetRef: {{kind: MeshService, labels: {{a: b}}}}, rules: [{rule}]}}]");
    let expected: Vec<String> = expected.iter().map(|fault| format!("{RULE}.{fault}")).collect();
    assert_eq!(faults("MeshHTTPRoute", &spec), expected);
}

#[rstest::rstest]
#[case::relative_prefix(
    "{type: PathPrefix, value: a/}",
    &[
        "path.value: does not need a trailing slash because only a `/`-separated prefix or an entire path is matched",
        "path.value: must be an absolute path",
    ]
)]
#[case::root("{type: PathPrefix, value: /}", &[])]
#[case::exact("{type: Exact, value: /a/}", &[])]
#[case::expression("{type: RegularExpression, value: 'a.*'}", &[])]
fn judges_paths(#[case] path: &str, #[case] expected: &[&str]) {
    let expected: Vec<String> = expected.iter().map(|fault| format!("matches[0].{fault}")).collect();
    let expected: Vec<&str> = expected.iter().map(String::as_str).collect();
    judge(&format!("{{matches: [{{path: {path}}}], default: {{}}}}"), &expected);
}

#[rstest::rstest]
#[case::no_body(
    "{type: RequestHeaderModifier}, {type: ResponseHeaderModifier}, {type: RequestRedirect}, {type: URLRewrite}, {type: RequestMirror}",
    &[
        "[0].requestHeaderModifier: must be defined",
        "[1].responseHeaderModifier: must be defined",
        "[2].requestRedirect: must be defined",
        "[3].urlRewrite: must be defined",
        "[4].requestMirror: must be defined",
    ]
)]
#[case::address(
    "{type: RequestRedirect, requestRedirect: {hostname: 10.0.0.1}}",
    &["[0].requestRedirect.hostname: cannot be an IP address"]
)]
#[case::redirect(
    "{type: RequestRedirect, requestRedirect: {statusCode: 200, scheme: ftp, port: 0}}",
    &[
        "[0].requestRedirect.port: port must be in the range [1, 65535]",
        "[0].requestRedirect.statusCode: in body should be one of [301 302 303 307 308]",
        "[0].requestRedirect.scheme: in body should be one of [http https]",
    ]
)]
fn judges_filters(#[case] filters: &str, #[case] expected: &[&str]) {
    let expected: Vec<String> = expected.iter().map(|fault| format!("default.filters{fault}")).collect();
    let expected: Vec<&str> = expected.iter().map(String::as_str).collect();
    judge(&format!("{{default: {{filters: [{filters}]}}}}"), &expected);
}

#[test]
fn a_name_is_told_as_what_it_is_not() {
    let spec = "to: [{targetRef: {kind: MeshService, labels: {a: b}}, rules: [{default: {filters: [{type: URLRewrite, urlRewrite: {hostname: '*.a'}}]}}]}]";
    let faults = faults("MeshHTTPRoute", spec);
    let wanted =
        format!("{RULE}.default.filters[0].urlRewrite.hostname: a lowercase RFC 1123 subdomain must");
    assert!(faults[0].starts_with(&wanted), "{faults:?}");
}

#[rstest::rstest]
#[case::any_path("", &[])]
#[case::prefix("{path: {type: PathPrefix, value: /a}}", &[])]
#[case::exact("{path: {type: PathPrefix, value: /a}}, {path: {type: Exact, value: /a}}", &["can only appear if all matches match a path prefix"])]
#[case::method("{method: GET}", &["can only appear if all matches match a path prefix"])]
fn a_prefix_is_replaced_only_where_one_matched(#[case] matches: &str, #[case] expected: &[&str]) {
    for (kind, field) in [("RequestRedirect", "requestRedirect"), ("URLRewrite", "urlRewrite")] {
        let filter = format!(
            "{{type: {kind}, {field}: {{path: {{type: ReplacePrefixMatch, replacePrefixMatch: /b}}}}}}"
        );
        let expected: Vec<String> = expected
            .iter()
            .map(|fault| format!("default.filters[0].{field}.path.replacePrefixMatch: {fault}"))
            .collect();
        let expected: Vec<&str> = expected.iter().map(String::as_str).collect();
        judge(&format!("{{matches: [{matches}], default: {{filters: [{filter}]}}}}"), &expected);
    }
}
