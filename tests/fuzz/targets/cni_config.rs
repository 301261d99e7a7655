//! What a container runtime writes to the plugin's standard input, annotations of strangers' pods included.
#![no_main]
#![allow(dead_code, reason = "the plugin is a program, of which this takes two modules")]

#[path = "../../../cni-plugin/src/config.rs"]
mod config;
#[path = "../../../cni-plugin/src/spec.rs"]
mod spec;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let version = config::version_of(text);
    match config::Config::parse(text) {
        Ok(config) => {
            let _ = (config.conf.intent(), config.conf.previous(), config.conf.addresses());
        }
        Err(failure) => assert!(failure.to_json(&version).is_object()),
    }
});
