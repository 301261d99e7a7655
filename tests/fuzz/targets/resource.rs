//! What an operator applies, and what arrives in the body of a request.
#![no_main]

use libfuzzer_sys::fuzz_target;
use ursa_model::Resource;

fuzz_target!(|text: &str| {
    let mut all = Resource::many_from_yaml(text).unwrap_or_default();
    if let Ok(value) = serde_json::from_str(text) {
        all.extend(Resource::from_json(&value));
    }
    for resource in all {
        let _ = (resource.validate(), resource.warnings(), resource.projection());
        let written = resource.to_yaml().expect("what was read can be written");
        let again = Resource::from_yaml(&written).expect("what was written can be read");
        assert_eq!(again.to_json(), resource.to_json(), "a round trip changes it");
    }
});
