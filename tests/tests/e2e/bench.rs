//! The benchmark at a small size: what it counts must hold at any size, and it must not rot.

use ursa_init::Plan;
use ursa_init::plan::{Action, Match};
use ursa_tests::bench::node::Size;
use ursa_tests::bench::{self, Options, cni, rules};
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

#[test]
fn the_redirect_takes_few_messages_and_no_program() {
    let scratch = tempfile::tempdir().unwrap();
    let call = rules::apply_call(&Programs::discover().unwrap().bin_dir);
    let counts = rules::count_all(&[call], scratch.path()).unwrap();
    let plan = rules::plan().unwrap();
    assert_eq!((counts.execs, counts.internet), (0, 0), "{counts:?}");
    assert_eq!(counts.messages, messages(&plan), "{counts:?}");
    assert!(counts.syscalls < 400, "{counts:?}");
}

#[test]
fn a_pod_costs_the_plugin_no_program_and_no_call_to_an_api_server() {
    let (plain, meshed) = cni::counted(&Programs::discover().unwrap().bin_dir).unwrap();
    for counts in [plain, meshed] {
        assert_eq!((counts.execs, counts.internet), (0, 0), "{counts:?}");
    }
    assert_eq!(plain.messages, 0, "a pod that isn't meshed costs a decision: {plain:?}");
    // Links and addresses show that the namespace is the pod's.
    assert_eq!(meshed.messages, 2 + messages(&rules::plan().unwrap()), "{meshed:?}");
}

/// The netlink messages of a redirect in a fresh namespace.
fn messages(plan: &Plan) -> u64 {
    // A refusal of everything is two rules in the kernel.
    let rules = plan.chains.iter().flat_map(|chain| &chain.rules);
    let refusals = rules.clone().filter(|rule| {
        rule.action == Action::Reject && !rule.matches.iter().any(|m| matches!(m, Match::Protocol(_)))
    });
    // Its begin and end, the table, the chains, the rules.
    let batch = 3 + plan.chains.len() + rules.clone().count() + refusals.count();
    // Generation and tables before; generation, tables, chains, rules, generation after.
    let reads = 2 + 5;
    // Which backend serves; whether iptables left anything.
    let backends = 1 + 1;
    // lo's state and its change; dumps of our routes (of each family), rules and addresses; what is added.
    let routes = 2 + 4 + plan.local_routes.len() + plan.loopback_addresses.len();
    u64::try_from(backends + batch + reads + routes).unwrap()
}
