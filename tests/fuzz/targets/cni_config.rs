//! What a container runtime writes to the plugin's standard input, annotations of strangers' pods included.
#![no_main]
#![allow(dead_code, reason = "the plugin keeps these modules to itself, of which this takes three")]

#[path = "../../../cni-plugin/src/config.rs"]
mod config;
#[path = "../../../cni-plugin/src/json.rs"]
mod json;
#[path = "../../../cni-plugin/src/spec.rs"]
mod spec;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let version = config::version_of(text);
    match config::Config::parse(text) {
        Ok(config) => {
            let _ = (config.conf.intent(config.conf.own_annotations()), config.previous(), config.addresses());
            let _ = (config.conf.workload(), config.conf.valid_attachments());
        }
        Err(failure) => assert!(failure.to_json(&version).is_object()),
    }
    let _ = config::Config::for_departure(text);
});
