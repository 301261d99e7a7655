//! A redirect from a file: whatever compiles can be written as rules.
#![no_main]

use libfuzzer_sys::fuzz_target;
use ursa_init::{Plan, RedirectIntent, nft, yaml};

fuzz_target!(|text: &str| {
    let Ok(intent) = yaml::from_str::<RedirectIntent>(text) else { return };
    if let Ok(plan) = Plan::compile(&intent) {
        assert!(!nft::render(&plan).is_empty());
    }
});
