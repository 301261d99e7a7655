//! Names that others choose: KRIs in URLs, server names, SPIFFE ids in certificates, templates, durations.
#![no_main]

use libfuzzer_sys::fuzz_target;
use ursa_model::duration::GoDuration;
use ursa_model::kri::Kri;
use ursa_model::spiffe::SpiffeId;
use ursa_model::template::Template;
use ursa_model::sni;

fuzz_target!(|text: &str| {
    if let Ok(kri) = text.parse::<Kri>() {
        assert_eq!(kri.to_string().parse::<Kri>().expect("a KRI that we wrote"), kri);
        let _ = sni::encode(&kri);
    }
    if let Ok(id) = text.parse::<SpiffeId>() {
        assert_eq!(id.to_string(), text, "one spelling for each id");
    }
    if let Ok(kri) = sni::decode(text) {
        let _ = sni::encode(&kri);
    }
    if let Ok(duration) = text.parse::<GoDuration>() {
        assert_eq!(duration.to_string().parse::<GoDuration>().expect("a duration that we wrote"), duration);
    }
    let _ = Template::parse(text);
});
