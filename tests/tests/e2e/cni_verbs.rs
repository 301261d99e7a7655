//! What containerd 1.6 and podman never ask: CHECK, STATUS and GC; and every version that Debian's plugins support.

use std::path::Path;

use serde_json::{Value, json};
use ursa_tests::lab::machine::Machine;
use ursa_tests::lab::mesh;
use ursa_tests::lab::pair::SOON;
use ursa_tests::lab::runtime::PodSpec;
use ursa_tests::lab::runtime::driver::{Attachment, Driver};
use ursa_tests::lab::runtime::ground::{Ground, PODS_NETWORK};
use ursa_tests::lab::runtime::network::{PREPARED, VERSION};
use ursa_tests::lab::wait;

use crate::cni_runtimes::assert_nothing_left;

/// The code of an ADD that may succeed later, of STATUS while none would, and ours of CHECK for changed rules.
const TRY_AGAIN: u64 = 11;
const NOT_AVAILABLE: u64 = 50;
const DRIFTED: u64 = 101;

fn nft(machine: &Machine, netns: &str, args: &[&str]) -> String {
    let mut command = machine.command(Path::new("ip"));
    mesh::run(command.args(["netns", "exec", netns, "nft"]).args(args), "").unwrap()
}

fn delete_namespace(machine: &Machine, netns: &str) {
    mesh::run(machine.command(Path::new("ip")).args(["netns", "del", netns]), "").unwrap();
}

#[test]
fn check_sees_one_missing_rule_in_every_version() {
    let mut ground = Ground::start(&["web-shop"], Driver::start).unwrap();
    let spec = PodSpec::meshed("web");
    for version in ["0.3.0", "0.3.1", "0.4.0", VERSION] {
        let (machine, driver) = (&ground.machine, &ground.runtime);
        let mut list = ground.networks.conflist(PODS_NETWORK, 0, Some(ground.networks.ursa()));
        list["cniVersion"] = version.into();
        driver.know(PODS_NETWORK, list);
        let (name, path) = driver.namespace(machine, "web").unwrap();
        let id = format!("web-{}", version.replace('.', "-"));
        let web = Driver::attachment(&spec, &id, Some(path.clone()));
        let results = driver.add(machine, PODS_NETWORK, &web).unwrap();
        let [_, portmap, ursa] = results.as_slice() else { panic!("{results:?}") };
        assert_eq!(ursa, portmap, "{version}: prevResult is handed on as it is");

        // CHECK came with 0.4.0.
        if !version.starts_with("0.3") {
            driver.check(machine, PODS_NETWORK, &web).unwrap();
            // The agent would put it back.
            ground.node.agent.kill();
            let rules = nft(machine, &name, &["--handle", "list", "ruleset"]);
            let (chain, handle) = a_rule(&rules);
            nft(machine, &name, &["delete", "rule", &chain[0], &chain[1], &chain[2], "handle", &handle]);
            let error = driver.check(machine, PODS_NETWORK, &web).unwrap_err();
            assert_eq!((error.plugin.as_str(), error.code), ("ursa-cni", DRIFTED), "{error}");
            ground.node.agent.restart().unwrap();
            let check = || driver.check(machine, PODS_NETWORK, &web).map_err(|error| error.to_string());
            wait::until("the next agent to put it back", SOON, check).unwrap();
        }
        driver.del(machine, PODS_NETWORK, &web).unwrap();
        delete_namespace(machine, &name);
        // Again, as runtimes do: without a namespace and without a result.
        driver.del(machine, PODS_NETWORK, &Attachment { netns: None, ..web }).unwrap();
        assert_nothing_left(&ground);
    }
}

/// Family, table and chain of the last rule of a list, and its handle.
fn a_rule(rules: &str) -> ([String; 3], String) {
    let (mut table, mut found) = ([String::new(), String::new()], None);
    let mut chain = String::new();
    for line in rules.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let handle = line.rsplit_once("# handle ").map(|(_, handle)| handle.trim().to_owned());
        match (words.as_slice(), handle) {
            (["table", family, name, ..], _) => table = [(*family).to_owned(), (*name).to_owned()],
            (["chain", name, ..], _) => chain = (*name).to_owned(),
            (["set" | "map", ..], _) => {}
            (_, Some(handle)) => {
                let [family, name] = table.clone();
                found = Some(([family, name, chain.clone()], handle));
            }
            _ => {}
        }
    }
    found.unwrap_or_else(|| panic!("no rule in {rules}"))
}

/// A pod whose network comes from Debian's plugins, and its entry into a mesh of version 1.1.0, which they don't know.
struct Guest {
    id: String,
    name: String,
    attachment: Attachment,
}

impl Guest {
    fn new(ground: &Ground<Driver>, pod: &str) -> Self {
        let (machine, driver) = (&ground.machine, &ground.runtime);
        let (name, path) = driver.namespace(machine, pod).unwrap();
        let id = format!("{pod}-0");
        let attachment = Driver::attachment(&PodSpec::meshed(pod), &id, Some(path));
        driver.add(machine, PODS_NETWORK, &attachment).unwrap();
        let guest = Self { id, name, attachment };
        driver.know(NEW_NETWORK, guest.list(ground));
        guest
    }

    fn leave(&self, ground: &Ground<Driver>) {
        ground.runtime.del(&ground.machine, PODS_NETWORK, &self.attachment).unwrap();
        delete_namespace(&ground.machine, &self.name);
    }

    fn list(&self, ground: &Ground<Driver>) -> Value {
        let mut result = ground.runtime.recall(PODS_NETWORK, &self.id).unwrap();
        result["cniVersion"] = "1.1.0".into();
        // The specification's, and something that no version has.
        result["interfaces"][0]["mtu"] = 1500.into();
        result["unheard of"] = json!({"kept": [true]});
        let plugins = [json!({"type": PREPARED, "result": result}), ground.networks.ursa()];
        json!({"cniVersion": "1.1.0", "name": NEW_NETWORK, "plugins": plugins})
    }
}

const NEW_NETWORK: &str = "new";

/// What the agent runs.
fn sidecars(ground: &Ground<Driver>) -> Vec<String> {
    let status = ground.node.status().unwrap();
    let all = status["workloads"].as_array().unwrap();
    all.iter().map(|one| one["name"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn status_tells_what_add_would_do_and_gc_collects_what_was_forgotten() {
    let mut ground = Ground::start(&["web-shop", "backend-shop"], Driver::start).unwrap();
    // Only the entry into the mesh is tested here: Debian's plugins are in a list of their own.
    ground.runtime.know(PODS_NETWORK, ground.networks.conflist(PODS_NETWORK, 0, None));
    let guests = ["web", "backend"].map(|pod| {
        let guest = Guest::new(&ground, pod);
        let results = ground.runtime.add(&ground.machine, NEW_NETWORK, &guest.attachment).unwrap();
        assert_eq!(results[0], results[1], "prevResult is handed on as it is");
        ground.runtime.check(&ground.machine, NEW_NETWORK, &guest.attachment).unwrap();
        guest
    });
    let [web, backend] = &guests;
    ground.runtime.status(&ground.machine, NEW_NETWORK).unwrap();
    assert_eq!(sidecars(&ground).len(), 2);

    ground.node.agent.kill();
    let error = ground.runtime.status(&ground.machine, NEW_NETWORK).unwrap_err();
    assert_eq!(error.code, NOT_AVAILABLE, "{error}");
    let late = Guest::new(&ground, "late");
    let error = ground.runtime.add(&ground.machine, NEW_NETWORK, &late.attachment).unwrap_err();
    assert_eq!(error.code, TRY_AGAIN, "as STATUS said: {error}");
    late.leave(&ground);
    ground.node.agent.restart().unwrap();
    let is_well = || ground.runtime.status(&ground.machine, NEW_NETWORK).map_err(|error| error.to_string());
    wait::until("STATUS to be well again", SOON, is_well).unwrap();

    // Nobody remembers backend's attachment, so that nobody will ever call DEL for it.
    ground.runtime.forget(NEW_NETWORK, &backend.id).unwrap();
    ground.runtime.gc(&ground.machine, NEW_NETWORK, &[&web.id]).unwrap();
    wait::until("backend's sidecar to go", SOON, || match sidecars(&ground) {
        left if left == ["web.shop"] => Ok(()),
        left => Err(left.join(", ")),
    })
    .unwrap();
    ground.node.wait_ready("web.shop", SOON).unwrap();

    // What is cached and not valid is let go by DEL.
    ground.runtime.gc(&ground.machine, NEW_NETWORK, &[]).unwrap();
    guests.iter().for_each(|guest| guest.leave(&ground));
    assert_nothing_left(&ground);
}
