//! Redirects stay in place while an agent runs, whoever takes them away; and what is taken away on purpose stays away.

use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use ursa_tests::lab::daemon::Daemon;
use ursa_tests::lab::mesh::{Node, run};
use ursa_tests::lab::net::Host;
use ursa_tests::lab::pair::SOON;
use ursa_tests::lab::runtime::fake::{EarlyPod, FakeRuntime};
use ursa_tests::lab::{Lab, Programs, wait};

/// The promise: from the other program's end until the redirect is back.
const BACK: Duration = Duration::from_secs(1);
/// How long it is looked whether something stays as it is.
const WHILE: Duration = Duration::from_millis(1500);

/// The rules, without what counts packets.
pub(crate) fn rules(netns: &std::path::Path) -> Vec<String> {
    let lines = ursa_init::in_netns(netns, ursa_init::show).unwrap().unwrap();
    lines.into_iter().map(|line| line.split(" packets ").next().unwrap_or_default().to_owned()).collect()
}

/// A command in a namespace, which must succeed.
fn inside(host: &Host, program: &str, args: &[&str]) {
    let mut command = Command::new("nsenter");
    command.arg(format!("--net={}", host.path().display())).arg(program).args(args);
    run(&mut command, "").unwrap();
}

/// Waits until the rules are these, and says how long that took.
fn until_rules(host: &Host, wanted: &[String]) -> Duration {
    let what = format!("the rules of {} to be as they should", host.netns);
    let ((), took) = wait::until(&what, 2 * SOON, || match rules(&host.path()) {
        found if found == wanted => Ok(()),
        found => Err(format!("{} lines instead of {}", found.len(), wanted.len())),
    })
    .unwrap();
    took
}

fn stays_without_rules(host: &Host) {
    // What would bring them back is woken.
    inside(host, "nft", &["add table inet someone; delete table inet someone"]);
    let start = Instant::now();
    while start.elapsed() < WHILE {
        assert_eq!(rules(&host.path()), Vec::<String>::new());
        std::thread::sleep(Duration::from_millis(50)); // nothing tells that nothing happens
    }
}

fn redirect(node: &Node, workload: &str, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
    node.wait_status(workload, what, 2 * SOON, |status| wanted(&status["redirect"])).unwrap()["redirect"]
        .take()
}

fn workload(node: &mut Node, host: &Host, name: &str) -> Vec<String> {
    node.add(name, host).unwrap();
    redirect(node, name, "to be redirected", |redirect| redirect["state"] == "inPlace");
    rules(&host.path())
}

#[test]
fn a_flush_in_any_of_an_agents_namespaces_is_undone_within_a_second() {
    let mut lab = Lab::new(&Programs::discover().unwrap()).unwrap();
    let mut node = Node::unjoined(&mut lab, "node").unwrap();
    let own = node.host.clone();
    let mut hosts = Vec::new();
    for name in ["a", "b", "c"] {
        let host = lab.net.host(name).unwrap();
        let wanted = workload(&mut node, &host, name);
        hosts.push((name, host, wanted));
    }
    // The agent's own namespace, as the machine's would be.
    node.add_with("own", &own, |file| {
        file["ursa"].as_object_mut().unwrap().remove("netns");
        file["ursa"]["redirect"] = json!({});
    })
    .unwrap();
    redirect(&node, "own", "to be redirected", |redirect| redirect["state"] == "inPlace");
    hosts.push(("own", own.clone(), rules(&own.path())));

    let changes: [(&str, &[&str]); 5] = [
        ("nft", &["flush", "ruleset"]),
        ("nft", &["flush", "chain", "inet", "ursa", "output"]),
        ("ip", &["route", "del", "local", "241.0.0.0/8", "dev", "lo", "table", "local"]),
        ("nft", &["delete", "table", "inet", "ursa"]),
        ("nft", &["flush", "ruleset"]),
    ];
    let mut times = Vec::new();
    for (program, args) in changes {
        for (name, host, wanted) in &hosts {
            inside(host, program, args);
            let took = until_rules(host, wanted);
            assert!(took < BACK, "{program} {args:?} in {name}: back after {took:?}");
            times.push(took);
        }
    }
    times.sort();
    println!("{} repairs, from the other program's end: {times:?}", times.len());
    assert_eq!(times.len(), 20);
    for (name, ..) in &hosts {
        let report = redirect(&node, name, "to have five repairs", |redirect| redirect["repairs"] == 5);
        assert_eq!((&report["state"], &report["keptBy"]), (&json!("inPlace"), &Value::Null), "{report}");
        assert_eq!(report["lastRepair"]["by"]["name"], "nft", "{report}");
    }
    let text = node.status_text().unwrap();
    assert!(
        text.contains("redirect: in place, repaired 5 times, last") && text.contains("after nft (pid"),
        "{text}"
    );
    let metrics = node.metrics().unwrap();
    assert!(metrics.contains("redirect_repairs_total{mesh=\"default\",dataplane=\"a\"} 5\n"), "{metrics}");

    // What went while no agent ran is back when one runs again.
    node.agent.kill();
    for (_, host, _) in &hosts {
        inside(host, "nft", &["flush", "ruleset"]);
        assert!(
            !rules(&host.path()).iter().any(|line| line.contains("output")),
            "nobody is there to repair it"
        );
    }
    node.agent.restart().unwrap();
    for (_, host, wanted) in &hosts {
        until_rules(host, wanted);
    }

    // What is removed on purpose stays away: the file, and the redirect in a file.
    node.remove("a").unwrap();
    node.add_with("own", &own, |file| drop(file["ursa"].as_object_mut().unwrap().remove("netns"))).unwrap();
    for host in [&hosts[0].1, &own] {
        until_rules(host, &[]);
        stays_without_rules(host);
    }
    until_rules(&hosts[1].1, &hosts[1].2);
}

#[test]
fn of_agent_and_watch_one_has_the_say() {
    let mut lab = Lab::new(&Programs::discover().unwrap()).unwrap();
    let mut node = Node::unjoined(&mut lab, "node").unwrap();
    let host = lab.net.host("web").unwrap();
    let agents = workload(&mut node, &host, "web");
    let netns = host.path().display().to_string();
    let run_dir = node.run_dir().display().to_string();
    let init = lab.programs.path("ursa-init");

    // A unit that keeps another redirect here, as the host's would.
    let status: PathBuf = lab.dir().join("redirect.json");
    let options =
        ["--netns", &netns, "--proxy-uid", "5999", "--outbound-port", "15101", "--run-dir", &run_dir];
    let mut args: Vec<_> = ["watch", "--status", status.to_str().unwrap()].map(str::to_owned).to_vec();
    args.extend(options.map(str::to_owned));
    let mut watch =
        Daemon::start("ursa-init", &host, init.clone(), args, Vec::new(), lab.log("watch")).unwrap();
    let kept = redirect(&node, "web", "to be kept by watch", |redirect| !redirect["keptBy"].is_null());
    assert!(kept["keptBy"].as_str().unwrap().starts_with("ursa-init"), "{kept}");
    let watched = rules(&host.path());
    assert!(watched.iter().any(|line| line.contains("15101")) && watched != agents, "{watched:?}");
    for _ in 0..5 {
        inside(&host, "nft", &["flush", "ruleset"]);
        assert!(until_rules(&host, &watched) < BACK);
    }
    let start = Instant::now();
    while start.elapsed() < WHILE {
        assert_eq!(rules(&host.path()), watched, "somebody fights");
        std::thread::sleep(Duration::from_millis(50)); // nothing tells that nothing happens
    }
    let report = redirect(&node, "web", "to leave it alone", |redirect| redirect["repairs"] == 0);
    assert_eq!(report["state"], "inPlace", "{report}");
    let of_watch: Value = serde_json::from_slice(&std::fs::read(&status).unwrap()).unwrap();
    assert!(of_watch["state"] == "inPlace" && of_watch["repairs"].as_u64() >= Some(1), "{of_watch}");

    // An agent that starts now doesn't touch it either, nor one whose workload goes.
    node.agent.kill();
    node.agent.restart().unwrap();
    redirect(&node, "web", "to be kept by watch", |redirect| !redirect["keptBy"].is_null());
    assert_eq!(rules(&host.path()), watched);

    // However it ends, the agent takes over.
    watch.kill();
    until_rules(&host, &agents);
    redirect(&node, "web", "to be the agent's again", |redirect| redirect["keptBy"].is_null());

    // A change that waits to be confirmed is nobody's drift; when it is over, the file's word counts again.
    let mut apply = host.command(&init);
    apply.args(["apply", "--confirm", "60s"]).args(options);
    run(&mut apply, "").unwrap();
    redirect(&node, "web", "to wait", |redirect| {
        redirect["keptBy"].as_str().is_some_and(|by| by.contains("waits to be confirmed"))
    });
    assert_eq!(rules(&host.path()), watched);
    run(host.command(&init).args(["confirm", "--netns", &netns, "--run-dir", &run_dir]), "").unwrap();
    until_rules(&host, &agents);
}

#[test]
fn a_hundred_early_pods_are_closed_at_once_whatever_becomes_of_their_sidecars() {
    const PODS: usize = 100;
    let mut lab = Lab::new(&Programs::discover().unwrap()).unwrap();
    let pods: Vec<_> = (0..PODS).map(|i| lab.net.host(&format!("p{i}")).unwrap()).collect();
    let early = |(i, host): (usize, &Host)| EarlyPod {
        id: format!("{i:064}"),
        name: format!("web-{i}"),
        netns: host.path(),
        ip: host.v4.clone(),
    };
    let socket = lab.dir().join("cri.sock");
    let _runtime = FakeRuntime::serve(&socket, pods.iter().enumerate().map(early).collect()).unwrap();
    // An agent that hasn't joined starts no sidecar at all: who waits for one waits for ever.
    let start = Instant::now();
    let mut node = Node::unjoined_with(&mut lab, "node", |config| {
        config["cri"] = json!(socket);
        config["cni"] = json!({"default": "enabled"});
    })
    .unwrap();
    let is_closed = |host: &&Host| rules(&host.path()).iter().any(|line| line.contains("guard_out"));
    wait::until("every pod to be closed", 4 * SOON, || match pods.iter().filter(is_closed).count() {
        PODS => Ok(()),
        closed => Err(format!("{closed} of {PODS}")),
    })
    .unwrap();
    let took = start.elapsed();
    println!("{PODS} early pods were closed {took:?} after the agent's start");
    assert!(took < Duration::from_secs(5), "{took:?}");

    // They are kept so, and in rest that costs next to nothing.
    let wanted = rules(&pods[7].path());
    inside(&pods[7], "nft", &["flush", "ruleset"]);
    let took = until_rules(&pods[7], &wanted);
    assert!(took < BACK, "{took:?}");
    node.agent.check().unwrap();
}
