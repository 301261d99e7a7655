//! What operators see of a proxy.

use ursa_tests::lab::pair::Pair;

#[test]
fn an_operator_sees_envoys_own_words_and_no_key() {
    let pair = Pair::allowed().unwrap();
    let show = |what: &str| pair.control.ursa(&["inspect", "dataplane", "web", "--type", what]).unwrap();
    let dump = show("config-dump");
    assert!(dump.contains("ListenersConfigDump") && dump.contains("[redacted]"), "{dump}");
    assert!(!dump.contains("PRIVATE KEY") && !dump.contains("LS0tLS1CRUdJTiBQUklWQVRF"), "a key in the dump");
    assert!(show("stats").contains("server.live: 1"));
    assert!(show("clusters").contains("kri_msvc_default"));
}
