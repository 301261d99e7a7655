//! What a container runtime hands to the plugin: the first line is `CNI_ARGS`, the rest standard input, annotations of
//! strangers' pods included.
#![no_main]

use libfuzzer_sys::fuzz_target;
use ursa_cni::config::{self, Config};
use ursa_cni::spec::Environment;
use ursa_cni_protocol::Call;
use ursa_model::injection::{decide, membership};
use ursa_model::labels::Labels;

fuzz_target!(|text: &str| {
    let (args, text) = text.split_once('\n').unwrap_or(("", text));
    let environment = Environment::read(|name| match name {
        "CNI_COMMAND" => Some("STATUS".to_owned()),
        "CNI_ARGS" => Some(args.to_owned()),
        _ => None,
    });
    let Ok(environment) = environment else { return };
    let _ = Config::for_departure(text);
    let version = config::version_of(text);
    let config = match Config::parse(text) {
        Ok(config) => config,
        Err(failure) => {
            assert!(failure.to_json(&version).is_object());
            return;
        }
    };
    let (conf, nothing) = (&config.conf, Labels::new());
    let _ = (conf.intent(conf.own_annotations()), config.addresses(), conf.valid_attachments());
    let call = conf.call(&environment);
    let written = serde_json::to_string(&call).expect("the agent is told of every pod");
    assert_eq!(serde_json::from_str::<Call>(&written).expect("and understands it"), call);
    if let Ok(workload) = conf.workload() {
        let (pod, rules) = (conf.pod(&environment, &nothing), conf.rules(Some(&workload)));
        let _ = (decide(&pod, &rules), membership(&pod, &rules));
    }
    // What goes on untouched is what every reader of JSON would find there.
    if let Ok(previous) = config.previous()
        && let Ok(whole) = serde_json::from_str::<serde_json::Value>(text)
    {
        assert_eq!(serde_json::from_str::<serde_json::Value>(previous).ok().as_ref(), whole.get("prevResult"));
    }
});
