//! A base CNI's file, which the installer edits: what isn't ours stays to the byte, and what it means stays too.
#![no_main]

use libfuzzer_sys::fuzz_target;
use serde_json::{Value, json};
use ursa_cni::install::conflist::{Conf, Conflist, Plugin};

fuzz_target!(|text: &str| {
    let mut ours = Plugin::new();
    ours.insert("type".to_owned(), json!("ursa-cni"));
    ours.insert("excludeNamespaces".to_owned(), json!(["kube-system"]));
    if let Ok(conf) = Conf::parse(text)
        && let Ok(list) = conf.with(&ours, None)
    {
        let list = Conflist::parse(&list).expect("what was made of a single plugin is a list");
        assert_eq!(list.types().count(), 2);
    }
    let Ok(list) = Conflist::parse(text) else { return };
    if list.has("ursa-cni") {
        assert!(
            list.without("ursa-cni")
                .is_none_or(|rest| !Conflist::parse(&rest).expect("a list").has("ursa-cni"))
        );
        return;
    }
    let with = list.with(&ours);
    let mut expected: Value = serde_json::from_str(text).expect("it was parsed before");
    expected["plugins"].as_array_mut().expect("so was its list").push(json!(ours));
    assert_eq!(serde_json::from_str::<Value>(&with).expect("still JSON"), expected);
    let again = Conflist::parse(&with).expect("still a list");
    assert_eq!(again.with(&ours), with);
    assert_eq!(again.without("ursa-cni").as_deref(), Some(text));
});
