use proptest::prelude::*;

use super::*;

fn words(pairs: &[(&str, &str)]) -> Labels {
    pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

fn word(value: &str) -> Labels {
    words(&[(INJECTION, value)])
}

/// A pod of which everything is known.
fn full<'a>(annotations: &'a Labels, labels: &'a Labels, facts: &'a NamespaceFacts) -> Pod<'a> {
    Pod {
        name: Some("web"),
        namespace: Some("shop"),
        annotations: Some(annotations),
        labels: Some(labels),
        namespace_facts: Some(facts),
        ..Pod::default()
    }
}

#[test]
fn the_reason_names_the_source_and_its_value() {
    let (none, on, off) = (Labels::new(), word("enabled"), word("false"));
    let of_namespace = NamespaceFacts { labels: on.clone(), annotations: off.clone() };
    let rules = Rules { default: Some(Injection::Disabled), ..Rules::default() };
    let verdict = |pod: &Pod<'_>| decide(pod, &rules).expect("readable");

    let seen = verdict(&full(&none, &none, &of_namespace));
    assert_eq!((seen.decision, seen.source), (Decision::Meshed, Source::NamespaceLabel));
    assert_eq!(seen.reason, "the namespace's label kuma.io/sidecar-injection is `enabled`");
    let seen = verdict(&full(&none, &off, &of_namespace));
    assert_eq!((seen.decision, seen.source), (Decision::Unmeshed, Source::PodLabel));
    let seen = verdict(&full(&on, &off, &of_namespace));
    assert_eq!((seen.decision, seen.source), (Decision::Meshed, Source::PodAnnotation));
    let seen = verdict(&Pod { host_network: true, ..full(&on, &on, &of_namespace) });
    assert_eq!((seen.decision, seen.source), (Decision::Unmeshed, Source::HostNetwork));
    let seen = verdict(&full(&none, &none, &NamespaceFacts::default()));
    assert_eq!((seen.decision, seen.source), (Decision::Unmeshed, Source::Default));
}

#[test]
fn a_value_that_means_nothing_is_neither_yes_nor_no() {
    for value in ["", "yes", "Enabled", "enabled ", "1"] {
        let (said, none, nothing) = (word(value), Labels::new(), NamespaceFacts::default());
        let error =
            decide(&full(&said, &none, &nothing), &Rules::default()).expect_err("unreadable").to_string();
        assert!(error.contains(&format!("`{value}`")) && error.contains("write `enabled`"), "{error}");
        // In an excluded namespace it concerns nobody.
        let rules = Rules { exclude_namespaces: &["shop".to_owned()], ..Rules::default() };
        let verdict = decide(&full(&said, &none, &nothing), &rules).expect("not looked at");
        assert_eq!(verdict.decision, Decision::Unmeshed);
    }
}

#[test]
fn the_operators_word_on_an_identity_wins() {
    let annotations = words(&[("kuma.io/mesh", "money"), ("kuma.io/workload", "bank")]);
    let (none, nothing) = (Labels::new(), NamespaceFacts::default());
    let pod = full(&annotations, &none, &nothing);
    let who = |pod: &Pod<'_>, rules: &Rules<'_>| {
        let who = membership(pod, rules).expect("names");
        (who.mesh, who.workload, who.dataplane)
    };
    let expected = |mesh: &str, workload: &str| (mesh.to_owned(), workload.to_owned(), "web.shop".to_owned());
    assert_eq!(who(&pod, &Rules::default()), expected("money", "bank"));
    let rules = Rules { mesh: Some("shops"), workload: Some("web"), ..Rules::default() };
    assert_eq!(who(&pod, &rules), expected("shops", "web"));
    assert_eq!(who(&full(&none, &none, &nothing), &Rules::default()), expected("default", "web-shop"));
    let of_namespace =
        NamespaceFacts { labels: words(&[("kuma.io/mesh", "team")]), ..NamespaceFacts::default() };
    assert_eq!(who(&full(&none, &none, &of_namespace), &Rules::default()), expected("team", "web-shop"));
}

#[test]
fn a_long_name_makes_a_workload_that_fits_and_differs() {
    let (none, nothing) = (Labels::new(), NamespaceFacts::default());
    let workload = |name: &str| {
        let pod = Pod { name: Some(name), ..full(&none, &none, &nothing) };
        membership(&pod, &Rules::default()).expect("fits").workload
    };
    assert_eq!(workload("1st"), "w-1st-shop");
    let (one, other) = (workload(&"a".repeat(80)), workload(&"a".repeat(81)));
    assert!(one != other && one.len() == 63, "{one} {other}");
}

#[test]
fn names_that_cannot_be_are_refused_with_their_source() {
    let (none, nothing) = (Labels::new(), NamespaceFacts::default());
    for (key, value) in [("kuma.io/mesh", "Money"), ("kuma.io/workload", "../bank"), ("kuma.io/workload", "")]
    {
        let annotations = words(&[(key, value)]);
        let pod = full(&annotations, &none, &nothing);
        let error = membership(&pod, &Rules::default()).expect_err("invalid").to_string();
        assert!(error.contains("the pod's annotation") && error.contains(&format!("`{value}`")), "{error}");
    }
    let pod = Pod { name: None, ..full(&none, &none, &nothing) };
    assert_eq!(membership(&pod, &Rules::default()), Err(Invalid::Nameless));
}

/// What a source says: nothing, something that can't be read, yes or no, perhaps beside other words.
fn said() -> impl Strategy<Value = Labels> {
    let value = prop_oneof![
        6 => Just(None),
        1 => Just(Some("enabled")),
        1 => Just(Some("true")),
        1 => Just(Some("disabled")),
        1 => Just(Some("false")),
        1 => Just(Some("maybe")),
    ];
    (value, any::<bool>()).prop_map(|(value, more)| {
        let mut words = value.map(word).unwrap_or_default();
        if more {
            words.insert("app".to_owned(), "enabled".to_owned());
        }
        words
    })
}

fn default() -> impl Strategy<Value = Option<Injection>> {
    prop_oneof![Just(None), Just(Some(Injection::Enabled)), Just(Some(Injection::Disabled))]
}

proptest! {
    /// The first source that says anything decides, and nobody else matters.
    #[test]
    fn the_first_word_counts(
        sources in proptest::array::uniform6(said()), excluded: bool, host_network: bool, default in default(),
    ) {
        let [annotations, net_annotations, net_labels, labels, ns_labels, ns_annotations] = &sources;
        let facts = NamespaceFacts { labels: ns_labels.clone(), annotations: ns_annotations.clone() };
        let pod = Pod { host_network, ..full(annotations, labels, &facts) };
        let list = if excluded { vec!["a".to_owned(), "shop".to_owned()] } else { vec!["a".to_owned()] };
        let rules = Rules {
            exclude_namespaces: &list,
            annotations: Some(net_annotations),
            labels: Some(net_labels),
            default,
            ..Rules::default()
        };
        let word = sources.iter().find_map(|words| words.get(INJECTION)).map(String::as_str);
        let expected = match (excluded || host_network, word, default) {
            (true, ..) | (_, Some("disabled" | "false"), _) | (_, None, Some(Injection::Disabled)) => {
                Ok(Decision::Unmeshed)
            }
            (_, Some("enabled" | "true"), _) | (_, None, Some(Injection::Enabled)) => Ok(Decision::Meshed),
            (_, Some(_), _) => Err(()),
            (_, None, None) => Ok(Decision::Undecided),
        };
        let seen = decide(&pod, &rules);
        prop_assert_eq!(seen.clone().map(|verdict| verdict.decision).map_err(|_| ()), expected);
        if let Ok(verdict) = seen {
            prop_assert!(!verdict.reason.is_empty());
        }
    }

    /// Who knows less decides the same or nothing: plugin, agent and control can't contradict each other.
    #[test]
    fn who_knows_less_never_decides_otherwise(
        sources in proptest::array::uniform6(said()), known in proptest::array::uniform4(any::<bool>()),
        excluded: bool, default in default(),
    ) {
        let [annotations, net_annotations, net_labels, labels, ns_labels, ns_annotations] = &sources;
        let facts = NamespaceFacts { labels: ns_labels.clone(), annotations: ns_annotations.clone() };
        let list = if excluded { vec!["shop".to_owned()] } else { Vec::new() };
        let rules = Rules {
            exclude_namespaces: &list,
            annotations: Some(net_annotations),
            labels: Some(net_labels),
            default,
            ..Rules::default()
        };
        let pod = full(annotations, labels, &facts);
        let less = Pod {
            annotations: pod.annotations.filter(|_| known[0]),
            labels: pod.labels.filter(|_| known[1]),
            namespace_facts: pod.namespace_facts.filter(|_| known[2]),
            ..pod
        };
        let fewer_rules = Rules { default: default.filter(|_| known[3]), ..rules };
        match (decide(&less, &fewer_rules), decide(&pod, &rules)) {
            (Ok(verdict), _) if verdict.decision == Decision::Undecided => {}
            (less, more) => prop_assert_eq!(less, more),
        }
    }
}
