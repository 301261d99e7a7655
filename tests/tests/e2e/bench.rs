//! The benchmark at a small size: what it counts must hold at any size, and it must not rot.

use ursa_tests::bench::node::Size;
use ursa_tests::bench::{self, Options};
use ursa_tests::lab::Programs;

#[test]
fn a_change_reaches_whom_it_concerns_and_a_reconnect_sends_nothing_again() {
    let options = Options {
        size: Size { services: 24, proxies: 48 },
        nodes: 3,
        changes: 6,
        wide_changes: 3,
        bin_dir: Programs::discover().unwrap().bin_dir,
        bare: None,
        pin: false,
        progress: |_| {},
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let results = runtime.block_on(bench::run(&options)).unwrap();

    // Twenty backends each: a service has forty callers.
    let endpoint = &results.endpoint;
    assert_eq!((endpoint.affected, endpoint.tally.strays), (40, 0));
    assert_eq!(endpoint.tally.pushes, 6 * 40, "one push to each caller, and none to anybody else");
    assert_eq!(endpoint.tally.resources, 6 * 40, "one ClusterLoadAssignment in each push");
    assert_eq!(results.irrelevant.tally.pushes, 0, "what no configuration depends on wakes nobody");
    assert_eq!(results.wide.tally.pushes, 3 * 48, "one push to each proxy of the mesh");
    assert_eq!(results.wide.tally.resources, 3 * 48);
    assert!(results.first.resources > 48 * 60, "clusters, endpoints and listeners of 20 backends each");
    assert_eq!(results.again.resources, 0, "who comes back with what it holds is sent nothing");
}
