use rstest::rstest;

use super::*;

fn ours() -> Plugin {
    json!({"type": "ursa-cni", "excludeNamespaces": ["kube-system"]}).as_object().unwrap().clone()
}

const PLAIN: &str = "{\"name\":\"n\",\"cniVersion\":\"1.0.0\",\"plugins\":[{\"type\":\"bridge\"}]}";

#[rstest]
#[case::one_line(
    PLAIN,
    "{\"type\":\"bridge\"},{\"excludeNamespaces\":[\"kube-system\"],\"type\":\"ursa-cni\"}]}"
)]
#[case::tabs_and_crlf(
    "{\r\n\t\"name\": \"n\",\r\n\t\"plugins\": [\r\n\t\t{\"type\": \"bridge\"}\r\n\t]\r\n}",
    "\"bridge\"},\r\n\t\t{\r\n\t\t\t\"excludeNamespaces\": [\r\n\t\t\t\t\"kube-system\"\r\n\t\t\t],\r\n\t\t\t\"type\": \"ursa-cni\"\r\n\t\t}\r\n\t]\r\n}"
)]
fn appends_in_the_style_of_the_file(#[case] text: &str, #[case] ends: &str) {
    let with = Conflist::parse(text).unwrap().with(&ours());
    assert!(with.ends_with(ends), "{with}");
    assert_eq!(Conflist::parse(&with).unwrap().without("ursa-cni").as_deref(), Some(text));
    assert_eq!(Conflist::parse(&with).unwrap().with(&ours()), with, "a second time changes nothing");
}

#[test]
fn replaces_wherever_it_was() {
    let text = r#"{"name":"n","plugins":[ {"type":"ursa-cni"} , {"type":"a"},{"type":"ursa-cni","old":1}, {"type":"b"} ]}"#;
    let with = Conflist::parse(text).unwrap().with(&ours());
    let types: Vec<_> = Conflist::parse(&with).unwrap().types().map(str::to_owned).collect();
    assert_eq!(types, ["a", "b", "ursa-cni"]);
    let in_place = r#"{"name":"n","plugins":[{"type":"a"}, {"type":"ursa-cni","old":1} ] }"#;
    let with = Conflist::parse(in_place).unwrap().with(&ours());
    assert_eq!(
        with,
        r#"{"name":"n","plugins":[{"type":"a"}, {"excludeNamespaces":["kube-system"],"type":"ursa-cni"} ] }"#
    );
}

#[test]
fn only_ours_leaves_nothing() {
    let list =
        Conflist::parse(r#"{"name":"n","plugins":[{"type":"ursa-cni"},{"type":"ursa-cni"}]}"#).unwrap();
    assert!(list.is_only("ursa-cni"));
    assert_eq!(list.without("ursa-cni"), None);
}

#[test]
fn of_a_key_that_is_there_twice_the_last_counts() {
    let text =
        r#"{"plugins":[{"type":"x"}],"name":"n","pl\u0075gins":[{"type":"bridge","plugins":["\"}]"]}]}"#;
    let with = Conflist::parse(text).unwrap().with(&ours());
    let document: Value = serde_json::from_str(&with).unwrap();
    assert_eq!(document["plugins"][0]["type"], "bridge");
    assert_eq!(document["plugins"][1]["type"], "ursa-cni");
}

#[rstest]
#[case("", "it is no JSON")]
#[case("{\"name\":\"n\", // the base\n\"plugins\":[]}", "comments")]
#[case("[]", "no object")]
#[case(r#"{"plugins":[{"type":"a"}]}"#, "no `name`")]
#[case(r#"{"name":"n"}"#, "no list `plugins`")]
#[case(r#"{"name":"n","plugins":[]}"#, "empty")]
#[case(r#"{"name":"n","plugins":[{"type":"a"},{"type":""}]}"#, "plugin 2")]
#[case("\u{feff}{}", "no JSON")]
fn says_what_is_wrong(#[case] text: &str, #[case] why: &str) {
    let error = Conflist::parse(text).unwrap_err().to_string();
    assert!(error.contains(why), "{error}");
}

#[rstest]
#[case(r#"{"name":"kubenet","type":"flannel"}"#, Some("0.3.0"))]
#[case(r#"{"cniVersion":"0.4.0","name":"kubenet","type":"flannel"}"#, Some("0.4.0"))]
#[case(r#"{"cniVersion":"0.2.0","name":"kubenet","type":"flannel"}"#, None)]
fn a_single_plugin_becomes_a_list(#[case] text: &str, #[case] version: Option<&str>) {
    let list = Conf::parse(text).unwrap().with(&ours(), None);
    let Some(version) = version else { return assert!(list.is_err()) };
    let list = list.unwrap();
    let list = Conflist::parse(&list).unwrap();
    assert_eq!((list.name(), list.versions()), ("kubenet", vec![version.to_owned()]));
    assert_eq!(list.types().collect::<Vec<_>>(), ["flannel", "ursa-cni"]);
}

mod any_text {
    use proptest::prelude::*;

    use super::*;

    /// JSON white space.
    fn blank() -> impl Strategy<Value = String> {
        proptest::string::string_regex("[ \t\r\n]{0,3}").unwrap()
    }

    /// A value as text, in any formatting.
    fn value() -> impl Strategy<Value = String> {
        let leaf = prop_oneof![
            any::<String>().prop_map(|s| json!(s).to_string()),
            any::<i64>().prop_map(|n| n.to_string()),
            Just("1.50e+3".to_owned()),
            Just("\"\\u00e4\\/\\\"]}\"".to_owned()),
            prop_oneof![Just("null"), Just("true"), Just("{}"), Just("[ ]")].prop_map(str::to_owned),
        ];
        leaf.prop_recursive(3, 16, 4, |inner| {
            prop_oneof![
                proptest::collection::vec((blank(), inner.clone(), blank()), 1..4).prop_map(|items| {
                    let items: Vec<_> = items.into_iter().map(|(a, v, b)| format!("{a}{v}{b}")).collect();
                    format!("[{}]", items.join(","))
                }),
                proptest::collection::vec((blank(), any::<String>(), blank(), inner, blank()), 1..4)
                    .prop_map(|items| {
                        let items: Vec<_> = items
                            .into_iter()
                            .map(|(a, k, b, v, c)| format!("{a}{}{b}:{c}{v}{a}", json!(k)))
                            .collect();
                        format!("{{{}}}", items.join(","))
                    }),
            ]
        })
    }

    fn conflist() -> impl Strategy<Value = String> {
        let plugin = (blank(), "[a-z]{1,6}", blank(), value(), blank())
            .prop_map(|(a, kind, b, v, c)| format!("{a}{{{b}\"type\"{c}:\"{kind}\",{a}\"x\":{v}{b}}}{c}"));
        let extra = (any::<String>().prop_filter("ours", |k| k != "plugins" && k != "name"), value());
        (
            proptest::collection::vec(plugin, 1..4),
            proptest::collection::vec(extra, 0..3),
            blank(),
            any::<bool>(),
        )
            .prop_map(|(plugins, extras, space, first)| {
                let plugins = format!("{space}\"plugins\"{space}:{space}[{}]", plugins.join(","));
                let name = format!("{space}\"name\":{space}\"n\"");
                let mut parts = if first { vec![plugins, name] } else { vec![name, plugins] };
                parts.extend(extras.into_iter().map(|(k, v)| format!("{}{space}:{v}{space}", json!(k))));
                format!("{space}{{{}{space}}}{space}", parts.join(","))
            })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512))]

        #[test]
        fn is_itself_again_after_ours_came_and_went(text in conflist()) {
            let list = Conflist::parse(&text).unwrap();
            let with = list.with(&ours());
            let mut expected: Value = serde_json::from_str(&text).unwrap();
            expected["plugins"].as_array_mut().unwrap().push(json!(ours()));
            prop_assert_eq!(serde_json::from_str::<Value>(&with).unwrap(), expected);
            let again = Conflist::parse(&with).unwrap();
            prop_assert_eq!(again.with(&ours()), with.clone());
            prop_assert_eq!(again.without("ursa-cni"), Some(text));
        }

        #[test]
        fn or_no_list_is_refused_without_harm(text in any::<String>()) {
            prop_assert!(Conflist::parse(&text).is_err() || text.contains("plugins"));
        }
    }
}
