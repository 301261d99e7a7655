//! Many pods at once under containerd.

use ursa_tests::lab::runtime::containerd::Containerd;
use ursa_tests::lab::runtime::ground::Ground;
use ursa_tests::lab::runtime::storm::Storm;

use crate::cni_runtimes::assert_nothing_left;

fn storm(storm: Storm) {
    let names = storm.services();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let mut ground = Ground::start(&names, Containerd::start).unwrap();
    let sum = storm.pass(&mut ground).unwrap();
    println!("{sum:?}");
    if storm.kills {
        assert!(sum.agents > 0 && sum.plugins > 0, "nothing was killed: {sum:?}");
    }
    assert_nothing_left(&ground);
}

/// `make soak` has a hundred.
#[test]
fn many_pods_start_at_once() {
    storm(Storm { pods: 24, meshed: 5, lives: 1, kills: false, seed: 0 });
}
